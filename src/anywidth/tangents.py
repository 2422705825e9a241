r"""The neural tangent kernel of a gated loop from its sample paths, at the cost of the paths.

By Price's theorem d/d eps E[Y Y'] = sum_kl E[d_k Y d_l Y'] dC_kl, with C the covariances of the Gaussians of one
copy with those of the other: the covariance of the tangents of Y and Y' when the Gaussians move in a random
direction (eta, eta') independent of them with Cov(eta_k, eta'_l) = dC_kl. The direction is integrated exactly. At a
sample point the tangents are linear recursions

    dh_t = A_t dh_{t-1} + B_t eta_t,                      A_t, B_t the derivatives of the body at that point,

so their covariances with those of the other copy are too. With x_t = (dh_{t-1}, eta_t) and G_ts = Cov(x_t, x'_s),

    Cov(dh_t, dh'_s) = J_t G_ts J'_s^T,   Cov(dh_t, eta'_s) = J_t G_ts[:, eta'],   J_t = (A_t, B_t),

    G_ts = [ Cov(dh_{t-1}, dh'_{s-1})   Cov(dh_{t-1}, eta'_s) ]
           [ Cov(eta_t, dh'_{s-1})      dC_ts                 ],

and dC_ts is the derivative of fact 2, which needs the means over the sample points of the covariances of the
tangents of the operands at (t, s), functions of G_ts. A scan over t carries the row over s; time T^2 M.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from anywidth.cells import covariance, size
from anywidth.inner import ZERO, Gram
from anywidth.kets import Carry, Node
from anywidth.paths import Path, Stage, mean_outer
from anywidth.recursions import sealed

Array = Any


@dataclass(frozen=True, eq=False)
class Columns:
    """What a node of the body depends on: entries of x_t = (carries, Gaussians), flattened."""

    stage: Stage

    @property
    def carries(self) -> int:
        """How many of the entries are carries."""
        return sum(map(size, self.stage.carried))

    def of_carry(self, x: Node) -> range:
        """The entries of a carry."""
        start = sum(map(size, self.stage.carried[: self.stage.carried.index(x)]))
        return range(start, start + size(x))

    def of_gaussian(self, u: Node) -> range:
        """The entries of a Gaussian."""
        i = self.stage.gaussians.index(u)
        start = self.carries + sum(map(size, self.stage.gaussians[:i]))
        return range(start, start + size(u))

    def of(self, x: Node) -> np.ndarray:
        """The entries that a node of the body is a function of."""
        found: set[int] = set()
        seen: set[Node] = set()

        def walk(y: Node) -> None:
            if y in seen:
                return
            seen.add(y)
            if y in self.stage.gaussians:
                found.update(self.of_gaussian(y))
                return
            if isinstance(y, Carry):
                found.update(self.of_carry(y))
            for z in self.stage.children(y):
                walk(z)

        walk(x)
        return np.array(sorted(found), int)


def derivatives(stage: Stage, path: Path, outputs: Sequence[Node]) -> Array:
    """The derivatives of the flattened outputs in (carries, Gaussians) at every step: (T, outputs, p, M)."""
    M = path.gaussians.shape[-1]
    shapes = [x.shape[1:] for x in stage.carried]

    def at(t: Any, carries: list[Array], gaussians: Array) -> Array:
        def body(x: Array) -> Array:
            flat, u = jnp.split(x, [x.shape[0] - stage.count])
            ends = np.cumsum([size(c) for c in stage.carried])[:-1]
            h = [v.reshape(*shape, M) for v, shape in zip(jnp.split(flat, ends), shapes, strict=True)]
            sampled = stage.at(t, h, u)
            return jnp.concatenate([stage.sample(sampled, y, M).reshape(-1, M) for y in outputs])

        x = jnp.concatenate([*(h.reshape(-1, M) for h in carries), gaussians])
        p = x.shape[0]
        directions = jnp.broadcast_to(jnp.eye(p, dtype=x.dtype)[:, :, None], (p, p, M))
        return jnp.moveaxis(jax.vmap(lambda d: jax.jvp(body, (x,), (d,))[1])(directions), 0, 1)

    return lax.map(lambda a: at(*a), (jnp.arange(stage.loop.length), path.carries, path.gaussians))


def slopes(gram: Gram, left: Path, right: Path, a: Node, b: Node) -> Array:
    """d/d eps E[a_t b_s] for a node of either loop, for all t and s: (T, F..., S, F'...)."""
    one, two = left.stage, right.stage
    dtype = jnp.result_type(one.dtype, two.dtype)
    M = left.gaussians.shape[-1]
    pairs: list[tuple[Node, Node]] = []  # of Gaussians whose covariance has a derivative
    wanted: dict[tuple[Node | None, Node | None], None] = {}
    tables: dict[Any, Any] = {}

    def note(x: Node | None, y: Node | None) -> Array:
        wanted[x, y] = None
        return jnp.ones((*(x.shape[1:] if x is not None else ()), *(y.shape[1:] if y is not None else ())), dtype)

    # what is computed outside: values, and derivatives in a epsilon of our own
    zero = jnp.zeros((), dtype)
    for u in one.gaussians:
        for v in two.gaussians:
            cell = one.cell(two, 0, 0, note, tables)
            if covariance(gram, zero, cell, u, v, True) is not ZERO:
                pairs.append((u, v))
    keys = list(tables)

    def outside(e: Array) -> list[Any]:
        own = Gram(gram.graph, e, memo={k: v for k, v in gram.memo.items() if not k[2]}, solved=unperturbed(gram))
        values = [own(x, y, eps) for x, y, eps in keys]
        return [None if v is ZERO else jnp.asarray(v, dtype) for v in values]

    values, moving = jax.jvp(outside, (zero,), (jnp.ones((), dtype),))
    steady = {key: ZERO if v is None else (v, d) for key, v, d in zip(keys, values, moving, strict=True)}
    moments = {
        (x, y): jnp.moveaxis(mean_outer(left.operands[x], right.operands[y]), x.rank, 1)
        for x, y in wanted
        if x is not None and y is not None
    }
    first, second = Columns(one), Columns(two)
    c, d = first.carries, second.carries

    outs = [[*s.operands, *(x for x in s.loop.nexts if x is not None), r] for s, r in ((one, a), (two, b))]
    J, K = derivatives(one, left, outs[0]), derivatives(two, right, outs[1])
    rows = [_places(o) for o in outs]
    n_operands = [len(s.operands) for s in (one, two)]

    def bilinear(Jt: Array, G: Array, Ks: Array, i: int, j: int) -> Array:
        """Cov of the tangents of output i of the left and j of the right one: (k, k', M)."""
        p, q = first.of(outs[0][i]), second.of(outs[1][j])
        return _times(Ks[rows[1][j]][:, q], _times(Jt[rows[0][i]][:, p], G[p][:, q]), 1)

    nexts = [list(range(n, len(o) - 1)) for n, o in zip(n_operands, outs, strict=True)]
    next_rows = [np.concatenate([rows[side][i] for i in nexts[side]]) for side in (0, 1)]

    def moved_covariance(
        u: Node, v: Node, t: Any, s: Any, G: Array, Jt: Array, Ks: Array, known: dict[Any, Array]
    ) -> Array:
        """d/d eps Cov(u_t, v_s); `known` holds the derivatives of inner products of operands."""

        def moment(x: Node | None, y: Node | None) -> tuple[Array, Array]:
            if x is None or y is None:
                path, at, node = (left, t, x) if y is None else (right, s, y)
                mean = path.operands[node][at].mean(-1)  # type: ignore[index]
                return mean, jnp.zeros_like(mean)
            if (x, y) not in known:
                slope = bilinear(Jt, G, Ks, one.operands.index(x), two.operands.index(y)).mean(-1)
                known[x, y] = slope.reshape(*x.shape[1:], *y.shape[1:])
            return moments[x, y][t, s], known[x, y]

        def at(e: Array) -> Array:
            def table(_: Gram, x: Node, y: Node, eps: bool) -> Any:
                pair: Any = steady[x, y, eps]
                return ZERO if pair is ZERO else _moved(pair, e)

            cell = one.cell(two, t, s, lambda x, y: _moved(moment(x, y), e), {})
            cell.table = table
            return jnp.asarray(covariance(gram, e, cell, u, v, True), dtype)

        return jax.jvp(at, (zero,), (jnp.ones((), dtype),))[1]

    def cell_of(t: Any, s: Any, before: Array, along: Array, up: Array, Jt: Array, Ks: Array) -> Any:
        """`before`: Cov(dh_{t-1}, dh'_{s-1}), `along`: Cov(dh_{t-1}, eta'_s), `up`: Cov(eta_t, dh'_{s-1})."""
        G = jnp.concatenate(
            [jnp.concatenate([before, along], 1), jnp.concatenate([up, jnp.zeros((one.count, two.count, M), dtype)], 1)]
        )
        known: dict[Any, Array] = {}
        for u, v in pairs:
            p, q = first.of_gaussian(u), second.of_gaussian(v)
            moves = moved_covariance(u, v, t, s, G, Jt, Ks, known)
            G = G.at[p.start : p.stop, q.start : q.stop].set(
                jnp.broadcast_to(moves[:, :, None], (len(p), len(q), M)).astype(dtype)
            )
        Jn, Kn = Jt[next_rows[0]], Ks[next_rows[1]]
        H = _times(Jn, G)  # Cov(dh_t, x'_s)
        new_before = _times(Kn, H, 1)
        new_up = _times(Kn, G[c:], 1)  # Cov(eta_t, dh'_s)
        out = bilinear(Jt, G, Ks, len(outs[0]) - 1, len(outs[1]) - 1).mean(-1)
        return new_before, H[:, d:], new_up, out

    S = two.loop.length

    def over_t(state: Any, at: Any) -> Any:
        t, Jt = at
        before, along = state  # rows over s, of the step before

        def over_s(up: Array, at_s: Any) -> Any:
            s, Ks, b_s, a_s = at_s
            new_before, new_along, new_up, out = cell_of(t, s, b_s, a_s, up, Jt, Ks)
            return new_up, (new_before, new_along, out)

        shifted = jnp.concatenate([jnp.zeros_like(before[:1]), before[:-1]])
        up = jnp.zeros((one.count, d, M), dtype)
        _, (before, along, out) = lax.scan(over_s, up, (jnp.arange(S), K, shifted, along))
        return (before, along), out

    start = (jnp.zeros((S, c, d, M), dtype), jnp.zeros((S, c, two.count, M), dtype))
    with sealed(gram):
        _, out = lax.scan(over_t, start, (jnp.arange(one.loop.length), J))
    T = one.loop.length
    return jnp.moveaxis(out, 1, 2).reshape(T, *a.shape[1:], S, *b.shape[1:])


def _times(J: Array, G: Array, axis: int = 0) -> Array:
    """J times G along an axis of G, sample by sample (the last axis): (k, p, M) and (p, q, M) or (q, p, M).

    Written out, for there are few p: XLA:CPU (jaxlib 0.10) crashes on some fused reductions of so many axes in float32.
    """
    place = lambda x: x[:, None] if axis == 0 else x[None]  # noqa: E731
    terms = [place(J[:, p]) * lax.index_in_dim(G, p, axis) for p in range(J.shape[1])]
    return sum(terms[1:], terms[0])


def _moved(pair: tuple[Array, Array], e: Array) -> Array:
    return pair[0] + e * pair[1]


def _places(outputs: Sequence[Node]) -> list[np.ndarray]:
    ends = np.cumsum([0, *map(size, outputs)])
    return [np.arange(i, j) for i, j in itertools.pairwise(ends)]


def unperturbed(gram: Gram) -> dict[Any, Any]:
    """What is solved already and does not depend on epsilon."""
    return {place: {k: v for k, v in known.items() if not k[-1]} for place, known in gram.solved.items()}


__all__ = ["slopes"]
