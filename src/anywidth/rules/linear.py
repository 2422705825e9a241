"""Primitives that move entries around: layouts for merged and reshaped axes, views for everything else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from anywidth.errors import NoLimitError, UnsupportedError
from anywidth.interpret import Interpreter, evaluated, register
from anywidth.kets import Dyn, Index, View, ViewMap, expand
from anywidth.rules.elementwise import common_power, total
from anywidth.trace import Size, affine, is_wide
from anywidth.values import (
    Ax,
    Cat,
    Det,
    Ket,
    Mat,
    Value,
    Wide,
    common_sizes,
    ratio,
    refined,
    split_atom,
    standard,
    to_ket,
)


def numeric(shape: Sequence[Size]) -> tuple[int, ...]:
    return tuple(1 if is_wide(s) else int(s) for s in shape)  # type: ignore[arg-type]


def reread(it: Interpreter, x: Any, axis: int, index: Any, size: int, fills: bool = False) -> Any:
    """Entry k of the axis becomes entry index[k]; `index` is a vector, known or traced, of length `size`.

    Where it is -1 (`fills` says that it may be, for a traced one) the entry is zero.
    """
    g = it.graph
    atoms = x.layout[axis]
    if any(isinstance(a, Wide) for a in atoms):
        raise UnsupportedError(
            "single coordinates of the width are picked out, or reordered: they have no limit of their own"
        )
    rank = x.rank
    y = x
    entries: list[Any] = list(range(rank))
    stride = 1
    for a in reversed(atoms):
        part = (index // stride) % a.size if len(atoms) > 1 else index
        if len(atoms) > 1 and (fills or isinstance(index, np.ndarray)):
            part = evaluated(lambda i, p: jnp.where(i < 0, -1, p), index, part)
        entries[a.axis] = g.index(part.reshape((1,) * rank + (size,)), fills)
        stride *= a.size
    layout = list(y.layout)
    layout[axis] = (Ax(rank, size),)
    return y.with_view(g, ViewMap(rank + 1, tuple(entries)), tuple(layout))


@register("transpose")
def transpose(it: Interpreter, x: Value, permutation: Sequence[int]) -> Value:
    shape = tuple(x.shape[i] for i in permutation)
    if isinstance(x, Det):
        return replace(x, val=evaluated(lambda v: jnp.transpose(v, permutation), x.val), shape=shape)
    return x.relaid(tuple(x.layout[i] for i in permutation))


@register("squeeze")
def squeeze(it: Interpreter, x: Value, dimensions: Sequence[int]) -> Value:
    keep = [i for i in range(len(x.shape)) if i not in dimensions]
    if isinstance(x, Det):
        return replace(x, val=x.val.reshape([np.shape(x.val)[i] for i in keep]), shape=tuple(x.shape[i] for i in keep))
    return x.relaid(tuple(x.layout[i] for i in keep))


@register("expand_dims")
def expand_dims(it: Interpreter, x: Value, dimensions: Sequence[int]) -> Value:
    rank = len(x.shape) + len(dimensions)
    keep = [i for i in range(rank) if i not in dimensions]
    shape = tuple(1 if i in dimensions else x.shape[keep.index(i)] for i in range(rank))
    return broadcast_in_dim(it, x, shape=shape, broadcast_dimensions=tuple(keep))


@register("broadcast_in_dim")
def broadcast_in_dim(
    it: Interpreter, x: Value, *_: Any, shape: Sequence[Size], broadcast_dimensions: Sequence[int], **params: Any
) -> Value:
    shape = tuple(shape)
    if isinstance(x, Det):
        middle = [1] * len(shape)
        for i, j in enumerate(broadcast_dimensions):
            middle[j] = np.shape(x.val)[i]
        target = numeric(shape)
        val = evaluated(lambda v: jnp.broadcast_to(v.reshape(middle), target), x.val)
        return replace(x, val=val, shape=shape)
    layout: list[Any] = [None] * len(shape)
    for i, j in enumerate(broadcast_dimensions):
        if x.shape[i] == shape[j]:
            layout[j] = x.layout[i]
    for j, size in enumerate(shape):
        if layout[j] is None:
            if size == 1:
                layout[j] = ()
                continue
            if is_wide(size):
                if x.wides():
                    raise UnsupportedError(
                        "a random vector is broadcast along a second width axis (an outer product of size n x n)"
                    )
                raise NoLimitError(
                    "a random scalar is shared by all channels (broadcast along the width): the limit stays random"
                )
            x = x.with_view(it.graph, expand(x.rank, 1), x.layout)
            layout[j] = (Ax(x.rank - 1, int(size)),)  # type: ignore[arg-type]
    return x.relaid(tuple(layout))


@register("reshape")
def reshape(it: Interpreter, x: Value, *_: Any, new_sizes: Sequence[Size], **params: Any) -> Value:
    shape = tuple(new_sizes)
    if isinstance(x, Det):
        if not any(is_wide(s) for s in x.shape):
            return replace(x, val=x.val.reshape(shape), shape=shape)
        wides = lambda s: [d for d in s if d != 1]  # noqa: E731
        if wides(x.shape) == wides(shape):
            return replace(x, val=x.val.reshape(numeric(shape)), shape=shape)
        x = to_ket(it.graph, x)
    flat = [a for atoms in x.layout for a in atoms]
    x = x.relaid((tuple(flat),))
    layout: list[tuple[Any, ...]] = []
    k = 0
    for size in shape:
        atoms = 0
        rest: Any = size
        while rest != 1:
            atom = x.layout[0][k + atoms]
            count = ratio(rest, atom.size) if is_wide(rest) == is_wide(atom.size) else None
            if count is not None and count.denominator == 1:
                rest = int(count)
            elif is_wide(rest) and not is_wide(atom.size):
                rest = _part(rest, atom.size)
            else:
                x = split_atom(it.graph, x, 0, k + atoms, rest)
                continue
            atoms += 1
        layout.append((k, k + atoms))
        k += atoms
    return x.relaid(tuple(x.layout[0][i:j] for i, j in layout))


def _part(size: Any, count: int) -> Size:
    from anywidth.trace import make_size

    a, b = affine(size)
    return make_size(a / count, b / count)


@register("slice")
def slice_(
    it: Interpreter, x: Value, start_indices: Sequence[Size], limit_indices: Sequence[Size], strides: Any
) -> Value:
    from anywidth.trace import add_sizes

    strides = strides or (1,) * len(x.shape)
    for axis, (start, stop, stride) in enumerate(zip(start_indices, limit_indices, strides, strict=True)):
        if (start, stop, stride) == (0, x.shape[axis], 1):
            continue
        if is_wide(x.shape[axis]):
            x = cut(it, x, axis, start, add_sizes(stop, start, -1), stride)
        elif isinstance(x, Det):
            index = (slice(None),) * axis + (slice(start, stop, stride),)
            val = evaluated(lambda v, index=index: v[index], x.val)
            x = replace(x, val=val, shape=(*x.shape[:axis], np.shape(val)[axis], *x.shape[axis + 1 :]))
        else:
            index = np.arange(start, stop, stride)
            x = reread(it, x, axis, index, len(index))
    return x


def cut(it: Interpreter, x: Any, axis: int, start: Size, size: Size, stride: int = 1) -> Any:
    """The coordinates start : start + size of a width axis."""
    if stride != 1:
        raise UnsupportedError("a slice with a stride is taken along the width: reshape it into blocks instead")
    if isinstance(x, Det):
        if not is_wide(size):
            val = evaluated(lambda v: jnp.repeat(v, size, axis), x.val)
            return replace(x, val=val, shape=(*x.shape[:axis], size, *x.shape[axis + 1 :]))
        return replace(x, shape=(*x.shape[:axis], size, *x.shape[axis + 1 :]))
    if not is_wide(size):
        raise UnsupportedError("single coordinates of the width are picked out: they have no limit of their own")
    atoms = x.layout[axis]
    layout = list(x.layout)
    if len(atoms) > 1:
        if isinstance(atoms[0], Ax) and len(atoms) == 2:
            first, count = ratio(start, atoms[1].size) if start else 0, ratio(size, atoms[1].size)
            if first is not None and count is not None and count.denominator == 1:
                x = x.relaid((*x.layout[:axis], atoms[:1], atoms[1:], *x.layout[axis + 1 :]))
                x = reread(it, x, axis, np.arange(int(first), int(first) + int(count)), int(count))
                merged = x.layout[axis] + x.layout[axis + 1]
                return x.relaid((*x.layout[:axis], merged, *x.layout[axis + 2 :]))
        raise UnsupportedError("a part of the width is taken after it was split into blocks")
    layout[axis] = (Wide(atoms[0].number, size),)
    if isinstance(x, Mat):
        rows = tuple(_cut_rows(r, start, size) if r.axis == atoms[0].number else r for r in x.rows)
        return replace(x, rows=rows, layout=tuple(layout))
    return Ket(it.graph.cut(x.node, start, size), tuple(layout), x.power)


def _cut_rows(rows: Any, start: Size, size: Size) -> Any:
    from anywidth.kets import _new_rows

    return _new_rows(rows, ("cut", start, size))


@register("split")
def split(it: Interpreter, x: Value, sizes: Sequence[Size], axis: int) -> list[Value]:
    from anywidth.trace import add_sizes

    out, start = [], 0
    for size in sizes:
        stop = add_sizes(start, size)
        starts = [0] * len(x.shape)
        stops = list(x.shape)
        starts[axis], stops[axis] = start, stop  # type: ignore[call-overload, assignment]
        out.append(slice_(it, x, tuple(starts), tuple(stops), None))
        start = stop  # type: ignore[assignment]
    return out


@register("rev")
def rev(it: Interpreter, x: Value, dimensions: Sequence[int]) -> Value:
    for axis in dimensions:
        size = x.shape[axis]
        if isinstance(x, Det):
            x = replace(x, val=evaluated(lambda v, a=axis: jnp.flip(v, a), x.val))
        else:
            x = reread(it, x, axis, np.arange(size)[::-1], size)  # type: ignore[arg-type]
    return x


@register("dynamic_slice")
def dynamic_slice(it: Interpreter, x: Value, *starts: Value, slice_sizes: Sequence[Size]) -> Value:
    for axis, (start, size) in enumerate(zip(starts, slice_sizes, strict=True)):
        if size == x.shape[axis]:
            continue
        assert isinstance(start, Det)
        if is_wide(x.shape[axis]):
            raise UnsupportedError("a part of the width is picked by a computed index")
        limit = x.shape[axis] - size  # type: ignore[operator]
        index = evaluated(lambda s, n=size, m=limit: jnp.clip(s, 0, m) + jnp.arange(n), start.val)
        if isinstance(x, Det):
            val = evaluated(lambda v, i, a=axis: jnp.take(v, i, axis=a), x.val, index)
            x = replace(x, val=val, shape=(*x.shape[:axis], size, *x.shape[axis + 1 :]))
        else:
            x = reread(it, x, axis, index, int(size))  # type: ignore[arg-type]
    return x


@register("concatenate")
def concatenate(it: Interpreter, *parts: Value, dimension: int) -> Value:
    if all(isinstance(p, Det) for p in parts) and not any(is_wide(p.shape[dimension]) for p in parts):
        top, vals = common_power(parts)  # type: ignore[arg-type]
        val = evaluated(lambda *v: jnp.concatenate(v, dimension), *vals)
        shape = list(parts[0].shape)
        shape[dimension] = np.shape(val)[dimension]
        noise = max((p.noise for p in parts if p.noise is not None), default=None)  # type: ignore[union-attr]
        return Det(val, top, tuple(shape), zero=all(p.zero for p in parts), noise=noise)  # type: ignore[union-attr]
    if any(isinstance(p, Mat) for p in parts):
        raise UnsupportedError(
            "parameter matrices are concatenated; multiply each by its vector and add or concatenate the results"
        )
    if not is_wide(parts[0].shape[dimension]) and all(isinstance(p, Ket) for p in parts):
        joined = _rejoined(it, parts, dimension)  # type: ignore[arg-type]
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
        whole[dimension] = [int(p.shape[dimension])]  # type: ignore[call-overload]
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
                shape[axis] = int(p.shape[dimension])  # type: ignore[call-overload]
                at = evaluated(lambda a, s=shape: jnp.broadcast_to(a, s), at)
            arrays.append(at)
        shape = list(np.broadcast_shapes(*([n if i != axis else 1 for i, n in enumerate(np.shape(a))] for a in arrays)))
        wide = [[*shape[:axis], np.shape(a)[axis], *shape[axis + 1 :]] for a in arrays]
        joined = evaluated(
            lambda *a: jnp.concatenate([jnp.broadcast_to(v, s) for v, s in zip(a, wide, strict=True)], axis), *arrays
        )
        entries.append(g.index(joined, any(isinstance(e, Index) and e.fills for e in own)))
    total_size = sum(int(p.shape[dimension]) for p in parts)  # type: ignore[arg-type]
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
            from jax import lax

            val = evaluated(lambda v, p, w=width: lax.pad(v, p.astype(v.dtype), w), x.val, value.val)
            x = replace(x, val=val, shape=(*x.shape[:axis], np.shape(val)[axis], *x.shape[axis + 1 :]))
            continue
        if not is_wide(x.shape[axis]):
            x = _padded(it, x, value, axis, int(low), int(high), int(interior))
            continue
        if interior or affine(low) < (0, 0) or affine(high) < (0, 0):
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
        return it.evaluate(it.eqn, [x, update, *starts])[0]  # type: ignore[arg-type]
    axes = [a for a in range(len(x.shape)) if update.shape[a] != x.shape[a]]
    if not axes:
        return update
    if len(axes) > 1 or is_wide(x.shape[axes[0]]):
        raise UnsupportedError(
            "a block of an array of random vectors is overwritten along several axes, or along the width"
        )
    (axis,) = axes
    start, size, length = starts[axis], update.shape[axis], x.shape[axis]
    assert isinstance(start, Det)
    shape = [1] * len(x.shape)
    shape[axis] = length  # type: ignore[assignment]
    first = evaluated(lambda s: jnp.clip(s, 0, length - size), start.val)  # type: ignore[operator]
    position = evaluated(lambda s: jnp.arange(length) - s, first)
    inside = evaluated(lambda p: ((p >= 0) & (p < size)).reshape(shape), position)
    index = evaluated(lambda p: jnp.clip(p, 0, size - 1), position)  # type: ignore[operator]
    dtype = it.eqn.outputs[0].dtype  # type: ignore[union-attr]
    update = it.ket(update)
    moved = reread(it, update, axis, index, int(length)) if update.layout[axis] else broadcast_in_dim(
        it, update, shape=x.shape, broadcast_dimensions=tuple(range(len(x.shape)))
    )  # fmt: skip
    new = it.scale(Det(inside.astype(dtype), moved.power * 0, tuple(shape)), moved)
    if isinstance(x, Det) and x.zero:
        return new
    old = it.scale(Det(1 - inside.astype(dtype), moved.power * 0, tuple(shape)), it.ket(x))
    return total(it, [(1.0, new), (1.0, old)])


__all__ = ["Index", "refined"]
