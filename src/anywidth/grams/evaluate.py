"""One tile of a Gram matrix: the kernel under two `vmap`s, compiled once per pair of example shapes.

Under the two `vmap`s whatever depends on one example alone is computed once per example, and inner products become
matrix products. A last tile is padded by repeating an example rather than compiled again.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from anywidth import _compat
from anywidth.grams.plan import Piece, Tile, at

__all__ = ["Job", "Program", "assemble", "compiled", "launch", "outputs", "padded", "traffic", "transposed"]


@dataclass(frozen=True)
class Job:
    """Tiles to be computed, in this process or on a cluster.

    Args:
        kernel: a pure function of a pair of examples.
        ranks: the number of axes of an output, of each group.
        tiles: what to compute; None where there is nothing to hand out right now.
        examples: the padded examples of a piece of the rows (0) or columns (1), which are the same of a symmetric
            matrix.
        put: what to do with a tile.
        idle: called when there is nothing to hand out and nothing is being computed.
    """

    kernel: Callable[[Any, Any], Any]
    ranks: Sequence[int]
    tiles: Iterable[Tile | None]
    examples: Callable[[int, Piece], Any]
    put: Callable[[Tile, list[Any]], None]
    idle: Callable[[], None]


class Program(NamedTuple):
    """A compiled tile and the bytes it takes: for its temporaries and arguments, and for one copy of its output."""

    call: Callable[[Any, Any], Any]
    working: int
    output: int


def compiled(
    kernel: Callable[[Any, Any], Any], x: PyTree[jax.ShapeDtypeStruct], y: Any, size: tuple[int, int]
) -> Program:
    """The kernel between size[0] examples like x and size[1] like y (arrays, or their shapes and dtypes).

    The arrays of a `functools.partial(kernel, params)` are passed to the program and not compiled into it.
    """
    bound, arguments = _arguments(kernel, x, y, size)
    program = _compiled(*arguments)
    return program._replace(call=partial(program.call, bound))


class Traffic(NamedTuple):
    """Bytes of the arrays on the way to a tile, as far as its program tells before it is compiled."""

    largest: int  # of loops, of one step
    total: int  # of loops, of all steps


def traffic(
    kernel: Callable[[Any, Any], Any], x: PyTree[jax.ShapeDtypeStruct], y: Any, size: tuple[int, int]
) -> Traffic:
    """What a tile moves through memory."""
    return _traffic_traced(*_arguments(kernel, x, y, size)[1])


def outputs(kernel: Callable[[Any, Any], Any], x: PyTree[jax.ShapeDtypeStruct], y: Any) -> PyTree[Any]:
    """Shapes and dtypes of what the kernel returns for a pair of such examples; it is traced once for them."""
    return _outputs(*_arguments(kernel, x, y, (1, 1))[1])


@lru_cache(maxsize=256)
def _outputs(
    kernel: Callable[..., Any], bound: "_Spec", x: "_Spec", y: "_Spec", size: tuple[int, int], context: Any
) -> Any:
    return jax.eval_shape(lambda args, a, b: kernel(*args, a, b), bound.one(), x.one(), y.one())


_NOT_STORED = {"broadcast_in_dim", "iota"}  # computed where they are used
_MANY = 100


def _traffic(jaxpr: Any) -> Traffic:
    most = total = 0
    for eqn in jaxpr.eqns:
        inner = [_traffic(sub) for sub in _compat.sub_jaxprs(eqn)]
        most = max([most, *(t.largest for t in inner)])
        # how many steps a while loop takes is not known: many, as for a quadrature's
        steps = eqn.params.get("length", _MANY if eqn.primitive.name == "while" else 1)
        total += steps * sum(t.total for t in inner)
        if not inner and eqn.primitive.name not in _NOT_STORED:
            avals = [v.aval for v in eqn.outvars if hasattr(v.aval, "dtype")]
            sizes = [int(np.prod(a.shape)) * a.dtype.itemsize for a in avals]
            most, total = max([most, *sizes]), total + sum(sizes)
    return Traffic(most, total)


def _arguments(kernel: Any, x: Any, y: Any, size: tuple[int, int]) -> tuple[Any, tuple[Any, ...]]:
    function, bound = (kernel.func, kernel.args) if _bound(kernel) else (kernel, ())
    context = (_compat.settings(), _compat.default_device())
    return bound, (function, _Spec(bound), _Spec(x), _Spec(y), size, context)


def _bound(kernel: Any) -> bool:
    return (
        isinstance(kernel, partial)
        and not kernel.keywords
        and all(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(kernel.args))
    )


@lru_cache(maxsize=4)
def _traced(
    kernel: Callable[..., Any], bound: "_Spec", x: "_Spec", y: "_Spec", size: tuple[int, int], context: Any
) -> Any:
    """`context` is only there to tell cached programs apart."""

    def over(args: Any, xs: Any, ys: Any) -> Any:
        return jax.vmap(lambda a: jax.vmap(lambda b: kernel(*args, a, b))(ys))(xs)

    return jax.jit(over).trace(bound.one(), x.stacked(size[0]), y.stacked(size[1]))


@lru_cache(maxsize=256)
def _traffic_traced(*arguments: Any) -> Traffic:
    return _traffic(_traced(*arguments).jaxpr.jaxpr)


@lru_cache(maxsize=256)
def _compiled(*arguments: Any) -> Program:
    lowered = _traced(*arguments).lower()
    outputs = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(lowered.out_info))
    program = lowered.compile()
    analysis = program.memory_analysis()
    if analysis is None:  # not every backend tells
        return Program(program, 6 * outputs, outputs)
    working = analysis.temp_size_in_bytes + 2 * analysis.argument_size_in_bytes
    return Program(program, working, max(outputs, analysis.output_size_in_bytes))


class _Spec:
    """Shapes and dtypes of an example, hashable."""

    def __init__(self, example: PyTree[Any]) -> None:
        leaves, self.treedef = jax.tree.flatten(example)
        self.leaves = tuple((tuple(leaf.shape), np.dtype(leaf.dtype)) for leaf in leaves)

    def one(self) -> PyTree[jax.ShapeDtypeStruct]:
        return jax.tree.unflatten(self.treedef, [jax.ShapeDtypeStruct(s, d) for s, d in self.leaves])

    def stacked(self, size: int) -> PyTree[jax.ShapeDtypeStruct]:
        return jax.tree.unflatten(self.treedef, [jax.ShapeDtypeStruct((size, *s), d) for s, d in self.leaves])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Spec) and (self.treedef, self.leaves) == (other.treedef, other.leaves)

    def __hash__(self) -> int:
        return hash((self.treedef, self.leaves))


def padded(stack: PyTree[np.ndarray], start: int, stop: int, size: int) -> PyTree[np.ndarray]:
    """The examples start..stop, padded to `size` by repeating the last of them (a legitimate input)."""
    if stop - start == size == len(jax.tree.leaves(stack)[0]):
        return stack

    def piece(leaf: np.ndarray) -> np.ndarray:
        part = leaf[start:stop]
        if len(part) < size:
            part = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
        return part

    return jax.tree.map(piece, stack)


def launch(kernel: Callable[[Any, Any], Any], tile: Tile, left: Sequence[Any], right: Sequence[Any]) -> list[Any]:
    """Start the computation of a tile: the results of its blocks, which JAX computes while Python goes on.

    Args:
        kernel: a pure function of a pair of examples.
        tile: what to compute.
        left: the padded examples of every piece of the tile's rows.
        right: likewise of its columns.
    """
    out = []
    for block in tile.blocks():
        x, y = left[block.row], right[block.col]
        if block.swapped:
            x, y = y, x
        out.append(compiled(kernel, _example(x), _example(y), (_length(x), _length(y))).call(x, y))
    return out


def _example(stack: PyTree[Any]) -> PyTree[jax.ShapeDtypeStruct]:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), stack)


def _length(stack: PyTree[Any]) -> int:
    return jax.tree.leaves(stack)[0].shape[0]


def assemble(tile: Tile, ranks: Sequence[int], results: Sequence[Any]) -> list[Any]:
    """The arrays of a tile, of shape tile.shape + S + S', from the results of its blocks.

    NumPy arrays; of a tile that is one result as it is, and will not be transposed, the arrays of JAX.

    Args:
        tile: what was computed.
        ranks: the number of axes of an output, of each group; not looked at if the matrix is not symmetric.
        results: what `launch` returned.
    """
    if len(results) == 1 and not tile.symmetric:
        leaves = jax.tree.leaves(results[0])
        if all(leaf.shape[:2] == tile.shape for leaf in leaves):
            return leaves
    out: list[np.ndarray] = []
    for block, result in zip(tile.blocks(), results, strict=True):
        p, q = tile.rows.pieces[block.row], tile.cols.pieces[block.col]
        for k, leaf in enumerate(jax.tree.leaves(result)):
            values = np.asarray(leaf)
            if block.swapped:
                values = transposed(values, ranks[q.group])
            values = values[: len(p), : len(q)]
            if block.diagonal:  # exactly symmetric, as the mirrored tiles are
                upper = np.triu(np.ones((len(p), len(q)), bool)).reshape(len(p), len(q), *[1] * (values.ndim - 2))
                values = np.where(upper, values, transposed(values, ranks[p.group]))
            if len(results) == 1:
                out.append(values)
                continue
            if k == len(out):
                out.append(np.empty((*tile.shape, *values.shape[2:]), values.dtype))
            out[k][at(p.where, q.where)] = values
            if block.mirrored:
                out[k][at(q.where, p.where)] = transposed(values, ranks[p.group])
    return out


def transposed(block: np.ndarray, rank: int) -> np.ndarray:
    """Exchange examples and outputs: (n, m) + S + S' to (m, n) + S' + S, where S has `rank` axes."""
    axes = range(block.ndim)
    return block.transpose((1, 0, *axes[2 + rank :], *axes[2 : 2 + rank]))
