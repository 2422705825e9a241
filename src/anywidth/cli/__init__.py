"""The command line. Needs the extra `anywidth[cli]`.

A command is a function with annotated options in a module of its own here; `application` gathers them. What a command
does beyond reading options and printing is in the package around this one.
"""

import os
import sys
from typing import TYPE_CHECKING, Annotated

if TYPE_CHECKING:
    import typer

__all__ = ["application", "main"]

INTERRUPTED = 130  # the shell's number for a command that was interrupted from the keyboard

_HELP = """Infinite-width kernels of neural networks written as plain JAX: compute them, predict with them,
and hold them against simulation.

A network is named MODULE:NAME, a Network of yours or a function from the number of features to one, or zoo:NAME. Data
are in .npy, .npz, .csv or .parquet files.

For example, predictions and the uncertainty of them, and a kernel matrix for work of your own:

\b
  anywidth fit --network zoo:mlp --option depth=3 --data train.csv --target price --model model.npz
  anywidth predict --model model.npz --data test.csv --out predictions.csv
  anywidth gram --network mypkg.nets:rnn --data X.npy --store K.zarr
  anywidth info K.zarr

"anywidth COMMAND --help" says more of each."""


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
    try:
        app()
    except SystemExit as exit:
        if exit.code == INTERRUPTED:  # to leave in the ordinary way is to wait until JAX is done with what it is at
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(INTERRUPTED)
        raise


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
        help=_HELP,
        no_args_is_help=True,
        rich_markup_mode=None,  # help as paragraphs, like a manual page
        add_completion=False,
        pretty_exceptions_show_locals=False,
    )

    def version(wanted: bool) -> None:
        if wanted:
            import anywidth

            typer.echo(f"anywidth {anywidth.__version__}")
            raise typer.Exit

    @app.callback()
    def options(
        version: Annotated[
            bool, typer.Option("--version", callback=version, is_eager=True, help="Show the version and exit.")
        ] = False,
    ) -> None:
        pass

    for command in (gram, fit, predict, info, table, figure1, figure3):
        app.command(short_help=(command.__doc__ or "").splitlines()[0])(one_line(command))
    return app
