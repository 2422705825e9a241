"""`anywidth figure1`."""

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anywidth.cli.errors import Interrupted

if TYPE_CHECKING:
    from anywidth.figure1 import Result, Setting

__all__ = ["figure1", "produce"]


def figure1(
    max_width: Annotated[int, typer.Option(min=64, help="Largest width; the others are powers of two from 64.")] = (
        1024
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Seeds at each width.")] = 50,
    out: Annotated[Path, typer.Option(file_okay=False, help="Directory of the picture, table and cells.")] = Path(
        "figure1"
    ),
    cifar10: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Use the first images of CIFAR-10, from its binary version (data_batch_1.bin) in this directory. "
            "Without it, digits that come with scikit-learn are used.",
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(metavar="[float32|float64]", help="Precision.")] = "float32",
) -> None:
    """Draw Figure 1 of Tensor Programs II: deviation of finite-width NTKs from the infinite-width one.

    For an RNN, a transformer and a batchnorm-ReLU MLP: the median over seeds of the relative Frobenius deviation,
    with a band from the 10% to the 90% quantile, against width, and the width^(-1/2) line.

    Finished (network, width, seed) cells are kept in OUT/cells.jsonl and not computed twice: interrupt the
    command and run it again, or run it again with more seeds or a larger width.

    The full figure: anywidth figure1 --max-width 8192 --seeds 100
    """
    if dtype not in ("float32", "float64"):
        raise typer.BadParameter(f"{dtype!r} is neither float32 nor float64", param_hint="--dtype")
    try:
        _figure1(max_width, seeds, out, cifar10, dtype)
    except KeyboardInterrupt:
        raise Interrupted(f"finished cells are kept in {out / 'cells.jsonl'}: run again to go on") from None


def _figure1(max_width: int, seeds: int, out: Path, cifar10: Path | None, dtype: str) -> None:
    # Imported here so that --help and --version need not wait for JAX.
    from anywidth import figure1 as figure
    from anywidth.plots import new_figure

    new_figure()  # whether matplotlib is there, before the work and not after
    images = figure.default_images() if cifar10 is None else figure.cifar10_images(cifar10)
    title = "relative deviation of the NTK: median over seeds (10%-90% quantiles)"
    produce("figure1", figure.settings(images), figure.draw, title, max_width, seeds, out, dtype, figure.PAPER_SLOPES)


def produce(
    name: str,
    curves: "Sequence[Setting]",
    draw: "Callable[[Sequence[Result], Path], None]",
    title: str,
    max_width: int,
    seeds: int,
    out: Path,
    dtype: str,
    slopes: Mapping[str, float] | None = None,
) -> None:
    """Computes the curves of a figure, and writes its table and its picture."""
    from rich.console import Console

    from anywidth import figure1 as figure

    out.mkdir(parents=True, exist_ok=True)
    widths = figure.widths_up_to(max_width)
    console = Console()
    with _progress(console) as bar:
        task = bar.add_task("compiling", total=len(curves) * seeds * sum(map(_cost, widths)))

        def advance(name: str, width: int, count: int) -> None:
            bar.update(task, advance=count * _cost(width), description=f"{name}, width {width}")

        results = figure.run(curves, widths, seeds, out / "cells.jsonl", dtype=dtype, advance=advance)

    rows = list(figure.table(results))
    with (out / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw(results, out / f"{name}.png")
    console.print(_table(results, title, slopes))
    # Not through the console, which would wrap a long path.
    print(f"picture: {(out / f'{name}.png').resolve()}")
    print(f"table:   {(out / f'{name}.csv').resolve()}")


def _cost(width: int) -> float:
    """Of a cell, for the progress bar: compiling and overheads, then work that goes with width squared."""
    return 1 + (width / 512) ** 2


def _progress(console: Any) -> Any:
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description:>24}"), BarColumn(), TaskProgressColumn())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)


def _table(results: "list[Result]", title: str, slopes: Mapping[str, float] | None) -> Any:
    import numpy as np
    from rich.table import Table

    shown = Table(title=title)
    shown.add_column("width", justify="right")
    for result in results:
        shown.add_column(result.setting.label, justify="center")
    for i, n in enumerate(results[0].widths):
        quantiles = [np.quantile(result.deviations[i], (0.5, 0.1, 0.9)) for result in results]
        shown.add_row(str(n), *(f"{m:.3f} ({low:.2f}-{high:.2f})" for m, low, high in quantiles))
    shown.add_section()
    shown.add_row("slope", *("{:.3f} ± {:.3f}".format(*result.slope) for result in results))
    if slopes is not None:
        shown.add_row("the paper's", *(f"{slopes[result.setting.name]:.2f}" for result in results))
    return shown
