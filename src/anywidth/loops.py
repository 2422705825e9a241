"""Inner products of kets that a loop carries, without unrolling it.

A loop's carry before step t is a ket `Carry[t]`, and `next[t]`, its value after the step, is an ordinary node over
`Carry[t]`. So the inner products of two loops obey a recursion (`recursions.py`), whose step is that of `inner.py`
itself, stopped at the carries. Products of a carry with a node outside the loop obey the same recursion in t alone.
Here requests are answered: at a running step from the state of the solve, elsewhere by a diagonal of the recursion
where only that is asked for, and by the whole table of t and s otherwise; where the recursion along diagonals does not
close, because a part of the state is kept, by rows (`sweeps.py`).
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import jax.numpy as jnp
import numpy as np

from anywidth import sweeps
from anywidth.errors import NeedsUnroll
from anywidth.frames import Ask, Frame, ask_of, carry_view, is_carry
from anywidth.inner import ZERO, Gram
from anywidth.kets import Node, Pointwise, Product, View
from anywidth.recursions import chain, table
from anywidth.views import Index, ViewMap

_SHORT = 4  # steps up to which a loop that keeps a part of its state is a smaller program when written out


def lookup(gram: Gram, x: Node, y: Node, eps: bool) -> Any:
    """<x, y> with x (a view of) a carry."""
    if gram.parent is None:
        return _solved(gram, x, y, eps)
    frame = gram.frames[-1]
    if not isinstance(frame, Frame) or isinstance(frame, sweeps.Sweep):
        return frame.lookup(gram, x, y, eps)
    graph = gram.graph
    y_carry = is_carry(y)
    side = frame.side(x)
    if side is None and not (y_carry and frame.side(y) is not None):
        raise NeedsUnroll("a carry is read at a computed step")
    if y_carry and side is not None and frame.side(y) is not None:
        if frame.right is None:
            raise NeedsUnroll("the states of one step meet beside the recursion")
        if side == "right" and frame.side(y) == "left":
            x, y = y, x
        ask, other = ask_of(x), ask_of(y)
        key: Hashable = (ask.key(graph), other.key(graph), eps)
        frame.asked[key] = (ask, other, eps)
        return frame.state.get(key, ZERO)
    if side is None:
        x, y = y, x
    carry, _ = carry_view(x)
    lockstep = not frame.row and (frame.dyn_right is None or frame.dyn_left.offset == frame.dyn_right.offset)
    if lockstep and isinstance(y, Product) and y.leaf in carry.loop.fresh:
        return ZERO
    if (
        lockstep
        and isinstance(y, Pointwise)
        and all(isinstance(u, Product) and u.leaf in carry.loop.fresh for u in y.args)
    ):
        one = graph.const(np.ones((1,) * y.rank))
        mean = gram(y, one)
        if mean is ZERO:
            return ZERO
        own = gram(x, one)
        return ZERO if own is ZERO else own * mean
    if (frame.right is None or frame.first) and not y.local:
        ask = ask_of(x)
        key = (ask.key(graph), y, eps)
        frame.asked[key] = (ask, y, eps)
        return frame.state.get(key, ZERO)
    raise NeedsUnroll("the next carry needs more than the inner products of the carries before it")


def outputs(gram: Gram, x: Node, y: Node, eps: bool) -> Any:
    """<x, y> where both are what loops carry after every step, or views of it; None where that is no table.

    The table of a pooled or a stacked output is a by-product of the recursion of the carries.
    """
    sides = []
    for node in (x, y):
        entries = node.view.entries if isinstance(node, View) else tuple(range(node.rank))
        found = gram.graph.stepped.get(node.operand if isinstance(node, View) else node)
        if found is None:
            return None
        sides.append((*found, entries))
    (loop, number, e), (other, number_, f) = sides
    apart = isinstance(e[0], int) and isinstance(f[0], int) and e[0] != f[0]
    if not apart:
        return None
    rank = x.rank
    try:
        value = table(
            gram, Ask(loop, number, ViewMap(rank, e[1:])), Ask(other, number_, ViewMap(rank, f[1:])), eps, after=True
        )
    except NeedsUnroll:
        return None
    if value is ZERO:
        return ZERO
    return _read(value, [_steps(e[0], rank, loop.length), _steps(f[0], rank, other.length)], [e[0], f[0]], rank)


def _solved(gram: Gram, x: Node, y: Node, eps: bool) -> Any:
    carry, entries = carry_view(x)
    if not carry.loop.ready:
        raise NeedsUnroll("a carry is used before its loop is known")
    closed = gram.solved.setdefault((id(carry.loop), id(carry_view(y)[0].loop) if is_carry(y) else None, "closed"), {})
    if closed.get("closed", True):
        try:
            return _closed(gram, x, y, eps)
        except NeedsUnroll:
            closed["closed"] = False
    # a part of the state is kept from step to step
    rank = x.rank
    if all(loop.length <= _SHORT for loop, _ in gram.graph.stepped.values()):
        raise NeedsUnroll("a short loop keeps a part of its state")
    left = ask_of(x)
    t = _steps(entries[0], rank, carry.loop.length)
    if not is_carry(y):
        value = sweeps.column(gram, y, left, eps)
        return value if value is ZERO else _read(value, [t], [entries[0]], rank)
    other, f = carry_view(y)
    value = sweeps.table(gram, left, ask_of(y), eps)
    if value is ZERO:
        return ZERO
    return _read(value, [t, _steps(f[0], rank, other.loop.length)], [entries[0], f[0]], rank)


def _closed(gram: Gram, x: Node, y: Node, eps: bool) -> Any:
    carry, entries = carry_view(x)
    rank = x.rank
    left = ask_of(x)
    t = _steps(entries[0], rank, carry.loop.length)
    if not is_carry(y):
        fixed = _fixed(entries[0])
        count = carry.loop.length if fixed is None else fixed + 1
        value = chain(gram, left, y, (0, 0), count, eps)
        return value if value is ZERO else _read(value, [t], [entries[0]], rank)
    other, f = carry_view(y)
    right = ask_of(y)
    s = _steps(f[0], rank, other.loop.length)
    i, j = _fixed(entries[0]), _fixed(f[0])
    if i is not None and j is not None:
        m = min(i, j)
        value = chain(gram, left, right, (i - m, j - m), m + 1, eps)
        return value if value is ZERO else value[-1]
    if isinstance(entries[0], int) and entries[0] == f[0] and carry.loop.length == other.loop.length:
        value = chain(gram, left, right, (0, 0), carry.loop.length, eps)
        return value if value is ZERO else _read(value, [t], [entries[0]], rank)
    value = table(gram, left, right, eps)
    if value is ZERO:
        return ZERO
    return _read(value, [t, s], [entries[0], f[0]], rank)


def _fixed(e: Any) -> int | None:
    if isinstance(e, Index) and isinstance(e.array, np.ndarray) and e.array.size == 1:
        return int(e.array.reshape(()))
    return None


def _steps(e: Any, rank: int, length: int) -> Any:
    """The steps that are read, aligned with the axes of the request."""
    if isinstance(e, int):
        return np.arange(length).reshape([length if i == e else 1 for i in range(rank)])
    return e.array if isinstance(e, Index) else jnp.reshape(e.index, (1,) * rank)


def _read(value: Any, steps: list[Any], entries: list[Any], rank: int) -> Any:
    """value[steps..., axes of the request], aligned."""
    k = len(steps)
    axes = [e for e in entries if isinstance(e, int)]
    if len(axes) == k and len(set(axes)) == k and all(value.shape[k + a] == 1 for a in axes):
        value = jnp.squeeze(value, tuple(k + a for a in axes))
        order = sorted(range(k), key=lambda i: axes[i])
        rest = list(range(k, value.ndim))
        out: list[int] = []
        for axis in range(rank):
            out.append(order.pop(0) if axis in axes else rest.pop(0))
        return jnp.transpose(value, out)
    index = list(steps)
    for axis in range(rank):
        size = value.shape[k + axis]
        index.append(np.arange(size).reshape([size if i == axis else 1 for i in range(rank)]))
    return value[tuple(index)]
