"""What went wrong, in one line."""

import functools
import os
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from anywidth.cli import INTERRUPTED

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
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            if (where := _in_the_network(error)) is None:
                raise
            typer.echo(f"anywidth: the network fails: {type(error).__name__}: {error}\n  at {where}", err=True)
            raise typer.Exit(1) from None

    return run


def _in_the_network(error: BaseException) -> str | None:
    """The innermost line of the traceback in the code of a network: in the zoo, or outside of all packages."""
    package = str(Path(__file__).parents[1])
    installed = tuple(os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib"))
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = os.path.realpath(frame.filename)
        theirs = not file.startswith((package, *installed)) and os.path.exists(file)
        if theirs or file.startswith(os.path.join(package, "zoo", "")):
            return f"{frame.filename}:{frame.lineno} ({frame.name})"
    return None
