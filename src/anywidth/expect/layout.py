"""Which coordinates of the Gaussians below two kets are sampled together, and their covariances."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

from anywidth.kets import Node, Pointwise, View
from anywidth.views import ViewMap

__all__ = ["LARGEST", "Layout", "covariance", "layouts"]

LARGEST = 256  # dimensions that are sampled jointly


@dataclass(eq=False)
class Layout:
    """The coordinates of the bases, when the axes `joint` of the request are sampled jointly.

    A block is a node whose first `rank` axes are those of the request (of size one along the joint ones) and whose
    others are coordinates. The same block may serve several bases: `place` has its number and the joint axes that the
    base has, which come first among the block's coordinates.
    """

    graph: Any
    rank: int
    joint: tuple[int, ...]
    blocks: list[Node] = field(default_factory=list)
    place: dict[Node, tuple[int, list[int]]] = field(default_factory=dict)

    def add(self, base: Node) -> None:
        """Makes room for a base."""
        if base in self.place:
            return
        rank = self.rank
        moved = [i for i in self.joint if base.shape[i] > 1]
        extra = base.rank - rank
        entries = [rank + moved.index(i) if i in moved else i for i in range(rank)]
        entries += [rank + len(moved) + j for j in range(extra)]
        block = self.graph.view(base, ViewMap(rank + len(moved) + extra, tuple(entries)))
        for number, other in enumerate(self.blocks):
            if other.shape == block.shape and _same(self.graph, other, block):
                self.place[base] = number, moved
                return
        self.blocks.append(block)
        self.place[base] = len(self.blocks) - 1, moved

    def size(self, number: int) -> int:
        """How many coordinates a block has."""
        return int(np.prod(self.blocks[number].shape[self.rank :], dtype=int))

    def sample(self, base: Node, z: Any, start: int) -> Any:
        """The base's values, from those of its block: z[..., start:]."""
        number, moved = self.place[base]
        extra = self.blocks[number].shape[self.rank :]
        z = z[..., start : start + self.size(number)]
        lead = z.shape[: self.rank + 1]
        z = z.reshape(*lead, *extra)
        at = self.rank + 1
        order = [0] + [at + moved.index(i) if i in moved else 1 + i for i in range(self.rank)]
        order += list(range(at + len(moved), z.ndim))
        left = [i for i in range(z.ndim) if i not in order]
        z = jnp.transpose(z, order + left)
        return z.reshape(z.shape[: len(order)])


def _same(graph: Any, x: Node, y: Node) -> bool:
    """The same kets, however the views on them are written."""
    for _ in range(64):
        if x is y:
            return True
        if isinstance(x, View):
            pushed = graph.push(x)
            if pushed is x:
                return False
            x = pushed
        elif isinstance(y, View):
            pushed = graph.push(y)
            if pushed is y:
                return False
            y = pushed
        else:
            return False
    return False


def layouts(graph: Any, left: Any, right: Any) -> tuple[Layout, Layout, tuple[int, ...]]:
    """The layouts of the two sides that cost least, and the shape of the batch of expectations.

    Gaussians that both sides have are coordinates of either: so what an example has by itself is sampled at the points
    at which two equal examples are.
    """
    a, b = left.node, right.node
    rank = a.rank
    full = np.broadcast_shapes(a.shape, b.shape)
    axes = [i for i in range(rank) if full[i] > 1]
    choices = itertools.chain.from_iterable(itertools.combinations(axes, k) for k in range(len(axes) + 1))
    best: Any = None
    for joint in itertools.islice(choices, 64):
        pair = Layout(graph, rank, joint), Layout(graph, rank, joint)
        for base in left.bases:
            pair[0].add(base)
        for base in right.bases:
            pair[1].add(base)
        dimension = sum(lay.size(i) for lay in pair for i in range(len(lay.blocks)))
        batch = tuple(1 if i in joint else full[i] for i in range(rank))
        cost = int(np.prod(batch)) * dimension**2 * (1 if not joint else 3)
        if dimension <= LARGEST and (best is None or cost < best[0]):
            best = cost, pair, batch
    if best is None:
        from anywidth.expect.choose import SeveralError

        raise SeveralError(
            a if isinstance(a, Pointwise) else b,
            f"this is a function of more than {LARGEST} correlated Gaussians (in both copies of the network), which is "
            "more than anywidth samples",
        )
    return (*best[1], best[2])


def covariance(gram: Any, first: list[Node], second: list[Node], batch: tuple[int, ...], eps: bool, dtype: Any) -> Any:
    """(*batch, D, D') covariances of all coordinates of two lists of blocks."""
    from anywidth.inner import ZERO

    rank = len(batch)
    graph = gram.graph

    def entry(p: Node, q: Node) -> Any:
        kp, kq = p.rank - rank, q.rank - rank
        x = graph.view(p, ViewMap(rank + kp + kq, tuple(range(rank + kp))))
        y = graph.view(q, ViewMap(rank + kp + kq, (*range(rank), *range(rank + kp, rank + kp + kq))))
        value = gram(x, y, eps)
        sp, sq = p.shape[rank:], q.shape[rank:]
        shape = (*batch, int(np.prod(sp, dtype=int)), int(np.prod(sq, dtype=int)))
        if value is ZERO:
            return jnp.zeros(shape, dtype)
        return jnp.broadcast_to(value, (*batch, *sp, *sq)).reshape(shape).astype(dtype)

    if not first or not second:
        count = lambda blocks: sum(int(np.prod(p.shape[rank:], dtype=int)) for p in blocks)
        return jnp.zeros((*batch, count(first), count(second)), dtype)
    if first is second:
        upper = {(i, j): entry(first[i], first[j]) for i in range(len(first)) for j in range(i, len(first))}
        rows = [
            [upper[i, j] if i <= j else jnp.swapaxes(upper[j, i], -1, -2) for j in range(len(first))]
            for i in range(len(first))
        ]
        S = jnp.concatenate([jnp.concatenate(row, -1) for row in rows], -2)
        return (S + jnp.swapaxes(S, -1, -2)) / 2
    return jnp.concatenate([jnp.concatenate([entry(p, q) for q in second], -1) for p in first], -2)
