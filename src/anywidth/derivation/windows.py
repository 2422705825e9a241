"""How windows are written: convolutions and sums over windows, as sums over the positions of the window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from anywidth.derivation import terms as tm
from anywidth.derivation.read import Indices, Reader, Val
from anywidth.derivation.rules import register
from anywidth.derivation.terms import Index, Num, Term
from anywidth.trace import Eqn, is_wide


def _position(i: Term | None, k: Term | None, stride: int, dilation: int, before: int) -> Term:
    """The position that entry k of the window at i reads; all count from one."""
    at: list[Term] = [Num(float(1 - before))]
    for index, step in ((i, stride), (k, dilation)):
        if index is not None:
            at += [tm.mul(Num(float(step)), index), Num(float(-step))]
    found = tm.add(*at)
    return found if tm.indices_of(found) or isinstance(found, Num) else Num(1.0)


def _all_one(values: Sequence[int] | None) -> bool:
    return all(v == 1 for v in values or ())


@register("conv_general_dilated")
def convolution(r: Reader, eqn: Eqn, inputs: list[Val]) -> Any:
    p, (x, w) = eqn.params, inputs
    groups = p["feature_group_count"] * p["batch_group_count"]
    lhs, rhs, out = p["dimension_numbers"]
    shape = eqn.outputs[0].shape
    if groups != 1 or not _all_one(p["lhs_dilation"]) or w.raw is None or not is_wide(shape[out[1]]):
        return r.unknown(eqn, inputs)
    x = r.operand(x)
    r.padded |= any(before or after for before, after in p["padding"])

    def entry(idx: Indices) -> Term:
        ix: list[Term | None] = [None] * len(x.shape)
        iw: list[Term | None] = [None] * len(w.shape)
        ix[lhs[0]] = idx[out[0]]
        bound: list[Index] = []
        for d, (a, b, c) in enumerate(zip(lhs[2:], rhs[2:], out[2:], strict=True)):
            if w.shape[b] != 1:
                bound.append(r.fresh([*idx, *bound]))
                iw[b] = bound[-1]
            if x.shape[a] != 1:
                before = p["padding"][d][0]
                ix[a] = _position(idx[c], iw[b], p["window_strides"][d], p["rhs_dilation"][d], before)
        body = tm.mul(w.at(tuple(iw)), x.at(tuple(ix)))
        for k in reversed(bound):
            body = tm.total(k, body)
        return body

    return Val(shape, entry, True, True, x.leaves | w.leaves)


@register("reduce_window_sum")
def window_sum(r: Reader, eqn: Eqn, inputs: list[Val]) -> Any:
    p, (x, *_) = eqn.params, inputs
    sizes = p["window_dimensions"]
    if not _all_one(p["base_dilation"]) or any(is_wide(s) and k != 1 for s, k in zip(x.shape, sizes, strict=True)):
        return r.unknown(eqn, inputs)
    x = r.operand(x)
    r.padded |= any(before or after for before, after in p["padding"])

    def entry(idx: Indices) -> Term:
        at: list[Term | None] = list(idx)
        bound: list[Index] = []
        for d, size in enumerate(sizes):
            if x.shape[d] == 1 or is_wide(x.shape[d]):
                at[d] = None
                continue
            k = None
            if size != 1:
                bound.append(k := r.fresh([*idx, *bound]))
            at[d] = _position(idx[d], k, p["window_strides"][d], p["window_dilation"][d], p["padding"][d][0])
        body = x.at(tuple(at))
        for k in reversed(bound):
            body = tm.total(k, body)
        return body

    return Val(eqn.outputs[0].shape, entry, x.ket, x.gaussian, x.leaves)
