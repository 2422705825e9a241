"""Fact 3: the expectation of a product of coordinatewise functions, by the most exact method that applies.

Both sides are brought to normal form (`expr.py`), a sum of monomials, and the Gaussians of a pair of monomials
are grouped by dependence. A product of independent groups factorises. A group of one Gaussian is a mean; of one
on each side, a closed form (`closed.py`) or quadrature (`quadrature.py`); powers of any number of Gaussians
follow by Isserlis' theorem; a batch normaliser goes to `normalised.py`. Anything else is sampled (`sampled.py`).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from anywidth.errors import NeedsUnroll, NoLimitError, UnsupportedError
from anywidth.expect import closed, normalised, quadrature, sampled
from anywidth.expr import (
    IDENTITY,
    Generic,
    Mono,
    Normaliser,
    SeveralGaussians,
    as_function,
    atom_product,
    jumps,
    known,
    monomial,
    times,
)
from anywidth.kets import Const, Contract, Node, Pointwise, Product, View, ViewMap, expand


def expectation(gram: Any, a: Node, b: Node, eps: bool) -> Any:
    """E[Z^a Z^b] of two nodes of which at least one is a coordinatewise function."""
    from anywidth.inner import ZERO, add

    try:
        (left, left_args), (right, right_args) = forms(gram, a), forms(gram, b)
        total: Any = ZERO
        for x in left:
            for y in right:
                total = add(total, _pair(gram, x, left_args, y, right_args, eps))
        return total
    except SeveralGaussians:
        return sampled.expectation(gram, a, b, eps)
    except NoLimitError as e:
        origin = gram.graph.origin.get(a if isinstance(a, Pointwise) else b)
        raise e if origin is None or "\n  " in str(e) else NoLimitError(f"{e}.\n  at {origin.line}") from None


def forms(gram: Any, node: Node) -> tuple[list[Mono], tuple[Node, ...]]:
    """The normal form of a node and the nodes that its factors speak of."""
    if isinstance(node, Const):
        return [Mono(node.array, ())], ()
    if not isinstance(node, Pointwise):
        return [Mono(1.0, ((0, IDENTITY),))], (node,)
    key = ("form", node)
    table = gram.graph.table
    if key not in table:
        small = frozenset(i for i, x in enumerate(node.args) if _no_variance(x))
        opaque = frozenset(i for i, x in enumerate(node.args) if not x.gaussian)
        table[key] = Normaliser(node.coefs, small, opaque).form(node.expr)
    return table[key], node.args


def _no_variance(node: Node) -> bool:
    x = node
    while isinstance(x, View):
        x = x.operand
    if isinstance(x, Product):
        return x.leaf.zero_var
    children = [t for _, t in x.terms] if hasattr(x, "terms") else [x.operand] if isinstance(x, Contract) else []
    return bool(children) and all(_no_variance(c) for c in children)


class SeveralError(UnsupportedError):
    """Carries the node, so that the interpreter can name the user's line."""

    def __init__(self, node: Node, message: str) -> None:
        super().__init__(message)
        self.node = node


def _pair(gram: Any, x: Mono, xs: tuple[Node, ...], y: Mono, ys: tuple[Node, ...], eps: bool) -> Any:
    from anywidth.inner import ZERO, scaled

    coef = times(x.coef, y.coef)
    if x.norm is not None or y.norm is not None:
        return scaled(coef, _normalised(gram, x, xs, y, ys, eps))
    variables = [(0, xs[i], atom) for i, atom in x.factors] + [(1, ys[i], atom) for i, atom in y.factors]
    if any(not node.gaussian for _, node, _ in variables):
        raise SeveralGaussians
    n = len(variables)
    frozen = [jumps(atom) for _, _, atom in variables]  # a jump has derivative zero almost everywhere
    cov: dict[tuple[int, int], Any] = {}
    for i in range(n):
        for j in range(i + 1, n):
            cross = variables[i][0] != variables[j][0]
            cov[i, j] = gram(variables[i][1], variables[j][1], eps and cross and not frozen[i] and not frozen[j])
    total: Any = coef
    for group in _groups(n, cov):
        value = _group(gram, [variables[i] for i in group], lambda i, j, g=group: cov[g[i], g[j]])
        if value is ZERO:
            return ZERO
        total = value if known(total) and float(total) == 1.0 else total * value
    return total


def _groups(n: int, cov: dict[tuple[int, int], Any]) -> list[list[int]]:
    from anywidth.inner import ZERO

    groups = [{i} for i in range(n)]
    for (i, j), c in cov.items():
        if c is not ZERO:
            gi, gj = (next(g for g in groups if k in g) for k in (i, j))
            if gi is not gj:
                gi |= gj
                groups.remove(gj)
    return [sorted(g) for g in groups]


def _group(gram: Any, variables: list[Any], cov: Any) -> Any:
    from anywidth.inner import ZERO

    if len(variables) == 2 and variables[0][1] is variables[1][1]:
        coef, atom = atom_product(variables[0][2], variables[1][2])
        value = _mean(gram, variables[0][1], atom)
        return value if value is ZERO else value * coef if not (known(coef) and coef == 1.0) else value
    if len(variables) == 1:
        return _mean(gram, *variables[0][1:])
    if len(variables) == 2:
        (_, u, f), (_, v, g) = variables
        if monomial(f) and monomial(g) and f.k == g.k == 1:
            return times(f.plus * g.plus, cov(0, 1))
        q1, q2 = _variance(gram, u), _variance(gram, v)
        return _univariate(f, g, q1, q2, cov(0, 1))
    if all(monomial(atom) for _, _, atom in variables):
        return _isserlis(gram, variables, cov)
    raise SeveralGaussians


def _variance(gram: Any, u: Node) -> Any:
    from anywidth.inner import ZERO

    q = gram(u, u)
    return jnp.zeros((1,) * u.rank) if q is ZERO else q


def _mean(gram: Any, u: Node, atom: Any) -> Any:
    from anywidth.inner import ZERO

    if monomial(atom) and atom.k % 2:
        return ZERO
    if isinstance(atom, closed.ErfPower) and atom.k % 2 == 0:
        return ZERO
    if isinstance(atom, closed.GaussPower) and atom.k % 2:
        return ZERO
    q = _variance(gram, u)
    if isinstance(atom, Generic):
        return quadrature.mean(atom.function, _aligned(atom.coefs, q), q, breaks=_aligned(atom.breaks, q))
    return closed.mean(atom, q)


def _univariate(f: Any, g: Any, q1: Any, q2: Any, c: Any) -> Any:
    if not isinstance(f, Generic) and not isinstance(g, Generic) and closed.has_closed_form(f, g):
        return closed.pair(f, g, q1, q2, c)
    (ff, fc, fb), (gf, gc, gb) = as_function(f), as_function(g)
    return quadrature.pair(
        ff, _aligned(fc, c), gf, _aligned(gc, c), q1, q2, c, f_breaks=_aligned(fb, c), g_breaks=_aligned(gb, c)
    )


def _aligned(arrays: Any, like: Any) -> tuple[Any, ...]:
    return tuple(jnp.asarray(a, jnp.asarray(like).dtype) for a in arrays)


def _isserlis(gram: Any, variables: list[Any], cov: Any) -> Any:
    """E of a product of powers: the sum over perfect matchings."""
    from anywidth.inner import ZERO, add

    slots = [i for i, (_, _, atom) in enumerate(variables) for _ in range(atom.k)]
    if len(slots) > 10:
        raise SeveralGaussians

    def entry(i: int, j: int) -> Any:
        return gram(variables[i][1], variables[i][1]) if i == j else cov(min(i, j), max(i, j))

    def match(rest: list[int]) -> Any:
        if not rest:
            return 1.0
        total: Any = ZERO
        for k in range(1, len(rest)):
            c = entry(rest[0], rest[k])
            if c is ZERO:
                continue
            other = match(rest[1:k] + rest[k + 1 :])
            if other is not ZERO:
                total = add(total, c * other)
        return total

    if len(slots) % 2:
        return ZERO
    value = match(slots)
    scale = float(np.prod([float(atom.plus) for _, _, atom in variables]))
    return value if value is ZERO else value * scale


# --- batch normalisation ------------------------------------------------------------------------------


def _normalised(gram: Any, x: Mono, xs: tuple[Node, ...], y: Mono, ys: tuple[Node, ...], eps: bool) -> Any:
    """E[f(g_i) r^(-s/2) h(g'_j) r'^(-t/2)] where r is a sum of squares over a finite axis of which g is a part."""
    from anywidth.inner import ZERO

    if len(x.factors) > 1 or len(y.factors) > 1:
        raise SeveralGaussians
    one = closed.Power(0, 1.0, 1.0)
    fs = x.factors[0][1] if x.factors else one
    gs = y.factors[0][1] if y.factors else one
    if not isinstance(fs, closed.Power) or not isinstance(gs, closed.Power):
        raise SeveralGaussians
    left = _Batch.of(gram, x, xs)
    right = _Batch.of(gram, y, ys)
    if left is None or right is None:
        return _one_sided(gram, left, right, fs, gs, eps)
    return left.against(right, fs, gs, eps)


def _one_sided(gram: Any, left: Any, right: Any, fs: Any, gs: Any, eps: bool) -> Any:
    """Only one side is normalised; the other is a constant."""
    side, f, other, g = (left, fs, right, gs) if left is not None else (right, gs, left, fs)
    if other is not None or not (monomial(g) and g.k == 0):
        raise SeveralGaussians
    return side.mean(f)


class _Batch:
    """g over its batch axis, its normaliser, and where in it the factor stands.

    `base` is the centred Gaussian with its batch axis last; `member` is the factor's own node, a view of the
    same kets. The pair is computed for the whole batch and then read at the members.
    """

    def __init__(self, gram: Any, base: Node, member: Node | None, a: Any, norm: Any, size: int) -> None:
        self.gram, self.base, self.member, self.a, self.norm, self.size = gram, base, member, a, norm, size

    @staticmethod
    def of(gram: Any, m: Mono, nodes: tuple[Node, ...]) -> _Batch | None:
        if m.norm is None:
            if not m.factors:
                return None
            raise SeveralGaussians
        total = nodes[m.norm.argument]
        while isinstance(total, View):
            total = gram.graph.push(total)
        weight: Any = 1.0
        while not isinstance(total, Contract):
            if hasattr(total, "terms") and len(total.terms) == 1:
                weight = times(weight, total.terms[0][0])
                total = total.terms[0][1]
                while isinstance(total, View):
                    total = gram.graph.push(total)
            else:
                raise SeveralGaussians
        if total.contracted != 1 or total.coef is not None:
            raise SeveralGaussians
        square = total.operand
        while isinstance(square, View):
            square = gram.graph.push(square)
        form, args = forms(gram, square)
        if len(form) != 1 or len(form[0].factors) != 1 or form[0].norm is not None:
            raise SeveralGaussians
        i, atom = form[0].factors[0]
        if not monomial(atom) or atom.k != 2:
            raise SeveralGaussians
        a = times(times(times(weight, form[0].coef), atom.plus), m.norm.alpha)
        member = nodes[m.factors[0][0]] if m.factors else None
        return _Batch(gram, args[i], member, a, m.norm, args[i].shape[-1])

    def _place(self) -> int:
        """The axis of the member along which it runs through the batch."""
        member = self.member
        assert member is not None
        graph = self.gram.graph
        inner = graph.view(member, expand(member.rank, 1))
        for axis in range(member.rank):
            if member.shape[axis] != self.size:
                continue
            entries = list(range(member.rank + 1))
            entries[axis] = member.rank
            if _same(graph, graph.view(inner, ViewMap(member.rank + 1, tuple(entries))), self.base):
                return axis
        raise SeveralGaussians

    def covariance(self, other: _Batch, eps: bool) -> Any:
        """(..., B, B') covariances of the two batches."""
        graph = self.gram.graph
        rank = self.base.rank - 1
        u = graph.view(self.base, ViewMap(rank + 2, tuple(range(rank + 1))))
        v = graph.view(other.base, ViewMap(rank + 2, (*range(rank), rank + 1)))
        value = self.gram(u, v, eps)
        from anywidth.inner import ZERO

        lead = np.broadcast_shapes(self.base.shape[:-1], other.base.shape[:-1])
        shape = (*lead, self.size, other.size)
        return jnp.zeros(shape) if value is ZERO else jnp.broadcast_to(value, shape)

    def against(self, other: _Batch, f: Any, g: Any, eps: bool) -> Any:
        same = self.base is other.base
        s, t = self.norm.s, other.norm.s
        known_no_eps = _is_zero(self.norm.eps) and _is_zero(other.norm.eps)
        if eps and known_no_eps and f.k and g.k and min(self.size, other.size) <= 3:
            raise NoLimitError(
                f"the NTK of batch normalisation without epsilon is infinite for batches of 3 or fewer (here "
                f"{min(self.size, other.size)}): 1/sigma^2 has no mean. Add an epsilon to the variance, or use larger batches"
            )
        rank = self.base.rank - 1
        if same:
            lead = _axes(f, g)
            value = normalised.normalised_self(
                *lead,
                s,
                t,
                self.covariance(other, False),
                _scalar(self.a),
                _scalar(self.norm.eps),
                centred=_centred(self),
            )
        else:
            frozen = jumps(f) or jumps(g)
            value = normalised.normalised_pair(
                f, g, s, t, self.covariance(self, False), other.covariance(other, False),
                self.covariance(other, eps and not frozen), _scalar(self.a), _scalar(other.a),
                _scalar(self.norm.eps), _scalar(other.norm.eps), centred=_centred(self) and _centred(other),
            )  # fmt: skip
        # read it at the members: axis `rank` is the left batch, `rank + 1` the right one
        left = self._place() if self.member is not None else None
        right = other._place() if other.member is not None else None
        return _read(value, rank, left, right)

    def mean(self, f: Any) -> Any:
        value = normalised.normalised_mean(
            f,
            self.norm.s,
            self.covariance(self, False),
            _scalar(self.a),
            _scalar(self.norm.eps),
            centred=_centred(self),
        )
        axis = self._place() if self.member is not None else None
        if axis is None:
            return value[..., :1][..., 0]
        return jnp.moveaxis(value, -1, axis).squeeze(self.base.rank - 1) if False else _read_one(value, axis)


def _axes(f: Any, g: Any) -> tuple[Any, Any]:
    return f, g


def _centred(batch: _Batch) -> bool:
    """Whether the kets of the batch sum to zero: a Sum of kets and minus their mean over the batch axis."""
    return _sums_to_zero(batch.gram.graph, batch.base, batch.size)


def _sums_to_zero(graph: Any, node: Node, size: int) -> bool:
    while isinstance(node, View):
        node = graph.push(node)
    if not hasattr(node, "terms") or len(node.terms) != 2:
        return False
    (c, x), (d, mean) = node.terms
    factor = 1.0
    while not isinstance(mean, Contract):
        if isinstance(mean, View):
            mean = graph.push(mean)
        elif hasattr(mean, "terms") and len(mean.terms) == 1 and known(mean.terms[0][0]):
            factor, mean = factor * float(mean.terms[0][0]), mean.terms[0][1]
        else:
            return False
    if c is not None or not known(d) or mean.coef is not None or mean.contracted != 1:
        return False
    inner = mean.operand
    rank = node.rank
    moved = graph.view(x, ViewMap(rank + 1, (*range(rank - 1), rank)))
    return abs(factor * float(d) * size + 1.0) < 1e-12 * size and _same(graph, moved, inner)


def _read_one(value: Any, axis: int) -> Any:
    rank = value.ndim - 1
    out = jnp.moveaxis(value, -1, axis)  # the batch axis stands where the member has it; the lead has a one there
    return out.squeeze(axis + 1) if axis + 1 <= rank and out.shape[axis + 1] == 1 else out


def _read(value: Any, rank: int, left: int | None, right: int | None) -> Any:
    """(lead..., B, B') read along the members' axes: lead has ones there."""
    if left is None:
        value = value[..., :1, :]
    if right is None:
        value = value[..., :, :1]
    if left is not None and left == right:
        value = jnp.diagonal(value, axis1=-2, axis2=-1)[..., None]
        value = jnp.moveaxis(value, -2, left).squeeze(left + 1)[..., 0]
        return value
    if left is not None:
        value = jnp.swapaxes(value, left, rank)
    if right is not None:
        value = jnp.swapaxes(value, right, rank + 1)
    return value.reshape(value.shape[:rank])


def _scalar(x: Any) -> Any:
    return float(x) if known(x) else jnp.asarray(x).reshape(()) if np.size(x) == 1 else _raise()


def _raise() -> Any:
    raise SeveralGaussians


def _is_zero(x: Any) -> bool:
    return known(x) and float(x) == 0.0


def _same(graph: Any, x: Node, y: Node) -> bool:
    """The same kets, however the views on them are written."""
    for _ in range(64):
        if x is y:
            return True
        if isinstance(x, View):
            x = graph.push(x)
        elif isinstance(y, View):
            y = graph.push(y)
        else:
            return False
    return False


__all__ = ["SeveralError", "expectation", "NeedsUnroll"]
