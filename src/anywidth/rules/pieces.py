"""Operations on concatenations, part by part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from anywidth.errors import UnsupportedError
from anywidth.interpret import RULES, Interpreter
from anywidth.rules import elementwise, joins, linear, products
from anywidth.trace import Eqn, add_sizes, affine, finite, is_wide
from anywidth.values import Cat, Det, Value

ELEMENTWISE = {
    *elementwise.SCALES, *elementwise.NONLINEAR, *elementwise.COMPARE, "integer_pow", "pow", "add", "sub", "add_any",
    "mul", "div", "max", "min", "select_n",
}  # fmt: skip


# of an array of random vectors, along its finite axes alone
ALONG_FINITE = {
    "reduce_window_sum", "reduce_window_max", "reduce_window_min", "pad", "rev", "cumsum", "dynamic_slice",
}  # fmt: skip


def parts_like(it: Interpreter, x: Value, axis: int, sizes: Sequence[Any]) -> list[Value]:
    """X cut along an axis into parts of the given sizes."""
    if isinstance(x, Cat) and x.axis == axis and x.sizes == tuple(sizes):
        return list(x.parts)
    if isinstance(x, Det) and (not x.shape or x.shape[axis] == 1):
        return [x] * len(sizes)
    out, start = [], 0
    for size in sizes:
        stop = add_sizes(start, size)
        out.append(section(it, x, axis, start, stop))
        start = stop  # type: ignore[assignment]
    return out


def section(it: Interpreter, x: Value, axis: int, start: Any, stop: Any) -> Value:
    """x[start:stop] along an axis."""
    if not isinstance(x, Cat):
        starts: list[Any] = [0] * len(x.shape)
        stops = list(x.shape)
        starts[axis], stops[axis] = start, stop
        return linear.slice_(it, x, tuple(starts), tuple(stops), None)
    if x.axis != axis:
        return Cat(tuple(section(it, p, axis, start, stop) for p in x.parts), x.axis)
    kept, at = [], 0
    for p, size in zip(x.parts, x.sizes, strict=True):
        end = add_sizes(at, size)
        lo, hi = max(start, at, key=affine), min(stop, end, key=affine)
        if affine(hi) > affine(lo):
            whole = (lo, hi) == (at, end)
            kept.append(p if whole else section(it, p, axis, add_sizes(lo, at, -1), add_sizes(hi, at, -1)))
        at = end  # type: ignore[assignment]
    return kept[0] if len(kept) == 1 else Cat(tuple(kept), axis)


def distribute(it: Interpreter, eqn: Eqn, inputs: list[Value]) -> Any:
    name = eqn.name
    if name in ELEMENTWISE:
        first = next(x for x in inputs if isinstance(x, Cat))
        sizes = _common_cuts([x for x in inputs if isinstance(x, Cat) and x.axis == first.axis])
        columns = [parts_like(it, x, first.axis, sizes) for x in inputs]
        return joined(it, [_one(it, eqn, list(row)) for row in zip(*columns, strict=True)], first.axis)
    x = inputs[0]
    if name == "concatenate":
        axis = eqn.params["dimension"]
        if all((isinstance(p, Cat) and p.axis == axis) or not isinstance(p, Cat) for p in inputs):
            return Cat(tuple(q for p in inputs for q in (p.parts if isinstance(p, Cat) else (p,))), axis)
        other = next(p for p in inputs if isinstance(p, Cat) and p.axis != axis)
        columns = [parts_like(it, p, other.axis, other.sizes) for p in inputs]
        return Cat(tuple(joins.concatenate(it, *row, dimension=axis) for row in zip(*columns, strict=True)), other.axis)
    if name == "dot_general":
        return _dot(it, eqn, *inputs)
    if name == "conv_general_dilated":
        return _convolution(it, eqn, *inputs)
    if name in ALONG_FINITE and isinstance(x, Cat) and is_wide(x.shape[x.axis]):
        return Cat(tuple(_one(it, _narrowed(eqn, p, x.axis), [p, *inputs[1:]]) for p in x.parts), x.axis)
    if name == "stack":
        return _stack(it, eqn, inputs)
    if isinstance(x, Cat):
        return _RULES[name](it, eqn, x, inputs) if name in _RULES else _merged_or_refused(it, eqn, inputs)
    return _merged_or_refused(it, eqn, inputs)


def _one(it: Interpreter, eqn: Eqn, inputs: list[Value]) -> Any:
    it.eqn = eqn
    out = it.apply(eqn, inputs)
    return out[0] if isinstance(out, list | tuple) else out


def joined(it: Interpreter, parts: list[Any], axis: int) -> Any:
    if all(isinstance(p, Det) for p in parts) and not any(is_wide(p.shape[axis]) for p in parts):
        return joins.concatenate(it, *parts, dimension=axis)
    return Cat(tuple(parts), axis)


def _common_cuts(cats: Sequence[Cat]) -> list[Any]:
    cuts: dict[Any, Any] = {}
    for c in cats:
        at: Any = 0
        for s in c.sizes:
            at = add_sizes(at, s)
            cuts[affine(at)] = at
    ordered = [cuts[k] for k in sorted(cuts)]
    return [add_sizes(b, a, -1) for a, b in zip([0, *ordered[:-1]], ordered, strict=True)]


def _merged_or_refused(it: Interpreter, eqn: Eqn, inputs: list[Value]) -> Any:
    """A concatenation of kets along a finite axis as one ket array: masked and added."""
    if any(isinstance(x, Cat) and is_wide(x.shape[x.axis]) for x in inputs):
        raise UnsupportedError(f"'{eqn.name}' is applied to a concatenation along the width")
    return _one_or_many(it, eqn, [as_one(it, x) if isinstance(x, Cat) else x for x in inputs])


def _one_or_many(it: Interpreter, eqn: Eqn, inputs: list[Value]) -> Any:
    it.eqn = eqn
    return it.apply(eqn, inputs)


def as_one(it: Interpreter, x: Cat) -> Value:
    at = 0
    length = finite(x.shape[x.axis])
    terms = []
    for p in x.parts:
        p = as_one(it, p) if isinstance(p, Cat) else p
        size = finite(p.shape[x.axis])
        position = np.arange(length) - at
        at += size
        if isinstance(p, Det) and p.zero:
            continue
        k = it.ket(p)
        if k.layout[x.axis]:
            k = linear.reread(it, k, x.axis, np.clip(position, 0, size - 1), length)
        else:
            shape = tuple(length if a == x.axis else s for a, s in enumerate(k.shape))
            k = linear.broadcast_in_dim(it, k, shape=shape, broadcast_dimensions=tuple(range(len(shape))))
        mask = ((position >= 0) & (position < size)).astype(np.float64)
        mask = mask.reshape([length if a == x.axis else 1 for a in range(len(x.shape))])
        terms.append((1.0, it.scale(Det(mask, k.power * 0, mask.shape), k)))
    return elementwise.total(it, terms)


def _dot(it: Interpreter, eqn: Eqn, x: Value, y: Value) -> Any:
    p = products.plan(eqn.params["dimension_numbers"], len(x.shape), len(y.shape))
    for cat, other, places, own, first in ((x, y, p.lhs, p.rhs, True), (y, x, p.rhs, p.lhs, False)):
        if not isinstance(cat, Cat):
            continue
        place = places[cat.axis]
        shared = own.index(place) if place in own else None
        sizes = cat.sizes
        if shared is not None and isinstance(other, Cat) and other.axis == shared:
            both = [
                cat,
                replace(other, axis=cat.axis, parts=tuple(_renamed(q, other.axis, cat.axis) for q in other.parts)),
            ]
            sizes = tuple(_common_cuts(both))
        others = [other] * len(sizes) if shared is None else parts_like(it, other, shared, sizes)
        mine = parts_like(it, cat, cat.axis, sizes)
        results = [_one(it, eqn, [a, b] if first else [b, a]) for a, b in zip(mine, others, strict=True)]
        if place < p.outer:
            return joined(it, results, place)
        return added(it, results)
    raise AssertionError


def _convolution(it: Interpreter, eqn: Eqn, x: Value, w: Value) -> Any:
    """A concatenation of channels is convolved part by part, one of positions as one array."""
    lhs, rhs, _ = eqn.params["dimension_numbers"]
    if isinstance(x, Cat) and x.axis == lhs[1] and eqn.params["feature_group_count"] == 1:
        kernels = parts_like(it, w, rhs[1], x.sizes)
        return added(it, [_one(it, eqn, [a, b]) for a, b in zip(x.parts, kernels, strict=True)])
    return _merged_or_refused(it, eqn, [x, w])


def _narrowed(eqn: Eqn, part: Value, axis: int) -> Eqn:
    """The equation for a part of the width."""
    if "slice_sizes" not in eqn.params:
        return eqn
    sizes = list(eqn.params["slice_sizes"])
    sizes[axis] = part.shape[axis]
    return replace(eqn, params={**eqn.params, "slice_sizes": tuple(sizes)})


class _Renamed:
    """A stand-in that only tells sizes."""

    def __init__(self, size: Any, axis: int) -> None:
        self.shape = {axis: size}


def _renamed(q: Any, axis: int, to: int) -> Any:
    return _Renamed(q.shape[axis], to)


def added(it: Interpreter, results: list[Any]) -> Any:
    cats = [r for r in results if isinstance(r, Cat)]
    if cats:
        axis = cats[0].axis
        sizes = _common_cuts([c for c in cats if c.axis == axis])
        columns = [parts_like(it, r, axis, sizes) for r in results]
        return joined(it, [added(it, list(row)) for row in zip(*columns, strict=True)], axis)
    if all(isinstance(r, Det) for r in results):
        total = results[0]
        for r in results[1:]:
            top, vals = elementwise.common_power([total, r])
            noise = elementwise._noise(total.noise, r.noise)
            total = Det(
                vals[0] + vals[1], top, total.shape, zero=total.zero and r.zero, noise=noise, line=total.line or r.line
            )
        return total
    return elementwise.total(it, [(1.0, r) for r in results])


def _transpose(it: Interpreter, eqn: Eqn, x: Cat, inputs: Any) -> Any:
    axis = list(eqn.params["permutation"]).index(x.axis)
    return Cat(tuple(_one(it, eqn, [p]) for p in x.parts), axis)


def _stack(it: Interpreter, eqn: Eqn, inputs: list[Value]) -> Any:
    cats = [x for x in inputs if isinstance(x, Cat)]
    axis, new = cats[0].axis, eqn.params["axis"]
    sizes = _common_cuts([c for c in cats if c.axis == axis])
    columns = [parts_like(it, x, axis, sizes) for x in inputs]
    return joined(it, [_one(it, eqn, list(row)) for row in zip(*columns, strict=True)], axis + (new <= axis))


def _expand_dims(it: Interpreter, eqn: Eqn, x: Cat, inputs: Any) -> Any:
    new = eqn.params["dimensions"]
    kept = [i for i in range(len(x.shape) + len(new)) if i not in new]
    return Cat(tuple(_one(it, eqn, [p]) for p in x.parts), kept[x.axis])


def _rev(it: Interpreter, eqn: Eqn, x: Cat, inputs: Any) -> Any:
    parts = tuple(_one(it, eqn, [p]) for p in x.parts)
    return Cat(parts[::-1] if x.axis in eqn.params["dimensions"] else parts, x.axis)


def _cumsum(it: Interpreter, eqn: Eqn, x: Cat, inputs: Any) -> Any:
    if eqn.params["axis"] == x.axis:
        return _merged_or_refused(it, eqn, inputs)
    return Cat(tuple(_one(it, eqn, [p]) for p in x.parts), x.axis)


def _gather(it: Interpreter, eqn: Eqn, x: Cat, inputs: Any) -> Any:
    """Indexing along other axes, part by part."""
    dims = eqn.raw["dimension_numbers"]
    if x.axis in dims.start_index_map or x.axis in dims.collapsed_slice_dims or dims.operand_batching_dims:
        return _merged_or_refused(it, eqn, inputs)
    kept = [a for a in range(len(x.shape)) if a not in dims.collapsed_slice_dims]
    parts = []
    for p, size in zip(x.parts, x.sizes, strict=True):
        sizes = tuple(size if a == x.axis else s for a, s in enumerate(eqn.params["slice_sizes"]))
        part = it.ket(p) if isinstance(p, Det) else p
        parts.append(_one(it, replace(eqn, params=eqn.params | {"slice_sizes": sizes}), [part, inputs[1]]))
    return Cat(tuple(parts), dims.offset_dims[kept.index(x.axis)])


def _tile(it: Interpreter, eqn: Eqn, x: Cat, inputs: Any) -> Any:
    """Repeated along its own axis the parts come again; along the others each part is repeated by itself."""
    reps = list(eqn.params["reps"])
    again, reps[x.axis] = reps[x.axis], 1
    return Cat(tuple(RULES["tile"](it, p, reps=tuple(reps)) for p in x.parts) * again, x.axis)


def _squeeze(it: Interpreter, eqn: Eqn, x: Cat, inputs: Any) -> Any:
    dims = eqn.params["dimensions"]
    return Cat(tuple(_one(it, eqn, [p]) for p in x.parts), x.axis - sum(d < x.axis for d in dims))


def _broadcast(it: Interpreter, eqn: Eqn, x: Cat, inputs: Any) -> Any:
    dims, shape = eqn.params["broadcast_dimensions"], eqn.params["shape"]
    axis = dims[x.axis]
    parts = []
    for p, size in zip(x.parts, x.sizes, strict=True):
        own = tuple(size if a == axis else s for a, s in enumerate(shape))
        params = {**eqn.params, "shape": own}
        parts.append(_one(it, replace(eqn, params=params), [p]))
    return Cat(tuple(parts), axis)


def _slice(it: Interpreter, eqn: Eqn, x: Cat, inputs: Any) -> Any:
    starts, stops = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    if strides[x.axis] != 1:
        return _merged_or_refused(it, eqn, inputs)
    parts = section(it, x, x.axis, starts[x.axis], stops[x.axis])
    rest = [0 if a == x.axis else s for a, s in enumerate(starts)]

    def others(p: Value) -> Value:
        if isinstance(p, Cat) and p.axis == x.axis:
            return Cat(tuple(others(q) for q in p.parts), x.axis)
        ends = [p.shape[a] if a == x.axis else s for a, s in enumerate(stops)]
        return linear.slice_(it, p, tuple(rest), tuple(ends), tuple(strides))

    return others(parts)


def _split(it: Interpreter, eqn: Eqn, x: Cat, inputs: Any) -> Any:
    out, at = [], 0
    axis = eqn.params["axis"]
    for size in eqn.params["sizes"]:
        end = add_sizes(at, size)
        out.append(section(it, x, axis, at, end))
        at = end  # type: ignore[assignment]
    return out


def _reduce_sum(it: Interpreter, eqn: Eqn, x: Cat, inputs: Any) -> Any:
    axes = tuple(int(a) for a in eqn.params["axes"])
    results = [_one(it, eqn, [p]) for p in x.parts]
    if x.axis in axes:
        return added(it, results)
    return joined(it, results, x.axis - sum(a < x.axis for a in axes))


def _reshape(it: Interpreter, eqn: Eqn, x: Cat, inputs: Any) -> Any:
    """The axis stays one axis of the result (axes of size one come or go around it)."""
    new = eqn.params["new_sizes"]
    whole = x.shape[x.axis]
    old_rest = [s for a, s in enumerate(x.shape) if s != 1]
    if [s for s in new if s != 1] == old_rest and whole != 1:
        axis = [a for a, s in enumerate(new) if s != 1][sum(s != 1 for s in x.shape[: x.axis])]
        parts = []
        for p, size in zip(x.parts, x.sizes, strict=True):
            own = tuple(size if a == axis else s for a, s in enumerate(new))
            parts.append(RULES["reshape"](it, p, new_sizes=own))
        return Cat(tuple(parts), axis)
    return _merged_or_refused(it, eqn, inputs)


_RULES = {
    "transpose": _transpose, "squeeze": _squeeze, "broadcast_in_dim": _broadcast, "slice": _slice, "split": _split,
    "reduce_sum": _reduce_sum, "reshape": _reshape, "expand_dims": _expand_dims, "rev": _rev, "cumsum": _cumsum,
    "tile": _tile, "gather": _gather,
}  # fmt: skip
