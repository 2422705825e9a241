r"""A gated loop given the Gaussians that are sampled: the rest is integrated analytically (`split.py`).

At a sample point m the carries h_t that are vectors obey, with x_t = (1, h_{t-1}, psi_t) and psi_t the atoms,

    h_t = B_t x_t,       <x_t, x'_s> = G_ts,       K_ts = E[psi_t psi'_s],

where B_t depends on the sampled Gaussians of the point alone. So the rows H_ts = <h_{t-1}, h'_{s-1}>,
A_ts = <h_{t-1}, psi'_s> and Q_ts = <psi_t, h'_{s-1}> over all s follow from those of the step before,

    Q_t,s+1 = B'_s (E psi_t, Q_ts, K_ts),    A_t+1,s = B_t (E psi'_s, A_ts, K_ts),
    H_t+1,s = B_t (<1, h'_{s-1}>, H_ts, Q_ts),

for a second copy as for the loop with itself. Inner products of operands are means over the points of bilinear
functions of them, times those of the factors that no carry contains. Time T^2 M, memory T M.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from anywidth import paths, split
from anywidth.cells import covariance, size
from anywidth.inner import ZERO
from anywidth.kets import Node
from anywidth.paths import Factor
from anywidth.recursions import sealed
from anywidth.split import Atom, Part, Split
from anywidth.vectors import Given, dot

Array = Any


@dataclass(frozen=True, eq=False)
class Conditional:
    """A loop on M sample points of what is sampled, at all steps."""

    split: Split
    numbers: list[Array]  # carries that are numbers, before each step: (T, F..., M)
    drawn: Array  # (T, K, M)
    factors: list[Factor]
    operands: dict[tuple[Node, int], Array]  # parts of the operands: (T, k, 1 + c, M)
    steps: Array  # B: (T, c, columns, M)
    means: Array  # <1, h_{t-1}>: (T + 1, c, M)
    atoms: Array  # E psi_t: (T, n)
    variances: dict[Node, Array]  # of what is integrated: (T, k)
    own: dict[tuple[Node, Node], Array]  # its covariances: (T, T, k, k')
    cross: dict[tuple[Node, Node], Array]  # with those of the given path: (T, S, k, k')


def simulate(own: Split, normals: Array, given: Conditional | None = None) -> Conditional:
    """The loop on M sample points, given another copy (or loop); `normals` is (T, K, M) of what is drawn."""
    stage, T, M, dtype = own.stage, own.stage.loop.length, normals.shape[-1], own.stage.dtype
    c = own.carries
    n = own.columns - 1 - c
    groups = _groups(own, given)
    others = [own] if given is None else [own, given.split]
    tables: dict[Any, Any] = {}
    for u in stage.gaussians:  # what is computed outside, before the scan
        for o in others:
            for v in o.stage.gaussians:
                covariance(stage.gram, None, stage.cell(o.stage, 0, 0, paths._ones, tables), u, v, False)
    parts = {x: own.outer(x) for x in stage.operands}
    places = [(x, i) for x in stage.operands for i in range(len(parts[x]))]
    linked = {
        (u, v, k): stage.asked(o.stage, u, v)[0]
        for k, o in enumerate(others) for u in stage.gaussians for v in o.stage.gaussians
    }  # fmt: skip
    first = jnp.concatenate([x.reshape(-1, M) for x in _starts(own, M, True)]) if c else jnp.zeros((0, M), dtype)

    def step(state: Any, at: Any) -> Any:
        t, z = at
        numbers, stored, factors, q, B, m, E, rows = state
        factors, stored, q = (
            list(factors),
            dict(zip(places, stored, strict=True)),
            dict(zip(own.integrated, q, strict=True)),
        )
        fresh = dict(zip(own.drawn, drawn_apart(own, z), strict=True))
        body = Given(stage.gram.graph, stage.loop, t, {}, {}, own, M)
        for x, value in zip(numbers_of(own), numbers, strict=True):
            body.known[x] = value
        cov: dict[Any, Array] = {}  # (u, v, which): (S, k, k')
        done: set[Node] = set()
        moments: dict[Any, Array] = {}

        def atoms(a: Atom | None, b: Atom | None, k: int) -> Array | None:
            """E[a_t b_s] for all s: (S, k, k')."""
            if a is None and b is None:
                return None
            S = others[k].stage.loop.length
            there = q if k == 0 else given.variances  # type: ignore[union-attr]
            left = {u: q[u][t] for u, _ in a.factors} if a else {}
            pairs = {
                (u, v): cov[u, v, k] for u, _ in (a.factors if a else ()) for v, _ in (b.factors if b else ())
                if linked[u, v, k]
            }  # fmt: skip

            def one(s: Any, cs: dict[int, Array]) -> Array:
                get = dict(zip(pairs, cs.values(), strict=True))
                right = {v: there[v][s] for v, _ in b.factors} if b else {}
                return split.inner(
                    a or Atom(()), b or Atom(()), t, s, (left, right), lambda u, v: linked[u, v, k],
                    lambda u, v: get[u, v],
                )  # fmt: skip

            return jax.vmap(one)(jnp.arange(S), dict(enumerate(pairs.values())))

        def moment(x: Node, y: Node, k: int) -> Array:
            """E[x_t y_s] of operands for all s: (S, F..., F'...)."""
            H, there, means = rows[k][0], (stored if k == 0 else given.operands), (m if k == 0 else given.means)  # type: ignore[union-attr]
            o = others[k]
            S = o.stage.loop.length
            theirs = parts[y] if k == 0 else o.outer(y)
            total: Any = 0.0
            for i, p in enumerate(parts[x]):
                a = stored[x, i][t]
                low = a[:, 0] + dot(a[:, 1:], m[t][None], 1)  # <a, 1>
                high = a[:, 0][None, :, None] * means[:S, None] + dot(a[None, :, 1:, None], H[:S, None], 2)
                for j, r in enumerate(theirs):
                    b = there[y, j]
                    value = (
                        jnp.einsum("km,slm->skl", low, b[:, :, 0]) + jnp.einsum("skdm,sldm->skl", high, b[:, :, 1:])
                    ) / M
                    factor = atoms(p.atom, r.atom, k)
                    total = total + (value if factor is None else value * factor)
            return total.reshape(S, *x.shape[1:], *y.shape[1:])

        def row(u: Node, v: Node, k: int) -> Array:
            """Cov(u_t, v_s) for all s: (S, k, k')."""
            o = others[k]
            needs = [(x, y) for x in stage.needs[u] for y in o.stage.needs[v]]
            for x, y in needs:
                if (x, y, k) not in moments:
                    moments[x, y, k] = moment(x, y, k)
            here = {f"{i}": moments[x, y, k] for i, (x, y) in enumerate(needs)}
            # a mean alone is an inner product with one
            alone = {x: _expected(own, parts[x], [stored[x, i][t] for i in range(len(parts[x]))], m[t], q, t)
                     for x in stage.needs[u]}  # fmt: skip
            theirs = {y: (_all_expected(others[k], y, stored if k == 0 else given.operands, m if k == 0 else given.means,  # type: ignore[union-attr]  # noqa: E501
                          q if k == 0 else given.variances)) for y in o.stage.needs[v]}  # type: ignore[union-attr]  # fmt: skip

            def one(s: Any, here: dict[str, Array]) -> Array:
                def get(x: Node | None, y: Node | None) -> Array:
                    if x is None or y is None:
                        return alone[x].reshape(x.shape[1:]) if y is None else theirs[y][s].reshape(y.shape[1:])  # type: ignore[index,union-attr]
                    return here[f"{needs.index((x, y))}"]

                cell = stage.cell(o.stage, t, s, get, tables)
                value = covariance(stage.gram, None, cell, u, v, False)
                return jnp.zeros((size(u), size(v)), dtype) if value is ZERO else value.astype(dtype)

            return jax.vmap(one)(jnp.arange(o.stage.loop.length), here)

        for u in stage.gaussians:
            for x in stage.needs[u]:
                if x not in done:
                    done.add(x)
                    for i, p in enumerate(parts[x]):
                        stored[x, i] = stored[x, i].at[t].set(body.rows(x, p)[:, : 1 + c])
            for k, o in enumerate(others):
                for v in o.stage.gaussians:
                    if linked[u, v, k]:
                        cov[u, v, k] = row(u, v, k)
            if u in own.integrated:
                q[u] = q[u].at[t].set(jnp.maximum(jnp.diagonal(cov[u, u, 0][t]), 0) if linked[u, u, 0] else 0.0)
                continue
            i, group = next((i, g) for i, g in enumerate(groups) if u in g.members)
            zero = lambda v, k: jnp.zeros((others[k].stage.loop.length, size(u), size(v)), dtype)  # noqa: B023, E731
            here = jnp.concatenate([cov.get((u, v, 0), zero(v, 0)) for v in group.members], -1)
            offset = sum(size(v) for v in group.members[: group.members.index(u)])
            k, width = size(u), sum(map(size, group.members))
            block = here[t][:, offset : offset + k]
            past = (jnp.arange(T)[:, None] * width + jnp.arange(width)) < t * width + offset
            here = jnp.where(past[:, None, :], here, jnp.zeros((), dtype))
            pieces = [jnp.concatenate([cov.get((u, v, 1), zero(v, 1)) for v in f.members], -1) for f in group.given]
            flat = jnp.concatenate([jnp.moveaxis(p, 1, 0).reshape(k, -1) for p in (*pieces, here)], 1)
            start = flat.shape[1] - T * width + t * width + offset
            L, xi = factors[i]
            value, factors[i] = paths.draw(L, xi, flat, block, fresh[u].reshape(k, M), start)
            body.known[u] = value.reshape(*u.shape[1:], M)

        # covariances at this step with what was drawn later at it
        for (u, v, k), value in list(cov.items()):
            if k == 0 and stage.gaussians.index(v) > stage.gaussians.index(u):
                cov[u, v, k] = value.at[t].set(cov[v, u, k][t].T)
        current = {u: q[u][t] for u in own.integrated}
        Et = jnp.concatenate([jnp.zeros((0,), dtype), *(split.mean(a, t, current).astype(dtype) for a in own.atoms)])
        E = E.at[t].set(Et)

        def gram(k: int) -> Array:
            table: list[list[Any]] = [[atoms(a, b, k) for b in others[k].atoms] for a in own.atoms]
            if not table or not table[0]:
                shape = (others[k].stage.loop.length, n, others[k].columns - 1 - others[k].carries)
                return jnp.zeros(shape, dtype)
            return jnp.concatenate([jnp.concatenate(row, -1) for row in table], -2).astype(dtype)

        after = [
            x
            for x, y in zip(stage.loop.carries, stage.loop.nexts, strict=True)
            if x is not None and x not in own.numbers
        ]
        nexts = dict(zip(stage.loop.carries, stage.loop.nexts, strict=True))
        Bt = jnp.concatenate([jnp.zeros((0, own.columns, M), dtype), *(
            jnp.broadcast_to(w, (*x.shape[1:], *w.shape[-2:])).reshape(size(x), own.columns, M)
            for x in after for w in [body.wide(body.vector(nexts[x]))]
        )])  # fmt: skip
        B = B.at[t].set(Bt)
        b0, bh, ba = Bt[:, 0], Bt[:, 1 : 1 + c], Bt[:, 1 + c :]
        m = m.at[t + 1].set(b0 + dot(bh, m[t][None], 1) + dot(ba, Et[None, :, None], 1))
        new_rows = []
        for k in range(len(others)):
            H, A = rows[k]
            K = gram(k)
            Bs, ms, Es = (B, m, E) if k == 0 else (given.steps, given.means, given.atoms)  # type: ignore[union-attr]
            Q = across(Et, K, Bs, ms)
            if k == 0:
                A = A.at[:, :, t].set(jnp.moveaxis(Q[:, :, t], 0, 1))
                H = H.at[t + 1].set(jnp.swapaxes(advance(Bt, m[t], H[t], Q[:, :, t]), 0, 1))
            new_rows.append(
                (jax.vmap(lambda h, mm, qq: advance(Bt, mm, h, qq))(H, ms, jnp.moveaxis(Q, 2, 0)), along(Bt, Es, A, K))
            )
        numbers_after = [stage.sample(body, nexts[x], M) for x in numbers_of(own)]
        drawn = jnp.concatenate([jnp.zeros((0, M), dtype), *(body.known[u].reshape(size(u), M) for u in own.drawn)])
        kept = {key: cov[key] for key in cov if key[0] in own.integrated}
        keys[:] = list(kept)
        out = (numbers, drawn, list(kept.values()))
        return (
            numbers_after, [stored[p] for p in places], factors, [q[u] for u in own.integrated], B, m, E, new_rows,
        ), out  # fmt: skip

    keys: list[Any] = []
    rows = []
    for k, o in enumerate(others):
        S, d, e = o.stage.loop.length, o.carries, o.columns - 1 - o.carries
        H, A = jnp.zeros((S + 1, c, d, M), dtype), jnp.zeros((c, e, S, M), dtype)
        if k == 0:
            H = H.at[0].set(first[:, None] * first[None])
        else:
            H = first[None, :, None] * given.means[:, None]  # type: ignore[union-attr]
            A = first[:, None, None] * jnp.moveaxis(given.atoms, 0, 1)[None, :, :, None]  # type: ignore[union-attr]
        rows.append((H, A))
    state = (
        _starts(own, M, False),
        [jnp.zeros((T, size(x), 1 + c, M), dtype) for x, _ in places],
        [g.start(T, M, dtype) for g in groups],
        [jnp.zeros((T, size(u)), dtype) for u in own.integrated],
        jnp.zeros((T, c, own.columns, M), dtype),
        jnp.zeros((T + 1, c, M), dtype).at[0].set(first),
        jnp.zeros((T, n), dtype),
        rows,
    )
    with sealed(stage.gram):
        (_, stored, factors, q, B, m, E, _), (numbers, drawn, kept) = lax.scan(step, state, (jnp.arange(T), normals))
    stage.gram.graph.sampler.hold(M, normals, numbers, drawn, stored, [xi for _, xi in factors], B, m, rows)
    found = dict(zip(keys, kept, strict=True))
    earlier = (jnp.arange(T)[:, None] >= jnp.arange(T))[:, :, None, None]
    mine = {
        (u, v): jnp.where(earlier, value, jnp.transpose(found[v, u, 0], (1, 0, 3, 2)))
        for (u, v, k), value in found.items() if k == 0
    }  # fmt: skip
    return Conditional(
        own, numbers, drawn, [Factor(g.members, *f) for g, f in zip(groups, factors, strict=True)],
        dict(zip(places, stored, strict=True)), B, m, E, dict(zip(own.integrated, q, strict=True)),
        mine, {(u, v): value for (u, v, k), value in found.items() if k == 1},
    )  # fmt: skip


def across(E: Array, K: Array, B: Array, means: Array) -> Array:
    """<psi, h'_{s-1}> for s = 0..S, (n, c', S + 1, M).

    From E psi (n,), <psi, psi'_s> (S, n, n') and B' (S, c', columns, M).
    """
    c = B.shape[1]

    def over_s(q: Array, at: Any) -> Any:
        Ks, Bs = at
        new = E[:, None, None] * Bs[None, :, 0] + dot(q[:, None], Bs[None, :, 1 : 1 + c], 2)
        new = new + dot(Ks[:, None, :, None], Bs[None, :, 1 + c :], 2)
        return new, new

    start = E[:, None, None] * means[0][None]
    _, rest = lax.scan(over_s, start, (K, B))
    return jnp.moveaxis(jnp.concatenate([start[None], rest]), 0, 2)


def advance(B: Array, mean: Array, H: Array, Q: Array) -> Array:
    """<h_t, h'> from <1, h'> (c', M), <h_{t-1}, h'> (c, c', M) and <psi_t, h'> (n, c', M)."""
    c = B.shape[0]
    value = B[:, 0][:, None] * mean[None] + dot(B[:, 1 : 1 + c, None], H[None], 1)
    return value + dot(B[:, 1 + c :, None], Q[None], 1)


def along(B: Array, E: Array, A: Array, K: Array) -> Array:
    """<h_t, psi'_s> for all s: (c, n', S, M)."""
    c = B.shape[0]
    value = B[:, 0][:, None, None] * jnp.moveaxis(E, 0, 1)[None, :, :, None]
    value = value + dot(B[:, 1 : 1 + c, None, None], A[None], 1)
    return value + dot(B[:, 1 + c :, None, None], jnp.transpose(K, (1, 2, 0))[None, ..., None], 1)


def numbers_of(own: Split) -> list[Node]:
    """The carries that are numbers given what is sampled."""
    return [x for x in own.stage.carried if x in own.numbers]


def _starts(own: Split, M: int, vectors: bool) -> list[Array]:
    values = zip(own.stage.carried, own.stage.first(M), strict=True)
    return [v for x, v in values if (x in own.numbers) is not vectors]


def drawn_apart(own: Split, z: Array) -> list[Array]:
    """(K, M) as one array for each Gaussian that is drawn."""
    ends = np.cumsum([size(u) for u in own.drawn])
    return list(jnp.split(z, ends[:-1])) if len(ends) else []


def _groups(own: Split, given: Conditional | None) -> list[paths.Group]:
    """The families that are drawn, and those of the given path that they depend on."""
    out = []
    for number in dict.fromkeys(own.family[u] for u in own.drawn):
        members = [u for u in own.drawn if own.family[u] == number]
        factors = [
            f for f in (given.factors if given is not None else [])
            if any(own.stage.asked(given.split.stage, u, v)[0] for u in members for v in f.members)  # type: ignore[union-attr]
        ]  # fmt: skip
        out.append(paths.Group(members, factors))
    return out


def _expected(own: Split, parts: list[Part], rows: list[Array], mean: Array, variances: Any, t: Any) -> Array:
    """E[x_t], (k,): `rows` (k, 1 + c or columns, M)."""
    total: Any = 0.0
    for p, a in zip(parts, rows, strict=True):
        c = mean.shape[0]
        value = (a[:, 0] + dot(a[:, 1 : 1 + c], mean[None], 1)).mean(-1)
        if p.atom is not None:
            value = value * split.mean(p.atom, t, {u: variances[u][t] for u, _ in p.atom.factors})
        total = total + value
    return total


def _all_expected(own: Split, y: Node, stored: Any, means: Array, variances: Any) -> Array:
    parts = own.outer(y)
    T = own.stage.loop.length
    used = {u: variances[u] for p in parts if p.atom for u, _ in p.atom.factors}
    rows = [stored[y, i] for i in range(len(parts))]
    one = lambda t: _expected(own, parts, [r[t] for r in rows], means[t], used, t)  # noqa: E731
    return jax.vmap(one)(jnp.arange(T))


__all__ = ["Conditional", "across", "advance", "along", "drawn_apart", "numbers_of", "simulate"]
