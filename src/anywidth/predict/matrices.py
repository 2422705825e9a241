"""Gram matrices as matrices of numbers, in memory or read block by block from a store.

A kernel over N and M examples with outputs of shapes S and S' is an array of shape (N, M) + S + S'. For linear
algebra it is a matrix of shape (N |S|, M |S'|) whose rows run over (example, output). Targets (N,) + S + R become
(N |S|, |R|).
"""

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from anywidth import _compat
from anywidth.errors import InputError, StoreError
from anywidth.examples import dataset
from anywidth.kernels import Kernels

__all__ = ["Matrix", "Targets", "diagonal"]

_BLOCK = 64 * 1024**2  # bytes of a block read from a store
_DIAGONAL = 256  # pairs (x, x) at a time


class Matrix:
    """A Gram matrix, flattened.

    Args:
        K: anything with `shape`, `dtype` and slicing: an array, or a store opened lazily (a zarr array, a memory map).
        name: what to call it in errors.
        square: whether it is a kernel of examples with themselves, of shape (N, N) + S + S.
    """

    def __init__(self, K: Any, name: str, *, square: bool = False) -> None:
        if isinstance(K, Kernels):
            raise TypeError(f"{name} holds two kernels: pass {name}.nngp or {name}.ntk")
        if isinstance(K, list) or not hasattr(K, "shape") or not hasattr(K, "dtype"):
            raise TypeError(
                f"{name} must be an array or a store, and it is a {type(K).__name__}. (For examples whose outputs have "
                "different shapes, gram returns a nested list; prediction needs outputs of one shape.)"
            )
        shape = tuple(int(s) for s in K.shape)
        half = len(shape) // 2
        if len(shape) < 2 or len(shape) % 2:
            raise InputError(f"{name} must have shape (N, M) + S + S', and it has shape {shape}")
        self.source, self.name = K, name
        self.examples = shape[0], shape[1]
        self.outputs = shape[2 : 1 + half], shape[1 + half :]
        if square and (shape[0] != shape[1] or self.outputs[0] != self.outputs[1]):
            raise InputError(f"{name} must be a kernel of examples with themselves, (N, N) + S + S, not {shape}")
        self.sizes = math.prod(self.outputs[0]), math.prod(self.outputs[1])
        self.shape = shape[0] * self.sizes[0], shape[1] * self.sizes[1]
        self.dtype = np.dtype(K.dtype)
        if not jnp.issubdtype(self.dtype, jnp.floating):
            raise TypeError(f"{name} must hold real numbers, and its dtype is {self.dtype}")

    @property
    def lazy(self) -> bool:
        """Whether reading it costs more than looking at it: a store, or a file mapped into memory."""
        return isinstance(self.source, np.memmap) or not isinstance(self.source, jax.Array | np.ndarray)

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return math.prod(self.shape) * self.dtype.itemsize

    def dense(self) -> Float[Array, "rows columns"]:
        """All of it, on JAX's device; refused if a number is not finite."""
        if _compat.is_tracer(self.source):
            return self._flat(jnp.asarray(self.source), jnp)
        values = self._read(...) if self.lazy else self.source
        return self._checked(self._flat(jnp.asarray(values), jnp), jnp)

    def block(self, rows: slice, columns: slice) -> np.ndarray:
        """Part of it in host memory, for examples `rows` and `columns`."""
        return self._checked(self._flat(np.asarray(self._read((rows, columns))), np), np)

    def _read(self, where: Any) -> Any:
        try:
            return self.source[where]
        except Exception as error:  # zarr has many for a chunk that does not check out
            if not type(self.source).__module__.startswith("zarr"):
                raise
            raise StoreError(
                f"{self.name} cannot be read from its store ({error}). If a tile is damaged, the call of gram that "
                "wrote it finds it by its checksum and computes it again; anywidth info --check says how many are."
            ) from error

    def blocks(self, side: int) -> list[slice]:
        """The examples along a side, in pieces that hold whole chunks of a store."""
        n = self.examples[side]
        chunks = getattr(self.source, "shards", None) or getattr(self.source, "chunks", None)
        unit = int(chunks[side]) if chunks else 1
        most = int((_BLOCK / (self.sizes[0] * self.sizes[1] * 8)) ** 0.5)
        step = unit * max(1, most // unit)
        return [slice(start, min(start + step, n)) for start in range(0, n, step)]

    def span(self, examples: slice, side: int) -> slice:
        """The rows, or columns, of some examples."""
        return slice(examples.start * self.sizes[side], examples.stop * self.sizes[side])

    def streamed(self, vectors: np.ndarray) -> np.ndarray:
        """The product with (columns, r), in float64, one block in memory at a time."""
        out = np.zeros((self.shape[0], vectors.shape[1]))
        for rows in self.blocks(0):
            for columns in self.blocks(1):
                out[self.span(rows, 0)] += self.block(rows, columns).astype(np.float64) @ vectors[self.span(columns, 1)]
        return out

    def streamed_symmetric(self, vectors: np.ndarray) -> np.ndarray:
        """The same of a symmetric matrix, of which only the blocks of one triangle are read."""
        out = np.zeros((self.shape[0], vectors.shape[1]))
        pieces = self.blocks(0)
        for i, rows in enumerate(pieces):
            a = self.span(rows, 0)
            for columns in pieces[: i + 1]:
                b = self.span(columns, 1)
                block = self.block(rows, columns).astype(np.float64)
                out[a] += block @ vectors[b]
                if a != b:
                    out[b] += block.T @ vectors[a]
        return out

    def row_blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Rows of some examples at a time, whole, with their place in the flattened matrix."""
        step = max(1, _BLOCK // max(1, self.shape[1] * self.sizes[0] * 8))
        for start in range(0, self.examples[0], step):
            rows = slice(start, min(start + step, self.examples[0]))
            yield self.span(rows, 0), self.block(rows, slice(None))

    def _flat(self, values: Any, np_: Any) -> Any:
        n, m = values.shape[:2]
        if not self.outputs[0] and not self.outputs[1]:
            return values
        rank = len(self.outputs[0])
        order = (0, *range(2, 2 + rank), 1, *range(2 + rank, values.ndim))
        return np_.transpose(values, order).reshape(n * self.sizes[0], m * self.sizes[1])

    def _checked(self, values: Any, np_: Any) -> Any:
        if not _compat.is_tracer(values) and not np_.isfinite(values).all():
            raise InputError(f"{self.name} has entries that are NaN or infinite (a store that is not finished?)")
        return values


class Targets:
    """Targets (N,) + S + R for a square Gram matrix, as (N |S|, |R|)."""

    def __init__(self, y: Any, K: Matrix) -> None:
        y = y if hasattr(y, "shape") else np.asarray(y)
        n, outputs = K.examples[0], K.outputs[0]
        lead = (n, *outputs)
        if tuple(y.shape[: len(lead)]) != lead:
            wanted = f"({', '.join(map(str, lead))}, ...)"
            raise InputError(f"y must have shape {wanted} to go with {K.name}, and it has shape {tuple(y.shape)}")
        if not _compat.is_tracer(y) and not np.isfinite(np.asarray(y)).all():
            raise InputError("y has entries that are NaN or infinite")
        self.columns = tuple(y.shape[len(lead) :])
        self.flat = y.reshape(K.shape[0], math.prod(self.columns))


def noise_diagonal(noise: Any, K: Matrix) -> Any:
    """The noise variance of every row of K: of shape () or (N |S|,)."""
    shape = np.shape(noise)
    if shape not in ((), (K.examples[0],)):
        raise InputError(
            f"noise is one variance, or one for each of the {K.examples[0]} examples; not of shape {shape}"
        )
    if not _compat.is_tracer(noise) and not (np.isfinite(noise).all() and (np.asarray(noise) >= 0).all()):
        raise InputError(f"noise is a variance, finite and not negative, and it is {noise}")
    return noise if shape == () else jnp.repeat(jnp.asarray(noise), K.sizes[0])


def check_cross(cross: Any, K: Matrix) -> Matrix:
    """A kernel of new examples (rows) with those of K (columns)."""
    found = Matrix(cross, "cross")
    if found.examples[1] != K.examples[0] or found.outputs[1] != K.outputs[0]:
        raise InputError(
            f"cross must be the kernel of new examples with the {K.examples[0]} training examples, gram(kernel, new, "
            f"X), and it has shape {tuple(found.source.shape)}"
        )
    return found


def diagonal(kernel: Callable[[Any, Any], PyTree[Array]], X: Any) -> PyTree[Float[Array, "N *outputs"]]:
    """The kernel of each example with itself: its prior variance.

    Args:
        kernel: as for `gram`.
        X: N examples, as for `gram`, whose outputs have one shape S.

    Returns:
        In place of each array of shape S + S that the kernel returns, an array of shape (N,) + S: its diagonal.

    Raises:
        TypeError, ValueError: X is not a data set (see `gram`), or outputs have different shapes.
    """
    found: list[Any] = [None] * len(xs := dataset(X))
    for group in xs.groups:
        program = _diagonals(kernel)
        for start in range(0, len(group), _DIAGONAL):
            size = min(_DIAGONAL, len(group) - start)
            # the last piece starts early rather than being padded: a piece is compiled once
            first = max(0, min(start, len(group) - _DIAGONAL))
            values = program(jax.tree.map(lambda leaf, a=first: jnp.asarray(leaf[a : a + _DIAGONAL]), group.stack))
            for i in range(start, start + size):
                found[group.positions[i]] = jax.tree.map(lambda leaf, j=i - first: np.asarray(leaf)[j], values)
    leaves = [[leaf.shape for leaf in jax.tree.leaves(one)] for one in found]
    if any(shapes != leaves[0] for shapes in leaves):
        raise InputError("the outputs of the examples of X have different shapes")
    return jax.tree.map(lambda *each: jnp.asarray(np.stack(each)), *found)


@lru_cache(maxsize=64)
def _diagonals(kernel: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
    def of_one(x: Any) -> Any:
        def own(k: Array) -> Array:
            half = math.prod(k.shape[: k.ndim // 2])
            return jnp.diagonal(k.reshape(half, half)).reshape(k.shape[: k.ndim // 2])

        return jax.tree.map(own, kernel(x, x))

    return jax.jit(jax.vmap(of_one))
