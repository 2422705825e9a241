"""Covariances of the Gaussians of two gated loops at one pair of steps (t, s).

`covariance(u, v)` is the recursion of `inner.py` itself for the products u at step t of one loop and v at step s of
the other. It stops at the operands that depend on the carries: their inner products are means over sample
points and are asked of `moment`. What does not depend on the carries is computed outside for all (t, s) at once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from anywidth.errors import NeedsUnroll
from anywidth.frames import Loop
from anywidth.inner import ZERO, Gram, add, scaled
from anywidth.kets import Carry, Const, Contract, Graph, Node, Sum, View
from anywidth.views import Dyn, Index, ViewMap, expand

Array = Any


def base(x: Node) -> Node:
    """What a view is a view of."""
    return x.operand if isinstance(x, View) else x


def pure(x: Node) -> bool:
    """A Gaussian to be drawn: Gaussian, and without a carry but inside of products."""
    return x.gaussian and not isinstance(x, Const) and not _bare_carry(x)


def _bare_carry(x: Node) -> bool:
    if isinstance(x, Carry):
        return True
    if isinstance(x, Sum):
        return any(_bare_carry(t) for _, t in x.terms)
    return isinstance(x, View | Contract) and _bare_carry(x.operand)


def timed(loop: Loop, x: Node) -> bool:
    """A node of the loop itself, with the time as its first axis."""
    return (isinstance(x, Carry) and x.loop is loop) or x in loop.lifted


@dataclass(eq=False)
class Cell:
    """The frame of one pair of steps; stands where `loops.Frame` does in the stack of a `Gram`."""

    left: Loop
    right: Loop
    t: Dyn
    s: Dyn
    moment: Callable[[Node | None, Node | None], Array]  # (F..., F'...) of two operands, None standing for one
    tables: dict[Hashable, Any]  # base inner products for all t and s: their last two axes
    table: Callable[[Gram, Node, Node, bool], Any]

    def hoist(self, gram: Gram, a: Node, b: Node, eps: bool) -> Any:
        """The inner product where the recursion stops, None where it goes on."""
        mine = {id(self.left), id(self.right)}
        loopy = [bool(x.loops & mine) for x in (a, b)]
        if not any(loopy):
            return self.outside(gram, a, b, eps)
        sides = [self.operand(a), self.operand(b)]
        if sides[0] is None and sides[1] is None:
            return None if all(loopy) else self.apart(gram, *((a, b) if loopy[0] else (b, a)), eps)
        for side, x in zip(sides, (a, b), strict=True):
            if side is None and not isinstance(x, Const):
                raise NeedsUnroll("a state and a vector from outside of its loop go through one parameter")
        if sides[0] is None or (sides[1] is not None and sides[0][1] and not sides[1][1]):
            a, b, sides = b, a, sides[::-1]  # the left side first
        first, second = sides
        rank = a.rank
        if second is None:
            assert first is not None
            node, right, entries = first
            value = self.moment(None, node) if right else self.moment(node, None)
            return read(value, entries, rank) * b.array  # type: ignore[attr-defined]
        assert first is not None
        value = self.moment(first[0], second[0])
        return read(value, (*first[2], *second[2]), rank)

    def apart(self, gram: Gram, x: Node, y: Node, eps: bool) -> Any:
        """<x, y> where x depends on the carries and y does not: term by term, so that y stays as it is."""
        if isinstance(x, View):
            return gram(gram.graph.push(x), y, eps)
        if isinstance(x, Sum):
            total: Any = ZERO
            for coef, term in x.terms:
                total = add(total, scaled(coef, gram(term, y, eps)))
            return total
        return None

    def operand(self, x: Node) -> tuple[Node, bool, tuple[Any, ...]] | None:
        """(node of the loop, whether it belongs to the right side, how its axes are read) of a state read at a step."""
        node = base(x)
        if not isinstance(x, View) or pure(node):
            return None
        step = x.view.entries[0] if x.view.entries else None
        if step is self.t and timed(self.left, node):
            return node, False, x.view.entries[1:]
        if step is self.s and timed(self.right, node):
            return node, True, x.view.entries[1:]
        return None

    def outside(self, gram: Gram, a: Node, b: Node, eps: bool) -> Any:
        """An inner product without the carries, read at (t, s) from the table of all."""
        g = gram.graph
        full = [self._over_steps(g, x) for x in (a, b)]
        if full[0] is None or full[1] is None:
            return None
        key = (full[0], full[1], eps)
        if key not in self.tables:
            self.tables[key] = self.table(gram, full[0], full[1], eps)
        value = self.tables[key]
        if value is ZERO:
            return ZERO
        at = tuple(0 if n == 1 else d.index for n, d in zip(value.shape[-2:], (self.t, self.s), strict=True))
        return value[(..., *at)]

    def _over_steps(self, g: Graph, x: Node) -> Node | None:
        """The node with both running steps as two more last axes."""
        rank = x.rank
        if not x.local:
            return g.view(x, expand(rank, 2))
        if not isinstance(x, View) or x.operand.local:
            return None
        entries: list[Any] = []
        for e in x.view.entries:
            if e is self.t or e is self.s:
                entries.append(rank + (e is self.s))
            elif isinstance(e, Dyn):
                return None
            elif isinstance(e, Index):
                if not isinstance(e.array, np.ndarray):
                    return None
                entries.append(g.index(g.viewed(e.array, expand(rank, 2), aligned=True)))
            else:
                entries.append(e)
        return g.view(x.operand, ViewMap(rank + 2, tuple(entries)))


def read(value: Array, entries: Sequence[Any], rank: int) -> Array:
    """The array with its axes read through the entries of a view: aligned with the axes of a request."""
    value = jnp.asarray(value)
    if all(isinstance(e, int) for e in entries) and len(set(entries)) == len(entries):
        order = sorted(range(len(entries)), key=lambda i: entries[i])
        shape = [1] * rank
        for n, e in zip(value.shape, entries, strict=True):
            shape[e] = n
        return jnp.transpose(value, order).reshape(shape)
    index = []
    for n, e in zip(value.shape, entries, strict=True):
        if isinstance(e, int):
            index.append(np.arange(n).reshape([n if i == e else 1 for i in range(rank)]))
        else:
            index.append(np.zeros((1,) * rank, int) if n == 1 else e.array)
    return value[tuple(index)]


def covariance(gram: Gram, epsilon: Any, cell: Cell, u: Node, v: Node, eps: bool) -> Any:
    """Cov(u_t, v_s) as a matrix over the flattened finite axes of both, or ZERO."""
    g = gram.graph
    m, n = u.rank - 1, v.rank - 1
    x = g.view(u, ViewMap(m + n, (cell.t, *range(m))))
    y = g.view(v, ViewMap(m + n, (cell.s, *range(m, m + n))))
    value = Gram(g, epsilon, gram, (*gram.frames, cell))(x, y, eps)
    if value is ZERO:
        return ZERO
    shape = (*u.shape[1:], *v.shape[1:])
    return jnp.broadcast_to(value, shape).reshape(size(u), size(v))


def size(x: Node) -> int:
    """Number of entries at one step."""
    return int(np.prod(x.shape[1:]))


__all__ = ["Cell", "base", "covariance", "pure", "read", "size", "timed"]
