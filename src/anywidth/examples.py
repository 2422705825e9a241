"""Data sets: arrays with a leading example axis, or lists of examples of different shapes.

Everything that takes a data set reads it here, so that what is refused is refused before any work and in the same
words everywhere.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

__all__ = ["Dataset", "Group", "dataset"]


@dataclass(frozen=True)
class Group:
    """The examples of one shape.

    Args:
        positions: where each of them stands in the data set, increasing.
        stack: the examples, a pytree of NumPy arrays with a leading example axis.
    """

    positions: Sequence[int]
    stack: PyTree[np.ndarray]

    def __len__(self) -> int:
        return len(self.positions)

    @cached_property
    def spec(self) -> PyTree[jax.ShapeDtypeStruct]:
        """Shape and dtype of one example."""
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), self.stack)

    def example(self, i: int) -> PyTree[np.ndarray]:
        """The i-th example of the group."""
        return jax.tree.map(lambda leaf: leaf[i], self.stack)


@dataclass(frozen=True)
class Dataset:
    """A data set as groups of examples of one shape each, in order of first appearance."""

    groups: tuple[Group, ...]

    def __len__(self) -> int:
        return sum(len(group) for group in self.groups)

    def examples(self) -> list[PyTree[np.ndarray]]:
        """The examples one by one, in the order of the data set."""
        placed = {p: group.example(i) for group in self.groups for i, p in enumerate(group.positions)}
        return [placed[i] for i in range(len(self))]


def dataset(X: Any, name: str = "X", like: Dataset | None = None) -> Dataset:
    """Read a data set.

    Args:
        X: a list of examples, each an array or a pytree of arrays, of any shapes; or an array with a leading
            example axis; or a pytree of such arrays. A list is always a list of examples (a tuple is a pytree).
        name: what to call it in errors.
        like: a data set whose examples these must resemble: same pytree structure, same number of axes.

    Raises:
        TypeError: if a leaf is not an array of numbers or is being traced by `jax.jit`, `vmap` or `grad`.
        ValueError: if there are no examples, leading axes disagree, a number is NaN or infinite, or the
            examples do not resemble those of `like`.
    """
    groups = _listed(X, name) if isinstance(X, list) else (_stacked(X, name),)
    first = groups[0].spec
    for group in groups[1:]:
        _resemble(first, name, group.spec, name)
    if like is not None:
        _resemble(first, name, like.groups[0].spec, "X")
    return Dataset(groups)


def _listed(examples: Sequence[Any], name: str) -> tuple[Group, ...]:
    if not examples:
        raise ValueError(f"{name} has no examples")
    found: dict[Any, tuple[list[int], list[Any]]] = {}
    for i, example in enumerate(examples):
        leaves, treedef = _leaves(example, f"{name}[{i}]")
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        positions, members = found.setdefault((treedef, shapes), ([], []))
        positions.append(i)
        members.append(leaves)
    return tuple(
        Group(tuple(positions), jax.tree.unflatten(key[0], [np.stack(column) for column in zip(*members, strict=True)]))
        for key, (positions, members) in found.items()
    )


def _stacked(X: Any, name: str) -> Group:
    leaves, treedef = _leaves(X, name)
    for leaf in leaves:
        if leaf.ndim == 0:
            raise ValueError(f"{name} must have a leading example axis, and it holds a scalar")
    sizes = {leaf.shape[0] for leaf in leaves}
    if len(sizes) > 1:
        raise ValueError(f"the arrays of {name} disagree on the number of examples (their first axis): {sorted(sizes)}")
    (size,) = sizes
    if size == 0:
        raise ValueError(f"{name} has no examples: its first axis is the example axis, and it has size 0")
    return Group(range(size), jax.tree.unflatten(treedef, leaves))


def _leaves(tree: Any, name: str) -> tuple[list[np.ndarray], Any]:
    leaves, treedef = jax.tree.flatten(tree)
    if not leaves:
        raise TypeError(f"{name} holds no arrays")

    def called(i: int) -> str:
        return name + jax.tree_util.keystr(jax.tree.flatten_with_path(tree)[0][i][0])

    return [_array(leaf, partial(called, i)) for i, leaf in enumerate(leaves)], treedef


def _array(leaf: Any, called: Callable[[], str]) -> np.ndarray:
    if isinstance(leaf, jax.core.Tracer):
        raise TypeError(
            f"{called()} is being traced by jit, vmap or grad. Work over data sets is scheduled from Python and runs "
            "outside them; inside, use jax.vmap of the kernel, which is a pure function of a pair of examples."
        )
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise TypeError(
            f"{called()} must be an array, and it is a {type(leaf).__name__}. A list is a list of examples; "
            "write jnp.asarray(...) around nested lists of numbers."
        )
    # The dtype JAX would give it: float64 becomes float32 unless x64 is enabled, as everywhere in JAX.
    array = np.asarray(leaf)
    array = array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)
    kind = array.dtype.kind
    if kind not in "biufc" and not jnp.issubdtype(array.dtype, jnp.number):
        raise TypeError(f"{called()} must hold numbers, and its dtype is {array.dtype}")
    if kind not in "biu" and not (finite := np.isfinite(array)).all():
        where = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise ValueError(
            f"{called()} has {int((~finite).sum())} entries that are NaN or infinite, the first at index {where}. "
            "Remove or replace them first."
        )
    return array


def _resemble(spec: Any, name: str, other: Any, label: str) -> None:
    whose = f"those of {label}" if label != name else "one another"
    ours: Any = jax.tree.structure(spec)
    theirs: Any = jax.tree.structure(other)
    if ours != theirs:
        raise ValueError(f"the examples of {name} do not have the structure of {whose}: {ours} and {theirs}")
    for a, b in zip(jax.tree.leaves(spec), jax.tree.leaves(other), strict=True):
        if len(a.shape) != len(b.shape):
            raise ValueError(
                f"the examples of {name} do not have as many axes as {whose}: their shapes are {a.shape} and "
                f"{b.shape}. The first axis of an array of examples is the example axis."
            )
