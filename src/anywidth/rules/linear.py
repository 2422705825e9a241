"""Primitives that move entries around: layouts for merged and reshaped axes, views for everything else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from anywidth.errors import NoLimitError, UnsupportedError
from anywidth.interpret import Interpreter, evaluated, register
from anywidth.kets import Carry, Const, Node, Product, View
from anywidth.rows import new_rows, rows_of
from anywidth.trace import Size, add_sizes, affine, finite, is_wide, kind_of, make_size
from anywidth.values import (
    Ax,
    Det,
    Ket,
    Mat,
    Part,
    Wide,
    divided_wide,
    ratio,
    split_atom,
    to_ket,
)
from anywidth.views import ViewMap, expand


def numeric(shape: Sequence[Size]) -> tuple[int, ...]:
    return tuple(1 if is_wide(s) else finite(s) for s in shape)


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
def transpose(it: Interpreter, x: Part, permutation: Sequence[int]) -> Part:
    shape = tuple(x.shape[i] for i in permutation)
    if isinstance(x, Det):
        return replace(x, val=evaluated(lambda v: jnp.transpose(v, permutation), x.val), shape=shape)
    return x.relaid(tuple(x.layout[i] for i in permutation))


@register("squeeze")
def squeeze(it: Interpreter, x: Part, dimensions: Sequence[int]) -> Part:
    keep = [i for i in range(len(x.shape)) if i not in dimensions]
    if isinstance(x, Det):
        return replace(x, val=x.val.reshape([np.shape(x.val)[i] for i in keep]), shape=tuple(x.shape[i] for i in keep))
    return x.relaid(tuple(x.layout[i] for i in keep))


@register("expand_dims")
def expand_dims(it: Interpreter, x: Part, dimensions: Sequence[int]) -> Part:
    rank = len(x.shape) + len(dimensions)
    keep = [i for i in range(rank) if i not in dimensions]
    shape = tuple(1 if i in dimensions else x.shape[keep.index(i)] for i in range(rank))
    return broadcast_in_dim(it, x, shape=shape, broadcast_dimensions=tuple(keep))


@register("broadcast_in_dim")
def broadcast_in_dim(
    it: Interpreter, x: Part, *_: Any, shape: Sequence[Size], broadcast_dimensions: Sequence[int], **params: Any
) -> Part:
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
                kinds = [name for a in x.wides() for name in kind_of(a.size)]
                if isinstance(x, Ket) and kinds and not kind_of(size) & set(kinds):
                    layout[j] = (Wide(0, size),)
                    continue
                if kinds:
                    raise UnsupportedError(
                        "a random vector is broadcast along a second width axis (an outer product of size n x n)"
                    )
                raise NoLimitError(
                    "a random scalar is shared by all channels (broadcast along the width): the limit stays random"
                )
            x = x.with_view(it.graph, expand(x.rank, 1), x.layout)
            layout[j] = (Ax(x.rank - 1, finite(size)),)
    return x.relaid(tuple(layout))


@register("reshape")
def reshape(it: Interpreter, x: Part, *_: Any, new_sizes: Sequence[Size], **params: Any) -> Part:
    shape = tuple(new_sizes)
    if isinstance(x, Det):
        if not any(is_wide(s) for s in x.shape):
            return replace(x, val=x.val.reshape(shape), shape=shape)
        wides = lambda s: [d for d in s if d != 1]  # noqa: E731
        if wides(x.shape) == wides(shape):
            return replace(x, val=x.val.reshape(numeric(shape)), shape=shape)
        x = to_ket(it.graph, x)
    laid: Any = x.relaid((tuple(a for atoms in x.layout for a in atoms),))
    layout: list[tuple[int, int]] = []
    k = 0
    for size in shape:
        atoms = 0
        rest: Any = size
        while rest != 1:
            atom = laid.layout[0][k + atoms]
            count = ratio(rest, atom.size) if is_wide(rest) == is_wide(atom.size) else None
            if count is not None and count.denominator == 1:
                rest = int(count)
            elif is_wide(rest) and not is_wide(atom.size):
                rest = part(rest, atom.size)
            elif is_wide(atom.size) and kind_of(atom.size) < kind_of(rest):
                rest = divided_wide(rest, atom.size)
            else:
                laid = split_atom(it.graph, laid, 0, k + atoms, rest)
                continue
            atoms += 1
        layout.append((k, k + atoms))
        k += atoms
    return laid.relaid(tuple(laid.layout[0][i:j] for i, j in layout))


def part(size: Size, count: int) -> Size:
    """The size divided by a whole number."""
    a, b = affine(size)
    return make_size(a / count, b / count, kind_of(size))


@register("slice")
def slice_(
    it: Interpreter, x: Part, start_indices: Sequence[Size], limit_indices: Sequence[Size], strides: Any
) -> Part:
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
            read = np.arange(finite(start), finite(stop), stride)
            x = reread(it, x, axis, read, len(read))
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
        return few(it, x, axis, start, size)
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
        rows = tuple(new_rows(r, ("cut", start, size)) if r.axis == atoms[0].number else r for r in x.rows)
        return replace(x, rows=rows, layout=tuple(layout))
    return Ket(it.graph.cut(x.node, start, size), tuple(layout), x.power)


def few(it: Interpreter, x: Any, axis: int, start: Size, size: int) -> Ket:
    """A finite number of rows of a parameter, those that meet the input in W @ concatenate([h, x]): another parameter.

    Its index along the axis, `a n + b` at every entry, is told apart from those of other parts by a.
    """
    node = x.node if isinstance(x, Ket) else None
    while isinstance(node, View) and not isinstance(node.operand, Carry):
        node = it.graph.push(node)
    raw = isinstance(x, Mat) or (isinstance(node, Product) and node.col is None and isinstance(node.operand, Const))
    if not raw or len(x.layout[axis]) != 1 or (isinstance(x, Mat) and x.mean is not None):
        raise UnsupportedError("single coordinates of the width are picked out: they have no limit of their own")
    g, rank = it.graph, x.rank
    rows = x.rows if isinstance(x, Mat) else (node.row,)  # type: ignore[union-attr]
    (atom,) = x.layout[axis]
    number = atom.number if isinstance(x, Mat) and isinstance(atom, Wide) else rows[0].axis
    (own,) = [r for r in rows if r.axis == number]
    if own.splits or own.also:
        raise UnsupportedError("a few rows of a parameter are taken after its width was split into blocks")
    a, b = affine(add_sizes(own.offset, start))
    more = expand(rank, 1)
    entries = int(b) + np.arange(size).reshape((1,) * rank + (size,))
    known = x.indices if isinstance(x, Mat) else node.indices  # type: ignore[union-attr]
    indices = (*((k, g.viewed(v, more)) for k, v in known), (("part", number, a), entries))
    operand = g.const(np.ones((1,) * (rank + 1))) if isinstance(x, Mat) else g.view(node.operand, more)  # type: ignore[union-attr]
    row = rows_of([r for r in rows if r.axis != number])
    leaf = x.leaf if isinstance(x, Mat) else node.leaf  # type: ignore[union-attr]
    out: Node = g.product(leaf, it.copy, operand, 0, row, None, indices, it.eqn.line)
    if isinstance(x, Mat) and x.coef is not None:
        out = g.scale(g.viewed(x.coef, more), out)
    layout = [tuple(Wide(0, at.size) if isinstance(at, Wide) else at for at in atoms) for atoms in x.layout]
    layout[axis] = (Ax(rank, size),) if size > 1 else ()
    return Ket(out, tuple(layout), x.power)


@register("split")
def split(it: Interpreter, x: Part, sizes: Sequence[Size], axis: int) -> list[Part]:
    out = []
    start: Size = 0
    for size in sizes:
        stop = add_sizes(start, size)
        starts: list[Size] = [0] * len(x.shape)
        stops = list(x.shape)
        starts[axis], stops[axis] = start, stop
        out.append(slice_(it, x, tuple(starts), tuple(stops), None))
        start = stop
    return out


@register("rev")
def rev(it: Interpreter, x: Part, dimensions: Sequence[int]) -> Part:
    for axis in dimensions:
        size = x.shape[axis]
        if isinstance(x, Det):
            x = replace(x, val=evaluated(lambda v, a=axis: jnp.flip(v, a), x.val))
        else:
            x = reread(it, x, axis, np.arange(finite(size))[::-1], finite(size))
    return x


@register("dynamic_slice")
def dynamic_slice(it: Interpreter, x: Part, *starts: Part, slice_sizes: Sequence[Size]) -> Part:
    for axis, (start, size) in enumerate(zip(starts, slice_sizes, strict=True)):
        if size == x.shape[axis]:
            continue
        assert isinstance(start, Det)
        if is_wide(x.shape[axis]):
            raise UnsupportedError("a part of the width is picked by a computed index")
        limit = finite(x.shape[axis]) - finite(size)
        index = evaluated(lambda s, n=size, m=limit: jnp.clip(s, 0, m) + jnp.arange(n), start.val)
        if isinstance(x, Det):
            val = evaluated(lambda v, i, a=axis: jnp.take(v, i, axis=a), x.val, index)
            x = replace(x, val=val, shape=(*x.shape[:axis], size, *x.shape[axis + 1 :]))
        else:
            x = reread(it, x, axis, index, finite(size))
    return x
