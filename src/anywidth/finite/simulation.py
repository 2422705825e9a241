"""The theory against simulation: how far finite networks are from the infinite one."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from anywidth.examples import Dataset, dataset
from anywidth.finite.empirical import reverse_mode
from anywidth.grams.tiles import gram
from anywidth.kernels import nngp, ntk
from anywidth.network import Network
from anywidth.rates import Rates, rates_at, scaled_by

__all__ = [
    "Check",
    "check",
    "deviation",
    "limit",
    "loglog_slope",
    "simulate",
    "simulations",
]

_BAND = (0.1, 0.9)
_TOGETHER = 2**24  # parameters sampled at a time: seeds are batched at small widths, and not at large ones


@dataclass(frozen=True)
class Check:
    """The deviation of finite networks from the infinite one, as returned by `check`.

    Deviations are relative, ||K_n - K||_F / ||K||_F, over all examples and outputs together.

    Attributes:
        kernel: "ntk" or "nngp".
        widths: the widths, increasing.
        deviations: (widths, seeds).
        slope: of log deviation against log width, by least squares over all widths and seeds; the theory says -1/2
            for the NTK. NaN if there is only one width.
        slope_stderr: its standard error.
        limit: (M, M), the infinite-width kernel of all M outputs of all examples.
        means: (widths, M, M), the average over seeds and i.i.d. copies of the finite-width kernel.
        stderrs: (widths, M, M), the standard errors of `means`.
    """

    kernel: str
    widths: tuple[int, ...]
    deviations: Float[np.ndarray, "widths seeds"]
    slope: float
    slope_stderr: float
    limit: Float[np.ndarray, "M M"]
    means: Float[np.ndarray, "widths M M"]
    stderrs: Float[np.ndarray, "widths M M"]

    @property
    def medians(self) -> Float[np.ndarray, " widths"]:
        """The median deviation over seeds at each width."""
        return np.median(self.deviations, axis=1)

    def __str__(self) -> str:
        scale = np.linalg.norm(self.limit)
        lows, highs = np.quantile(self.deviations, _BAND, axis=1)
        bias = np.linalg.norm(self.means - self.limit, axis=(1, 2)) / scale
        noise = np.linalg.norm(self.stderrs, axis=(1, 2)) / scale
        lines = [
            f"{self.kernel} of finite networks against the infinite one, {self.deviations.shape[1]} seeds a width",
            f"{'width':>7}  {'median':>8}  {'10%':>8}  {'90%':>8}  {'of mean':>8}  {'noise':>8}",
        ]
        for row in zip(self.widths, self.medians, lows, highs, bias, noise, strict=True):
            lines.append(f"{row[0]:>7}  " + "  ".join(f"{value:8.4f}" for value in row[1:]))
        lines.append(f"slope {self.slope:.3f} +- {self.slope_stderr:.3f}")
        return "\n".join(lines)

    __repr__ = __str__

    def plot(self, ax: Any = None) -> Any:
        """Draw deviation against width with its band over seeds and the width^(-1/2) line.

        Args:
            ax: a matplotlib `Axes`; a new figure's if None.

        Returns:
            The `Axes`.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        from anywidth.plots import axes, curve, reference_line

        ax = axes() if ax is None else ax
        curve(ax, self.widths, self.deviations, label=f"{self.kernel}, slope {self.slope:.2f}")
        reference_line(ax, self.widths, self.medians[0])
        return ax


def check(
    net: Network,
    X: Any,
    widths: Sequence[int] = (64, 128, 256, 512, 1024),
    seeds: int = 20,
    kernel: Literal["ntk", "nngp"] = "ntk",
    key: Key[Array, ""] | None = None,
    *,
    draws: int = 1000,
    copies: Sequence[int] | None = None,
    dtype: Any = None,
    lr: Rates = None,
    heads: Callable[[int], int] | None = None,
) -> Check:
    """Hold the theory against simulation: how far finite networks are from the infinite one, by width.

    Args:
        net: the network.
        X: a few examples: an array with a leading example axis, a pytree of such arrays, or a list of examples.
        widths: the widths to simulate.
        seeds: how many deviations to measure at each width, independent of one another.
        kernel: "ntk" compares the empirical NTK of one network per seed. "nngp" compares f(x) f(y) averaged over
            `draws` networks per seed; what is left is the noise of that average, of order draws^(-1/2) at any
            width, so look at the columns `of mean` and `noise` rather than at the slope.
        key: a JAX random key; `jax.random.key(0)` if None.
        draws: see `kernel`.
        copies: output axes that consist of i.i.d. copies (the classes of a readout), for which the theory returns
            one kernel: each copy's kernel is compared to it. None to find them from the shapes.
        dtype: dtype of the parameters; JAX's default float if None.
        lr: learning-rate multipliers of the NTK, as for `ntk`.
        heads: the second width at each width, as a function of n, of a network that has two.

    Returns:
        A `Check`, which prints as a table: width, median, 10% and 90% quantiles of the deviation, the deviation of
        the mean over seeds, and how large that would be by chance alone.

    Raises:
        ValueError: if an argument is out of range, or X is refused as by `gram`.
    """
    if kernel not in ("ntk", "nngp"):
        raise ValueError(f'kernel is "ntk" or "nngp", and it is {kernel!r}')
    if not widths or seeds < 1 or draws < 1:
        raise ValueError(f"check needs a width, a seed and a draw, and got {widths=}, {seeds=}, {draws=}")
    key = jax.random.key(0) if key is None else key
    if net.second_width != (heads is not None):
        raise ValueError(
            "check takes heads, a function of n, if and only if the network has two widths, init(n, heads)"
        )
    data = dataset(X)
    theory, axes = limit(net, X, kernel, copies=copies, lr=lr)
    if heads is not None:
        net = net.along(heads)
        lr = (lambda n, given=lr: given(n, heads(n))) if callable(lr) else lr
    widths = tuple(sorted({int(n) for n in widths}))
    deviations, means, stderrs = [], [], []
    for n in widths:
        keys = jax.random.split(jax.random.fold_in(key, n), seeds)
        found = simulate(net, data, n, keys, kernel, copies=axes, draws=draws, dtype=dtype, lr=lr)
        deviations.append(deviation(found, theory))
        found = found.mean(1)  # over copies, which share all but the readout and so count once
        means.append(found.mean(0))
        stderrs.append(found.std(0, ddof=1) / math.sqrt(seeds) if seeds > 1 else np.full(theory.shape, np.nan))
    slope, slope_stderr = loglog_slope(widths, np.stack(deviations))
    return Check(kernel, widths, np.stack(deviations), slope, slope_stderr, theory, np.stack(means), np.stack(stderrs))


def limit(
    net: Network,
    X: Any,
    kernel: Literal["ntk", "nngp"] = "ntk",
    *,
    copies: Sequence[int] | None = None,
    lr: Rates = None,
) -> tuple[Float[np.ndarray, "M M"], tuple[int, ...]]:
    """The infinite-width kernel of all outputs of all examples as one matrix, and the i.i.d. axes of the output.

    Raises:
        ValueError: if the shape of the kernel is not that of the output with `copies` taken out.
    """
    theory = gram(nngp(net) if kernel == "nngp" else ntk(net) if lr is None else ntk(net, lr=lr), X)
    data = dataset(X)
    # Only shapes are read here, so the width does not matter; it is large and divides well, for heads.
    params = jax.eval_shape(lambda k: net.sample(k, 5040, heads=240 if net.second_width else None), jax.random.key(0))
    index = [position for group in data.groups for position in group.positions]
    found: list[tuple[int, ...]] = []
    shapes: dict[int, int] = {}
    for group in data.groups:
        output = jax.eval_shape(net.apply, params, group.spec).shape
        kernel_shape = np.shape(theory[group.positions[0]][group.positions[0]])
        shape = kernel_shape[: len(kernel_shape) // 2]
        found.append(_copied_axes(output, shape, copies))
        shapes |= {position: math.prod(shape) for position in group.positions}
    if len(set(found)) > 1:
        raise ValueError(f"the axes of i.i.d. copies are not clear from the shapes ({found}): pass copies=")
    rows = [
        [np.asarray(theory[i][j], float).reshape(shapes[i], shapes[j]) for j in sorted(index)] for i in sorted(index)
    ]
    return np.block(rows), found[0]


def simulate(
    net: Network,
    X: Any,
    n: int,
    keys: Key[Array, " seeds"],
    kernel: Literal["ntk", "nngp"] = "ntk",
    *,
    copies: Sequence[int] = (),
    draws: int = 1000,
    dtype: Any = None,
    lr: Rates = None,
) -> Float[np.ndarray, "seeds copies M M"]:
    """The kernels of finite networks of width n over all outputs of all examples, one for each key.

    Args:
        net, X, kernel, draws, dtype, lr: as for `check`; X may be a `Dataset`.
        n: the width.
        keys: one key a seed. A seed's result depends on its own key only, to rounding.
        copies: the output axes of i.i.d. copies. Each copy's kernel is returned.
    """
    found = simulations(net, X, n, keys, kernel, copies=copies, draws=draws, dtype=dtype, lr=lr)
    return np.concatenate(list(found))


def simulations(
    net: Network,
    X: Any,
    n: int,
    keys: Key[Array, " seeds"],
    kernel: Literal["ntk", "nngp"] = "ntk",
    *,
    copies: Sequence[int] = (),
    draws: int = 1000,
    dtype: Any = None,
    lr: Rates = None,
) -> Iterator[Float[np.ndarray, "some copies M M"]]:
    """As `simulate`, a few seeds at a time, in their order: what is done can be kept before the rest is."""
    data = X if isinstance(X, Dataset) else dataset(X)
    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(net.init(n)))
    together = max(1, min(draws if kernel == "nngp" else len(keys), _TOGETHER // max(size, 1)))
    order = np.argsort(
        np.concatenate([_positions(net, data, g, n, copies) for g in range(len(data.groups))]), kind="stable"
    )

    def ntk_of(key: Any) -> Array:
        return _finite_ntk(net, net.sample(key, n, dtype), data, tuple(copies), rates_at(net, lr, n))

    def nngp_of(key: Any) -> Array:
        def product(key: Any) -> Array:
            outputs = _outputs(net, net.sample(key, n, dtype), data, tuple(copies))
            return jnp.einsum("ci,cj->cij", outputs, outputs)

        return jax.lax.map(product, jax.random.split(key, draws), batch_size=together).mean(0)

    one, width = (ntk_of, together) if kernel == "ntk" else (nngp_of, 1)
    params = jax.eval_shape(lambda k: net.sample(k, n, dtype), keys[0])
    # One seed alone is not mapped: a batched product of large matrices is slower than a product.
    program = jax.jit(jax.vmap(one) if width > 1 else lambda some: one(some[0])[None])
    for start in range(0, len(keys), width):
        index = np.minimum(np.arange(start, start + width), len(keys) - 1)  # padded, so it is compiled once
        with reverse_mode(net.apply, params, data.groups[0].spec):
            found = np.asarray(program(keys[index]), float)[: len(keys) - start]
        yield found[:, :, order][:, :, :, order]


def deviation(found: Float[np.ndarray, "seeds copies M M"], theory: Float[np.ndarray, "M M"]) -> np.ndarray:
    """||found - theory||_F / ||theory||_F for each seed, over all copies together."""
    difference = np.linalg.norm((found - theory).reshape(len(found), -1), axis=1)
    return difference / (np.linalg.norm(theory) * math.sqrt(found.shape[1]))


def loglog_slope(widths: Sequence[int], deviations: Float[np.ndarray, "widths seeds"]) -> tuple[float, float]:
    """Slope of log deviation against log width by least squares, and its standard error; NaN if undetermined."""
    x = np.repeat(np.log(widths), deviations.shape[1])
    y = np.log(np.maximum(deviations, np.finfo(float).tiny)).ravel()
    spread = ((x - x.mean()) ** 2).sum()
    if spread == 0:
        return math.nan, math.nan
    slope = ((x - x.mean()) * (y - y.mean())).sum() / spread
    residual = y - y.mean() - slope * (x - x.mean())
    freedom = len(x) - 2
    stderr = math.sqrt((residual**2).sum() / freedom / spread) if freedom > 0 else math.nan
    return float(slope), stderr


def _outputs(net: Network, params: Any, data: Dataset, copies: tuple[int, ...]) -> Float[Array, "copies M"]:
    """All outputs of all examples, group by group."""
    outputs = [
        jax.vmap(lambda x: _arranged(net.apply(params, x), copies))(jax.tree.map(jnp.asarray, group.stack))
        for group in data.groups
    ]
    return jnp.concatenate([jnp.moveaxis(out, 1, 0).reshape(out.shape[1], -1) for out in outputs], axis=1)


def _finite_ntk(
    net: Network, params: Any, data: Dataset, copies: tuple[int, ...], rates: Sequence[Any]
) -> Float[Array, "copies M M"]:
    """The NTK matrix: one gradient in memory at a time, pushed forward through all examples at once."""
    _, push = jax.linearize(lambda p: _outputs(net, p, data, copies), params)

    def rows(x: Any) -> Float[Array, "copies s M"]:
        out, pull = jax.vjp(lambda p: _arranged(net.apply(p, x), copies), params)

        def row(index: Array) -> Float[Array, " M"]:
            e = jnp.zeros(out.size, out.dtype).at[index].set(1).reshape(out.shape)
            return push(scaled_by(rates, *pull(e)))[index // out.shape[1]]

        return jax.lax.map(row, jnp.arange(out.size)).reshape(*out.shape, -1)

    parts = []
    for group in data.groups:
        part = jax.lax.map(rows, jax.tree.map(jnp.asarray, group.stack))
        parts.append(jnp.moveaxis(part, 1, 0).reshape(part.shape[1], -1, part.shape[3]))
    return jnp.concatenate(parts, axis=1)


def _arranged(output: Array, copies: tuple[int, ...]) -> Float[Array, "copies s"]:
    """An output with its i.i.d. copies first and everything else after."""
    output = jnp.moveaxis(output, copies, range(len(copies)))
    return output.reshape(math.prod(output.shape[: len(copies)]), -1)


def _positions(net: Network, data: Dataset, g: int, n: int, copies: Sequence[int]) -> np.ndarray:
    """The example each output of a group belongs to."""
    params = jax.eval_shape(lambda k: net.sample(k, n), jax.random.key(0))
    shape = jax.eval_shape(net.apply, params, data.groups[g].spec).shape
    outputs = math.prod(size for axis, size in enumerate(shape) if axis not in copies)
    return np.repeat(data.groups[g].positions, outputs)


def _copied_axes(output: tuple[int, ...], kernel: tuple[int, ...], copies: Sequence[int] | None) -> tuple[int, ...]:
    """Which axes of an output the kernel leaves out; the last ones if there is a choice."""
    if copies is not None:
        candidates = [tuple(sorted(axis % len(output) for axis in copies))]
    else:
        candidates = list(itertools.combinations(range(len(output)), max(len(output) - len(kernel), 0)))[::-1]
    for axes in candidates:
        if tuple(size for axis, size in enumerate(output) if axis not in axes) == kernel:
            return axes
    raise ValueError(
        f"an output has shape {output} and its kernel is over {kernel}; no choice of axes of i.i.d. copies "
        "reconciles them"
    )
