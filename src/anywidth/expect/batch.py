"""Batch normalisation: expectations of homogeneous functions of a Gaussian divided by the size of its batch.

What is recognised here is a monomial f(g_i) r^(-s/2) whose normaliser r = alpha S + eps has S a sum of squares over a
finite axis of Gaussians of which g_i is one; `normalised.py` integrates it.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from anywidth.errors import NoLimitError
from anywidth.expect import closed, methods, normalised
from anywidth.expect.atoms import Mono, Norm, SeveralGaussians, jumps, known, monomial, times
from anywidth.kets import Contract, Node, View
from anywidth.views import ViewMap, expand

__all__ = ["Norm", "expectation"]


def expectation(gram: Any, x: Mono, xs: tuple[Node, ...], y: Mono, ys: tuple[Node, ...], eps: bool) -> Any:
    """E[f(g_i) r^(-s/2) h(g'_j) r'^(-t/2)] where r is a sum of squares over a finite axis of which g is a part."""
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
        from anywidth.expect.choose import arguments, forms

        form, args = forms(gram, square), arguments(square)
        if len(form) != 1 or not form[0].univariate or not form[0].factors:
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
        if eps and known_no_eps and f.k and g.k and min(self.size, other.size) <= 2:
            raise NoLimitError(
                "the NTK of batch normalisation without epsilon is infinite for batches of "
                f"{min(self.size, other.size)}: a gradient has no mean. Add an epsilon to the variance, or use larger "
                "batches"
            )
        rank = self.base.rank - 1
        methods.used(methods.NORMALISED)
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
            S11, S22 = self.covariance(self, False), other.covariance(other, False)
            S12 = self.covariance(other, eps and not frozen)
            value = normalised.normalised_pair(
                f, g, s, t, S11, S22, S12, _scalar(self.a), _scalar(other.a),
                _scalar(self.norm.eps), _scalar(other.norm.eps), centred=_centred(self) and _centred(other),
            )  # fmt: skip
            if eps and not frozen and known_no_eps and f.k and g.k:
                self.gram.graph.sampler.poles = True
                value = normalised.infinite_slope(value, S11, S22, S12)
        # read it at the members: axis `rank` is the left batch, `rank + 1` the right one
        left = self._place() if self.member is not None else None
        right = other._place() if other.member is not None else None
        return _read(value, rank, left, right)

    def mean(self, f: Any) -> Any:
        methods.used(methods.NORMALISED)
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
