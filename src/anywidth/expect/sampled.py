r"""Expectations of functions of several correlated Gaussians, sampled: E[Y(u) Y'(v)], (u, v) jointly Gaussian.

The Gaussian nodes below both sides are collected, with their joint covariance S = ((S11, C), (C^T, S22)) from `gram`;
both sides are evaluated at (u, v) = S^(1/2) xi with low-discrepancy normal points xi (`points.py`), and the product is
averaged. Axes of the request are axes of a batch of such expectations, each with a covariance of its own; contracted
axes are further coordinates. Where the entries along an axis are mostly functions of the same Gaussians (batch
normalisation), the whole axis is sampled jointly instead (`Layout`). Exchanging the sides exchanges the halves of xi,
so every point is used twice, with its halves exchanged: the estimate is exactly symmetric. Functions with poles, as of
a normalised batch, have coordinates of their own, and points near the poles for their derivative (`poles.py`).

What an example has by itself is sampled in the same way, at the points at which two equal examples are: the covariances
that a next layer gets then say of equal inputs that they are equal. Points of its own, or an integral, would give
correlations above and below one, of which those above count as one: a bias as large as the error itself.

**Derivatives.** In C by Price's theorem, dE = sum_kl E[d_k Y d_l Y'] dC_kl, with one gradient of each side a sample:
this is what the NTK asks for, and it is finite at coinciding inputs. In everything else along the path, through the
root (`roots.py`). The latter is right for functions with kinks and wrong for functions with jumps, for which it is
refused; the former is the almost-everywhere derivative, the convention of every NTK.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from anywidth.errors import NeedsUnroll, UnsupportedError
from anywidth.expect import methods
from anywidth.expect.atoms import discontinuous
from anywidth.expect.forms import Normaliser
from anywidth.expect.layout import Layout, covariance, layouts
from anywidth.expect.numerics import is_zero
from anywidth.expect.points import normals
from anywidth.expect.poles import coordinates, density, flips, infinite, poles, projection, shortened
from anywidth.expect.roots import root
from anywidth.expect.sampler import Sampler, average, chunk_of
from anywidth.expr import JUMPS, KINKED, LEAVES, evaluated, variables
from anywidth.kets import Const, Contract, Node, Pointwise, Sum, View

# --- evaluation on samples --------------------------------------------------------------------------------


@dataclass(eq=False)
class Side:
    """A node as a function of its Gaussian nodes (`bases`) and of the arrays in it that are not known numbers."""

    graph: Any
    node: Node
    bases: list[Node] = field(default_factory=list)
    arrays: list[Any] = field(default_factory=list)
    primitives: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._read(self.node, set())

    def _read(self, x: Node, seen: set[Node]) -> None:
        if x in seen:
            return
        seen.add(x)
        if isinstance(x, Const):
            self._array(x.array)
        elif x.gaussian:
            self.bases.append(x)
        elif isinstance(x, View):
            self._read(self._pushed(x), seen)
        elif isinstance(x, Sum):
            for c, t in x.terms:
                self._array(c)
                self._read(t, seen)
        elif isinstance(x, Contract):
            self._array(x.coef)
            self._read(x.operand, seen)
        elif isinstance(x, Pointwise):
            for c in x.coefs:
                self._array(c)
            for a in x.args:
                self._read(a, seen)
            self._primitives(x.expr, x.coefs, set())
        else:
            raise NeedsUnroll("a loop's carry that is not Gaussian goes into a function of several Gaussians")

    def _pushed(self, x: View) -> Node:
        y = self.graph.push(x)
        if y is x:
            raise NeedsUnroll("a loop's carry that is not Gaussian goes into a function of several Gaussians")
        return y

    def _array(self, a: Any) -> None:
        if isinstance(a, jax.Array) and not any(a is b for b in self.arrays):
            self.arrays.append(a)

    def _primitives(self, e: Any, coefs: Any, seen: set[Any], held: bool = False) -> None:
        if e[0] in LEAVES or (id(e), held) in seen:
            return
        seen.add((id(e), held))
        held = held or e[0] == "stop_gradient"
        below = e[2:]
        if e[0] == "call":
            self._met(e[1][1], held)
        elif e[0] == "select_n" and not _jumps(e, coefs):
            self._met("kink", held)
            below = e[3:]  # where the choice changes, nothing jumps
        else:
            self._met(e[0], held)
        for a in below:
            self._primitives(a, coefs, seen, held)

    def _met(self, name: str, held: bool) -> None:
        """A kink below `stop_gradient`, as of the maximum in a softmax, is none of the gradients."""
        if not held or name not in {"kink", *KINKED} or name in JUMPS:
            self.primitives.add(name)

    def value(
        self, samples: dict[Node, Any], arrays: list[Any], dtype: Any, held: dict[Node, Any] | None = None
    ) -> Any:
        """The node at samples of its bases (N, *their axes): an array (N, *its axes).

        `held`: the samples below `stop_gradient`, which stops the gradients of the parameters of the network, and no
        others: the values themselves depend on everything.
        """
        known = {id(old): new for old, new in zip(self.arrays, arrays, strict=True)}
        held = held if "stop_gradient" in self.primitives else None
        memo: dict[tuple[Node, bool], Any] = {}

        def array(a: Any) -> Any:
            a = known.get(id(a), a)
            if isinstance(a, float | int):
                return a
            return jnp.asarray(a, dtype if jnp.issubdtype(jnp.result_type(a), jnp.floating) else None)

        def of(x: Node, below: bool) -> Any:
            if (x, below) not in memo:
                memo[x, below] = new(x, below)
            return memo[x, below]

        def new(x: Node, below: bool) -> Any:
            if isinstance(x, Const):
                return array(x.array)[None]
            if x.gaussian:
                return held[x] if below and held is not None else samples[x]
            if isinstance(x, View):
                return of(self._pushed(x), below)
            if isinstance(x, Sum):
                terms = [of(t, below) if c is None else array(c) * of(t, below) for c, t in x.terms]
                return sum(terms[1:], terms[0])
            if isinstance(x, Contract):
                from anywidth.inner import weighted_sum

                k, coef = x.contracted, None if x.coef is None else array(x.coef)[None]
                full = np.broadcast_shapes(x.operand.shape, np.shape(x.coef) if x.coef is not None else ())
                return weighted_sum(coef, of(x.operand, below), k, full[len(full) - k :])
            assert isinstance(x, Pointwise)
            stopped = None if held is None or below else [of(a, True) for a in x.args]
            return evaluated(x.expr, [of(a, below) for a in x.args], [array(c) for c in x.coefs], False, stopped)

        return jnp.asarray(of(self.node, False), dtype)


def _jumps(e: Any, coefs: Any) -> bool:
    """Whether a function may jump: not one of a single argument that is seen to be continuous."""
    if len(variables(e)) != 1:
        return True
    form = Normaliser(coefs, frozenset(), frozenset()).form(e)
    return any(m.joints or any(discontinuous(a) for _, a in m.factors) for m in form)


# --- the expectation -----------------------------------------------------------------------------------------


def expectation(gram: Any, a: Node, b: Node, eps: bool) -> Any:
    """E[Z^a Z^b] by sampling, an array over the aligned axes of a and b."""
    methods.used(methods.SAMPLED)
    graph = gram.graph
    sampler: Sampler = graph.sampler
    left, right = Side(graph, a), Side(graph, b)
    one, two, batch = layouts(graph, left, right)
    dtype = sampler.dtype
    S11 = covariance(gram, one.blocks, one.blocks, batch, False, dtype)
    S22 = covariance(gram, two.blocks, two.blocks, batch, False, dtype)
    C = covariance(gram, one.blocks, two.blocks, batch, eps, dtype)
    return estimate(sampler, _Pair(left, right, one, two, batch, dtype), S11, S22, C)


@dataclass(eq=False)
class _Pair:
    left: Side
    right: Side
    one: Layout
    two: Layout
    batch: tuple[int, ...]
    dtype: Any

    def __post_init__(self) -> None:
        self.starts = [np.cumsum([0] + [x.size(i) for i in range(len(x.blocks))]) for x in (self.one, self.two)]
        self.sizes = [int(s[-1]) for s in self.starts]
        used = self.left.primitives | self.right.primitives
        self.jumps, self.kinks = bool(used & {"jump", *JUMPS}), bool(used & {"jump", "kink", *KINKED})
        self.rows = [self._rows(k, side) for k, side in enumerate((self.left, self.right))]
        self.poles = any(self.rows)

    def _rows(self, k: int, side: Side) -> list[int]:
        """The coordinates of (u, v) at which a side has poles."""
        rows: set[int] = set()
        layout = (self.one, self.two)[k]
        for base in poles(side.graph, side.node):
            number = layout.place[base][0]
            start = k * self.sizes[0] + int(self.starts[k][number])
            rows |= set(range(start, start + layout.size(number)))
        return sorted(rows)

    def side(self, number: int, z: tuple[Any, Any], arrays: list[Any], held: tuple[Any, Any] | None = None) -> Any:
        """Y, or Y', at samples (N, *batch, D) of the coordinates of the two layouts."""
        side = (self.left, self.right)[number]

        def samples(z: tuple[Any, Any]) -> dict[Node, Any]:
            out = {}
            for base in side.bases:
                layout = (self.one, self.two)[number]
                out[base] = layout.sample(base, z[number], int(self.starts[number][layout.place[base][0]]))
            return out

        return side.value(samples(z), arrays, self.dtype, None if held is None else samples(held))

    @property
    def dimension(self) -> int:
        """Of the points."""
        d, e = self.sizes
        return (2 * max(d, e) if e else d) + self.poles

    def factor(self, S: Any) -> Any:
        """A with (u, v) = A xi."""
        A = root(S)
        d, e = self.sizes
        return coordinates(A, e > 0) if self.poles and e in (0, d) else A

    def exchanged(self, xi: Any) -> Any:
        """Standard normal xi (n, D) for points, each used with the two sides exchanged as well."""
        d, e = self.sizes
        m = max(d, e)
        first, second = xi[:, :m], xi[:, m + self.poles :]
        if not e:
            return first
        if self.poles and d == e:
            first, second = jnp.concatenate([first, first]), jnp.concatenate([second, -second])
        else:
            first, second = jnp.concatenate([first, second]), jnp.concatenate([second, first])
        return jnp.concatenate([first[:, :d], second[:, :e]], -1)

    def flipped(self, xi: Any) -> Any:
        """Points (16 n, D) with other signs."""
        return (xi[:, None] * flips(xi.shape[1]).astype(xi.dtype)).reshape(-1, xi.shape[1])

    def draw(self, xi: Any, A: Any) -> tuple[Any, Any]:
        """(u, v) for points."""
        z = jnp.einsum("nq,...pq->n...p", self.exchanged(xi), A, precision="highest")
        return z[..., : self.sizes[0]], z[..., self.sizes[0] :]

    def near(self, A: Any) -> list[Any]:
        """The projections for `draw_near`, of each side or of both."""
        if self.sizes[1]:
            return [projection(A[..., rows, :]) for rows in self.rows if rows]
        return [projection(A[..., sorted({*self.rows[0], *self.rows[1]}), :])]

    def draw_near(self, xi: Any, A: Any, projections: list[Any]) -> tuple[Any, Any, Any]:
        """(u, v), more of them near the poles, and their weights (n, *batch)."""
        d, e = self.sizes
        U = jax.scipy.special.ndtr(xi[:, max(d, e)])
        xi = jnp.expand_dims(self.exchanged(xi), tuple(range(1, A.ndim - 1)))
        parts = jnp.split(xi, 2) if e else [xi]
        near = [shortened(x, projections[i % len(projections)], U) for i, x in enumerate(parts)]
        xi = jnp.concatenate([jnp.broadcast_to(x, (len(U), *A.shape[:-2], A.shape[-1])) for x in near])
        inside = [jnp.einsum("...pq,n...q->n...p", P, xi, precision="highest") for P in projections]
        w = [density((r * r).sum(-1), P) for r, P in zip(inside, projections, strict=True)]
        z = jnp.einsum("n...q,...pq->n...p", xi, A, precision="highest")
        return z[..., :d], z[..., d:], len(w) / sum(w[1:], w[0])


def _joined(S11: Any, S22: Any, C: Any) -> Any:
    top = jnp.concatenate([S11, C], -1)
    bottom = jnp.concatenate([jnp.swapaxes(C, -1, -2), S22], -1)
    return jnp.concatenate([top, bottom], -2)


def _summed(labels: list[tuple[Any, list[int]]], out: list[int]) -> Any:
    """einsum where axes of size one are broadcast; the result has an axis for every label of `out`."""
    sizes: dict[int, int] = {}
    terms: list[Any] = []
    for x, names in labels:
        for n, name in zip(x.shape, names, strict=True):
            sizes[name] = max(sizes.get(name, 1), n)
        kept = [i for i, n in enumerate(x.shape) if n > 1]
        terms += [x.reshape([x.shape[i] for i in kept]), [names[i] for i in kept]]
    wanted = [name for name in out if sizes[name] > 1]
    total = jnp.einsum(*terms, wanted, precision="highest", optimize=True)
    return total.reshape([sizes[name] for name in out])


def _mean_product(y: Any, w: Any) -> Any:
    """The mean over the samples, the first axis of both, of the product."""
    axes = list(range(y.ndim))
    count = max(y.shape[0], w.shape[0])
    return _summed([(y, axes), (w, axes)], axes[1:]) / count


def estimate(sampler: Sampler, pair: _Pair, S11: Any, S22: Any, C: Any) -> Any:
    """The mean over the sampler's points, with its derivatives."""
    d, e = pair.sizes
    static = sampler.count if isinstance(sampler.count, int) else None
    half = 2 if e else 1
    chunk = chunk_of(int(np.prod(pair.batch)) * (d + e) * half)

    def mean(f: Any, count: Any, net: Any) -> Any:
        count = static if static is not None else count
        return average(f, net, count // half, pair.dtype, chunk)

    def value_at(xi: Any, A: Any, left: Any, right: Any) -> Any:
        z = pair.draw(pair.flipped(xi) if pair.poles else xi, A)
        return _mean_product(pair.side(0, z, left), pair.side(1, z, right))

    def plain(S11: Any, S22: Any, C: Any, left: Any, right: Any, net: Any, count: Any) -> Any:
        A = pair.factor(_joined(S11, S22, C))

        return mean(lambda xi: value_at(xi, A, left, right), count, net)

    def price(S11: Any, S22: Any, C: Any, left: Any, right: Any, dC: Any, net: Any, count: Any) -> Any:
        A = pair.factor(_joined(S11, S22, C))
        near = pair.near(A) if pair.poles else None

        def sides(u: Any, v: Any) -> Any:
            y, gy = _gradient(lambda z: pair.side(0, (z, v), left, (u, v)), u)
            w, gw = _gradient(lambda z: pair.side(1, (u, z), right, (u, v)), v)
            return y, gy, w, gw

        def f(xi: Any) -> Any:
            u, v, weight = (*pair.draw(xi, A), None) if near is None else pair.draw_near(xi, A, near)
            y, gy, w, gw = sides(u, v)
            if weight is None:
                value = _mean_product(y, w)
            else:  # what is bounded is best sampled where it is
                value = value_at(xi, A, left, right)
                gy = gy * weight[..., None]
            axes = list(range(y.ndim))
            k, l = y.ndim, y.ndim + 1
            slope = _summed([(gy, [*axes, k]), (dC, [*axes[1:], k, l]), (gw, [*axes, l])], axes[1:]) / len(u)
            return value, slope

        value, slope = mean(f, count, net)
        if all(pair.rows):
            z = pair.draw(normals(net, 0, 16, pair.dtype), A)
            P = projection(A[..., sorted({*pair.rows[0], *pair.rows[1]}), :])
            slope = jnp.where(infinite(lambda z: sides(*z)[1::2], z, P) & (dC != 0).any(), jnp.inf, slope)
        return value, slope

    def refused() -> UnsupportedError:
        from anywidth.expect.choose import SeveralError

        return SeveralError(
            pair.left.node if pair.left.primitives else pair.right.node,
            "the derivative, in something other than the weights, of an expectation of a function with jumps (for an "
            "NTK: with kinks) of several correlated Gaussians is asked for, which sampling cannot give. Use smooth "
            "functions",
        )

    # What is not differentiated in is an argument all the same: it may be traced.
    value_of = jax.custom_jvp(plain)
    slope_of = jax.custom_jvp(price)

    def along(function: Any, primals: tuple[Any, ...], tangents: tuple[Any, ...], count: int) -> Any:
        """jax.jvp in the first `count` arguments; the others are integers."""
        rest = primals[count:]
        filled = jax.tree.map(
            lambda x, t: jnp.zeros_like(x) if is_zero(t) else t, tuple(primals[:count]), tuple(tangents[:count])
        )
        return jax.jvp(lambda *p: function(*p, *rest), tuple(primals[:count]), filled)

    def value_jvp(primals: Any, tangents: Any) -> Any:
        S11, S22, C, left, right, net, count = primals
        if all(is_zero(t) for t in jax.tree.leaves((*tangents[:2], *tangents[3:5]), is_leaf=is_zero)):
            if is_zero(tangents[2]):
                out = value_of(*primals)
                return out, jnp.zeros_like(out)
            return slope_of(S11, S22, C, left, right, tangents[2], net, count)
        if pair.jumps:
            raise refused()
        return along(plain, primals, tangents, 5)

    def slope_jvp(primals: Any, tangents: Any) -> Any:
        S11, S22, C, left, right, _, net, count = primals
        if all(is_zero(t) for t in jax.tree.leaves(tangents[:5], is_leaf=is_zero)):
            value, slope = slope_of(*primals)
            if is_zero(tangents[5]):
                return (value, slope), (jnp.zeros_like(value), jnp.zeros_like(slope))
            return (value, slope), (
                jnp.zeros_like(value),
                slope_of(S11, S22, C, left, right, tangents[5], net, count)[1],
            )
        if pair.kinks:
            raise refused()
        return along(price, primals, tangents, 6)

    value_of.defjvp(value_jvp, symbolic_zeros=True)
    slope_of.defjvp(slope_jvp, symbolic_zeros=True)
    sampler.poles |= all(pair.rows)
    net = sampler.net(pair.dimension, half)
    count = jnp.asarray(sampler.count, jnp.int32)
    return value_of(S11, S22, C, pair.left.arrays, pair.right.arrays, net, count)


def _gradient(f: Any, z: Any) -> tuple[Any, Any]:
    """y = f(z) and its gradient, for z (n, *batch, d) and y (n, *axes): an array (n, *axes, d).

    An axis of y is one of the batch, or has size one in the batch: then every entry has its own gradient.
    """

    def whole(z: Any) -> Any:
        y = f(z)
        shape = tuple(max(p, q) for p, q in zip(y.shape, z.shape[:-1], strict=True))
        return jnp.broadcast_to(y, shape)

    y, pull = jax.vjp(whole, z)
    joint = [i for i in range(1, y.ndim) if y.shape[i] != z.shape[i]]
    sizes = [y.shape[i] for i in joint]
    if not joint:
        return y, pull(jnp.ones_like(y))[0]
    count = int(np.prod(sizes))
    eye = np.eye(count).reshape((count, *(y.shape[i] if i in joint else 1 for i in range(y.ndim))))
    basis = jnp.broadcast_to(jnp.asarray(eye, y.dtype), (count, *y.shape))
    g = jax.vmap(lambda c: pull(c)[0])(basis)  # (count, n, *batch, d)
    g = g.reshape(*sizes, *g.shape[1:])
    k = len(joint)
    order = [joint.index(i) if i in joint else k + i for i in range(y.ndim)] + [k + y.ndim]
    left = [k + i for i in joint]
    g = jnp.transpose(g, order + left)
    return y, g.reshape(g.shape[: y.ndim + 1])
