"""A progress bar for work in tiles: how many, how fast, how long still. Quiet where nobody looks.

It is drawn on standard error, only in a terminal, only if rich is installed, and only for work that lasts.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Meter", "bar"]

_PATIENCE = 0.7  # seconds before anything is drawn: short work leaves the terminal alone


class Meter:
    """Counts tiles, and shows nothing."""

    def total(self, tiles: int) -> None:
        """Say how many tiles there are, once that is known: what comes before is compilation."""

    def advance(self, pairs: int, found: bool = False) -> None:
        """Count a tile of so many pairs; `found` if it was there already."""


class _Bar(Meter):
    def __init__(self, progress: Any) -> None:
        self._progress = progress
        self._task = progress.add_task("compiling", total=None, rate="")
        self._lock = threading.Lock()
        self._begin, self._computed = time.monotonic(), 0

    def total(self, tiles: int) -> None:
        self._begin = time.monotonic()
        self._progress.reset(self._task, total=tiles, description="gram")

    def advance(self, pairs: int, found: bool = False) -> None:
        with self._lock:
            self._computed += 0 if found else pairs
            rate = self._computed / max(time.monotonic() - self._begin, 1e-9)
        self._progress.update(self._task, advance=1, rate=f"{_short(rate)} pairs/s" if self._computed else "")


@contextmanager
def bar(show: bool) -> Iterator[Meter]:
    """A context with a progress bar, or with nothing to see."""
    progress = _progress() if show else None
    if progress is None:
        yield Meter()
        return
    timer = threading.Timer(_PATIENCE, progress.start)
    timer.daemon = True
    timer.start()
    try:
        yield _Bar(progress)
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
