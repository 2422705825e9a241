"""A loop, a request for inner products of what it carries, and the running step at which they are computed.

The recursion of `recursions.py` computes <next[t], next'[s]> from <Carry[t], Carry'[s]>. Its running step is a `Frame`:
it says which carries belong to which side, holds the state (the products at this step), notes which are asked for, and
hoists what does not depend on the state: it is computed for all steps at once and read at the running one.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from anywidth.errors import NeedsUnroll
from anywidth.inner import ZERO, Gram
from anywidth.kets import Carry, Graph, Leaf, Node, View
from anywidth.views import Dyn, Index, ViewMap

_MOST_AXES = 14  # of a request: a step that mixes a finite axis adds one to what it asks for, and so on for ever


@dataclass(eq=False)
class Loop:
    """What is carried, before the first step and after each, as nodes whose first axis is the time."""

    length: int
    fresh: frozenset[Leaf] = frozenset()  # parameters of which every step has its own
    inits: list[Node] = field(default_factory=list)
    nexts: list[Node] = field(default_factory=list)  # the time is their first axis
    carries: list[Node] = field(default_factory=list)  # likewise
    lifted: frozenset[Node] = frozenset()  # every node of the body, likewise
    roots: list[Node] = field(default_factory=list)  # the nodes that leave the loop, likewise

    @property
    def ready(self) -> bool:
        """Whether the body is known."""
        return bool(self.nexts)


@dataclass(frozen=True, eq=False)
class Ask:
    """One side of a request: the number of a carry, read through a view (its time axis left out)."""

    loop: Loop
    number: int
    view: ViewMap

    def key(self, g: Graph) -> Hashable:
        """Equal for equal requests."""
        return (id(self.loop), self.number, self.view.rank, g._entries_key(self.view.entries))


@dataclass(eq=False)
class Frame:
    """A running step: `left` steps with `dyn_left`; the right side with `dyn_right`, or is a row, or is fixed."""

    left: Loop
    right: Loop | None
    step: Any
    count: int
    dyn_left: Dyn
    dyn_right: Dyn | None
    row: bool
    state: dict[Hashable, Any]
    asked: dict[Hashable, tuple[Ask, Any, bool]] = field(default_factory=dict)
    first: bool = False  # the loop's own statistics are being computed: its body is not known yet

    def side(self, x: Node) -> str | None:
        """Which of the stepping sides a carry belongs to."""
        carry, e = carry_view(x)
        if carry.loop is self.left and e[0] is self.dyn_left:
            return "left"
        if carry.loop is self.right and (e[0] is self.dyn_right if not self.row else _is_row(e[0])):
            return "right"
        return None

    def coupled(self, a: Node, b: Node) -> bool:
        """Whether the inner product depends on the state of the solve."""
        left, right = id(self.left), id(self.right)
        if self.right is None:
            return (left in a.loops and a.local) != (left in b.loops and b.local)
        if self.row and self.left is self.right:  # the running step of a loop against its own row
            return left in a.loops and left in b.loops and a.local != b.local
        return (left in a.loops and right in b.loops) or (right in a.loops and left in b.loops)

    def hoist(self, gram: Gram, a: Node, b: Node, eps: bool) -> Any:
        """The inner product computed for all steps at once outside, where it does not depend on the state."""
        assert gram.parent is not None
        if self.coupled(a, b) or (self.first and id(self.left) in (a.loops | b.loops)):
            return None
        if not a.local and not b.local:
            return gram.parent(a, b, eps)
        full = [self._over_steps(gram.graph, x) for x in (a, b)]
        if full[0] is None or full[1] is None:
            return None
        value = gram.parent(full[0], full[1], eps)
        if value is ZERO:
            return ZERO
        if value.shape[0] == 1:
            return value[0]
        return lax.dynamic_index_in_dim(jnp.asarray(value), self.step, 0, keepdims=False)

    def _over_steps(self, g: Graph, x: Node) -> Node | None:
        """The node with the running step as one more first axis, so that what a step reads lies together in memory."""
        rank = x.rank
        shift = shifted(rank)
        if not x.local:
            return g.view(x, shift)
        if not isinstance(x, View) or x.operand.local:
            return None
        entries: list[Any] = []
        for e in x.view.entries:
            if isinstance(e, Dyn):
                if e is not self.dyn_left and e is not self.dyn_right:
                    return None
                steps = np.arange(self.count) + e.offset
                whole = e.offset == 0 and x.operand.shape[len(entries)] == self.count
                entries.append(0 if whole else g.index(steps.reshape((self.count,) + (1,) * rank)))
            elif isinstance(e, Index):
                if not isinstance(e.array, np.ndarray):
                    return None
                entries.append(g.index(g.viewed(e.array, shift, aligned=True)))
            else:
                entries.append(e + 1)
        return g.view(x.operand, ViewMap(rank + 1, tuple(entries)))


def _is_row(e: Any) -> bool:
    return isinstance(e, int) and e == 0


def is_carry(x: Node) -> bool:
    """Whether it is a carry, or a view of one."""
    return isinstance(x.operand if isinstance(x, View) else x, Carry)


def carry_view(x: Node) -> tuple[Carry, tuple[Any, ...]]:
    """The carry that is viewed, and how: the entry of its time first."""
    if isinstance(x, View):
        assert isinstance(x.operand, Carry)
        return x.operand, x.view.entries
    assert isinstance(x, Carry)
    return x, tuple(range(x.rank))


def ask_of(x: Node) -> Ask:
    """The request for (a view of) a carry."""
    if x.rank > _MOST_AXES:
        raise NeedsUnroll("every step asks for a view with more axes")
    carry, entries = carry_view(x)
    return Ask(carry.loop, carry.number, ViewMap(x.rank, entries[1:]))


def shifted(rank: int) -> ViewMap:
    """The view that leaves room for a new first axis."""
    return ViewMap(rank + 1, tuple(range(1, rank + 1)))
