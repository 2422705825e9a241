"""What went wrong, in one line."""

import functools
from collections.abc import Callable
from typing import Any

import typer

__all__ = ["Interrupted", "one_line"]


class Interrupted(Exception):
    """A command was interrupted from the keyboard, and has something to say about it."""


def one_line(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with what can go wrong through no fault of this package said in a line: no traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (ImportError, OSError, ValueError, MemoryError, NotImplementedError) as error:
            typer.echo(f"anywidth: {error}", err=True)
            raise typer.Exit(1) from None
        except Interrupted as error:
            typer.echo(f"\ninterrupted; {error}", err=True)
            raise typer.Exit(130) from None

    return run
