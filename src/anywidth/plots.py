"""Pictures. Needs the extra `anywidth[plots]`, and imports it only when something is drawn."""

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["axes", "curve", "new_figure", "reference_line"]


def new_figure(**options: Any) -> Any:
    """A matplotlib `Figure` that belongs to no window, so nothing global is touched and no display is needed.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "anywidth[plots]"') from error
    return Figure(layout="constrained", **options)


def axes() -> Any:
    """Axes for deviation against width, in a figure of their own; `ax.figure.savefig(...)` keeps it."""
    return prepared(new_figure(figsize=(6, 4)).add_subplot())


def prepared(ax: Any) -> Any:
    """Scales and labels for deviation against width."""
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlabel("width")
    ax.set_ylabel("relative Frobenius deviation")
    return ax


def curve(ax: Any, widths: Sequence[int], deviations: Sequence[Sequence[float]] | np.ndarray, **style: Any) -> Any:
    """The median deviation over seeds against width, with a band from the 10% to the 90% quantile.

    Args:
        ax: matplotlib `Axes`.
        widths: the widths.
        deviations: for each width, the deviations of its seeds; their numbers may differ.
        style: passed to `ax.plot`.
    """
    prepared(ax)
    medians = [np.median(d) for d in deviations]
    lows, highs = zip(*(np.quantile(d, (0.1, 0.9)) for d in deviations), strict=True)
    (line,) = ax.plot(widths, medians, marker="o", markersize=4, **style)
    ax.fill_between(widths, lows, highs, color=line.get_color(), alpha=0.15, linewidth=0)
    ax.legend(frameon=False)
    return line


def reference_line(ax: Any, widths: Sequence[int], start: float) -> Any:
    """The line width^(-1/2) through (widths[0], start)."""
    w = np.asarray(widths, float)
    (line,) = ax.plot(w, start * np.sqrt(w[0] / w), color="black", linestyle="--", linewidth=1, label="width$^{-1/2}$")
    ax.legend(frameon=False)
    return line
