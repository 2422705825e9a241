"""Views: how the axes of a node are read along the axes of another.

A view has one entry for each axis of what is viewed: a number (it becomes that axis of the result), an `Index` (the
axis is read at integers aligned with the axes of the result, and -1 reads zero, as padding does), or `Dyn` (it is read
at the running step of a loop). Transposition, broadcasting, slicing, gathering and padding are views.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

Array = Any


@dataclass(frozen=True, eq=False)
class Dyn:
    """The running step of a loop being solved: a traced scalar index."""

    step: Array
    offset: int = 0

    @property
    def index(self) -> Array:
        """The step that is read."""
        return self.step + self.offset


@dataclass(frozen=True, eq=False)
class Index:
    """The integers at which an axis is read."""

    array: Array  # integers, aligned with the output axes
    fills: bool = False  # some of them may be -1


@dataclass(frozen=True)
class ViewMap:
    """A view: the rank of the result, and an entry for each axis of what is viewed."""

    rank: int
    entries: tuple[Any, ...]

    @property
    def identity(self) -> bool:
        """Whether it reads every axis as it is."""
        return self.entries == tuple(range(self.rank))

    @property
    def fills(self) -> bool:
        """Whether it may read zeros where there is nothing to read."""
        return any(isinstance(e, Index) and e.fills for e in self.entries)


def expand(rank: int, extra: int) -> ViewMap:
    """Adds `extra` trailing axes."""
    return ViewMap(rank + extra, tuple(range(rank)))


def broadcast_shapes(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of all together."""
    return tuple(np.broadcast_shapes(*shapes)) if shapes else ()


def view_array(a: Array, view: ViewMap, fill: int = 0) -> Array:
    """The array read through the view, `fill` where it reads -1; axes that nothing maps to have size one."""
    xp = np if isinstance(a, np.ndarray | np.generic) and not any(is_traced(e) for e in view.entries) else jnp
    axes = [e for e in view.entries if isinstance(e, int)]
    if len(axes) == len(view.entries) and len(set(axes)) == len(axes):
        order = sorted(range(len(axes)), key=lambda i: axes[i])
        shape = [1] * view.rank
        for i, axis in enumerate(axes):
            shape[axis] = a.shape[i]
        return (a if order == list(range(len(order))) else xp.transpose(a, order)).reshape(shape)
    index: list[Array] = []
    for size, e in zip(a.shape, view.entries, strict=True):
        if isinstance(e, int):
            shape = [1] * view.rank
            shape[e] = size
            index.append(np.arange(size).reshape(shape))
        elif size == 1:
            index.append(np.zeros((1,) * view.rank, np.int64))
        elif isinstance(e, Dyn):
            index.append(jnp.asarray(e.index).reshape((1,) * view.rank))
        else:
            index.append(xp.maximum(e.array, 0) if e.fills else e.array)
    out = xp.asarray(a)[tuple(index)]
    for e in view.entries:
        if isinstance(e, Index) and e.fills:
            out = xp.where(e.array >= 0, out, xp.asarray(fill, out.dtype))
    return out


def is_traced(entry: Any) -> bool:
    """Whether an entry is not known while the kernel is traced."""
    return isinstance(entry, Dyn) or (isinstance(entry, Index) and not isinstance(entry.array, np.ndarray | np.generic))
