"""Primitives that put arrays together: concatenation, padding, and writing into a part of an array.

Along a finite axis these are linear maps of the entries: padding reads zero where there is nothing to read (index -1),
writing is a choice between two arrays by zeros and ones, and parts of one array put together again are a view of it.
Parts along the width, which are vectors of different laws, stay apart (`Cat`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from anywidth.errors import UnsupportedError
from anywidth.interpret import Interpreter, evaluated, register
from anywidth.kets import View
from anywidth.rules.elementwise import common_power, total
from anywidth.rules.linear import broadcast_in_dim, numeric, reread
from anywidth.trace import affine, finite, is_wide
from anywidth.values import (
    Ax,
    Cat,
    Det,
    Ket,
    Mat,
    Value,
    common_sizes,
    standard,
)
from anywidth.views import Dyn, Index, ViewMap


@register("concatenate")
def concatenate(it: Interpreter, *parts: Value, dimension: int) -> Value:
    parts = tuple(p for p in parts if p.shape[dimension] != 0) or parts
    known = [p for p in parts if isinstance(p, Det)]
    if len(known) == len(parts) and not any(is_wide(p.shape[dimension]) for p in parts):
        top, vals = common_power(known)
        val = evaluated(lambda *v: jnp.concatenate(v, dimension), *vals)
        shape = list(parts[0].shape)
        shape[dimension] = np.shape(val)[dimension]
        noise = max((p.noise for p in known if p.noise is not None), default=None)
        return Det(val, top, tuple(shape), zero=all(p.zero for p in known), noise=noise)
    if any(isinstance(p, Mat) for p in parts) and not is_wide(parts[0].shape[dimension]):
        raise UnsupportedError(
            "parameter matrices are stacked along a finite axis; multiply each by its vector and stack the results"
        )
    kets = [p for p in parts if isinstance(p, Ket)]
    if not is_wide(parts[0].shape[dimension]) and len(kets) == len(parts):
        joined = _rejoined(it, kets, dimension)
        if joined is not None:
            return joined
    return Cat(tuple(parts), dimension)


def _rejoined(it: Interpreter, parts: Sequence[Ket], dimension: int) -> Ket | None:
    """Parts of one array of kets (a roll, a stack of shifts) as one view of it; None if they are not."""
    g = it.graph
    parts = [p.relaid(tuple(tuple(a for a in at if a.size != 1) for at in p.layout)) for p in parts]
    if any(len(p.layout[dimension]) > 1 for p in parts):
        return None
    try:
        sizes = common_sizes(
            [(*p.layout[:dimension], (), *p.layout[dimension + 1 :]) for p in parts], len(parts[0].layout)
        )
    except UnsupportedError:
        return None
    whole: list[Any] = [list(s) for s in sizes]
    same = []
    for p in parts:
        whole[dimension] = [finite(p.shape[dimension])]
        same.append(standard(g, p, whole))
    axis = sum(isinstance(s, int) for at in sizes[:dimension] for s in at)
    nodes = [p.node for p in same]
    views = [n.view.entries if isinstance(n, View) else tuple(range(n.rank)) for n in nodes]
    bases = [n.operand if isinstance(n, View) else n for n in nodes]
    if any(b is not bases[0] for b in bases) or len({p.power for p in parts}) > 1:
        return None
    if any(isinstance(e, Dyn) for v in views for e in v):
        return None
    rank, entries = nodes[0].rank, []
    for size, own in zip(bases[0].shape, zip(*views, strict=True), strict=True):
        if (
            all(e is own[0] or e == own[0] for e in own)
            and own[0] != axis
            and (isinstance(own[0], int) or np.shape(own[0].array)[axis] == 1)
        ):
            entries.append(own[0])
            continue
        arrays = []
        for e, p in zip(own, parts, strict=True):
            at = (
                np.arange(size).reshape([size if i == e else 1 for i in range(rank)]) if isinstance(e, int) else e.array
            )
            shape = list(np.shape(at))
            if shape[axis] == 1:
                shape[axis] = finite(p.shape[dimension])
                at = evaluated(lambda a, s=shape: jnp.broadcast_to(a, s), at)
            arrays.append(at)
        shape = list(np.broadcast_shapes(*([n if i != axis else 1 for i, n in enumerate(np.shape(a))] for a in arrays)))
        wide = [[*shape[:axis], np.shape(a)[axis], *shape[axis + 1 :]] for a in arrays]
        joined = evaluated(
            lambda *a, wide=wide: jnp.concatenate([jnp.broadcast_to(v, s) for v, s in zip(a, wide, strict=True)], axis),
            *arrays,
        )
        entries.append(g.index(joined, any(isinstance(e, Index) and e.fills for e in own)))
    total_size = sum(finite(p.shape[dimension]) for p in parts)
    layout = list(same[0].layout)
    layout[dimension] = (Ax(axis, total_size),)
    return Ket(g.view(bases[0], ViewMap(rank, tuple(entries))), tuple(layout), parts[0].power)


@register("pad")
def pad(it: Interpreter, x: Value, value: Value, padding_config: Any) -> Value:
    assert isinstance(value, Det)
    for axis, (low, high, interior) in enumerate(padding_config):
        if (low, high, interior) == (0, 0, 0):
            continue
        if isinstance(x, Det) and not is_wide(x.shape[axis]):
            width = [(0, 0, 0)] * len(x.shape)
            width[axis] = (int(low), int(high), int(interior))
            val = evaluated(lambda v, p, w=width: lax.pad(v, p.astype(v.dtype), w), x.val, value.val)
            x = replace(x, val=val, shape=(*x.shape[:axis], np.shape(val)[axis], *x.shape[axis + 1 :]))
            continue
        if not is_wide(x.shape[axis]):
            x = _padded(it, x, value, axis, int(low), int(high), int(interior))
            continue
        if interior or any(affine(count) < (Fraction(0), Fraction(0)) for count in (low, high)):
            raise UnsupportedError("random vectors are padded along the width by a negative number, or in between")
        parts = [x]
        for count, at in ((low, 0), (high, None)):
            if count:
                shape = tuple(count if a == axis else s for a, s in enumerate(x.shape))
                val = evaluated(lambda v, s=shape: jnp.broadcast_to(v, numeric(s)), value.val)
                parts.insert(at if at is not None else len(parts), Det(val, value.power, shape, zero=value.zero))
        x = Cat(tuple(parts), axis)
    return x


def _padded(it: Interpreter, x: Any, value: Det, axis: int, low: int, high: int, interior: int) -> Any:
    """Padding, also negative and in between, of a finite axis: reading with -1 where there is nothing to read."""
    old, step = int(x.shape[axis]), interior + 1
    size = low + high + old + max(old - 1, 0) * interior
    at = np.arange(size) - low
    inside = (at >= 0) & (at <= (old - 1) * step) & (at % step == 0)
    shape = tuple(size if a == axis else 1 for a in range(len(x.shape)))
    if x.layout[axis]:
        y = reread(it, x, axis, np.where(inside, at // step, -1), size)
    else:
        whole = tuple(size if a == axis else s for a, s in enumerate(x.shape))
        y = broadcast_in_dim(it, x, shape=whole, broadcast_dimensions=tuple(range(len(whole))))
        y = it.scale(Det(inside.astype(np.float32).reshape(shape), x.power * 0, shape), y)
    if value.zero or inside.all():
        return y
    if isinstance(y, Mat) or (value.known and not np.isfinite(value.val).all()):
        raise UnsupportedError("random vectors are padded with a number that is not finite, or parameters with ones")
    around = evaluated(lambda v: jnp.where(inside.reshape(shape), jnp.zeros((), v.dtype), v), value.val)
    return total(it, [(1.0, y), (1.0, Det(around, value.power, shape))])


@register("dynamic_update_slice")
def dynamic_update_slice(it: Interpreter, x: Value, update: Value, *starts: Value) -> Value:
    if all(isinstance(v, Det) for v in (x, update)) and not any(is_wide(s) for s in x.shape):
        return it.evaluate(it.eqn, [x, update, *starts])[0]
    axes = [a for a in range(len(x.shape)) if update.shape[a] != x.shape[a]]
    if not axes:
        return update
    if any(is_wide(x.shape[a]) for a in axes):
        raise UnsupportedError("a block of an array of random vectors is overwritten along the width")
    dtype = it.eqn.outputs[0].dtype
    moved, inside, shape = it.ket(update), jnp.ones((), bool), [1] * len(x.shape)
    for axis in axes:
        start, size, length = starts[axis], finite(update.shape[axis]), finite(x.shape[axis])
        assert isinstance(start, Det)
        shape[axis] = length
        row = tuple(length if a == axis else 1 for a in range(len(x.shape)))
        first = evaluated(lambda s, room=length - size: jnp.clip(s, 0, room), start.val)
        position = evaluated(lambda s, n=length: jnp.arange(n) - s, first)
        inside = evaluated(lambda p, m, n=size, row=row: m & ((p >= 0) & (p < n)).reshape(row), position, inside)
        index = evaluated(lambda p, n=size: jnp.clip(p, 0, n - 1), position)
        if moved.layout[axis]:
            moved = reread(it, moved, axis, index, length)
    moved = broadcast_in_dim(it, moved, shape=x.shape, broadcast_dimensions=tuple(range(len(x.shape))))
    new = it.scale(Det(inside.astype(dtype), moved.power * 0, tuple(shape)), moved)
    if isinstance(x, Det) and x.zero:
        return new
    old = it.scale(Det(1 - inside.astype(dtype), moved.power * 0, tuple(shape)), it.ket(x))
    return total(it, [(1.0, new), (1.0, old)])
