r"""Inner products of what loops carry where a part of the state is kept: leaky and residual cells, masked steps.

If Carry[t + 1] = a_t Carry[t] + f_t, then <Carry[t + 1], Carry'[s + 1]> needs <Carry[t], f'_s>, an inner product with
all that f'_s is correlated with, and the recursion along a diagonal does not close. It does by rows. Let

    A[t, s] = <Carry[t], Carry'[s]>,        V_y[s] = <y, Carry'[s]>   for a node y.

Row t determines the covariances of what step t computes from its carries with what every step s computes from its, so

    A[t + 1, s] = <next[t], Carry'[s]>      = a_t A[t, s] + V_{f_t}[s]            (a scan over t: `Sweep`)
    V_y[s + 1]  = <y, next'[s]>             = a'_s V_y[s] + <y, f'_s>             (a scan over s within it: `Along`).

A loop with itself needs the variances that it is computing: then only s <= t is computed in row t, A[t + 1, t + 1] is
<next[t], next[t]>, and the variances so far are carried along. The rest is symmetry. Time T S, and one program for all
lengths.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from anywidth.errors import NeedsUnroll
from anywidth.frames import Ask, Frame, Loop, ask_of, carry_view, is_carry, shifted
from anywidth.inner import ZERO, Gram
from anywidth.kets import Contract, Fluctuation, Graph, Node, Pointwise, Product, Sum, View
from anywidth.recursions import Solve, after_step, along_rows, at_step, iterate, plan
from anywidth.views import Dyn, ViewMap


def table(gram: Gram, left: Ask, right: Ask, eps: bool) -> Any:
    """<Carry[t], Carry'[s]> for all t and s, as the first two axes; the others are those of the request."""
    g = gram.graph
    known = gram.solved.setdefault((id(left.loop), id(right.loop), "sweep"), {})
    left, right = along_rows(g, left), along_rows(g, right)
    key, back = _key(g, left, right, eps), _key(g, right, left, eps)
    if key in known:
        return known[key]
    if known.get("running"):
        raise NeedsUnroll("what a loop starts from or reads is correlated with what it carries")
    own = left.loop is right.loop
    asked: dict[Hashable, Any] = {key: (left, right, eps)}
    if own:
        asked[back] = (right, left, eps)
    known["running"] = True
    try:
        found = iterate(gram, _rows(gram, left.loop, right.loop), asked, left.loop.length)
    finally:
        known["running"] = False
    for k in asked:
        found.setdefault(k, ZERO)
    if own and found[key] is not ZERO:
        found = _mirrored(found)
    found = {k: v for k, v in found.items() if not _is_diagonal(k)}
    if not gram.sealed:
        known.update(found)
    return found[key]


def column(gram: Gram, y: Node, right: Ask, eps: bool) -> Any:
    """<y, Carry'[s]> for all s, as a new first axis; y is no carry."""
    g = gram.graph
    return along(gram, g.view(y, shifted(y.rank)), along_rows(g, right), eps)


# --- rows: all s at once --------------------------------------------------------------------------------------


@dataclass(eq=False)
class Sweep(Frame):
    """The running step of the left loop, against all steps of the right one, which are axis 0.

    The state holds A[t, s] by the keys of two requests; of a loop with itself also A[s, s] for s <= t.
    """

    columns: dict[Hashable, Any] = field(default_factory=dict)

    @property
    def own(self) -> bool:
        """Whether a loop meets itself."""
        return self.left is self.right

    def coupled(self, a: Node, b: Node) -> bool:
        """Whether the inner product depends on the state of the solve."""
        if self.own:
            return id(self.left) in a.loops and id(self.left) in b.loops
        return super().coupled(a, b)

    def here(self, row: Any) -> Any:
        """The entry of a row at the running step."""
        if row is ZERO or row.shape[0] == 1:
            return row
        return lax.dynamic_index_in_dim(row, self.step, 0, keepdims=True)

    def lookup(self, gram: Gram, x: Node, y: Node, eps: bool) -> Any:
        """<x, y> with x (a view of) a carry."""
        g = gram.graph
        y_side = self.side(y) if is_carry(y) else None
        if self.side(x) is None:
            x, y, y_side = y, x, None
        side = self.side(x) if is_carry(x) else None
        if side is None:
            raise NeedsUnroll("a carry is read at a computed step")
        if y_side is None:
            if not y.local or id(self.left) not in y.loops or (side == "left" and not self.own):
                raise NeedsUnroll("a carry meets what another step computes")
            row = self.column(gram, y, ask_of(x), eps)
            return self.here(row) if side == "left" else row
        if (side, y_side) == ("right", "left"):
            x, y = y, x
        a, b = ask_of(x), ask_of(y)
        if side == y_side == "right":
            key: Hashable = ("diagonal", *_key(g, a, b, eps))
            self.asked[key] = (a, _Same(b), eps)
            return self.state.get(key, ZERO)
        key = _key(g, a, b, eps)
        self.asked[key] = (a, b, eps)
        row = self.state.get(key, ZERO)
        return self.here(row) if side == y_side else row

    def column(self, gram: Gram, y: Node, b: Ask, eps: bool) -> Any:
        """<y, Carry'[s]> for all s, y being of the running step."""
        key = (y, b.key(gram.graph), eps)
        if key not in self.columns:
            self.columns[key] = along(gram, y, b, eps, planning=isinstance(self.step, int))
        return self.columns[key]


@dataclass(frozen=True, eq=False)
class _Same:
    """The right side of a request for <Carry[s], Carry'[s]>, s <= t."""

    ask: Ask


def _sides(request: tuple[Ask, Any, bool]) -> tuple[Ask, Ask, bool]:
    a, b, eps = request
    return a, b.ask if isinstance(b, _Same) else b, eps


def _is_diagonal(key: Hashable) -> bool:
    return isinstance(key, tuple) and key[0] == "diagonal"


def _rows(gram: Gram, left: Loop, right: Loop) -> Solve:
    g, T, S = gram.graph, left.length, right.length
    own = left is right

    def frame(k: Any, state: dict[Hashable, Any]) -> Frame:
        return Sweep(left, right, k, T, Dyn(k), None, True, state)

    def carried(b: Ask) -> Node:
        return g.view(right.carries[b.number], ViewMap(b.view.rank, (0, *b.view.entries)))

    def first(value: Any) -> Any:
        """The entry at s = 0 of a row of zeros."""
        return value if value is ZERO else jnp.zeros((S, *value.shape[1:]), value.dtype).at[:1].set(value)

    def init(request: Any) -> Any:
        a, b, eps = _sides(request)
        if own:
            value = gram(at_step(g, a, 0), at_step(g, b, 0), eps)
            return first(value if value is ZERO else jnp.asarray(value))
        value = gram(at_step(g, a, 0), carried(b), eps)
        return value if value is ZERO else jnp.broadcast_to(value, (S, *value.shape[1:]))

    def advance(child: Gram, f: Sweep, request: Any) -> Any:
        a, b, eps = _sides(request)
        diagonal = isinstance(request[1], _Same)
        lock: Any = ZERO
        if own:
            lock = child(after_step(g, a, f.dyn_left), after_step(g, b, f.dyn_left), eps)
        if diagonal:
            row = f.state.get(("diagonal", *_key(g, a, b, eps)), ZERO)
        else:
            row = child(after_step(g, a, f.dyn_left), carried(b), eps)
        if not own:
            return row if row is ZERO else jnp.broadcast_to(row, (S, *row.shape[1:]))
        if row is ZERO and lock is ZERO:
            return ZERO
        dtype = jnp.result_type(*(v for v in (row, lock) if v is not ZERO))
        row, lock = (jnp.zeros((1,), dtype) if v is ZERO else v for v in (row, lock))
        s = jnp.arange(S).reshape((S,) + (1,) * (max(row.ndim, lock.ndim) - 1))
        return jnp.where(s <= f.step, row, jnp.where(s == f.step + 1, lock, jnp.zeros((), dtype)))

    return Solve(frame, init, advance)  # type: ignore[arg-type]


def _mirrored(found: dict[Any, Any]) -> dict[Any, Any]:
    """A[t, s] for s > t too."""
    out = dict(found)
    for key, lower in found.items():
        if _is_diagonal(key) or lower is ZERO:
            continue
        a, b, eps = key
        upper = found.get((b, a, eps), ZERO)
        if upper is ZERO:  # only asked for on the way
            del out[key]
            continue
        T = lower.shape[0]
        below = np.tri(T, dtype=bool).reshape((T, T) + (1,) * (lower.ndim - 2))
        out[key] = jnp.where(below, lower, jnp.swapaxes(upper, 0, 1))
    return out


# --- a column: step by step -----------------------------------------------------------------------------------


@dataclass(eq=False)
class Along:
    """The running step of a loop whose carries meet a given node; what they do not come into is known for all steps."""

    loop: Loop
    dyn: Dyn
    state: dict[Hashable, Any]
    asked: dict[Hashable, Any] = field(default_factory=dict)

    def hoist(self, gram: Gram, a: Node, b: Node, eps: bool) -> Any:
        """The inner product computed for all steps at once, as axis 0, where no carry itself meets the node."""
        assert gram.parent is not None
        inside = [self.inside(a), self.inside(b)]
        if not any(inside):
            return gram.parent(a, b, eps)
        if all(inside):
            raise NeedsUnroll("two things that a step computes meet")
        y, x = (b, a) if inside[0] else (a, b)
        if not isinstance(x, View) or x.operand.local or not isinstance(x.operand, Pointwise | Product):
            return None
        entries = tuple(0 if e is self.dyn else e for e in x.view.entries)
        row = gram.parent(y, gram.graph.view(x.operand, ViewMap(x.rank, entries)), eps)
        if row is ZERO or row.shape[0] == 1:
            return row
        return lax.dynamic_index_in_dim(row, self.dyn.index, 0, keepdims=True)

    def inside(self, x: Node) -> bool:
        """Whether a node is of the running step."""
        if not x.local:
            return False
        if isinstance(x, View):
            return any(e is self.dyn for e in x.view.entries) or self.inside(x.operand)
        if isinstance(x, Sum):
            return any(self.inside(t) for _, t in x.terms)
        if isinstance(x, Pointwise):
            return any(map(self.inside, x.args))
        return isinstance(x, Product | Contract | Fluctuation) and self.inside(x.operand)

    def lookup(self, gram: Gram, x: Node, y: Node, eps: bool) -> Any:
        """<x, y> with x (a view of) a carry."""
        if not self._stepping(x):
            x, y = y, x
        if not self._stepping(x) or self.inside(y):
            raise NeedsUnroll("a carry is read at a computed step")
        a = ask_of(x)
        key = (a.key(gram.graph), y, eps)
        self.asked[key] = (a, y, eps)
        return self.state.get(key, ZERO)

    def _stepping(self, x: Node) -> bool:
        if not is_carry(x):
            return False
        carry, entries = carry_view(x)
        return carry.loop is self.loop and entries[0] is self.dyn


def along(gram: Gram, y: Node, b: Ask, eps: bool, planning: bool = False) -> Any:
    """<y, Carry'[s]> for all s, as axis 0, which y does not have. While planning, only its shape is right."""
    g = gram.graph

    def frame(k: Any, state: dict[Hashable, Any]) -> Along:
        return Along(b.loop, Dyn(k), state)

    def init(request: Any) -> Any:
        a, node, e = request
        return gram(at_step(g, a, 0), node, e)

    def advance(child: Gram, f: Along, request: Any) -> Any:
        a, node, e = request
        return child(after_step(g, a, f.dyn), node, e)

    solve = Solve(frame, init, advance)  # type: ignore[arg-type]
    key = (b.key(g), y, eps)
    asked: dict[Hashable, Any] = {key: (b, y, eps)}
    if planning:
        live, first = plan(gram, solve, asked)
        return jnp.broadcast_to(first[key], (b.loop.length, *first[key].shape[1:])) if key in live else ZERO
    found = iterate(gram, solve, asked, b.loop.length).get(key, ZERO)
    return found if found is ZERO else found[:, 0]


def _key(g: Graph, a: Ask, b: Ask, eps: bool) -> tuple[Hashable, Hashable, bool]:
    return a.key(g), b.key(g), eps


__all__ = ["column", "table"]
