"""What is asked of a gated loop from outside, given what is sampled of it (`conditional.py`)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from anywidth import split
from anywidth.conditional import Conditional, across, advance, along, drawn_apart, numbers_of
from anywidth.inner import Gram
from anywidth.kets import Node
from anywidth.split import Atom, Part, Split
from anywidth.vectors import Given, dot

Array = Any


def values(gram: Gram, p: Conditional, x: Node) -> list[Array]:
    """The parts of a node at all steps, (T, k, columns, M), atoms of the carries among the columns."""
    own, M = p.split, p.drawn.shape[-1]
    parts = own.outer(x, True)

    def at(a: Any) -> Any:
        t, numbers, drawn = a
        body = Given(gram.graph, own.stage.loop, t, {}, {}, own, M)
        body.known |= dict(zip(numbers_of(own), numbers, strict=True))
        body.known |= {u: v.reshape(*u.shape[1:], M) for u, v in zip(own.drawn, drawn_apart(own, drawn), strict=True)}
        return [body.rows(x, part, _inside(own, part)) for part in parts]

    return lax.map(at, (jnp.arange(own.stage.loop.length), p.numbers, p.drawn))


def _inside(own: Split, p: Part) -> bool:
    return p.atom is not None and any(a.key == p.atom.key for a in own.atoms)


def expected(gram: Gram, p: Conditional, x: Node) -> Array:
    """E[x_t] for all t, (T, F...)."""
    own = p.split
    c = own.carries
    total: Any = 0.0
    for part, a in zip(own.outer(x, True), values(gram, p, x), strict=True):
        value = a[:, :, 0] + dot(a[:, :, 1 : 1 + c], p.means[:-1, None], 2)
        value = (value + dot(a[:, :, 1 + c :], p.atoms[:, None, :, None], 2)).mean(-1)
        if part.atom is not None and not _inside(own, part):
            one = lambda t: split.mean(part.atom, t, {u: p.variances[u][t] for u, _ in part.atom.factors})  # noqa: B023, E731
            value = value * jax.vmap(one)(jnp.arange(own.stage.loop.length))
        total = total + value
    return total.reshape(-1, *x.shape[1:])


def table(gram: Gram, left: Conditional, right: Conditional, a: Node, b: Node) -> Array:
    """E[a_t b_s] for all t and s, (T, F..., S, F'...); `right` is `left` or was drawn given it."""
    one, two = left.split, right.split
    T, S = one.stage.loop.length, two.stage.loop.length
    M, dtype, c, d = left.drawn.shape[-1], one.stage.dtype, one.carries, two.carries
    linked = {(u, v): one.stage.asked(two.stage, u, v)[0] for u in one.integrated for v in two.integrated}

    def cov(u: Node, v: Node) -> Array:
        return left.own[u, v] if left is right else jnp.transpose(right.cross[v, u], (1, 0, 3, 2))

    def atoms(x: Atom | None, y: Atom | None) -> Array:
        """E[x_t y_s]: (T, S, k, k')."""
        x, y = x or Atom(()), y or Atom(())
        known = {(u, v): cov(u, v) for u, _ in x.factors for v, _ in y.factors if linked[u, v]}

        def cell(t: Any, s: Any) -> Array:
            both = {u: left.variances[u][t] for u, _ in x.factors}, {v: right.variances[v][s] for v, _ in y.factors}
            return split.inner(x, y, t, s, both, lambda u, v: linked[u, v], lambda u, v: known[u, v][t, s]).astype(
                dtype
            )

        return jax.vmap(jax.vmap(cell, (None, 0)), (0, None))(jnp.arange(T), jnp.arange(S))

    K = jnp.zeros((T, S, one.columns - 1 - c, two.columns - 1 - d), dtype)
    if one.atoms and two.atoms:
        K = jnp.concatenate([jnp.concatenate([atoms(x, y) for y in two.atoms], -1) for x in one.atoms], -2)
    parts = one.outer(a, True), two.outer(b, True)
    rows = values(gram, left, a), values(gram, right, b)

    def step(state: Any, at: Any) -> Any:
        H, A = state
        B, Et, Kt, mean, here = at
        Q = across(Et, Kt, right.steps, right.means)
        out = []
        for x in here:  # <x, x'_s>, (k, columns', M) for all s
            h, p = x[:, 1 : 1 + c], x[:, 1 + c :]
            low = x[:, 0] + dot(h, mean[None], 1) + dot(p, Et[None, :, None], 1)
            mid = x[:, 0][None, :, None] * right.means[:S, None] + dot(h[None, :, :, None], H[:S, None], 2)
            mid = mid + dot(p[None, :, :, None], jnp.moveaxis(Q[:, :, :S], 2, 0)[:, None], 2)
            high = x[:, 0][None, :, None] * right.atoms[:, None, :, None]
            high = high + dot(h[None, :, :, None], jnp.moveaxis(A, 2, 0)[:, None], 2)
            high = high + dot(p[None, :, :, None], Kt[:, None, :, :, None], 2)
            for y in rows[1]:
                value = jnp.einsum("km,slm->skl", low, y[:, :, 0]) + jnp.einsum(
                    "skdm,sldm->skl", mid, y[:, :, 1 : 1 + d]
                )
                out.append((value + jnp.einsum("sknm,slnm->skl", high, y[:, :, 1 + d :])) / M)
        H = jax.vmap(lambda h, mm, qq: advance(B, mm, h, qq))(H, right.means, jnp.moveaxis(Q, 2, 0))
        return (H, along(B, right.atoms, A, Kt)), out

    first = left.means[0]
    start = (
        first[None, :, None] * right.means[:, None],
        first[:, None, None] * jnp.moveaxis(right.atoms, 0, 1)[None, :, :, None],
    )
    _, out = lax.scan(step, start, (left.steps, left.atoms, K, left.means[:-1], rows[0]))
    total: Any = 0.0
    for i, p in enumerate(parts[0]):
        for j, r in enumerate(parts[1]):
            value = out[i * len(parts[1]) + j]
            outer = [None if _inside(own, x) else x.atom for own, x in ((one, p), (two, r))]
            total = total + (value if outer == [None, None] else value * atoms(*outer))
    return jnp.moveaxis(total, 1, 2).reshape(T, *a.shape[1:], S, *b.shape[1:])


__all__ = ["expected", "table"]
