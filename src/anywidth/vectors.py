"""A gated loop at one step as vectors over `1`, its carries and its atoms, at every sample point (`split.py`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from anywidth import paths
from anywidth.cells import size, timed
from anywidth.kets import Carry, Contract, Node, Sum, View
from anywidth.paths import Sampled
from anywidth.split import Part, Split
from anywidth.views import Index

Array = Any


@dataclass(eq=False)
class Given(Sampled):
    """The body at one step as vectors, (finite axes..., columns * M) over (1, carries, atoms)."""

    split: Split = None  # type: ignore[assignment]
    M: int = 0
    vectors: dict[Node, Array] = field(default_factory=dict)

    def vector(self, x: Node) -> Array:
        """A node that is affine in carries and atoms."""
        if x not in self.vectors:
            self.vectors[x] = self._vector(x)
        return self.vectors[x]

    def _vector(self, x: Node) -> Array:
        own, rank = self.split, x.rank - 1
        if own.scalar(x):
            return self.flat(self._column(self(x)[..., None, :], 0))
        if isinstance(x, Carry):
            start = 1 + sum(map(size, own.vectors[: own.vectors.index(x)]))
            return self.flat(self.units(x.shape[1:], start))
        if isinstance(x, View) and not x.gaussian:
            child = own.below(x)
            if not timed(self.loop, x.operand) or x.view.entries[0] != 0:
                return self.vector(child)
            entries = [e - 1 if isinstance(e, int) else split_index(self, e) for e in x.view.entries[1:]]
            return paths._read_samples(self.vector(child), entries, rank)
        if isinstance(x, Sum) and not x.gaussian:
            return sum(
                self.vector(t) if c is None else paths._coefficient(self.now(c)) * self.vector(t) for c, t in x.terms
            )
        if isinstance(x, Contract) and not x.gaussian:
            coef = None if x.coef is None else self.now(x.coef)[None]
            full = np.broadcast_shapes(x.operand.shape, np.shape(x.coef) if x.coef is not None else ())
            value = jnp.moveaxis(self.vector(x.operand), -1, 0)
            return jnp.moveaxis(paths.weighted_sum(coef, value, x.contracted, full[len(full) - x.contracted :]), 0, -1)
        return sum(self.part(p, rank) for p in own.parts(x))

    def part(self, p: Part, rank: int, inside: bool = True) -> Array:
        """Scalar * vector, times the atom if it is one of the columns (`inside`)."""
        if p.vector is not None:
            value = self.wide(self.vector(p.vector))
        elif p.atom is not None and inside:
            value = self.units(p.atom.shape, self.split.index(p.atom))
        else:
            value = self._column(jnp.ones((1,) * (rank + 2), self.split.stage.dtype), 0)
        return self.flat(value if p.scalar is None else value * self(p.scalar)[..., None, :])

    def _column(self, value: Array, i: int) -> Array:
        own = jnp.zeros((*value.shape[:-2], self.split.columns, value.shape[-1]), self.split.stage.dtype)
        return own.at[..., i, :].set(value[..., 0, :].astype(own.dtype))

    def units(self, shape: tuple[int, ...], start: int) -> Array:
        """Every entry a column of its own."""
        n = int(np.prod(shape))
        eye = np.eye(n, self.split.columns, start).reshape(*shape, self.split.columns, 1)
        return jnp.asarray(eye, self.split.stage.dtype)

    def flat(self, value: Array) -> Array:
        """(..., columns, M) as (..., columns * M)."""
        value = jnp.broadcast_to(value, (*value.shape[:-1], self.M))
        return value.reshape(*value.shape[:-2], -1)

    def wide(self, value: Array) -> Array:
        """And back."""
        return value.reshape(*value.shape[:-1], self.split.columns, self.M)

    def rows(self, x: Node, p: Part, inside: bool = False) -> Array:
        """A part of an operand, its atom left out: (entries, columns, M)."""
        value = self.wide(self.part(p, x.rank - 1, inside))
        return jnp.broadcast_to(value, (*x.shape[1:], *value.shape[-2:])).reshape(size(x), *value.shape[-2:])


def dot(a: Array, b: Array, axis: int) -> Array:
    """The sum of a * b over an axis of few entries, written out; the others are broadcast.

    As one contraction it would be a small matrix product for every sample point, which is slow.
    """
    terms = [lax.index_in_dim(a, i, axis, False) * lax.index_in_dim(b, i, axis, False) for i in range(a.shape[axis])]
    if not terms:
        shape = np.broadcast_shapes(a.shape, b.shape)
        return jnp.zeros((*shape[:axis], *shape[axis + 1 :]), jnp.result_type(a, b))
    return sum(terms[1:], terms[0])


def split_index(sampled: Sampled, e: Any) -> Any:
    """An index of a view at the step of the samples."""
    return Index(sampled.now(e.array))
