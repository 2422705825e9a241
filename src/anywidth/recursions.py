"""The recursion of the inner products of two loops, solved by a scan over the steps.

    A[t + 1, s + 1] = G(A[t, s]; t, s),        A[t, s] = <Carry[t], Carry'[s]>,

along a diagonal (`chain`), or for all t and s (`table`): a scan over t that carries the row over all s. `plan` finds
out which products the recursion needs of the step before, from those that are asked for on, and `iterate` runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from anywidth.errors import NeedsUnroll
from anywidth.frames import Ask, Frame, shifted
from anywidth.inner import ZERO, Gram
from anywidth.kets import Graph, Node
from anywidth.views import Dyn, ViewMap, expand


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
        x = at_step(g, a, at[0])
        return gram(x, at_step(g, b, at[1]) if isinstance(b, Ask) else b, e)

    def advance(child: Gram, f: Frame, request: tuple[Ask, Any, bool]) -> Any:
        a, b, e = request
        x = after_step(g, a, f.dyn_left)
        return child(x, after_step(g, b, f.dyn_right) if isinstance(b, Ask) else b, e)

    found = iterate(gram, Solve(frame, init, advance), {key: (left, right, eps)}, count)
    found.setdefault(key, ZERO)
    if not gram.sealed:
        known.update(found)
    return found[key]


def at_step(g: Graph, a: Ask, t: int) -> Node:
    """The carry at a fixed step."""
    if t == 0:
        return g.view(a.loop.inits[a.number], a.view)
    e = g.index(np.full((1,) * a.view.rank, t))
    return g.view(a.loop.carries[a.number], ViewMap(a.view.rank, (e, *a.view.entries)))


def after_step(g: Graph, a: Ask, step: Any) -> Node:
    """The carry after a step."""
    return g.view(a.loop.nexts[a.number], ViewMap(a.view.rank, (step, *a.view.entries)))


def along_rows(g: Graph, a: Ask) -> Ask:
    """The request with one more axis, 0, for the steps of the right loop."""
    behind = shifted(a.view.rank)
    return Ask(a.loop, a.number, ViewMap(behind.rank, tuple(g._through(e, behind) for e in a.view.entries)))


def table(gram: Gram, left: Ask, right: Ask, eps: bool, after: bool = False) -> Any:
    """<Carry[t], Carry'[s]> for all t and s, as the first two axes; the others are those of the request.

    `after`: of the carries after the steps t and s rather than before.
    """
    g = gram.graph
    place = (id(left.loop), id(right.loop), "after" if after else "table")
    known = gram.solved.setdefault(place, {})

    left, right = along_rows(g, left), along_rows(g, right)
    key = (left.key(g), right.key(g), eps)
    if key in known:
        return known[key]
    T, S = left.loop.length, right.loop.length

    def frame(k: Any, state: dict[Hashable, Any]) -> Frame:
        return Frame(left.loop, right.loop, k, T, Dyn(k), None, True, state)

    def init(request: tuple[Ask, Any, bool]) -> Any:
        a, b, e = request
        node = b.loop.carries[b.number]
        value = gram(at_step(g, a, 0), g.view(node, ViewMap(b.view.rank, (0, *b.view.entries))), e)
        return value if value is ZERO else jnp.broadcast_to(value, (S, *value.shape[1:]))

    def advance(child: Gram, f: Frame, request: tuple[Ask, Any, bool]) -> Any:
        a, b, e = request
        value = child(after_step(g, a, f.dyn_left), after_step(g, b, 0), e)
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
            start = g.view(at_step(g, b, 0), expand(rank, 1))
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
    request: dict[Hashable, Any] = {key: (left, right, eps)}
    live, _ = plan(gram, solve, request)
    for r in live.values():
        edge(r)
    found = iterate(gram, solve, request, T, after)
    found.setdefault(key, ZERO)
    if not gram.sealed:
        known.update(found)
    return found[key]
