"""Sums: over finite axes a linear map, over the width n times a number."""

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
from anywidth.rules.levels import sum_over_one
from anywidth.rules.linear import reread
from anywidth.rules.products import summed_node
from anywidth.rules.readouts import lengths_of, number, readout_of_product
from anywidth.trace import affine, finite, is_wide, order
from anywidth.values import Ax, Det, Ket, Part, Wide, standard, trivial_sizes
from anywidth.views import ViewMap


@register("reduce_sum")
def reduce_sum(it: Interpreter, x: Part, axes: Sequence[int], **params: Any) -> Part:
    axes = tuple(int(a) for a in axes)
    keep = [i for i in range(len(x.shape)) if i not in axes]
    if isinstance(x, Det):
        power, factor, noise = x.power, 1.0, x.noise
        for a in axes:
            if is_wide(x.shape[a]):
                power, factor = power + order(x.shape[a]), factor * float(affine(x.shape[a])[0])
                noise = None if noise is None else noise + order(x.shape[a])
        val = evaluated(lambda v: (jnp.sum(v, axes) * factor).astype(v.dtype), x.val)
        return Det(val, power, tuple(x.shape[i] for i in keep), zero=x.zero, noise=noise, line=x.line)
    if not isinstance(x, Ket):
        raise UnsupportedError("a parameter matrix is summed over: multiply it by a vector of ones")
    moved: Ket = x.relaid(tuple(x.layout[i] for i in (*keep, *axes)))
    sizes = [[a.size for a in axis] for axis in moved.layout]
    moved = standard(it.graph, moved, sizes)
    outer = len(keep)
    summed = [a for axis in moved.layout[outer:] for a in axis]
    count = sum(isinstance(a, Ax) for a in summed)
    wide = [a for a in summed if isinstance(a, Wide)]
    lengths = lengths_of(moved.layout, outer)
    if not wide:
        return Ket(summed_node(it, moved.node, None, count, lengths), moved.layout[:outer], x.power)
    out = readout_of_product(it, moved, outer)
    if out is not None:
        return out
    fluctuating = sum_over_one(it, moved.node, x.power, moved.layout, outer, count)
    if fluctuating is not None:
        return fluctuating
    shape = Ket(moved.node, moved.layout[:outer]).shape
    return number(it, it.mean(moved.node), x.power, [a.size for a in wide], count, lengths, moved.layout[:outer], shape)


@register("cumsum")
def cumsum(it: Interpreter, x: Part, axis: int, reverse: bool) -> Part:
    if isinstance(x, Det):
        return replace(x, val=evaluated(lambda v: lax.cumsum(v, axis, reverse), x.val))
    if not isinstance(x, Ket):
        raise UnsupportedError("a cumulative sum of a parameter matrix is taken: multiply it by a vector first")
    atoms = x.layout[axis]
    if len(atoms) != 1 or not isinstance(atoms[0], Ax):
        raise UnsupportedError("a cumulative sum over the width, or over several merged axes, is taken")
    n, rank = atoms[0].size, x.rank
    triangle = np.tril(np.ones((n, n))) if not reverse else np.triu(np.ones((n, n)))
    entries: list[Any] = list(range(rank))
    entries[atoms[0].axis] = rank + 1
    view = it.graph.view(x.node, ViewMap(rank + 2, tuple(entries)))
    dtype = it.eqn.outputs[0].dtype
    node = it.graph.contract(triangle.astype(dtype).reshape((1,) * rank + (n, n)), view, 1)
    layout = list(x.layout)
    layout[axis] = (Ax(rank, n),)
    return Ket(node, tuple(layout), x.power)


@register("reduce_max", "reduce_min", "argmax", "argmin", "reduce_and", "reduce_or")
def reduce_max(it: Interpreter, x: Part, axes: Sequence[int], **params: Any) -> Part:
    name = it.eqn.name
    if isinstance(x, Det):
        it.settled(x)
        keep = tuple(s for i, s in enumerate(x.shape) if i not in axes)
        val = evaluated(lambda v: it.eqn.primitive.bind(v, **it.eqn.raw), x.val)
        return Det(val, x.power if name in ("reduce_max", "reduce_min") else Fraction(0), keep, zero=x.zero)
    if any(is_wide(x.shape[a]) for a in axes):
        raise UnsupportedError(
            f"'{name}' over the width: the extreme of n numbers has no limit of this kind. Averages over the width "
            "(a mean, a layer norm) have one, and so do extremes over positions or heads: is the axis the right one?"
        )
    if name not in ("reduce_max", "reduce_min"):
        raise UnsupportedError(f"'{name}' over an axis of random vectors has no rule: its values are whole numbers")
    # the entries along the axes, two at a time
    parts: list[Part] = [x]
    for axis in sorted((int(a) for a in axes), reverse=True):
        parts = [entry(it, p, axis, i) for p in parts for i in range(finite(x.shape[axis]))]
    while len(parts) > 1:
        pairs = [parts[i : i + 2] for i in range(0, len(parts), 2)]
        parts = [it.pointwise(name[7:], {}, pair, x.power) if len(pair) == 2 else pair[0] for pair in pairs]
    return parts[0]


def entry(it: Interpreter, x: Part, axis: int, i: int) -> Part:
    """x[..., i, ...]: one entry along a finite axis."""
    y = reread(it, x, axis, np.array([i]), 1)
    return y.relaid((*y.layout[:axis], *y.layout[axis + 1 :]))


@register("reduce_precision")
def reduce_precision(it: Interpreter, x: Part, **params: Any) -> Part:
    return x


__all__ = ["trivial_sizes"]
