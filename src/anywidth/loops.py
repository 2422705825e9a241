"""Inner products of kets that a loop carries, without unrolling it.

A loop's carry before step t is a ket `Carry[t]`, and `next[t]`, its value after the step, is an ordinary node over
`Carry[t]`. So the inner products of two loops obey a recursion,

    A[t + 1, s + 1] = G(A[t, s]; t, s),        A[t, s] = <Carry[t], Carry'[s]>,

whose G is the recursion of `inner.py` itself, stopped at the carries. It is solved along a diagonal (`chain`) where
only that is asked for, and otherwise for all t and s (`table`): a scan over t that carries the row over all s.
Products of a carry with a node outside the loop obey the same recursion in t alone.

The state of a solve holds one array for each aligned request met on the way. What does not depend on the carries of
both sides is hoisted: computed before the scan for all steps at once, and read at the running one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from anywidth.errors import NeedsUnroll
from anywidth.inner import ZERO, Gram
from anywidth.kets import Carry, Const, Dyn, Graph, Index, Leaf, Node, Pointwise, Product, View, ViewMap, expand


@dataclass(eq=False)
class Loop:
    length: int
    fresh: frozenset[Leaf] = frozenset()  # parameters of which every step has its own
    inits: list[Node] = field(default_factory=list)
    nexts: list[Node] = field(default_factory=list)  # the time is their first axis
    carries: list[Node] = field(default_factory=list)  # likewise
    lifted: frozenset[Node] = frozenset()  # every node of the body, likewise
    roots: list[Node] = field(default_factory=list)  # the nodes that leave the loop, likewise

    @property
    def ready(self) -> bool:
        return bool(self.nexts)


@dataclass(frozen=True, eq=False)
class Ask:
    """One side of a request: the number of a carry, read through a view (its time axis left out)."""

    loop: Loop
    number: int
    view: ViewMap

    def key(self, g: Graph) -> Hashable:
        return (id(self.loop), self.number, self.view.rank, g._entries_key(self.view.entries))


@dataclass(eq=False)
class Frame:
    """A running step of a solve: `left` steps with `dyn_left`; the right side with `dyn_right`, or is a row, or fixed."""

    left: Loop
    right: Loop | None
    step: Any
    count: int
    dyn_left: Dyn
    dyn_right: Dyn | None
    row: bool
    state: dict[Hashable, Any]
    asked: dict[Hashable, tuple[Ask, Any, bool]] = field(default_factory=dict)
    first: bool = False  # the loop's own statistics are being computed: its body is not known yet

    def side(self, x: Node) -> str | None:
        """Which of the stepping sides a carry belongs to."""
        carry, e = _carry_view(x)
        if carry.loop is self.left and e[0] is self.dyn_left:
            return "left"
        if carry.loop is self.right and (e[0] is self.dyn_right if not self.row else _is_row(e[0])):
            return "right"
        return None

    def coupled(self, a: Node, b: Node) -> bool:
        left, right = id(self.left), id(self.right)
        if self.right is None:
            return (left in a.loops and a.local) or (left in b.loops and b.local)
        return (left in a.loops and right in b.loops) or (right in a.loops and left in b.loops)

    def hoist(self, gram: Gram, a: Node, b: Node, eps: bool) -> Any:
        """The inner product computed for all steps at once outside, where it does not depend on the state."""
        assert gram.parent is not None
        if self.coupled(a, b) or (self.first and id(self.left) in (a.loops | b.loops)):
            return None
        if not a.local and not b.local:
            return gram.parent(a, b, eps)
        full = [self._over_steps(gram.graph, x) for x in (a, b)]
        if full[0] is None or full[1] is None:
            return None
        value = gram.parent(full[0], full[1], eps)
        if value is ZERO:
            return ZERO
        if value.shape[0] == 1:
            return value[0]
        return lax.dynamic_index_in_dim(jnp.asarray(value), self.step, 0, keepdims=False)

    def _over_steps(self, g: Graph, x: Node) -> Node | None:
        """The node with the running step as one more first axis, so that what a step reads lies together in memory."""
        rank = x.rank
        shift = _shifted(g, rank)
        if not x.local:
            return g.view(x, shift)
        if not isinstance(x, View) or x.operand.local:
            return None
        entries: list[Any] = []
        for e in x.view.entries:
            if isinstance(e, Dyn):
                if e is not self.dyn_left and e is not self.dyn_right:
                    return None
                steps = np.arange(self.count) + e.offset
                whole = e.offset == 0 and x.operand.shape[len(entries)] == self.count
                entries.append(0 if whole else g.index(steps.reshape((self.count,) + (1,) * rank)))
            elif isinstance(e, Index):
                if not isinstance(e.array, np.ndarray):
                    return None
                entries.append(g.index(g.viewed(e.array, shift)))
            else:
                entries.append(e + 1)
        return g.view(x.operand, ViewMap(rank + 1, tuple(entries)))


def _is_row(e: Any) -> bool:
    return isinstance(e, int) and e == 0


def _carry_view(x: Node) -> tuple[Carry, tuple[Any, ...]]:
    if isinstance(x, View):
        assert isinstance(x.operand, Carry)
        return x.operand, x.view.entries
    assert isinstance(x, Carry)
    return x, tuple(range(x.rank))


def lookup(gram: Gram, x: Node, y: Node, eps: bool) -> Any:
    """<x, y> with x (a view of) a carry."""
    if gram.parent is None:
        return _solved(gram, x, y, eps)
    frame = gram.frames[-1]
    graph = gram.graph
    y_carry = isinstance(y, Carry) or (isinstance(y, View) and isinstance(y.operand, Carry))
    side = frame.side(x)
    if side is None and not (y_carry and frame.side(y) is not None):
        raise NeedsUnroll("a carry is read at a computed step")
    if y_carry and side is not None and frame.side(y) is not None:
        if side == "right" and frame.side(y) == "left":
            x, y = y, x
        ask, other = _ask(x), _ask(y)
        key: Hashable = (ask.key(graph), other.key(graph), eps)
        frame.asked[key] = (ask, other, eps)
        return frame.state.get(key, ZERO)
    if side is None:
        x, y = y, x
    carry, _ = _carry_view(x)
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
        ask = _ask(x)
        key = (ask.key(graph), y, eps)
        frame.asked[key] = (ask, y, eps)
        return frame.state.get(key, ZERO)
    raise NeedsUnroll("the next carry needs more than the inner products of the carries before it")


def _ask(x: Node) -> Ask:
    carry, entries = _carry_view(x)
    rank = x.rank
    return Ask(carry.loop, carry.number, ViewMap(rank, entries[1:]))


# --- solving --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Solve:
    """What `iterate` needs to know: the frame of a step, first values, and how a request moves on by a step."""

    frame: Callable[[Any, dict[Hashable, Any]], Frame]
    init: Callable[[tuple[Ask, Any, bool]], Any]
    advance: Callable[[Gram, Frame, tuple[Ask, Any, bool]], Any]
    shift: Callable[[Any, tuple[Ask, Any, bool], Any], Any] | None = None


def plan(gram: Gram, solve: Solve, asked: dict[Hashable, Any]) -> tuple[dict[Hashable, Any], dict[Hashable, Any]]:
    """The requests that the given ones lead to, and their first values; those that stay zero are left out."""
    asked = dict(asked)
    inits: dict[Hashable, Any] = {}
    state: dict[Hashable, Any] = {}
    for _ in range(64):
        for key, request in asked.items():
            if key not in inits:
                inits[key] = solve.init(request)
        changed = False
        for key in asked:
            if inits[key] is not ZERO and key not in state:
                state[key] = jnp.asarray(inits[key])
                changed = True
        frame = solve.frame(0, state)
        child = Gram(gram.graph, gram.epsilon, gram, (*gram.frames, frame))
        for key, request in list(asked.items()):
            value = solve.advance(child, frame, request)
            if value is ZERO:
                continue
            value = jnp.asarray(value)
            old = state.get(key)
            shape = value.shape if old is None else np.broadcast_shapes(old.shape, value.shape)
            if old is None or old.shape != shape:
                state[key] = jnp.ones(shape, value.dtype)
                changed = True
        if frame.asked.keys() <= asked.keys() and not changed:
            return {k: asked[k] for k in state}, {
                k: jnp.zeros(v.shape, v.dtype)
                if inits[k] is ZERO
                else jnp.broadcast_to(jnp.asarray(inits[k], v.dtype), v.shape)
                for k, v in state.items()
            }
        asked |= frame.asked
    raise NeedsUnroll("the inner products of this loop do not close")


def iterate(
    gram: Gram, solve: Solve, asked: dict[Hashable, Any], count: int, after: bool = False
) -> dict[Hashable, Any]:
    """For each request its values before (or after) the steps 0 .. count - 1, along a new first axis."""
    live, first = plan(gram, solve, asked)
    if not live:
        return {}
    keys = list(live)

    def step(carry: list[Any], k: Any) -> tuple[list[Any], list[Any]]:
        frame = solve.frame(k, dict(zip(keys, carry, strict=True)))
        child = Gram(gram.graph, gram.epsilon, gram, (*gram.frames, frame))
        with sealed(gram):
            new, values = [], []
            for key, old in zip(keys, carry, strict=True):
                value = solve.advance(child, frame, live[key])
                value = jnp.zeros_like(old) if value is ZERO else jnp.broadcast_to(value, old.shape).astype(old.dtype)
                values.append(value)
                if solve.shift is not None:
                    value = solve.shift(value, live[key], k)
                new.append(value)
        return new, values if after else carry

    _, states = lax.scan(step, [first[k] for k in keys], jnp.arange(count))
    return dict(zip(keys, states, strict=True))


class sealed:
    """While another trace is running, nothing that it computes is remembered outside of it."""

    def __init__(self, gram: Gram | None) -> None:
        self.chain = []
        while gram is not None:
            self.chain.append(gram)
            gram = gram.parent

    def __enter__(self) -> None:
        self.before = [g.sealed for g in self.chain]
        for g in self.chain:
            g.sealed = True

    def __exit__(self, *_: object) -> None:
        for g, old in zip(self.chain, self.before, strict=True):
            g.sealed = old


def chain(gram: Gram, left: Ask, right: Any, at: tuple[int, int], count: int, eps: bool) -> Any:
    """<Carry[at + k], Carry'[at' + k]> for k < count, or <Carry[at + k], node> if `right` is a node."""
    g = gram.graph
    other = right.loop if isinstance(right, Ask) else None
    place = (id(left.loop), id(other), at)
    known = gram.solved.setdefault(place, {})
    key = (left.key(g), right.key(g) if isinstance(right, Ask) else right, eps)
    if key in known and (known[key] is ZERO or known[key].shape[0] >= count):
        return known[key] if known[key] is ZERO else known[key][:count]

    def frame(k: Any, state: dict[Hashable, Any]) -> Frame:
        dyn = Dyn(k, at[0])
        return Frame(left.loop, other, k, count, dyn, None if other is None else Dyn(k, at[1]), False, state)

    def init(request: tuple[Ask, Any, bool]) -> Any:
        a, b, e = request
        x = _at(g, a, at[0])
        return gram(x, _at(g, b, at[1]) if isinstance(b, Ask) else b, e)

    def advance(child: Gram, f: Frame, request: tuple[Ask, Any, bool]) -> Any:
        a, b, e = request
        x = _next(g, a, f.dyn_left)
        return child(x, _next(g, b, f.dyn_right) if isinstance(b, Ask) else b, e)

    found = iterate(gram, Solve(frame, init, advance), {key: (left, right, eps)}, count)
    found.setdefault(key, ZERO)
    if not gram.sealed:
        known.update(found)
    return found[key]


def _at(g: Graph, a: Ask, t: int) -> Node:
    """The carry at a fixed step."""
    if t == 0:
        return g.view(a.loop.inits[a.number], a.view)
    e = g.index(np.full((1,) * a.view.rank, t))
    return g.view(a.loop.carries[a.number], ViewMap(a.view.rank, (e, *a.view.entries)))


def _next(g: Graph, a: Ask, step: Any) -> Node:
    return g.view(a.loop.nexts[a.number], ViewMap(a.view.rank, (step, *a.view.entries)))


def table(gram: Gram, left: Ask, right: Ask, eps: bool, after: bool = False) -> Any:
    """<Carry[t], Carry'[s]> for all t and s, as the first two axes; the others are those of the request.

    `after`: of the carries after the steps t and s rather than before.
    """
    g = gram.graph
    place = (id(left.loop), id(right.loop), "after" if after else "table")
    known = gram.solved.setdefault(place, {})
    # inside, axis 0 runs over s
    inner = lambda a: Ask(
        a.loop,
        a.number,
        ViewMap(a.view.rank + 1, tuple(g._through(e, _shifted(g, a.view.rank)) for e in a.view.entries)),
    )
    left, right = inner(left), inner(right)
    key = (left.key(g), right.key(g), eps)
    if key in known:
        return known[key]
    T, S = left.loop.length, right.loop.length

    def frame(k: Any, state: dict[Hashable, Any]) -> Frame:
        return Frame(left.loop, right.loop, k, T, Dyn(k), None, True, state)

    def init(request: tuple[Ask, Any, bool]) -> Any:
        a, b, e = request
        node = b.loop.carries[b.number]
        value = gram(_at(g, a, 0), g.view(node, ViewMap(b.view.rank, (0, *b.view.entries))), e)
        return value if value is ZERO else jnp.broadcast_to(value, (S, *value.shape[1:]))

    def advance(child: Gram, f: Frame, request: tuple[Ask, Any, bool]) -> Any:
        a, b, e = request
        value = child(_next(g, a, f.dyn_left), _next(g, b, 0), e)
        return value if value is ZERO else jnp.broadcast_to(value, (S, *value.shape[1:]))

    edges: dict[Hashable, Any] = {}

    def edge(request: tuple[Ask, Any, bool]) -> Any:
        """<Carry[t], Carry'[0]> for all t, as the last axis."""
        a, b, e = request
        at = (a.key(g), b.key(g), e)
        if at not in edges:
            node = a.loop.carries[a.number]
            rank = a.view.rank
            view = ViewMap(rank + 1, (rank, *(g._through(x, expand(rank, 1)) for x in a.view.entries)))
            start = g.view(_at(g, b, 0), expand(rank, 1))
            edges[at] = gram(g.view(node, view), start, e)
        return edges[at]

    def shift(value: Any, request: tuple[Ask, Any, bool], k: Any) -> Any:
        bound = edge(request)
        first = jnp.zeros_like(value[:1])
        if bound is not ZERO:
            column = lax.dynamic_index_in_dim(
                jnp.asarray(bound), jnp.minimum(k + 1, T - 1), bound.ndim - 1, keepdims=False
            )
            first = jnp.broadcast_to(column, first.shape).astype(value.dtype)
        return jnp.concatenate([first, value[:-1]], 0)

    solve = Solve(frame, init, advance, shift)
    request = {key: (left, right, eps)}
    live, _ = plan(gram, solve, request)
    for r in live.values():
        edge(r)
    found = iterate(gram, solve, request, T, after)
    found.setdefault(key, ZERO)
    if not gram.sealed:
        known.update(found)
    return found[key]


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
    value = jnp.squeeze(value, 2) if value.ndim == rank + 3 else value
    return _read(value, [_steps(e[0], rank, loop.length), _steps(f[0], rank, other.length)], [e[0], f[0]], rank)


def _shifted(g: Graph, rank: int) -> ViewMap:
    return ViewMap(rank + 1, tuple(range(1, rank + 1)))


# --- requests from outside ------------------------------------------------------------------------------


def _solved(gram: Gram, x: Node, y: Node, eps: bool) -> Any:
    carry, entries = _carry_view(x)
    if not carry.loop.ready:
        raise NeedsUnroll("a carry is used before its loop is known")
    rank = x.rank
    left = Ask(carry.loop, carry.number, ViewMap(rank, entries[1:]))
    y_is_carry = isinstance(y, Carry) or (isinstance(y, View) and isinstance(y.operand, Carry))
    t = _steps(entries[0], rank, carry.loop.length)
    if not y_is_carry:
        fixed = _fixed(entries[0])
        count = carry.loop.length if fixed is None else fixed + 1
        value = chain(gram, left, y, (0, 0), count, eps)
        return value if value is ZERO else _read(value, [t], [entries[0]], rank)
    other, f = _carry_view(y)
    right = Ask(other.loop, other.number, ViewMap(rank, f[1:]))
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
    value = jnp.squeeze(value, 2) if value.ndim == rank + 3 else value
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


__all__ = ["Const", "Frame", "Loop", "chain", "iterate", "lookup", "plan", "table"]
