"""The command line. Needs the extra `anywidth[cli]`.

A command is a function with annotated options in a module of its own here; `application` gathers them. What a command
does beyond reading options and printing is in the package around this one.
"""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

__all__ = ["application", "main"]


def main() -> None:
    """Run the command line; without its extra, say how to install it."""
    try:
        app = application()
    except ImportError as error:
        print(
            f'anywidth: the command line needs {error.name or "more packages"}: pip install "anywidth[cli]"',
            file=sys.stderr,
        )
        raise SystemExit(1) from None
    app()


def application() -> "typer.Typer":
    """The typer application.

    Raises:
        ImportError: if typer or rich is not installed.
    """
    import rich  # noqa: F401
    import typer

    from anywidth.cli.errors import one_line
    from anywidth.cli.figure1 import figure1
    from anywidth.cli.figure3 import figure3
    from anywidth.cli.gram import gram
    from anywidth.cli.info import info
    from anywidth.cli.learn import fit, predict
    from anywidth.cli.table import table

    app = typer.Typer(
        help="Infinite-width kernels of neural networks written as plain JAX: compute, predict with them, "
        "and hold them against simulation.",
        no_args_is_help=True,
        rich_markup_mode=None,  # help as paragraphs, like a manual page
        add_completion=False,
        pretty_exceptions_show_locals=False,
    )

    @app.callback()
    def callback() -> None:
        pass  # makes a single command a command rather than the program itself

    for command in (gram, fit, predict, info, table, figure1, figure3):
        app.command()(one_line(command))
    return app
