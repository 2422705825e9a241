"""One inner product, asked for along different axes, is one computation.

Of a table G[t, s] = E[Z^x_t Z^y_s] the rules of `inner.py` ask for G[t, 1, s], G[1, s, t], ... as the sums of attention
and pooling are opened from one side or from the other. They are one table read along other axes, and taking each of
them for a new inner product would double the work at every layer. So requests are remembered by what is asked for and
how the axes of the two sides are paired, and not by which axis of the result each of them is.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from anywidth.kets import Array, Carry, Node, View
from anywidth.views import Index


class Request(NamedTuple):
    """What is asked for, and the axis of the result that each of its own axes becomes."""

    key: Hashable
    axes: tuple[int, ...]


def request(a: Node, b: Node, eps: bool) -> Request | None:
    """The inner product of a and b, by the axes of a and then those of b; None where they are read in another way."""
    axes: list[int] = []
    sides = []
    for node in (a, b):
        x, entries = (node.operand, node.view.entries) if isinstance(node, View) else (node, range(node.rank))
        if isinstance(x, Carry):
            return None
        places: list[Hashable] = []
        for n, e in zip(x.shape, entries, strict=True):
            if n == 1:
                places.append("only" if not (isinstance(e, Index) and e.fills) else None)
            elif isinstance(e, int):
                if e not in axes:
                    axes.append(e)
                places.append(axes.index(e))
            elif isinstance(e, Index) and isinstance(e.array, np.ndarray) and e.array.size == 1:
                places.append(("at", int(e.array.reshape(()))))
            else:
                places.append(None)
        if None in places:
            return None
        sides.append((x, tuple(places)))
    return Request(("aligned", tuple(sides), eps), tuple(axes))


def stored(value: Array, axes: Sequence[int]) -> Array:
    """The inner product over its own axes."""
    if list(axes) != sorted(axes):
        rest = [i for i in range(value.ndim) if i not in axes]
        value = jnp.transpose(value, (*axes, *rest))
        return value.reshape(value.shape[: len(axes)])
    return value.reshape([value.shape[i] for i in axes])


def along(value: Array, axes: Sequence[int], rank: int) -> Array:
    """The inner product along the axes of a result of this rank."""
    order = sorted(range(len(axes)), key=lambda i: axes[i])
    shape = [1] * rank
    for i, axis in enumerate(axes):
        shape[axis] = value.shape[i]
    return (value if order == list(range(len(order))) else jnp.transpose(value, order)).reshape(shape)


__all__ = ["Request", "along", "request", "stored"]
