"""The covariance of two outputs, arranged by the axes of both.

Outputs of shapes S and S' have a covariance of shape S + S': the nodes are viewed along axes of their own and their
inner product is taken. The last axis of a readout (n, k) is of k independent copies of one Gaussian process, for which
the covariance is the identity times that of one of them: only that one is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np

from anywidth.inner import ZERO, Gram
from anywidth.kets import Contract, Graph, Node, Product, Sum, View
from anywidth.trace import finite
from anywidth.values import Ax, Cat, Ket, Value
from anywidth.views import Index, ViewMap


def kernel_of(grams: Callable[[Fraction], Gram], a: Value, b: Value, eps: bool, dtype: Any) -> Any:
    """The covariance of two outputs, of shape S + S'; an axis of independent copies is left out."""
    if isinstance(a, Cat) or isinstance(b, Cat):
        first = a if isinstance(a, Cat) else b
        assert isinstance(first, Cat)
        pa = a.parts if isinstance(a, Cat) else None
        if pa is not None:
            blocks = [kernel_of(grams, p, b, eps, dtype) for p in pa]
            return jnp.concatenate(blocks, a.axis)  # type: ignore[union-attr]
        assert isinstance(b, Cat)
        blocks = [kernel_of(grams, a, p, eps, dtype) for p in b.parts]
        return jnp.concatenate(blocks, len(a.shape) + b.axis)
    if not isinstance(a, Ket) or not isinstance(b, Ket):  # a constant part of a concatenation
        return jnp.zeros((*map(int, a.shape), *map(int, b.shape)), dtype)  # type: ignore[arg-type]
    gram = grams(-a.power - b.power)
    g = gram.graph
    a, b = _one_class(g, a), _one_class(g, b)
    ra, rb = a.node.rank, b.node.rank
    x = g.view(a.node, ViewMap(ra + rb, tuple(range(ra))))
    y = g.view(b.node, ViewMap(ra + rb, tuple(range(ra, ra + rb))))
    value = gram(x, y, eps)
    # an output has no width axis (`output.py`)
    atoms = [[atom for axis in x.layout for atom in axis if isinstance(atom, Ax)] for x in (a, b)]
    order = [offset + atom.axis for offset, own in zip((0, ra), atoms, strict=True) for atom in own]
    sizes = [atom.size for atom in (*atoms[0], *atoms[1])]
    shape = [finite(s) for s in (*a.shape, *b.shape)]
    if value is ZERO:
        return jnp.zeros(shape, dtype)
    value = jnp.asarray(value)
    rest = [i for i in range(ra + rb) if i not in order]
    value = jnp.transpose(value, order + rest).reshape([value.shape[i] for i in order])
    return jnp.broadcast_to(value, sizes).reshape(shape).astype(dtype)


def _one_class(g: Graph, x: Ket) -> Ket:
    """The first of the independent copies along the last axis, if it is an axis of such copies."""
    if not x.layout:
        return x
    atoms = x.layout[-1]
    if len(atoms) != 1 or not isinstance(atoms[0], Ax) or not _copies(x.node, atoms[0].axis):
        return x
    entries: list[Any] = [i if i < atoms[0].axis else i - 1 for i in range(x.node.rank)]
    entries[atoms[0].axis] = Index(np.zeros((1,) * (x.node.rank - 1), np.int64))
    node = g.view(x.node, ViewMap(x.node.rank - 1, tuple(entries)))
    layout = tuple(
        tuple(Ax(a.axis - (a.axis > atoms[0].axis), a.size) if isinstance(a, Ax) else a for a in axis)
        for axis in x.layout[:-1]
    )
    return Ket(node, layout, x.power)


def _copies(node: Node, axis: int) -> bool:
    """Whether the entries along the axis are independent and of one distribution."""
    if isinstance(node, Sum):
        return all(_copies(t, axis) and (c is None or np.ndim(c) == 0 or np.shape(c)[axis] == 1) for c, t in node.terms)
    if isinstance(node, View):
        entries = [i for i, e in enumerate(node.view.entries) if e == axis]
        arrays = [e for e in node.view.entries if isinstance(e, Index) and np.shape(e.array)[axis] > 1]
        return len(entries) == 1 and not arrays and _copies(node.operand, entries[0])
    if isinstance(node, Contract):
        return (node.coef is None or np.shape(node.coef)[axis] == 1) and _copies(node.operand, axis)
    if not isinstance(node, Product) or node.operand.shape[axis] != 1:
        return False
    moving = [a for _, a in node.indices if np.shape(a)[axis] > 1]
    return len(moving) == 1 and isinstance(moving[0], np.ndarray) and len(np.unique(moving[0])) == moving[0].shape[axis]
