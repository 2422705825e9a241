"""From the nodes of one step to those of a whole loop.

The body of a loop is interpreted at one running step t. Its nodes hold arrays that differ from step to step (`collect`
finds them, so that the scan that solves the loop can stack them); `Lift` puts the stacked arrays in their place and
gives each node a first axis, the time: node(t, ...) of a step becomes node[t, ...] of the loop. What does not depend on
the step keeps one entry for all times, and a carry viewed at the running step becomes the carry along the new axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from anywidth.kets import Const, Contract, Fluctuation, Graph, Node, Pointwise, Product, Sum, View
from anywidth.views import Dyn, Index, ViewMap


def _arrays(node: Node) -> list[Any]:
    if isinstance(node, Product):
        return [a for _, a in node.indices]
    if isinstance(node, Const):
        return [node.array]
    if isinstance(node, Sum):
        return [c for c, _ in node.terms]
    if isinstance(node, Contract):
        return [node.coef]
    if isinstance(node, Pointwise):
        return list(node.coefs)
    if isinstance(node, View):
        return [e.array for e in node.view.entries if isinstance(e, Index)]
    return []


def _children(node: Node) -> Sequence[Node]:
    if isinstance(node, Sum):
        return [t for _, t in node.terms]
    if isinstance(node, Pointwise):
        return node.args
    return [node.operand] if isinstance(node, Product | Contract | View | Fluctuation) else []


def _static(a: Any) -> bool:
    return a is None or isinstance(a, np.ndarray | np.generic | float | int)


def collect(node: Node, arrays: dict[int, Any], seen: set[Node] | None = None) -> None:
    """The arrays that local nodes hold: they differ from step to step."""
    seen = set() if seen is None else seen
    if node in seen or not node.local:
        return
    seen.add(node)
    arrays.update({id(a): a for a in _arrays(node) if not _static(a)})
    for child in _children(node):
        collect(child, arrays, seen)


@dataclass(eq=False)
class Lift:
    """Gives the nodes of a step a first axis, the time."""

    graph: Graph
    length: int
    stacked: dict[int, Any]
    dyn: Dyn  # the running step
    done: dict[Node, Node] = field(default_factory=dict)

    def __call__(self, node: Node) -> Node:
        if node not in self.done:
            self.done[node] = self.lifted(node)
        return self.done[node]

    def shift(self, rank: int) -> ViewMap:
        return ViewMap(rank + 1, tuple(range(1, rank + 1)))

    def array(self, a: Any, rank: int) -> Any:
        if a is None or (np.ndim(a) == 0 and _static(a)):
            return a
        if _static(a):
            return self.graph.viewed(a, self.shift(np.ndim(a)))
        s = self.stacked[id(a)]
        return s if s.ndim == rank + 1 else s.reshape((self.length,) + (1,) * rank)

    def lifted(self, node: Node) -> Node:
        g, rank = self.graph, node.rank
        if not node.local:
            return g.view(node, self.shift(rank))
        if isinstance(node, View):
            x = node.operand
            entries: list[Any] = [0] if x.local else []  # the time of what is viewed is the time of the view
            for e in node.view.entries:
                if isinstance(e, Dyn):
                    entries.append(0 if e is self.dyn else e)
                elif isinstance(e, Index):
                    static = np.ndim(e.array) == 0 and _static(e.array)
                    entries.append(g.index(e.array.reshape(1) if static else self.array(e.array, rank)))
                else:
                    entries.append(e + 1)
            return g.view(self(x) if x.local else x, ViewMap(rank + 1, tuple(entries)))
        if isinstance(node, Product):
            inner = rank + node.contracted
            indices = tuple((k, self.array(a, inner)) for k, a in node.indices)
            return g.product(
                node.leaf, node.copy, self(node.operand), node.contracted, node.row, node.col, indices, node.line
            )
        if isinstance(node, Const):
            return g.const(self.array(node.array, rank))
        if isinstance(node, Sum):
            return g.sum([(self.array(c, rank), self(t)) for c, t in node.terms])
        if isinstance(node, Contract):
            return g.contract(self.array(node.coef, rank + node.contracted), self(node.operand), node.contracted)
        if isinstance(node, Fluctuation):
            return g.fluctuation(self(node.operand), node.level)
        assert isinstance(node, Pointwise)
        g.current = g.origin.get(node)
        return g.pointwise(node.expr, [self(a) for a in node.args], [self.array(c, rank) for c in node.coefs])
