"""Figure 3 of *Tensor Programs I*: the Gaussian processes that four architectures become, and how fast.

The kernel of the states of a finite network, h.h'/n at every pair of tokens, is the part of its NTK that belongs to the
readout v of `v h / sqrt(n)`: the NTK of the network in which v alone is trained. Its limit is the NNGP kernel.

`data/sentences.npz` has the words of "The brown fox jumps over the dog" and "The quick brown fox jumps over the lazy
dog" as GloVe vectors: (16, 300), those of the second sentence after those of the first. They are from the files of
J. Pennington, R. Socher, C. D. Manning, *GloVe: Global Vectors for Word Representation* (2014),
https://nlp.stanford.edu/projects/glove (Public Domain Dedication and License 1.0).
"""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from anywidth.figure1 import Result, Setting
from anywidth.network import Network
from anywidth.zoo import batchnorm_mlp, gru, rnn, transformer

__all__ = ["WORDS", "correlations", "digits", "draw", "sentences", "settings"]

WORDS = (
    ["The", "brown", "fox", "jumps", "over", "the", "dog"],
    ["The", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"],
)


def sentences() -> tuple[Float[np.ndarray, "7 300"], Float[np.ndarray, "9 300"]]:
    """The word vectors of the two sentences."""
    with files("anywidth").joinpath("data/sentences.npz").open("rb") as file, np.load(file) as stored:
        vectors = stored["vectors"]
    first = len(WORDS[0])
    return vectors[:first], vectors[first:]


def digits() -> Float[np.ndarray, "64 64"]:
    """A batch of 64 images of digits, as rows, centred and scaled.

    Raises:
        ImportError: if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('figure3 needs scikit-learn: pip install "anywidth[cli]"') from error
    images = load_digits().data[:64]
    return (images - images.mean()) / images.std()


def settings() -> tuple[Setting, ...]:
    """The figure's four networks with the examples they are read at. All variances are one."""
    x = sentences()
    d = x[0].shape[1]

    def sigmoid(t: Any) -> Any:
        return (1 + jax.lax.erf(t)) / 2

    return (
        _setting("rnn", "RNN", rnn(d, pool="none"), x),
        _setting("gru", "GRU", gru(d, jax.lax.erf, gate=sigmoid, pool="none", varb=1.0), x),
        _setting("transformer", "causal transformer", transformer(d, 1, pool="none", causal=True), x),
        _setting("batchnorm", "batchnorm-ReLU MLP", batchnorm_mlp(64, depth=1), (digits(),)),
    )


def _setting(name: str, label: str, net: Network, examples: tuple[np.ndarray, ...]) -> Setting:
    frozen = {parameter: 0.0 for parameter in net.init(64) if parameter != "v"}
    return Setting(name, label, net, examples, "nngp", frozen)


def correlations(kernel: Float[np.ndarray, "M M"]) -> Float[np.ndarray, "M M"]:
    """The correlation matrix of a covariance matrix."""
    scale = np.sqrt(np.diag(kernel))
    return kernel / np.outer(scale, scale)


def draw(results: Sequence[Result], path: Path) -> None:
    """The picture: the correlations, and below them the deviation of finite networks.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    from anywidth.plots import curve, new_figure, reference_line

    figure = new_figure(figsize=(3.4 * len(results), 7))
    grid = figure.add_gridspec(2, len(results))
    image = None
    panels = []
    for i, result in enumerate(results):
        ax = figure.add_subplot(grid[0, i])
        panels.append(ax)
        image = ax.imshow(correlations(result.theory), vmin=0, vmax=1, cmap="viridis")
        ax.set_title(result.setting.label)
        words = [word for sentence in WORDS for word in sentence]
        if len(result.theory) == len(words):
            ax.set_xticks(range(len(words)), words, rotation=90, fontsize=6)
            ax.set_yticks(range(len(words)), words, fontsize=6)
    figure.colorbar(image, ax=panels, shrink=0.7, label="correlation")
    ax = figure.add_subplot(grid[1, :])
    for result in results:
        curve(ax, result.widths, result.deviations, label=f"{result.setting.label}, slope {result.slope[0]:.2f}")
    reference_line(ax, results[0].widths, float(np.median([np.median(r.deviations[0]) for r in results])))
    figure.savefig(path, dpi=200)
