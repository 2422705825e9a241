r"""Sample paths of a loop whose carry is needed beyond inner products (GRU, LSTM, any gated cell).

The coordinates of the carry are i.i.d. copies of one random sequence, a function of the Gaussians that the products
in the body become: "the same equations with the width axis replaced by the sample axis". So the body is run on M
sample points. At step t the Gaussian u_t (a sum of products with parameters) is drawn given all earlier ones. Its
covariances are those of fact 2,

    Cov(u_t, u_s) = [what does not depend on the carry, exact] + sum over shared parameters var * E[o_t o_s],

with o the operand of the parameter and E the mean over the sample points. The covariance matrix of all Gaussians so
far is therefore an empirical Gram matrix plus an exact one, positive semidefinite whatever M is; a row is appended
to its Cholesky factor at every step, and a pivot of zero means no fresh randomness: the same input on both sides gives
the same path on both sides. The second copy of the network is drawn given the whole path of the first one, so lengths
need not agree. Gaussians that no parameter links are drawn apart (families), each with a factor of its own.

Time T^2 M, memory T M; a `lax.scan` over t, so that the time to compile does not depend on T.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.linalg import block_diag, solve_triangular

from anywidth import expr
from anywidth.cells import Cell, covariance, pure, read, size, timed
from anywidth.errors import NeedsUnroll
from anywidth.expect.points import normals
from anywidth.expect.sampler import FixedCount, Sampler
from anywidth.frames import Loop
from anywidth.inner import ZERO, Gram, weighted_sum
from anywidth.kets import Carry, Const, Contract, Graph, Node, Pointwise, Sum, View
from anywidth.recursions import sealed
from anywidth.views import Dyn, Index, ViewMap

Array = Any


# --- the body on sample points --------------------------------------------------------------------------------


@dataclass(eq=False)
class Sampled:
    """The nodes of a loop's body at step t, each an array (finite axes..., M).

    `known` holds the carries and the Gaussians.
    """

    graph: Graph
    loop: Loop
    t: Any
    known: dict[Node, Array]
    starts: dict[Node, Node] = field(default_factory=dict)  # of carries that start random

    def __call__(self, x: Node) -> Array:
        """The samples of a node."""
        if x not in self.known:
            self.known[x] = self.compute(x)
        return self.known[x]

    def carry(self, x: Node, value: Array) -> None:
        """A carry before this step; one that starts random is a function of the Gaussians of the first step."""
        if x in self.starts:
            value = jnp.where(self.t == 0, self(self.starts[x]).astype(value.dtype), value)
        self.known[x] = value

    def compute(self, x: Node) -> Array:
        """The samples of a node that is not known yet."""
        rank = x.rank - 1
        if isinstance(x, View) and timed(self.loop, x.operand) and x.view.entries[0] == 0:
            entries = [e - 1 if isinstance(e, int) else Index(self.now(e.array)) for e in x.view.entries[1:]]
            return _read_samples(self(x.operand), entries, rank)
        if isinstance(x, View):
            pushed = self.graph.push(x)
            if pushed is x:
                raise NeedsUnroll("the states of another loop are used coordinate by coordinate")
            return self(pushed)
        if isinstance(x, Const):
            return self.now(x.array)[..., None]
        if isinstance(x, Sum):
            return sum(self(t) if c is None else _coefficient(self.now(c)) * self(t) for c, t in x.terms)
        if isinstance(x, Contract):
            value = jnp.moveaxis(self(x.operand), -1, 0)
            coef = None if x.coef is None else self.now(x.coef)[None]
            full = np.broadcast_shapes(x.operand.shape, np.shape(x.coef) if x.coef is not None else ())
            return jnp.moveaxis(weighted_sum(coef, value, x.contracted, full[len(full) - x.contracted :]), 0, -1)
        if isinstance(x, Pointwise):
            coefs = [_coefficient(self.now(c)) for c in x.coefs]
            value = jnp.asarray(expr.evaluated(x.expr, [self(a) for a in x.args], coefs))
            return value.astype(jnp.result_type(*(self(a).dtype for a in x.args)))
        raise NeedsUnroll("a carry is read at another step than its own")

    def now(self, a: Any) -> Any:
        """An array of the loop, the time being its first axis, at this step."""
        if np.ndim(a) == 0:
            return a
        return a[0] if np.shape(a)[0] == 1 else jnp.asarray(a)[self.t]


def _coefficient(c: Any) -> Any:
    return c if np.ndim(c) == 0 else c[..., None]


def _read_samples(value: Array, entries: Sequence[Any], rank: int) -> Array:
    return read(value, (*entries, rank), rank + 1)


# --- what is drawn --------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Stage:
    """A gated loop ready to be sampled: its Gaussians in the order they are drawn, and the operands they need."""

    gram: Gram
    loop: Loop
    roots: Sequence[Node]
    gaussians: list[Node] = field(default_factory=list)
    needs: dict[Node, list[Node]] = field(default_factory=dict)  # of each Gaussian: operands that depend on the carry
    couplings: set[tuple[Node, Node]] = field(default_factory=set)
    starts: dict[Node, Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        g = self.gram.graph
        for node, init in zip(self.loop.carries, self.loop.inits, strict=True):
            if node is not None and not isinstance(init, Const):
                self.starts[node] = g.view(init, ViewMap(init.rank + 1, tuple(range(1, init.rank + 1))))
        found: list[Node] = []
        seen: set[Node] = set()
        for x in (*self.loop.nexts, *self.starts.values(), *self.roots):
            if x is not None:
                self._within(x, found, seen)
        for u in found:  # which grows
            self.needs[u] = list(dict.fromkeys(x for v in found for x in self.asked(self, u, v)[1]))
            for x in self.needs[u]:
                self._within(x, found, seen)
        self.couplings = {(u, v) for u in found for v in found if self.asked(self, u, v)[0]}
        for u in (*(v for x in self.starts.values() for v in self.within(x)), *found):
            self._order(u)

    def _order(self, u: Node) -> None:
        if u in self.gaussians:
            return
        for x in self.needs[u]:
            for v in self.within(x):
                self._order(v)
        self.gaussians.append(u)

    def within(self, x: Node) -> list[Node]:
        """The Gaussians of this step that a sample of x is a function of."""
        found: list[Node] = []
        self._within(x, found, set())
        return found

    def _within(self, x: Node, found: list[Node], seen: set[Node]) -> None:
        if x in seen:
            return
        seen.add(x)
        if pure(x):
            found += [x] if x not in found else []
            return
        for child in self.children(x):
            self._within(child, found, seen)

    def children(self, x: Node) -> Sequence[Node]:
        """What a node of the body, not a Gaussian, is computed from in the same step."""
        if isinstance(x, Carry) and x.loop is self.loop:
            return [self.starts[x]] if x in self.starts else []
        if isinstance(x, View):
            if timed(self.loop, x.operand):
                return [x.operand]
            pushed = self.gram.graph.push(x)
            if pushed is x:
                raise NeedsUnroll("the states of another loop are used coordinate by coordinate")
            return [pushed]
        if isinstance(x, Carry):
            raise NeedsUnroll("the states of another loop are used coordinate by coordinate")
        if isinstance(x, Sum):
            return [t for _, t in x.terms]
        if isinstance(x, Contract):
            return [x.operand]
        return x.args if isinstance(x, Pointwise) else []

    def asked(self, other: Stage, u: Node, v: Node, eps: bool = False) -> tuple[bool, list[Node], list[Node]]:
        """Whether Cov(u, v) is nonzero, and the operands of either side that it asks for."""
        left: list[Node] = []
        right: list[Node] = []

        def moment(a: Node | None, b: Node | None) -> Array:
            left.extend([a] if a is not None else [])
            right.extend([b] if b is not None else [])
            return jnp.ones((*(a.shape[1:] if a is not None else ()), *(b.shape[1:] if b is not None else ())))

        epsilon = jnp.zeros((), self.dtype_of(u)) if eps else None
        value = covariance(self.gram, epsilon, self.cell(other, 0, 0, moment, {}), u, v, eps)
        return value is not ZERO, left, right

    def cell(self, other: Stage, t: Any, s: Any, moment: Callable[..., Any], tables: dict[Any, Any]) -> Cell:
        """The frame for covariances of this loop at step t with another at step s."""
        outside = self.gram  # the inner products of what does not depend on the carries
        return Cell(
            self.loop, other.loop, Dyn(jnp.asarray(t)), Dyn(jnp.asarray(s)), moment, tables,
            lambda _, a, b, eps: outside(a, b, eps),
        )  # fmt: skip

    @staticmethod
    def dtype_of(u: Node) -> Any:
        """That of its parameters."""
        return jnp.result_type(*(leaf.var.dtype for leaf in u.leaves))

    @property
    def dtype(self) -> Any:
        """That of the samples."""
        return jnp.result_type(*map(self.dtype_of, self.gaussians))

    @property
    def count(self) -> int:
        """How many numbers are drawn at a step."""
        return sum(map(size, self.gaussians))

    def normals(self, copy: int, name: str, count: int | None = None) -> Array:
        """(T, K, M) standard normals: the points' first dimensions belong to the first steps, of both copies.

        Or, where the sampler knows a rotation for what is drawn, to what has the largest variance.
        """
        sampler: Sampler = self.gram.graph.sampler
        if not isinstance(sampler.count, int):
            raise FixedCount
        T, K = self.loop.length, self.count if count is None else count
        points = normals(sampler.net(2 * T * K), 0, sampler.count, self.dtype)
        points = points.T.reshape(T, 2, K, -1)[:, copy]
        if (Q := sampler.rotations.get(name)) is None:
            return points
        return jnp.matmul(Q, points.reshape(T * K, -1), precision="highest").reshape(points.shape)

    @property
    def operands(self) -> list[Node]:
        """Those whose inner products the covariances need."""
        return list(dict.fromkeys(x for u in self.gaussians for x in self.needs[u]))

    def at(self, t: Any, carries: Sequence[Array], gaussians: Array | None = None) -> Sampled:
        """The body at step t from the carries before it and the Gaussians (K, M), unless these are yet to be drawn."""
        sampled = Sampled(self.gram.graph, self.loop, t, {}, self.starts)
        if gaussians is not None:
            for u, value in zip(self.gaussians, self.split(gaussians), strict=True):
                sampled.known[u] = value
            self.enter(sampled, carries)
        return sampled

    def enter(self, sampled: Sampled, carries: Sequence[Array]) -> None:
        """Puts the carries in, once the Gaussians that some of them start from are there."""
        for x, value in zip(self.carried, carries, strict=True):
            sampled.carry(x, value)

    def split(self, gaussians: Array) -> list[Array]:
        """(K, M) as one array (finite axes..., M) for each Gaussian."""
        ends = np.cumsum([size(u) for u in self.gaussians])
        pieces = jnp.split(gaussians, ends[:-1])
        return [p.reshape(*u.shape[1:], -1) for u, p in zip(self.gaussians, pieces, strict=True)]

    @property
    def carried(self) -> list[Node]:
        """The carries that are random vectors."""
        return [x for x in self.loop.carries if x is not None]

    def first(self, M: int) -> list[Array]:
        """The carries before the first step, (finite axes..., M)."""
        out = []
        for x, init in zip(self.loop.carries, self.loop.inits, strict=True):
            if x is not None:
                array = jnp.asarray(init.array)[..., None] if isinstance(init, Const) else jnp.zeros((1,) * x.rank)
                out.append(jnp.broadcast_to(array.astype(self.dtype), (*x.shape[1:], M)))
        return out

    def sample(self, sampled: Sampled, x: Node, M: int) -> Array:
        """The samples of a node in full: (finite axes..., M)."""
        return jnp.broadcast_to(sampled(x), (*x.shape[1:], M)).astype(self.dtype)


# --- drawing --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Factor:
    """u = L xi for a family of Gaussians at all steps: rows ordered by time, then as in `members`."""

    members: list[Node]
    L: Array  # (N, N), zero columns where there was nothing to draw
    xi: Array  # (N, M)


def fresh_factor(factors: Sequence[Factor], drawn: Sequence[Node], T: int) -> Array:
    """(T K, T K): what the Gaussians of all families are of their own noise, rows and columns as in `normals`."""
    ends = np.cumsum([0, *map(size, drawn)])
    places = {u: np.arange(i, j) for u, (i, j) in zip(drawn, itertools.pairwise(ends), strict=True)}
    K = int(ends[-1])
    out = jnp.zeros((T * K, T * K), factors[0].L.dtype)
    for f in factors:
        index = (np.arange(T)[:, None] * K + np.concatenate([places[u] for u in f.members])).ravel()
        out = out.at[np.ix_(index, index)].set(f.L[-len(index) :, -len(index) :])
    return out


@dataclass(frozen=True, eq=False)
class Path:
    """A loop on M sample points, at all steps."""

    stage: Stage
    carries: list[Array]  # before each step: (T, finite axes..., M)
    gaussians: Array  # (T, K, M)
    operands: dict[Node, Array]  # (T, finite axes..., M)
    factors: list[Factor]


def simulate(stage: Stage, normals: Array, given: Path | None = None) -> Path:
    """The loop on M sample points, given the path of another copy (or loop); `normals` is (T, K, M)."""
    T, _, M = normals.shape
    dtype = stage.dtype
    groups = _groups(stage, given)
    tables: dict[Any, Any] = {}
    for u in stage.gaussians:  # what is computed outside, before the scan
        for other in (stage,) if given is None else (stage, given.stage):
            for v in other.gaussians:
                covariance(stage.gram, None, stage.cell(other, 0, 0, _ones, tables), u, v, False)

    def rows(u: Node, t: Any, left: Sampled, other: Stage, members: list[Node], operands: dict[Node, Array]) -> Array:
        """Cov(u_t, v_s) for all s and members v: (S, k, K')."""
        need = {x: stage.sample(left, x, M) for x in stage.needs[u]}

        def one(s: Any, right: dict[int, Array]) -> Array:
            def moment(a: Node | None, b: Node | None) -> Array:
                return mean_outer(None if a is None else need[a], None if b is None else right[others.index(b)])

            cell = stage.cell(other, t, s, moment, tables)
            blocks = [covariance(stage.gram, None, cell, u, v, False) for v in members]
            return jnp.concatenate(
                [jnp.zeros((size(u), size(v))) if b is ZERO else b for v, b in zip(members, blocks, strict=True)], 1
            ).astype(dtype)

        others = list(operands)
        return jax.vmap(one)(jnp.arange(other.loop.length), dict(enumerate(operands.values())))

    def step(state: Any, at: Any) -> Any:
        carries, stored, factors = state
        t, z = at
        fresh = dict(zip(stage.gaussians, stage.split(z), strict=True))
        operands = dict(zip(stage.operands, stored, strict=True))
        factors = list(factors)
        sampled = stage.at(t, carries)
        ready = False
        done: set[Node] = set()
        for u in stage.gaussians:
            if not ready and not any(u in stage.within(x) for x in stage.starts.values()):
                stage.enter(sampled, carries)
                ready = True
            for x in stage.needs[u]:
                if x not in done:
                    done.add(x)
                    operands[x] = operands[x].at[t].set(stage.sample(sampled, x, M))
            i, group = next((i, g) for i, g in enumerate(groups) if u in g.members)
            own = rows(u, t, sampled, stage, group.members, operands)
            offset = sum(size(v) for v in group.members[: group.members.index(u)])
            k, width = size(u), sum(map(size, group.members))
            block = own[t][:, offset : offset + k]
            past = (jnp.arange(T)[:, None] * width + jnp.arange(width)) < t * width + offset
            own = jnp.where(past[:, None, :], own, jnp.zeros((), dtype))
            pieces = [own]
            if given is not None:
                cross = [rows(u, t, sampled, given.stage, f.members, given.operands) for f in group.given]
                pieces = [*cross, own]
            c = jnp.concatenate([jnp.moveaxis(p, 1, 0).reshape(k, -1) for p in pieces], 1)
            start = c.shape[1] - T * width + t * width + offset
            L, xi = factors[i]
            value, factors[i] = draw(L, xi, c, block, fresh[u].reshape(k, M), start)
            sampled.known[u] = value.reshape(*u.shape[1:], M)
        if not ready:
            stage.enter(sampled, carries)
        drawn = jnp.concatenate([sampled.known[u].reshape(size(u), M) for u in stage.gaussians])
        before = [sampled.known[x] for x in stage.carried]
        after = [stage.sample(sampled, x, M) for x in stage.loop.nexts if x is not None]
        return (after, [operands[x] for x in stage.operands], factors), (before, drawn)

    stored = [jnp.zeros((T, *x.shape[1:], M), dtype) for x in stage.operands]
    state = (stage.first(M), stored, [g.start(T, M, dtype) for g in groups])
    with sealed(stage.gram):
        (_, stored, factors), (carries, drawn) = lax.scan(step, state, (jnp.arange(T), normals))
    kept = [Factor(g.members, L, xi) for g, (L, xi) in zip(groups, factors, strict=True)]
    stage.gram.graph.sampler.hold(M, normals, carries, drawn, stored, [f.xi for f in kept])
    return Path(stage, carries, drawn, dict(zip(stage.operands, stored, strict=True)), kept)


@dataclass(frozen=True, eq=False)
class Group:
    """A family of this loop's Gaussians, and the families of the given path that it depends on."""

    members: list[Node]
    given: list[Factor]

    def start(self, T: int, M: int, dtype: Any) -> tuple[Array, Array]:
        """L and xi with the rows of the given path, and zeros for what is to come."""
        N = T * sum(map(size, self.members))
        L = block_diag(*(f.L for f in self.given), jnp.zeros((N, N), dtype))
        return L, jnp.concatenate([*(f.xi for f in self.given), jnp.zeros((N, M), dtype)])


def _groups(stage: Stage, given: Path | None) -> list[Group]:
    families: list[tuple[list[Node], list[Factor]]] = []
    for u in stage.gaussians:
        factors = [
            f for f in (given.factors if given is not None else [])
            if any(stage.asked(given.stage, u, v)[0] for v in f.members)  # type: ignore[union-attr]
        ]  # fmt: skip
        linked = [
            f for f in families if any((u, v) in stage.couplings for v in f[0]) or any(x in f[1] for x in factors)
        ]
        members = [v for f in linked for v in f[0]] + [u]
        merged = list(dict.fromkeys([x for f in linked for x in f[1]] + factors))
        families = [f for f in families if f not in linked] + [(members, merged)]
    order = stage.gaussians.index
    return [Group(sorted(members, key=order), factors) for members, factors in families]


def draw(L: Array, xi: Array, c: Array, block: Array, z: Array, start: Any) -> tuple[Array, tuple[Array, Array]]:
    """Gaussians with covariance `block` (k, k) and covariances c (k, N) with those that L xi stands for.

    Returns them (k, M), and the factor and its noise with the rows from `start` on filled in.
    """
    alive = jnp.diagonal(L) != 0
    w = solve_triangular(L + jnp.diag(jnp.where(alive, 0, 1).astype(L.dtype)), c.T, lower=True).T
    w = jnp.where(alive, w, jnp.zeros((), w.dtype))
    pivot = cholesky(block - jnp.matmul(w, w.T, precision="highest"), jnp.diagonal(block))
    value = jnp.matmul(w, xi, precision="highest") + jnp.matmul(pivot, z, precision="highest")
    L = lax.dynamic_update_slice(L, w, (start, 0))
    L = lax.dynamic_update_slice(L, pivot, (start, start))
    return value, (L, lax.dynamic_update_slice(xi, z, (start, 0)))


def cholesky(S: Array, scale: Array) -> Array:
    """Of a positive semidefinite matrix; columns whose pivot is nothing against `scale` are zero."""
    n = S.shape[0]
    tol = float(jnp.finfo(S.dtype).eps) ** 0.75
    columns = []
    for i in range(n):
        d = S[i, i]
        alive = d > tol * scale[i]
        root = jnp.sqrt(jnp.where(alive, d, jnp.inf))
        column = jnp.where(jnp.arange(n) >= i, S[:, i] / root, jnp.zeros((), S.dtype))
        columns.append(column)
        S = S - jnp.outer(column, column)
    return jnp.stack(columns, 1)


def mean_outer(x: Array | None, y: Array | None) -> Array:
    """Means over the sample points of the products of all entries: (F..., F'...) of (F..., M) and (F'..., M)."""
    if x is None or y is None:
        return jnp.mean(x if y is None else y, -1)  # type: ignore[arg-type]
    value = jnp.matmul(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]).T, precision="highest") / x.shape[-1]
    return value.reshape(*x.shape[:-1], *y.shape[:-1])


def _ones(a: Node | None, b: Node | None) -> Array:
    return jnp.ones((*(a.shape[1:] if a is not None else ()), *(b.shape[1:] if b is not None else ())))


__all__ = ["Path", "Sampled", "Stage", "mean_outer", "simulate"]
