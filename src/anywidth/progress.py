"""A progress bar for work in tiles: how many, how fast, how long still. Quiet where nobody looks.

It is drawn on standard error, only in a terminal, only if rich is installed, and only for work that lasts.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

__all__ = ["Advance", "bar"]

_PATIENCE = 0.7  # seconds before anything is drawn: short work leaves the terminal alone


class Advance(Protocol):
    """To be called when a tile of `pairs` pairs is done; `found` if it was there already."""

    def __call__(self, pairs: int, found: bool = False) -> None: ...  # noqa: D102


@contextmanager
def bar(show: bool, tiles: int, description: str = "gram") -> Iterator[Advance]:
    """A context with a progress bar over so many tiles, or with nothing to see."""
    progress = _progress() if show else None
    if progress is None:
        yield lambda pairs, found=False: None
        return
    task = progress.add_task(description, total=tiles, rate="")
    lock, begin = threading.Lock(), time.monotonic()
    computed = 0

    def advance(pairs: int, found: bool = False) -> None:
        nonlocal computed
        with lock:
            computed += 0 if found else pairs
            rate = computed / max(time.monotonic() - begin, 1e-9)
        progress.update(task, advance=1, rate=f"{_short(rate)} pairs/s" if computed else "")

    timer = threading.Timer(_PATIENCE, progress.start)
    timer.daemon = True
    timer.start()
    try:
        yield advance
    finally:
        timer.cancel()
        timer.join()
        if progress.live.is_started:
            progress.stop()


def _progress() -> Any:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Remaining
    except ImportError:
        return None
    console = Console(stderr=True)
    if not console.is_terminal:
        return None
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("tiles"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        Remaining(),
        console=console,
    )


def _short(number: float) -> str:
    for unit in ("", "k", "M"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}G"
