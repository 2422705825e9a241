"""`anywidth figure3`."""

from pathlib import Path
from typing import Annotated

import typer

from anywidth.cli.errors import Interrupted
from anywidth.cli.figure1 import produce

__all__ = ["figure3"]


def figure3(
    max_width: Annotated[int, typer.Option(min=64, help="Largest width; the others are powers of two from 64.")] = (
        1024
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Seeds at each width.")] = 20,
    out: Annotated[Path, typer.Option(file_okay=False, help="Directory of the picture, table and cells.")] = Path(
        "figure3"
    ),
    dtype: Annotated[str, typer.Option(metavar="[float32|float64]", help="Precision.")] = "float32",
) -> None:
    """Draw Figure 3 of Tensor Programs I: the Gaussian processes of four architectures, and how fast they are reached.

    Correlations of the states of an RNN, a GRU and a causal transformer at every token of two sentences, and of a
    batchnorm-ReLU MLP on 64 images of digits; below, the relative Frobenius deviation of finite networks from them
    against width, median over seeds, with a band from the 10% to the 90% quantile, and the width^(-1/2) line.

    Finished (network, width, seed) cells are kept in OUT/cells.jsonl and not computed twice: interrupt the
    command and run it again, or run it again with more seeds or a larger width.

    The full figure: anywidth figure3 --max-width 8192 --seeds 100
    """
    if dtype not in ("float32", "float64"):
        raise typer.BadParameter(f"{dtype!r} is neither float32 nor float64", param_hint="--dtype")
    # Imported here so that --help and --version need not wait for JAX.
    from anywidth import figure3 as figure
    from anywidth.plots import new_figure

    new_figure()  # whether matplotlib is there, before the work and not after
    title = "relative deviation of the NNGP: median over seeds (10%-90% quantiles)"
    try:
        produce("figure3", figure.settings(), figure.draw, title, max_width, seeds, out, dtype)
    except KeyboardInterrupt:
        raise Interrupted(f"finished cells are kept in {out / 'cells.jsonl'}: run again to go on") from None
