"""Indexing with arrays: `gather` reads, `scatter` writes, `scatter-add` sums over what is written to one place.

Indices are numbers, known or traced (tokens, the edges of a graph), and never random. Reading is a view. Writing to
known or distinct places is a view of what is written, through the inverse of the indices, and -1 where nothing is.
A sum over places that may coincide, as in `segment_sum`, is a linear map,

    out[i] = sum_e [place[e] = i] update[e].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from anywidth.errors import UnsupportedError
from anywidth.interpret import Interpreter, evaluated, register
from anywidth.kets import is_zero
from anywidth.rules import linear, products
from anywidth.rules.elementwise import total
from anywidth.trace import finite, is_wide
from anywidth.values import ZERO_POWER, Ax, Det, Ket, Part, to_ket
from anywidth.views import ViewMap

_CLIP = jax.lax.GatherScatterMode.CLIP
_FILL = jax.lax.GatherScatterMode.FILL_OR_DROP


def _entries(it: Interpreter, entries: list[Any], atoms: Sequence[Any], index: Any, fills: bool) -> None:
    """Reads the atoms of one axis at `index`, already aligned with the new axes."""
    stride = 1
    for a in reversed(atoms):
        part = index
        if len(atoms) > 1:
            size = a.size
            part = evaluated(lambda i, s=stride, m=size: jnp.where(i < 0, -1, (i // s) % m), index)
        entries[a.axis] = it.graph.index(part, fills)
        stride *= a.size


@register("gather")
def gather(it: Interpreter, x: Part, indices: Part, **params: Any) -> Part:
    raw = it.eqn.raw
    dims, sizes = raw["dimension_numbers"], params["slice_sizes"]
    if isinstance(x, Det) and not any(is_wide(s) for s in x.shape):
        return it.evaluate(it.eqn, [x, indices])[0]
    if not isinstance(indices, Det):
        raise UnsupportedError("an array is indexed by random numbers")
    if isinstance(x, Det):
        x = to_ket(it.graph, x)
    mapped, batched = list(dims.start_index_map), list(dims.operand_batching_dims)
    lost = {*dims.collapsed_slice_dims, *batched}
    batch = np.shape(indices.val)[:-1]
    rank, nb = x.rank, len(batch)
    windows = [a for a in range(len(x.shape)) if a not in lost and (a in mapped or sizes[a] != x.shape[a])]
    windows = [a for a in windows if sizes[a] != x.shape[a]]  # a whole axis starts at its first entry
    if any(is_wide(x.shape[a]) for a in (*lost, *windows)):
        raise UnsupportedError(
            "single coordinates of the width are picked out, or reordered: they have no limit of their own"
        )
    new = rank + nb + len(windows)
    entries: list[Any] = list(range(rank))
    fill = raw["mode"] == _FILL and raw.get("fill_value") == 0
    for a in (*sorted(lost), *windows):
        size, length = int(x.shape[a]), int(sizes[a])
        shape = (1,) * rank + batch + (1,) * len(windows)
        if a in batched:
            along = dims.start_indices_batching_dims[batched.index(a)]
            index: Any = np.arange(size).reshape([size if i == rank + along else 1 for i in range(new)])
            _entries(it, entries, x.layout[a], index, False)
            continue
        if a in mapped:
            k = mapped.index(a)
            start = evaluated(lambda v, k=k, s=shape: v[..., k].reshape(s), indices.val)
        else:
            start = np.zeros((1,) * new, np.int64)
        offset = np.arange(length).reshape(
            [length if a in windows and i == rank + nb + windows.index(a) else 1 for i in range(new)]
        )

        def read(v: Any, offset: Any = offset, last: int = size - length) -> Any:
            inside = jnp.clip(v, 0, last) + offset
            return jnp.where((v >= 0) & (v <= last), inside, -1) if fill else inside

        _entries(it, entries, x.layout[a], evaluated(read, start), fill)
    rest: list[tuple[Any, ...]] = []
    for a in range(len(x.shape)):
        if a in windows:
            rest.append((Ax(rank + nb + windows.index(a), int(sizes[a])),) if sizes[a] != 1 else ())
        elif a not in lost:
            rest.append(x.layout[a])
    axes = [(Ax(rank + i, n),) if n > 1 else () for i, n in enumerate(batch)]
    layout = [rest.pop(0) if i in dims.offset_dims else axes.pop(0) for i in range(nb + len(dims.offset_dims))]
    return x.with_view(it.graph, ViewMap(new, tuple(entries)), tuple(layout))


@register("tile")
def tile(it: Interpreter, x: Part, reps: Sequence[int]) -> Part:
    for axis, count in enumerate(reps):
        if count == 1:
            continue
        if is_wide(x.shape[axis]):
            raise UnsupportedError("a random vector is repeated along its width")
        size = finite(x.shape[axis])
        if isinstance(x, Det):
            val = evaluated(lambda v, a=axis, c=count: jnp.concatenate([v] * c, a), x.val)
            x = replace(x, val=val, shape=(*x.shape[:axis], size * count, *x.shape[axis + 1 :]))
        elif size == 1:
            shape = tuple(count if a == axis else s for a, s in enumerate(x.shape))
            x = linear.broadcast_in_dim(it, x, shape=shape, broadcast_dimensions=tuple(range(len(shape))))
        else:
            x = linear.reread(it, x, axis, np.arange(size * count) % size, size * count)
    return x


@register("scatter-add", "scatter_add", "scatter")
def scatter(it: Interpreter, x: Part, indices: Part, updates: Part, **params: Any) -> Part:
    raw, name = it.eqn.raw, it.eqn.name
    dims = raw["dimension_numbers"]
    if all(isinstance(v, Det) and not any(map(is_wide, v.shape)) for v in (x, updates)):
        return it.evaluate(it.eqn, [x, indices, updates])[0]
    if not isinstance(indices, Det):
        raise UnsupportedError("an array is written to at random places")
    if dims.operand_batching_dims:
        raise UnsupportedError("a batched scatter is not supported: write to all places at once, x.at[i, j]")
    inserted, mapped = list(dims.inserted_window_dims), list(dims.scatter_dims_to_operand_dims)
    kept = [a for a in range(len(x.shape)) if a not in inserted]
    window = dict(zip(kept, dims.update_window_dims, strict=True))  # axis of x -> axis of the updates
    placed = [a for a in range(len(x.shape)) if a in inserted or updates.shape[window[a]] != x.shape[a]]
    if any(is_wide(x.shape[a]) for a in placed):
        raise UnsupportedError("single coordinates of the width are written to: they have no limit of their own")
    batch_axes = [i for i in range(len(updates.shape)) if i not in dims.update_window_dims]
    batch = tuple(finite(updates.shape[i]) for i in batch_axes)
    runs = [a for a in placed if a in window]  # written from a start on
    lengths = [finite(updates.shape[window[a]]) for a in runs]
    source = (*batch, *lengths)  # what is written, axes beside those that are kept whole
    targets = [finite(x.shape[a]) for a in placed]

    def places(v: Any) -> Any:
        """The flat place of each of them, out of bounds where it is dropped."""
        flat, inside = jnp.zeros(source, jnp.int32), jnp.ones(source, bool)
        for a, size in zip(placed, targets, strict=True):
            start = v[..., mapped.index(a)] if a in mapped else jnp.zeros(batch, jnp.int32)
            start = start.reshape(batch + (1,) * len(runs)).astype(jnp.int32)
            length = lengths[runs.index(a)] if a in runs else 1
            good = (start >= 0) & (start <= size - length)
            start = jnp.clip(start, 0, size - length)
            inside = inside & (good if raw["mode"] != _CLIP else True)
            if a in runs:
                where = len(batch) + runs.index(a)
                start = start + jnp.arange(length).reshape([length if i == where else 1 for i in range(len(source))])
            flat = flat * size + start
        return jnp.where(inside, flat, -1).reshape(-1)

    flat = evaluated(places, indices.val)
    power_zero = isinstance(x, Det) and x.zero
    u = it.ket(updates)
    if is_zero(u.node) and name != "scatter":
        return x
    distinct = isinstance(flat, np.ndarray) and len(np.unique(flat[flat >= 0])) == (flat >= 0).sum()
    order = [*batch_axes, *(window[a] for a in runs), *(window[a] for a in kept if a not in placed)]
    u = linear.transpose(it, u, tuple(order))
    count, wholes = len(source), [a for a in kept if a not in placed]
    if distinct or name == "scatter":
        new, mask = _written(it, u, flat, source, targets)
        if name == "scatter" and not power_zero:
            shape = [targets[placed.index(a)] if a in placed else 1 for a in range(len(x.shape))]
            keep = evaluated(lambda m: jnp.where(m, 0, 1).astype(u_dtype(it)).reshape(shape), mask)
            x = it.scale(Det(keep, ZERO_POWER, tuple(shape)), it.ket(x))
    else:
        number = int(np.prod(targets))
        onehot = evaluated(
            lambda f: (f[None] == jnp.arange(number)[:, None]).astype(u_dtype(it)).reshape((*targets, *source)), flat
        )
        t, rank = len(targets), len(targets) + len(wholes) + count
        a = products.spread(Det(onehot, ZERO_POWER, np.shape(onehot)), (*range(t), *range(t + len(wholes), rank)), rank)
        b = products.spread(u, (*range(t + len(wholes), rank), *range(t, t + len(wholes))), rank)
        new = products.contraction(it, a, b, t + len(wholes))
    # axes: the places, then those that are kept whole
    at = [*placed, *wholes]
    new = linear.transpose(it, new, tuple(at.index(a) for a in range(len(x.shape))))
    return new if power_zero else total(it, [(1.0, x), (1.0, new)])


def u_dtype(it: Interpreter) -> Any:
    return it.eqn.outputs[0].dtype


def _written(it: Interpreter, u: Ket, flat: Any, source: Sequence[int], targets: Sequence[int]) -> tuple[Any, Any]:
    """What is written where, zero elsewhere, over the axes of the targets; and where something is written."""
    number = int(np.prod(targets))

    def inverse(f: Any) -> Any:
        where = jnp.where(f < 0, number, f)
        return jnp.full(number, -1, jnp.int32).at[where].set(jnp.arange(f.size, dtype=jnp.int32), mode="drop")

    origin = evaluated(inverse, flat)
    rank, t = u.rank, len(targets)
    shape = (1,) * rank + tuple(targets)
    entries: list[Any] = list(range(rank))
    stride, empty = 1, False
    for axis in reversed(range(len(source))):
        size = source[axis]
        index = evaluated(lambda o, s=stride, m=size: jnp.where(o < 0, -1, (o // s) % m).reshape(shape), origin)
        if u.layout[axis]:
            _entries(it, entries, u.layout[axis], index, True)
        else:
            empty = True
        stride *= size
    mask = evaluated(lambda o: o >= 0, origin)
    layout = tuple((Ax(rank + i, n),) if n > 1 else () for i, n in enumerate(targets))
    out = u.with_view(it.graph, ViewMap(rank + t, tuple(entries)), (*layout, *u.layout[len(source) :]))
    if empty or not source:  # nothing above says where nothing is written
        rest = (1,) * (len(u.layout) - len(source))
        shape = (*targets, *rest)
        zeros_and_ones = evaluated(lambda m: m.astype(u_dtype(it)).reshape(shape), mask)
        if not u.layout[: len(source)] or all(not atoms for atoms in u.layout[: len(source)]):
            out = linear.broadcast_in_dim(
                it, u.relaid(u.layout[len(source) :]), shape=(*targets, *u.shape[len(source) :]),
                broadcast_dimensions=tuple(range(t, t + len(rest))),
            )  # fmt: skip
        out = it.scale(Det(zeros_and_ones, ZERO_POWER, shape), out)
    return out, mask


__all__ = ["gather", "scatter"]
