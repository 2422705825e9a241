"""Windows: convolutions and pooling. Reading, and a product or a sum over the offsets.

    conv(x, W)[p] = sum_o W[o] x[stride p + dilation o - padding],        pool(x)[p] = sum_o x[stride p + ...]

A window turns a finite axis into two, the position p and the offset o in the window; out of bounds it reads zero.
What is left of a convolution is `dot_general`, of a sum over windows `reduce_sum`. How the inner products of what
windows read are computed without reading anything twice is the subject of `tables.py`.

>>> window_index(4, 4, 3, stride=1, low=1)
array([[-1,  0,  1],
       [ 0,  1,  2],
       [ 1,  2,  3],
       [ 2,  3, -1]])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from anywidth.errors import UnsupportedError
from anywidth.interpret import Interpreter, evaluated, register
from anywidth.rules import elementwise, linear, products, reductions
from anywidth.trace import finite, is_wide
from anywidth.values import Ax, Det, Mat, Part, Wide, ratio
from anywidth.views import ViewMap


def window_index(
    size: int, positions: int, window: int, *, stride: int = 1, low: int = 0, base: int = 1, dilation: int = 1
) -> np.ndarray:
    """(positions, window) entries of an axis that a window reads; -1 where it reads padding.

    `low` is the padding before the axis, `base` the dilation of the axis, `dilation` that of the window.
    """
    at = np.arange(positions)[:, None] * stride + np.arange(window) * dilation - low
    inside = (at >= 0) & (at <= (size - 1) * base) & (at % base == 0)
    return np.where(inside, at // base, -1)


def windowed(it: Interpreter, x: Any, axis: int, index: np.ndarray) -> Any:
    """The axis read through windows: it becomes two, position and offset."""
    positions, window = index.shape
    if isinstance(x, Det):
        shape = tuple(n if a == axis else 1 for a in range(len(x.shape)) for n in (index.shape if a == axis else (1,)))
        val = evaluated(lambda v: _read(v, axis, index, shape), x.val)
        return replace(x, val=val, shape=(*x.shape[:axis], positions, window, *x.shape[axis + 1 :]))
    if not x.layout[axis]:  # an axis of size one
        y = _split_one(it, x, axis, index.shape)
        shape = (1,) * axis + index.shape + (1,) * (len(x.shape) - axis - 1)
        mask = (index >= 0).astype(np.float32).reshape(shape)
        return y if mask.all() else it.scale(Det(mask, x.power * 0, shape), y)
    rank = x.rank
    if any(isinstance(a, Wide) for a in x.layout[axis]):
        raise UnsupportedError("a window slides over the width: its coordinates have no order")
    entries: list[Any] = list(range(rank))
    stride = 1
    for a in reversed(x.layout[axis]):
        part = np.where(index < 0, -1, (index // stride) % a.size).reshape((1,) * rank + index.shape)
        entries[a.axis] = it.graph.index(part)
        stride *= a.size
    new = tuple((Ax(rank + i, n),) if n > 1 else () for i, n in enumerate(index.shape))
    layout = (*x.layout[:axis], *new, *x.layout[axis + 1 :])
    return x.with_view(it.graph, ViewMap(rank + 2, tuple(entries)), layout)


def _split_one(it: Interpreter, x: Any, axis: int, shape: Sequence[int]) -> Any:
    """An axis of size one as two axes along which nothing changes."""
    old = x.shape
    new = (*old[:axis], *shape, *old[axis + 1 :])
    dims = [a if a < axis else a + 1 for a in range(len(old)) if a != axis]
    x = linear.squeeze(it, x, dimensions=(axis,))
    return linear.broadcast_in_dim(it, x, shape=new, broadcast_dimensions=tuple(dims))


def _read(v: Any, axis: int, index: np.ndarray, shape: Sequence[int]) -> Any:
    out = jnp.take(v, np.maximum(index, 0).ravel(), axis).reshape((*v.shape[:axis], *index.shape, *v.shape[axis + 1 :]))
    return jnp.where((index >= 0).reshape(shape), out, jnp.zeros((), out.dtype))


# --- convolution ----------------------------------------------------------------------------------------


@register("conv_general_dilated")
def convolution(
    it: Interpreter,
    x: Part,
    w: Part,
    *,
    window_strides: Sequence[int],
    padding: Sequence[Sequence[int]],
    lhs_dilation: Sequence[int],
    rhs_dilation: Sequence[int],
    dimension_numbers: Any,
    feature_group_count: Any,
    batch_group_count: int,
    **params: Any,
) -> Part:
    if isinstance(x, Det) and isinstance(w, Det) and not any(map(is_wide, (*x.shape, *w.shape))):
        return it.evaluate(it.eqn, [x, w])[0]
    lhs, rhs, out = dimension_numbers
    d = len(lhs) - 2
    output = it.eqn.outputs[0].shape
    x = linear.transpose(it, x, (lhs[0], *lhs[2:], lhs[1]))  # batch, space, channel
    w = linear.transpose(it, w, (*rhs[2:], rhs[1], rhs[0]))  # space, channel, output channel
    if any(is_wide(x.shape[1 + i]) or is_wide(w.shape[i]) for i in range(d)):
        raise UnsupportedError("a window slides over the width: its coordinates have no order")
    for i in reversed(range(d)):
        index = window_index(
            finite(x.shape[1 + i]), finite(output[out[2 + i]]), finite(w.shape[i]),
            stride=window_strides[i], low=padding[i][0], base=lhs_dilation[i], dilation=rhs_dilation[i],
        )  # fmt: skip
        x = windowed(it, x, 1 + i, index)
    # x is (batch, p_1, o_1, p_2, o_2, ..., channel), w is (o_1, o_2, ..., channel, output channel)
    x = linear.transpose(it, x, (0, *range(1, 2 * d, 2), *range(2, 2 * d + 1, 2), 2 * d + 1))
    if batch_group_count != 1:
        if is_wide(batch_group_count):
            raise UnsupportedError("the batch of a convolution is split into groups whose number grows with the width")
        y = _by_batch(it, x, w, d, batch_group_count)
    elif is_wide(feature_group_count):
        y = _depthwise(it, x, w, d, feature_group_count)
    else:
        y = _grouped(it, x, w, d, feature_group_count, batch_group_count)
    order = [0] * len(out)
    for place, axis in zip((0, d + 1, *range(1, d + 1)), out, strict=True):
        order[axis] = place
    return linear.transpose(it, y, tuple(order))


def _grouped(it: Interpreter, x: Part, w: Part, d: int, of_features: int, of_batch: int) -> Part:
    """The product, summed over offsets and channels; groups of channels, or of examples, have outputs of their own."""
    position, offset, groups = list(range(d + 1)), [d + 2 + i for i in range(d)], of_features * of_batch  # one of them
    if groups == 1:
        rank = 2 * d + 3
        a = products.spread(x, (*position, *offset, rank - 1), rank)
        b = products.spread(w, (*offset, rank - 1, d + 1), rank)
        return products.contraction(it, a, b, d + 2)
    offset, rank = [o + 1 for o in offset], 2 * d + 4
    size, outs = linear.part(x.shape[-1], of_features), linear.part(w.shape[-1], groups)
    if of_batch == 1:
        x = linear.reshape(it, x, new_sizes=(*x.shape[:-1], groups, size))
    else:
        x = linear.reshape(it, x, new_sizes=(groups, finite(x.shape[0]) // groups, *x.shape[1:]))
        x = linear.transpose(it, x, (*range(1, 2 * d + 2), 0, 2 * d + 2))
    w = linear.reshape(it, w, new_sizes=(*w.shape[:-1], groups, outs))
    a = products.spread(x, (*position, *offset, d + 1, rank - 1), rank)
    b = products.spread(w, (*offset, rank - 1, d + 1, d + 2), rank)
    y = products.contraction(it, a, b, d + 3)
    merged = it.eqn.outputs[0].shape[it.eqn.params["dimension_numbers"][2][1]]
    return linear.reshape(it, y, new_sizes=(*y.shape[: d + 1], merged))


def _depthwise(it: Interpreter, x: Part, w: Part, d: int, groups: Any) -> Part:
    """One group for each channel: a product coordinate by coordinate, summed over the offsets."""
    if x.shape[-1] != groups or w.shape[-2] != 1:
        raise UnsupportedError(
            "the number of groups of a convolution grows with the width and their size does not: use a fixed number of "
            "groups, or one for each channel"
        )
    outputs = ratio(w.shape[-1], groups)
    assert outputs is not None
    merged = w.shape[-1]
    w = linear.squeeze(it, w, dimensions=(d,))
    w = linear.reshape(it, w, new_sizes=(*w.shape[:-1], groups, int(outputs)))
    # batch, positions, offsets, channel, and the outputs of a channel
    rank = 2 * d + 3
    a = products.spread(x, tuple(range(rank - 1)), rank)
    b = products.spread(w, (*range(d + 1, 2 * d + 1), rank - 2, rank - 1), rank)
    if isinstance(a, Mat) or isinstance(b, Mat):
        raise UnsupportedError("a depthwise convolution with a parameter that has two width axes")
    y = reductions.reduce_sum(it, elementwise.mul(it, a, b), tuple(range(d + 1, 2 * d + 1)))
    return linear.reshape(it, y, new_sizes=(*y.shape[: d + 1], merged))


def _by_batch(it: Interpreter, x: Part, w: Part, d: int, groups: int) -> Part:
    """Each block of outputs has examples of its own: those of the group of the batch that it belongs to."""
    # x: (group, batch), positions, offsets, channel; w: offsets, channel, (group, output)
    size, outs = linear.part(x.shape[0], groups), linear.part(w.shape[-1], groups)
    x = linear.reshape(it, x, new_sizes=(groups, size, *x.shape[1:]))
    w = linear.reshape(it, w, new_sizes=(*w.shape[:-1], groups, outs))
    offset, rank = [d + 3 + i for i in range(d)], 2 * d + 4
    a = products.spread(x, (d + 1, *range(d + 1), *offset, rank - 1), rank)
    b = products.spread(w, (*offset, rank - 1, d + 1, d + 2), rank)
    y = products.contraction(it, a, b, d + 3)
    merged = it.eqn.outputs[0].shape[it.eqn.params["dimension_numbers"][2][1]]
    return linear.reshape(it, y, new_sizes=(*y.shape[: d + 1], merged))


# --- pooling ----------------------------------------------------------------------------------------------


def _windows(
    it: Interpreter, x: Any, dimensions: Any, strides: Any, padding: Any, base: Any, dilation: Any
) -> tuple[Any, tuple[int, ...], list[np.ndarray]]:
    """X with an axis of offsets after each axis that a window slides over; where they are, and what they read."""
    output = it.eqn.outputs[0].shape
    offsets: list[int] = []
    indices: list[np.ndarray] = []
    for axis in reversed(range(len(x.shape))):
        if (dimensions[axis], strides[axis], base[axis], tuple(padding[axis])) == (1, 1, 1, (0, 0)):
            continue
        if is_wide(x.shape[axis]):
            raise UnsupportedError("a window slides over the width: its coordinates have no order")
        index = window_index(
            finite(x.shape[axis]), finite(output[axis]), dimensions[axis],
            stride=strides[axis], low=padding[axis][0], base=base[axis], dilation=dilation[axis],
        )  # fmt: skip
        offsets = [axis + 1] + [o + 1 for o in offsets]
        indices.insert(0, index)
        x = windowed(it, x, axis, index)
    return x, tuple(offsets), indices


@register("reduce_window_sum")
def window_sum(it: Interpreter, x: Part, *, window_dimensions: Any, window_strides: Any, padding: Any,
               base_dilation: Any, window_dilation: Any, **params: Any) -> Part:  # fmt: skip
    x, offsets, _ = _windows(it, x, window_dimensions, window_strides, padding, base_dilation, window_dilation)
    return reductions.reduce_sum(it, x, offsets) if offsets else x


@register("reduce_window_max", "reduce_window_min")
def window_max(it: Interpreter, x: Part, *, window_dimensions: Any, window_strides: Any, padding: Any,
               base_dilation: Any, window_dilation: Any, **params: Any) -> Part:  # fmt: skip
    """The extreme of shifted views; padding, which is never the extreme, reads what is in the window anyway."""
    name = "max" if it.eqn.name == "reduce_window_max" else "min"
    if isinstance(x, Det):
        it.settled(x)
        val = evaluated(lambda v: it.eqn.primitive.bind(v, **it.eqn.raw), x.val)
        return Det(val, x.power, it.eqn.outputs[0].shape, zero=x.zero)
    output = it.eqn.outputs[0].shape
    for axis in reversed(range(len(x.shape))):
        window = window_dimensions[axis]
        if (window, window_strides[axis], base_dilation[axis], tuple(padding[axis])) == (1, 1, 1, (0, 0)):
            continue
        if is_wide(x.shape[axis]):
            raise UnsupportedError("a window slides over the width: its coordinates have no order")
        index = window_index(
            finite(x.shape[axis]), finite(output[axis]), window, stride=window_strides[axis], low=padding[axis][0],
            base=base_dilation[axis], dilation=window_dilation[axis],
        )  # fmt: skip
        if (index < 0).all(1).any():
            raise UnsupportedError(f"a window of this '{name}' pooling lies in the padding altogether")
        index = np.where(index < 0, index.max(1, keepdims=True), index)
        views = [linear.reread(it, x, axis, index[:, o], len(index)) for o in range(window)]
        x = views[0]
        for view in views[1:]:
            x = it.pointwise(name, {}, [x, view], x.power)
    return x


__all__ = ["convolution", "window_index", "window_max", "window_sum", "windowed"]
