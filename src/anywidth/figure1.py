"""Figure 1 of *Tensor Programs II*: finite networks approach their infinite-width NTK like width^(-1/2).

Three networks of the zoo, the numbers of the paper's settings, and a file of finished cells so that a long run can be
interrupted. Like the command line it serves, this module may import the zoo; the engine may not.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Float

from anywidth.finite.simulation import deviation, limit, loglog_slope, simulations
from anywidth.network import Network
from anywidth.zoo import batchnorm_mlp, rnn, transformer

__all__ = ["PAPER_SLOPES", "Result", "Setting", "cifar10_images", "default_images", "run", "settings", "widths_up_to"]

PAPER_SLOPES = {"rnn": -0.49, "transformer": -0.51, "batchnorm": -0.43}

_IMAGES = 12  # how many images are used: two batches, of 7 and of 5
_RECORD = 1 + 3 * 1024  # a record of the binary version of CIFAR-10: a label, then three planes of 32 x 32 pixels
_FORMAT = 1  # of a cell: changes when the same settings would give other numbers


@dataclass(frozen=True)
class Setting:
    """A curve of the figure: a network and the examples whose kernel is simulated."""

    name: str
    label: str
    net: Network
    examples: tuple[Float[np.ndarray, "..."], ...]
    kernel: Literal["ntk", "nngp"] = "ntk"  # the limit of the simulated NTK, in which `lr` says what is trained
    lr: Any = None


@dataclass(frozen=True)
class Result:
    """A finished curve: for each width the deviations of its seeds."""

    setting: Setting
    widths: tuple[int, ...]
    deviations: Float[np.ndarray, "widths seeds"]
    theory: Float[np.ndarray, "M M"]

    @property
    def slope(self) -> tuple[float, float]:
        """Fitted log-log slope and its standard error."""
        return loglog_slope(self.widths, self.deviations)


def widths_up_to(largest: int) -> tuple[int, ...]:
    """Powers of two from 64, and `largest` itself.

    Raises:
        ValueError: if `largest` is less than 64.
    """
    if largest < 64:
        raise ValueError(f"the largest width must be at least 64, and it is {largest}")
    return tuple(sorted({*(2**k for k in range(6, largest.bit_length())), largest}))


def settings(images: Float[np.ndarray, "12 pixels 3"]) -> tuple[Setting, ...]:
    """The figure's three networks on the first pixels of some images.

    Two sequences of 5 tokens in R^3 are the first 5 pixels of two images; two batches in R^13 are the first 13
    numbers of 7 images, and of 5 others. The batches' kernel is that of all 12 outputs together.
    """
    images = (images - images.mean()) / images.std()
    sequences = tuple(images[:2, :5])
    rows = images.reshape(_IMAGES, -1)[:, :13]
    return (
        Setting("rnn", "RNN, average pooling", rnn(3, varw=1.0, varu=2.0, varb=0.2, varv=1.0), sequences),
        Setting("transformer", "transformer", transformer(3, depth=1), sequences),
        Setting("batchnorm", "batchnorm-ReLU MLP", batchnorm_mlp(13, depth=1), (rows[:7], rows[7:])),
    )


def default_images() -> Float[np.ndarray, "12 5 3"]:
    """The first numbers of handwritten digits, which come with scikit-learn, in place of CIFAR-10's.

    Raises:
        ImportError: if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('the default input needs scikit-learn: pip install "anywidth[cli]"') from error
    # From the third row on: the margin of a digit is blank.
    return load_digits().data[:_IMAGES, 16:31].reshape(_IMAGES, 5, 3)


def cifar10_images(directory: Path) -> Float[np.ndarray, "12 1024 3"]:
    """The first images of CIFAR-10, from its binary version (`cifar-10-batches-bin`).

    Args:
        directory: where `data_batch_1.bin` is, or the directory above.

    Raises:
        FileNotFoundError: if the file is not there.
        ValueError: if it is not a file of the binary version.
    """
    places = [directory / "data_batch_1.bin", directory / "cifar-10-batches-bin" / "data_batch_1.bin"]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"{places[0]} is not there. --cifar10 takes the directory of the binary version of CIFAR-10 "
            "(cifar-10-binary.tar.gz, unpacked), not of the Python or Matlab version."
        )
    with path.open("rb") as file:
        records = np.frombuffer(file.read(_IMAGES * _RECORD), np.uint8)
    if len(records) < _IMAGES * _RECORD:
        raise ValueError(
            f"{path} is too short: {len(records)} bytes, and the first {_IMAGES} images take {_IMAGES * _RECORD}"
        )
    records = records.reshape(_IMAGES, _RECORD)
    if records[:, 0].max() > 9:
        raise ValueError(f"{path} is not of the binary version of CIFAR-10: a label is {records[:, 0].max()}")
    return records[:, 1:].reshape(_IMAGES, 3, 1024).transpose(0, 2, 1) / 255.0


def run(
    curves: Sequence[Setting],
    widths: Sequence[int],
    seeds: int,
    cells: Path,
    *,
    dtype: str = "float32",
    advance: Callable[[str, int, int], None] = lambda name, width, count: None,
) -> list[Result]:
    """Compute the curves, skipping the cells that are already in a file and adding the others to it.

    Args:
        curves: the settings.
        widths: the widths.
        seeds: how many seeds at each width: 0, 1, ..., seeds - 1. A seed's number does not depend on the others.
        cells: the file, one JSON object a line. It may hold cells of other settings, which are left alone.
        dtype: "float32" or "float64".
        advance: called with (name, width, number of cells) when cells are finished, those found in the file included.
    """
    results = []
    with jax.enable_x64(dtype == "float64"):
        for setting in curves:
            examples = [np.asarray(example, dtype) for example in setting.examples]
            theory, copies = limit(setting.net, examples, setting.kernel)
            mark = _fingerprint(setting, examples, theory, dtype)
            done = dict(_read(cells, mark))
            for n in widths:
                missing = [seed for seed in range(seeds) if (n, seed) not in done]
                advance(setting.name, n, seeds - len(missing))
                if not missing:
                    continue
                keys = jax.vmap(lambda seed, n=n: jax.random.fold_in(jax.random.key(n), seed))(np.asarray(missing))
                at = 0
                for found in simulations(setting.net, examples, n, keys, copies=copies, dtype=dtype, lr=setting.lr):
                    values = deviation(found, theory)
                    fresh = {(n, seed): float(v) for seed, v in zip(missing[at:], values, strict=False)}
                    _append(cells, mark, setting.name, fresh)
                    done |= fresh
                    at += len(values)
                    advance(setting.name, n, len(values))
            table = np.array([[done[n, seed] for seed in range(seeds)] for n in widths])
            results.append(Result(setting, tuple(widths), table, theory))
    return results


def table(results: Sequence[Result]) -> Iterator[dict[str, Any]]:
    """The numbers of the figure, a row for each curve and width."""
    for result in results:
        slope, stderr = result.slope
        for n, deviations in zip(result.widths, result.deviations, strict=True):
            low, median, high = np.quantile(deviations, (0.1, 0.5, 0.9))
            yield {
                "network": result.setting.name,
                "width": n,
                "seeds": len(deviations),
                "median": f"{median:.6g}",
                "quantile_10": f"{low:.6g}",
                "quantile_90": f"{high:.6g}",
                "slope": f"{slope:.4f}",
                "slope_stderr": f"{stderr:.4f}",
            }


def draw(results: Sequence[Result], path: Path) -> None:
    """The picture, one panel a network.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    from anywidth.plots import curve, new_figure, reference_line

    figure = new_figure(figsize=(4 * len(results), 3.6))
    panels = figure.subplots(1, len(results), squeeze=False, sharey=True)[0]
    for ax, result in zip(panels, results, strict=True):
        curve(ax, result.widths, result.deviations, label=f"median, slope {result.slope[0]:.2f}")
        reference_line(ax, result.widths, float(np.median(result.deviations[0])))
        ax.set_title(result.setting.label)
        ax.label_outer()
    figure.savefig(path, dpi=200)


def _fingerprint(setting: Setting, examples: Sequence[np.ndarray], theory: np.ndarray, dtype: str) -> str:
    """Tells apart cells that cannot be mixed: another input, another dtype, or an engine with another answer."""
    mark = hashlib.sha256(f"{_FORMAT} {setting.name} {dtype}".encode())
    for array in (*examples, np.array([f"{entry:.4g}" for entry in theory.ravel()])):
        mark.update(f"{array.shape}{array.dtype}".encode() + array.tobytes())
    return mark.hexdigest()[:16]


def _read(cells: Path, mark: str) -> Iterator[tuple[tuple[int, int], float]]:
    if not cells.exists():
        return
    for line in cells.read_text(errors="replace").splitlines():
        try:
            cell = json.loads(line)
            if cell["settings"] == mark:
                yield (int(cell["width"]), int(cell["seed"])), float(cell["deviation"])
        except (ValueError, KeyError, TypeError):
            continue  # cut short when the run was killed: it is computed again


def _append(cells: Path, mark: str, name: str, fresh: dict[tuple[int, int], float]) -> None:
    lines = [
        json.dumps({"settings": mark, "network": name, "width": n, "seed": seed, "deviation": value})
        for (n, seed), value in fresh.items()
    ]
    with cells.open("a+b") as file:
        if file.tell() > 0:
            file.seek(-1, 2)
            if file.read(1) != b"\n":  # a line cut short must not swallow the next
                lines.insert(0, "")
        file.write("\n".join([*lines, ""]).encode())
