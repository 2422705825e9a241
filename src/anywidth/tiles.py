"""Kernels over data sets: tiles of pairs, within a memory budget.

A kernel is a pure function of a pair of examples. A tile is that function under two `vmap`s, so that whatever
depends on one example alone is computed once per example and inner products become one matrix product; it is
compiled once per pair of example shapes, and the last tile is padded rather than compiled again.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from anywidth.examples import Dataset, Group, dataset
from anywidth.memory import free_memory, readable

__all__ = ["gram"]

_LARGEST = 512  # examples on a side of a tile: beyond it nothing is gained
_SMALLEST_SPLIT = 64  # a symmetric matrix is cut into tiles at least this wide, to skip half of them


def gram(
    kernel: Callable[[Any, Any], PyTree[jax.Array]],
    X: Any,
    Y: Any = None,
    *,
    memory: int | None = None,
    progress: bool = False,
) -> PyTree[jax.Array]:
    """The matrix of a kernel over all pairs of examples.

    Args:
        kernel: a pure function of a pair of examples, such as `ntk(net)`, `nngp(net)` or `kernels(net)`. For
            examples with outputs of shapes S and S' it returns an array of shape S + S', or a pytree of them. It
            must be symmetric, kernel(y, x) = kernel(x, y) with S and S' exchanged, if Y is None.
        X: N examples: an array with a leading example axis, a pytree of such arrays, or a list of examples
            (arrays or pytrees of arrays), whose shapes may differ.
        Y: M examples, likewise. None for X itself: then only one triangle is computed, and mirrored.
        memory: bytes the computation may use beyond its result; by default a quarter of what is free.
        progress: show a progress bar in a terminal (needs `pip install "anywidth[cli]"`).

    Returns:
        In place of each array returned by the kernel, an array of shape (N, M) + S + S'. If the examples of a list
        have outputs of different shapes, a nested list instead, whose entry [i][j] has shape S_i + S'_j.

    Raises:
        TypeError: if X or Y does not hold arrays of numbers, or is being traced: `gram` runs outside `jit`.
        ValueError: if X or Y is empty or holds NaN or infinite numbers, if their examples do not resemble one
            another, or the kernel does not return shapes S + S'.
        MemoryError: if one pair does not fit in `memory`, or the result in what is free.
    """
    xs = dataset(X)
    ys = xs if Y is None else dataset(Y, "Y", like=xs)
    pairs = [(g, h) for g in range(len(xs.groups)) for h in range(len(ys.groups)) if Y is not None or g <= h]
    shapes = {(g, h): jax.eval_shape(kernel, xs.groups[g].spec, ys.groups[h].spec) for g, h in pairs}
    ranks = _output_ranks(shapes, len(xs.groups)) if Y is None else None
    _fits(shapes, xs, ys)
    budget = free_memory() // 4 if memory is None else memory

    blocks: dict[tuple[int, int], PyTree[np.ndarray]] = {}
    with _bar(progress, len(xs) * len(ys)) as advance:
        for g, h in pairs:
            rank = None if ranks is None or g != h else ranks[g]
            blocks[g, h] = _block(kernel, xs.groups[g], ys.groups[h], rank, budget, advance)
            if ranks is not None and g != h:
                blocks[h, g] = jax.tree.map(lambda k, r=ranks[g]: _transpose(k, r), blocks[g, h])
                advance(len(xs.groups[g]) * len(ys.groups[h]))
    return _assemble(blocks, xs, ys)


def _block(
    kernel: Callable[[Any, Any], Any],
    rows: Group,
    cols: Group,
    rank: int | None,
    budget: int,
    advance: Callable[[int], None],
) -> PyTree[np.ndarray]:
    """The kernel between two groups; by one triangle if `rank`, the number of axes of an output, is given."""
    symmetric, axes = rank is not None, rank or 0
    tile, program = _program(kernel, rows, cols, symmetric, budget)
    left, right = _cut(rows.stack, tile[0]), _cut(cols.stack, tile[1])
    n, m = len(rows), len(cols)
    shape = jax.eval_shape(kernel, rows.spec, cols.spec)
    out = jax.tree.map(lambda leaf: _empty((n, m, *leaf.shape), leaf.dtype), shape)

    def store(i: int, j: int, result: Any) -> None:
        a, b = i * tile[0], j * tile[1]
        p, q = min(tile[0], n - a), min(tile[1], m - b)

        def put(target: np.ndarray, values: Any) -> None:
            values = np.asarray(values)[:p, :q]
            if symmetric and i == j:  # exactly symmetric, as the mirrored tiles are
                upper = np.triu(np.ones((p, q), bool)).reshape((p, q) + (1,) * (values.ndim - 2))
                values = np.where(upper, values, _transpose(values, axes))
            target[a : a + p, b : b + q] = values
            if symmetric and i != j:
                target[b : b + q, a : a + p] = _transpose(values, axes)

        jax.tree.map(put, out, result)
        advance(p * q * (2 if symmetric and i != j else 1))

    pending: tuple[int, int, Any] | None = None  # the tile before, copied out while this one is computed
    for i, x in enumerate(left):
        for j, y in enumerate(right):
            if symmetric and j < i:
                continue
            result = program(x, y)
            if pending is not None:
                store(*pending)
            pending = (i, j, result)
    if pending is not None:
        store(*pending)
    return out


def _program(
    kernel: Callable[[Any, Any], Any], rows: Group, cols: Group, symmetric: bool, budget: int
) -> tuple[tuple[int, int], Callable[[Any, Any], Any]]:
    """The size of the tiles and the compiled program of one: the largest of ours that the budget allows."""
    tile = _even(len(rows), symmetric), _even(len(cols), symmetric)
    while True:
        program, need = _compiled(kernel, _Spec(rows.spec), _Spec(cols.spec), tile, _context())
        if need <= budget:
            return tile, program
        if tile == (1, 1):
            raise MemoryError(
                f"one pair of examples takes {readable(need)} and the memory budget is {readable(budget)}. "
                "Pass a larger memory= to gram, or compute an output that needs less of the kernel."
            )
        # Memory goes with the area of a tile, or with its side; 0.8 for what goes with neither.
        shrink = max(0.8 * (budget / need) ** 0.5, 1 / max(tile))
        tile = max(1, int(tile[0] * shrink)), max(1, int(tile[1] * shrink))


@lru_cache(maxsize=64)
def _compiled(
    kernel: Callable[[Any, Any], Any], x: "_Spec", y: "_Spec", tile: tuple[int, int], context: Any
) -> tuple[Callable[[Any, Any], Any], int]:
    """A tile's program, compiled, and the bytes it takes. `context` is only there to tell cached programs apart."""
    over = jax.vmap(jax.vmap(kernel, in_axes=(None, 0)), in_axes=(0, None))
    program = jax.jit(over).lower(x.stacked(tile[0]), y.stacked(tile[1])).compile()
    analysis = program.memory_analysis()
    if analysis is None:  # not every backend tells
        outputs = jax.tree.leaves(jax.eval_shape(over, x.stacked(tile[0]), y.stacked(tile[1])))
        return program, 8 * sum(leaf.size * leaf.dtype.itemsize for leaf in outputs)
    # Two outputs are alive at a time: the tile being computed and the one being copied out.
    return program, (
        analysis.temp_size_in_bytes + 2 * analysis.output_size_in_bytes + 2 * analysis.argument_size_in_bytes
    )


class _Spec:
    """Shapes and dtypes of an example, hashable."""

    def __init__(self, spec: PyTree[jax.ShapeDtypeStruct]) -> None:
        leaves, self.treedef = jax.tree.flatten(spec)
        self.leaves = tuple((leaf.shape, leaf.dtype) for leaf in leaves)

    def stacked(self, size: int) -> PyTree[jax.ShapeDtypeStruct]:
        return jax.tree.unflatten(self.treedef, [jax.ShapeDtypeStruct((size, *s), d) for s, d in self.leaves])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Spec) and (self.treedef, self.leaves) == (other.treedef, other.leaves)

    def __hash__(self) -> int:
        return hash((self.treedef, self.leaves))


def _context() -> tuple[str, ...]:
    names = ("jax_enable_x64", "jax_default_matmul_precision", "jax_default_device")
    return tuple(str(getattr(jax.config, name)) for name in names)


def _even(n: int, symmetric: bool) -> int:
    """The side of a tile: n cut evenly, so that little is padded."""
    most = min(_LARGEST, max(_SMALLEST_SPLIT, -(-n // 8))) if symmetric else _LARGEST
    return -(-n // -(-n // most))


def _cut(stack: PyTree[np.ndarray], size: int) -> list[PyTree[jax.Array]]:
    """Pieces of `size` examples, the last one padded by repeating its last example (a legitimate input)."""

    def piece(leaf: np.ndarray, start: int) -> jax.Array:
        part = leaf[start : start + size]
        if len(part) < size:
            part = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
        return jnp.asarray(part)

    n = jax.tree.leaves(stack)[0].shape[0]
    return [jax.tree.map(lambda leaf, s=start: piece(leaf, s), stack) for start in range(0, n, size)]


def _transpose(block: np.ndarray, rank: int) -> np.ndarray:
    """Exchange examples and outputs: (n, m) + S + S' to (m, n) + S' + S, where S has `rank` axes."""
    axes = range(block.ndim)
    return block.transpose((1, 0, *axes[2 + rank :], *axes[2 : 2 + rank]))


def _output_ranks(shapes: dict[tuple[int, int], Any], groups: int) -> list[int]:
    """The number of axes of an output, of each group; refuses what is not of shape S + S'."""
    outputs = []
    for g in range(groups):
        found = {leaf.shape for leaf in jax.tree.leaves(shapes[g, g])}
        for shape in found:
            half = len(shape) // 2
            if shape[:half] != shape[half:]:
                raise ValueError(
                    f"the kernel of an example with itself must have shape S + S, and it has shape {shape}. If it "
                    "is not a symmetric kernel, pass Y explicitly: gram(kernel, X, X)."
                )
        outputs.append({shape[: len(shape) // 2] for shape in found})
    for (g, h), tree in shapes.items():
        for leaf in jax.tree.leaves(tree):
            if leaf.shape not in {s + t for s in outputs[g] for t in outputs[h]}:
                raise ValueError(f"the kernel of two examples must have shape S + S', and it has shape {leaf.shape}")
    ranks = [{len(s) for s in found} for found in outputs]
    if any(len(found) != 1 for found in ranks):
        raise ValueError("the arrays a kernel returns must all be over the same outputs when Y is None")
    return [found.pop() for found in ranks]


def _fits(shapes: dict[tuple[int, int], Any], xs: Dataset, ys: Dataset) -> None:
    size = 0
    for (g, h), tree in shapes.items():
        pairs = len(xs.groups[g]) * len(ys.groups[h])
        size += pairs * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    if size > (free := free_memory()):
        raise MemoryError(
            f"the kernel of {len(xs)} x {len(ys)} examples takes {readable(size)} and {readable(free)} is free. "
            "Use fewer examples at a time, or an output with fewer axes."
        )


def _assemble(blocks: dict[tuple[int, int], PyTree[np.ndarray]], xs: Dataset, ys: Dataset) -> PyTree[Any]:
    treedef = jax.tree.structure(blocks[0, 0])
    columns = [jax.tree.leaves(block) for block in blocks.values()]
    leaves = [dict(zip(blocks, column, strict=True)) for column in zip(*columns, strict=True)]
    return jax.tree.unflatten(treedef, [_place(leaf, xs, ys) for leaf in leaves])


def _place(blocks: dict[tuple[int, int], np.ndarray], xs: Dataset, ys: Dataset) -> Any:
    """Blocks between groups, put back in the order of the data sets."""
    if len(blocks) == 1:
        return jax.device_put(blocks[0, 0], may_alias=True)
    if len({block.shape[2:] for block in blocks.values()}) == 1:
        first = blocks[0, 0]
        out = _empty((len(xs), len(ys), *first.shape[2:]), first.dtype)
        for (g, h), block in blocks.items():
            out[np.ix_(xs.groups[g].positions, ys.groups[h].positions)] = block
        return jax.device_put(out, may_alias=True)
    nested: list[list[Any]] = [[None] * len(ys) for _ in range(len(xs))]
    for (g, h), block in blocks.items():
        for a, i in enumerate(xs.groups[g].positions):
            for b, j in enumerate(ys.groups[h].positions):
                nested[i][j] = jnp.asarray(block[a, b])
    return nested


def _empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array aligned so that JAX can take it over on the CPU without a copy."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


@contextmanager
def _bar(progress: bool, total: int) -> Iterator[Callable[[int], None]]:
    if not progress:
        yield lambda _: None
        return
    try:
        from rich.progress import Progress
    except ImportError as error:
        raise ImportError('progress=True needs rich: pip install "anywidth[cli]"') from error
    with Progress(transient=True) as bar:
        task = bar.add_task("kernel", total=total)
        yield lambda amount: bar.advance(task, amount)
