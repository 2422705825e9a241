"""Inner products of kets that are read through windows: tables that are read, not read kets multiplied anew.

A convolution reads h[p + o] for every position p and offset o. The inner product of two of them is

    K[p, p'] = sum_o G[p + o, p' + o],        G[q, q'] = E[Z^h_q Z^h'_q'],

and pushing the reading down to the kets would compute G once for every offset, and once more for every offset
of every layer below. So G is computed once, as a table over the axes of what is read, and the table is read.
Where both sides are read at the same places (a flattened readout: p = p') the table is over common positions, P
numbers and not P^2. Whichever is smaller, the table or what is read of it, decides.

Sums over the offsets are loops: XLA on the CPU computes what a window reads anew for every offset it is used at.
They go axis by axis where the offsets of different axes do not mix (3 + 3 terms and not 9).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from anywidth.kets import Array, Carry, Const, Contract, Graph, Node, Product, Sum, View
from anywidth.views import Dyn, Index, ViewMap

_WORTH = 4  # a table may be this much larger than what is read of it: what is below it is read less often


@dataclass(frozen=True, eq=False)
class Plan:
    """The inner product of `x` and `y` is a table; axis t of it is read at entries[t]."""

    x: Node
    y: Node
    sizes: tuple[int, ...]
    entries: tuple[int | Index, ...]
    rank: int


def plan(graph: Graph, a: Node, b: Node) -> Plan | None:
    """How gram(a, b) is read from a table; None where it is better computed as it stands."""
    (x, ex), (y, ey) = _read(a), _read(b)
    entries = (*ex, *ey)
    if any(isinstance(e, Dyn) for e in entries) or isinstance(x, Carry) or isinstance(y, Carry):
        return None
    if not any(isinstance(e, Index) and np.size(e.array) > 1 for e in entries):
        return None
    if _shallow(x) and _shallow(y):
        return None
    rank = a.rank
    xs = [(i, e) for i, (n, e) in enumerate(zip(x.shape, ex, strict=True)) if n > 1 and not _picked(e)]
    ys = [(j, e) for j, (n, e) in enumerate(zip(y.shape, ey, strict=True)) if n > 1 and not _picked(e)]
    axes: list[tuple[Any, int, Any, int | None, int | None]] = []  # order, size, entry, axis of x, axis of y
    taken: set[int] = set()
    for i, e in xs:
        j = next((j for j, f in ys if j not in taken and x.shape[i] == y.shape[j] and _same(e, f)), None)
        if j is not None:
            taken.add(j)
        axes.append(((_first(e), 0, i), x.shape[i], e, i, j))
    axes += [((_first(f), 1, j), y.shape[j], f, None, j) for j, f in ys if j not in taken]
    axes.sort(key=lambda axis: axis[0])
    if all(isinstance(e, int) for _, _, e, _, _ in axes):
        return None
    size = int(np.prod([n for _, n, _, _, _ in axes]))
    wanted = int(np.prod(np.broadcast_shapes(a.shape, b.shape)))
    if size > _WORTH * wanted:
        return None
    m = len(axes)

    def placed(node: Node, own: Sequence[Any], side: int) -> Node:
        where = {axis[3 + side]: t for t, axis in enumerate(axes)}
        view = [
            where[i] if i in where else graph.index(np.zeros((1,) * m, np.int64)) if n == 1 else _scalar(graph, e, m)
            for i, (n, e) in enumerate(zip(node.shape, own, strict=True))
        ]
        return graph.view(node, ViewMap(m, tuple(view)))

    sizes, read = tuple(axis[1] for axis in axes), tuple(axis[2] for axis in axes)
    return Plan(placed(x, ex, 0), placed(y, ey, 1), sizes, read, rank)


def _read(node: Node) -> tuple[Node, tuple[Any, ...]]:
    return (node.operand, node.view.entries) if isinstance(node, View) else (node, tuple(range(node.rank)))


def _shallow(node: Node) -> bool:
    """Nothing is below it but numbers, so that there is nothing to compute anew."""
    if isinstance(node, Sum):
        return all(_shallow(t) for _, t in node.terms)
    if isinstance(node, View | Contract):
        return _shallow(node.operand)
    return isinstance(node, Const) or (isinstance(node, Product) and isinstance(node.operand, Const))


def _picked(e: Any) -> bool:
    return isinstance(e, Index) and np.size(e.array) == 1 and not e.fills


def _scalar(graph: Graph, e: Index, m: int) -> Index:
    key = ("scalar", id(e), m)
    if key not in graph.table:
        graph.table[key] = graph.index(e.array.reshape((1,) * m))
        graph.keep.append(e)
    return graph.table[key]


def _same(e: Any, f: Any) -> bool:
    if isinstance(e, int) or isinstance(f, int):
        return e == f
    if e is f or e.array is f.array:
        return e.fills == f.fills
    known = isinstance(e.array, np.ndarray) and isinstance(f.array, np.ndarray)
    return known and e.array.shape == f.array.shape and np.array_equal(e.array, f.array)


def _depends(e: Any) -> frozenset[int]:
    return frozenset({e}) if isinstance(e, int) else frozenset(i for i, n in enumerate(np.shape(e.array)) if n > 1)


def _first(e: Any) -> int:
    return min(_depends(e), default=0)


# --- reading ----------------------------------------------------------------------------------------------


def summed(table: Array, p: Plan, k: int, lengths: Sequence[int]) -> Array:
    """What is read of the table, summed over its last k axes (of the given lengths), of rank p.rank - k."""
    table = jnp.asarray(table)
    outer, factor = p.rank - k, 1
    entries: list[int | Index | None] = []
    for t, e in enumerate(p.entries):
        constant = table.shape[t] == 1 and p.sizes[t] > 1
        if constant and isinstance(e, Index) and e.fills:
            table = jnp.broadcast_to(table, (*table.shape[:t], p.sizes[t], *table.shape[t + 1 :]))
            constant = False
        entries.append(None if constant else e)
    live = [t for t, e in enumerate(entries) if e is not None]
    table = table.reshape([table.shape[t] for t in live])
    found: list[int | Index] = [entries[t] for t in live]  # type: ignore[misc]
    for c, length in enumerate(lengths, outer):
        touching = [t for t, e in enumerate(found) if c in _depends(e)]
        if not touching:
            factor *= length
        elif not _apart(found, touching, c, outer):
            continue  # gathered, and summed at the end
        elif isinstance(found[touching[0]], int):
            table = table.sum(touching[0])
            found = [e for t, e in enumerate(found) if t != touching[0]]
        else:
            table, found = _slid(table, found, touching, c, outer)
    table = _gathered(table, found, p.rank)
    table = table.sum(tuple(range(outer, p.rank)))
    return table * factor if factor != 1 else table


def _apart(found: Sequence[int | Index], touching: Sequence[int], c: int, outer: int) -> bool:
    """Whether the axes that run along with c run along with one axis of the result each, all different."""
    if isinstance(found[touching[0]], int):
        return len(touching) == 1
    if any(isinstance(found[t], int) for t in touching):
        return False
    alongs = [_depends(found[t]) - {c} for t in touching]
    others = frozenset().union(*(_depends(e) for t, e in enumerate(found) if t not in touching))
    if any(len(a) > 1 or max(a, default=0) >= outer or a & others for a in alongs):
        return False
    return len({next(iter(a)) for a in alongs if a}) == sum(bool(a) for a in alongs)


def _slid(table: Array, found: list[Any], touching: Sequence[int], c: int, outer: int) -> tuple[Array, list[Any]]:
    """The sum over c, one offset after the other; the axes that run along with it become axes of the result."""
    readers: list[tuple[int, int | None, int]] = []
    steps: list[Array] = []
    gone = []
    for t in touching:
        index = found[t].array
        along = next(iter(_depends(found[t]) - {c}), None)
        rows = index.transpose([c, *(i for i in range(index.ndim) if i != c)]).reshape(index.shape[c], -1)
        slide = _slide(rows, table.shape[t]) if isinstance(rows, np.ndarray) else None
        if slide is None:
            readers.append((t, None, 0))
            steps.append(jnp.asarray(rows))
        else:
            starts, stride, low, high = slide
            if low or high:
                table = jnp.pad(table, [(low, high) if i == t else (0, 0) for i in range(table.ndim)])
            readers.append((t, stride, rows.shape[1]))
            steps.append(jnp.asarray(starts + low, jnp.int32))
        if along is None:
            gone.append(t)
        found[t] = along

    def step(total: Any, at: Any) -> tuple[Any, None]:
        piece = table
        for (t, stride, count), where in zip(readers, at, strict=True):
            if stride is None:
                piece = _taken(piece, t, where)
            else:
                piece = jax.lax.dynamic_slice_in_dim(piece, where, (count - 1) * stride + 1, t)
                piece = piece if stride == 1 else jax.lax.slice_in_dim(piece, 0, None, stride, t)
        return total + piece, None

    first = jax.eval_shape(lambda at: step(jnp.zeros((), table.dtype), at)[0], [s[0] for s in steps])
    if len(steps[0]) == 1:
        table, _ = step(jnp.zeros((), table.dtype), [s[0] for s in steps])
    else:
        table, _ = jax.lax.scan(step, jnp.zeros(first.shape, first.dtype), steps)
    table = table.reshape([n for t, n in enumerate(table.shape) if t not in gone])
    return table, [e for t, e in enumerate(found) if t not in gone]


def _slide(rows: np.ndarray, size: int) -> tuple[np.ndarray, int, int, int] | None:
    """(starts, stride, padding below and above) where every row reads start + stride * p, and -1 outside."""
    count = rows.shape[1]
    inside = rows >= 0
    stride = 1
    for row, ok in zip(rows, inside, strict=True):
        at = np.flatnonzero(ok)
        if len(at) > 1:
            stride, extra = divmod(int(row[at[1]] - row[at[0]]), int(at[1] - at[0]))
            if extra or stride < 1:
                return None
            break
    reach = (count - 1) * stride + 1
    place = np.arange(count) * stride
    starts = np.where(inside.any(1), np.max(np.where(inside, rows - place, -(10**9)), 1), -reach)
    reads = starts[:, None] + place
    if not np.array_equal(np.where((reads >= 0) & (reads < size), reads, -1), rows):
        return None
    return starts, stride, max(0, -int(starts.min())), max(0, int(starts.max()) + reach - size)


def _taken(x: Array, axis: int, index: Array) -> Array:
    """Entries of an axis, zero where the index is -1."""
    out = jnp.take(x, jnp.maximum(index, 0), axis)
    shape = [-1 if i == axis else 1 for i in range(x.ndim)]
    return jnp.where(jnp.reshape(index >= 0, shape), out, jnp.zeros((), x.dtype))


def _gathered(table: Array, found: list[Any], rank: int) -> Array:
    """The table read at its entries, over the axes of the result."""
    for t, e in enumerate(found):
        if isinstance(e, int):
            continue
        along = _depends(e)
        others = frozenset().union(*(_depends(f) for i, f in enumerate(found) if i != t))
        if len(along) != 1 or along & others:
            continue
        index = e.array.reshape(-1)
        slide = _slide(index[None], table.shape[t]) if isinstance(index, np.ndarray) else None
        if slide is None:
            table = _taken(table, t, index)
        else:
            (start,), stride, low, high = slide
            if low or high:
                table = jnp.pad(table, [(low, high) if i == t else (0, 0) for i in range(table.ndim)])
            start = int(start) + low
            table = jax.lax.slice_in_dim(table, start, start + (len(index) - 1) * stride + 1, stride, t)
        found[t] = next(iter(along))
    if all(isinstance(e, int) for e in found) and len(set(found)) == len(found):
        order = sorted(range(len(found)), key=lambda t: found[t])
        shape = [1] * rank
        for t in order:
            shape[found[t]] = table.shape[t]
        return jnp.transpose(table, order).reshape(shape)
    index, mask = [], None
    for t, e in enumerate(found):
        if isinstance(e, int):
            index.append(np.arange(table.shape[t]).reshape([-1 if i == e else 1 for i in range(rank)]))
            continue
        index.append(jnp.maximum(e.array, 0) if e.fills else e.array)
        if e.fills:
            mask = e.array >= 0 if mask is None else mask & (e.array >= 0)
    out = table[tuple(index)]
    return out if mask is None else jnp.where(mask, out, jnp.zeros((), out.dtype))


__all__ = ["Plan", "plan", "summed"]
