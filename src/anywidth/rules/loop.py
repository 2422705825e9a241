"""Loops.

The body of a scan is interpreted once, at a running step t, with its carry as an opaque ket: inside a `lax.scan` of
our own that steps the carry's own inner products and yields every deterministic number the body comes to. The nodes
of the body, given a time axis, then define the loop for everything outside (`loops.py`). A body whose next carry
needs more than inner products of the last one is unrolled.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from anywidth import gated
from anywidth.errors import NeedsUnroll, NoLimitError, UnsupportedError
from anywidth.frames import Ask, Frame, Loop
from anywidth.inner import ZERO, Gram
from anywidth.interpret import Interpreter, register
from anywidth.kets import Const, Graph, Leaf, Node, Product, is_zero
from anywidth.recursions import sealed
from anywidth.rows import Rows
from anywidth.rules import linear
from anywidth.rules.lift import Lift, collect
from anywidth.rules.unrolled import unrolled
from anywidth.trace import is_wide
from anywidth.values import Ax, Cat, Det, Ket, Mat, Operator, Value, crowded, layout_of, standard, trivial_sizes
from anywidth.views import Dyn, ViewMap


@register("scan")
def scan(
    it: Interpreter,
    *inputs: Value,
    jaxpr: Any,
    length: int,
    num_carry: int,
    num_consts: int,
    reverse: bool,
    **params: Any,
) -> list[Value]:
    consts, carry, xs = (
        inputs[:num_consts],
        inputs[num_consts : num_consts + num_carry],
        inputs[num_consts + num_carry :],
    )
    return looped(it, jaxpr, list(consts), list(carry), list(xs), length, reverse)


def looped(
    it: Interpreter, body: Any, consts: list[Value], carry: list[Value], xs: list[Value], length: int, reverse: bool
) -> list[Value]:
    eqn = it.eqn
    used = dict(it.used)
    nested = it.graph.local > 0 and any(isinstance(x, Ket | Cat) or _is_wide(x) for x in carry)
    if length > 1 and not it.unrolled and not nested:
        try:
            return Body(it, body, consts, carry, xs, length, reverse).run()
        except NeedsUnroll:
            it.eqn = eqn
            it.used = used
    if length > 1000:
        raise UnsupportedError(
            f"a loop of {length} steps has to be unrolled: its carry enters more than products with parameters"
        )
    return unrolled(it, body, consts, carry, xs, length, reverse)


def _is_wide(x: Value) -> bool:
    return isinstance(x, Det) and any(map(is_wide, x.shape))


@dataclass(frozen=True)
class Kind:
    """What a carry is: a deterministic array, or kets of a power of n, all Gaussian or not."""

    power: Any
    ket: bool
    gaussian: bool = True
    zero: bool = False
    row: Rows | None = None


@dataclass(eq=False)
class Body:
    it: Interpreter
    program: Any
    consts: list[Value]
    carry: list[Value]
    xs: list[Value]
    length: int
    reverse: bool
    loop: Loop = field(init=False)

    @property
    def graph(self) -> Graph:
        return self.it.graph

    def run(self) -> list[Value]:
        from anywidth.rules import pieces

        self.xs = [pieces.as_one(self.it, x) if isinstance(x, Cat) and x.axis == 0 else x for x in self.xs]
        if any(isinstance(x, Cat) for x in (*self.carry, *self.xs)):
            raise NeedsUnroll("a concatenation goes through the loop")
        if any(isinstance(x, Mat | Operator) or crowded(x.shape) for x in self.carry):
            raise NeedsUnroll("a parameter, or an array of size n x n, is carried")
        if self.reverse:
            self.xs = [linear.rev(self.it, x, dimensions=(0,)) for x in self.xs]
        self.carry = [
            linear.to_ket(self.graph, x) if isinstance(x, Det) and any(map(is_wide, x.shape)) else x for x in self.carry
        ]
        kinds = [self._first_kind(x) for x in self.carry]
        for _ in range(8):
            found = self.plan(kinds)
            if found is None:
                return self.finish(kinds)
            kinds = found
        raise NeedsUnroll("the kinds of the carries do not settle")

    def _first_kind(self, x: Value) -> Kind:
        if isinstance(x, Det):
            return Kind(x.power, False, zero=x.zero)
        assert isinstance(x, Ket)
        return Kind(x.power, True, x.node.gaussian or is_zero(x.node), is_zero(x.node))

    # --- one step ---

    def start(self, kinds: Sequence[Kind]) -> None:
        """The loop with its carries at time zero; the shapes are those of the code."""
        self.loop = Loop(self.length, self._fresh())
        leaves = frozenset().union(*(_leaves(v) for v in (*self.consts, *self.carry, *self.xs)))
        for i, (x, kind) in enumerate(zip(self.carry, kinds, strict=True)):
            if not kind.ket:
                self.loop.inits.append(None)  # type: ignore[arg-type]
                self.loop.carries.append(None)  # type: ignore[arg-type]
                continue
            sizes = trivial_sizes(x.shape)
            node = standard(self.graph, x, sizes).node
            shape = tuple(s for axis in sizes for s in axis if isinstance(s, int))
            self.loop.inits.append(node)
            self.loop.carries.append(
                self.graph.carry(self.loop, i, (self.length, *shape), leaves, kind.gaussian, kind.row)
            )

    def _fresh(self) -> frozenset[Leaf]:
        """Parameters that come in only as the slices of this loop: every step has entries of its own."""
        own: set[Leaf] = set()
        for x in self.xs:
            indices = (
                x.indices
                if isinstance(x, Mat)
                else x.node.indices
                if isinstance(x, Ket) and isinstance(x.node, Product) and isinstance(x.node.operand, Const)
                else ()
            )
            if any(isinstance(a, np.ndarray) and len(np.unique(a)) == self.length for _, a in indices):
                own |= _leaves(x)
        counted = [leaf for x in self.xs for leaf in _leaves(x)]
        others = frozenset().union(*(_leaves(v) for v in (*self.consts, *self.carry)))
        return frozenset(leaf for leaf in own if counted.count(leaf) == 1 and leaf not in others)

    def interpret(
        self, k: Any, dets: Sequence[Any], xs: Sequence[Any], kinds: Sequence[Kind], state: dict[Hashable, Any]
    ) -> Any:
        g, it = self.graph, self.it
        dyn = Dyn(k)
        frame = Frame(self.loop, self.loop, k, self.length, dyn, dyn, False, state, first=True)
        child = Gram(g, it.gram.epsilon, it.gram, (*it.gram.frames, frame))
        values, slices = iter(dets), iter(xs)
        carry: list[Value] = []
        for i, (x, kind) in enumerate(zip(self.carry, kinds, strict=True)):
            if not kind.ket:
                carry.append(Det(next(values), kind.power, x.shape, zero=kind.zero))
                continue
            node = self.loop.carries[i]
            rank = node.rank - 1
            # what is zero so far has no order in n, and must not outweigh what is added to it
            zero = g.const(np.zeros((1,) * rank))
            view = zero if kind.zero else g.view(node, ViewMap(rank, (dyn, *range(rank))))
            carry.append(Ket(view, layout_of(trivial_sizes(x.shape)), kind.power))
        here = [self._slice(x, dyn, slices) for x in self.xs]
        outer_gram, outer_eqn = it.gram, it.eqn
        it.gram = child
        g.local += 1
        try:
            outputs = it.run(self.program, [*self.consts, *carry, *here])
            nodes = [self._standard(v) for v in outputs]
        finally:
            g.local -= 1
            it.gram, it.eqn = outer_gram, outer_eqn
        return frame, child, nodes

    def _slice(self, x: Value, dyn: Dyn, xs: Any) -> Value:
        if isinstance(x, Det):
            return replace(x, val=next(xs), shape=x.shape[1:])
        if isinstance(x, Cat | Operator):
            raise NeedsUnroll("the loop runs over a concatenation, or over arrays of size n x n")
        atoms = x.layout[0]
        if len(atoms) != 1 or not isinstance(atoms[0], Ax):
            raise NeedsUnroll("the loop runs over merged axes")
        axis = atoms[0].axis
        entries: list[Any] = [i if i < axis else i - 1 for i in range(x.rank)]
        entries[axis] = dyn
        layout = tuple(
            tuple(Ax(a.axis - (a.axis > axis), a.size) if isinstance(a, Ax) else a for a in at) for at in x.layout[1:]
        )
        return x.with_view(self.graph, ViewMap(x.rank - 1, tuple(entries)), layout)

    def _standard(self, v: Value) -> Value:
        from anywidth.rules import pieces

        if isinstance(v, Cat) and isinstance(v.shape[v.axis], int):
            v = pieces.as_one(self.it, v)
        if isinstance(v, Mat | Cat | Operator):
            raise NeedsUnroll("a parameter or a concatenation leaves the loop's body")
        if isinstance(v, Det) and any(map(is_wide, v.shape)):
            v = linear.to_ket(self.graph, v)
        return v if isinstance(v, Det) else standard(self.graph, v, trivial_sizes(v.shape))

    # --- what the loop carries ---

    def plan(self, kinds: list[Kind]) -> list[Kind] | None:
        """None once the kinds hold from one step to the next; then the state of the solve is known too."""
        gram = self.it.gram
        self.start(kinds)
        first_dets = [x.val for x, kind in zip(self.carry, kinds, strict=True) if not kind.ket and isinstance(x, Det)]
        first_xs = [x.val[0] for x in self.xs if isinstance(x, Det)]
        asked: dict[Hashable, Any] = {}
        inits: dict[Hashable, Any] = {}
        state: dict[Hashable, Any] = {}
        for _ in range(64):
            frame, child, outs = self.interpret(0, first_dets, first_xs, kinds, state)
            new = [_merged(kind, v) for kind, v in zip(kinds, outs, strict=False)]
            if new != kinds:
                return new
            nexts = outs[: len(kinds)]
            asked |= frame.asked
            changed = False
            for key, (a, b, e) in list(asked.items()):
                if key not in inits:
                    inits[key] = gram(
                        self._view(self.loop.inits, a), self._view(self.loop.inits, b) if isinstance(b, Ask) else b, e
                    )
                    changed = True
                    if inits[key] is not ZERO:
                        state[key] = jnp.asarray(inits[key])
                value = self.advance(child, nexts, (a, b, e))
                if value is ZERO:
                    continue
                old = state.get(key)
                shape = np.shape(value) if old is None else np.broadcast_shapes(old.shape, np.shape(value))
                if old is None or old.shape != shape:
                    state[key], changed = jnp.ones(shape, jnp.asarray(value).dtype), True
            if frame.asked.keys() - asked.keys():
                asked |= frame.asked
                changed = True
            if not changed and all(k in inits for k in asked):
                break
        else:
            raise NeedsUnroll("the inner products of this loop do not close")
        self.keys = list(state)
        self.asked = asked
        self.inits = [
            jnp.zeros(v.shape, v.dtype)
            if inits[k] is ZERO
            else jnp.broadcast_to(jnp.asarray(inits[k], v.dtype), v.shape)
            for k, v in state.items()
        ]
        return None

    def _view(self, nodes: Sequence[Node], a: Ask) -> Node:
        return self.graph.view(nodes[a.number], a.view)

    def advance(self, child: Gram, nexts: Sequence[Any], request: tuple[Ask, Any, bool]) -> Any:
        a, b, e = request
        g = self.graph
        g.local += 1
        try:
            x = g.view(nexts[a.number].node, a.view)
            y = g.view(nexts[b.number].node, b.view) if isinstance(b, Ask) else b
            return child(x, y, e)
        finally:
            g.local -= 1

    def finish(self, kinds: list[Kind]) -> list[Value]:
        it, g, gram = self.it, self.graph, self.it.gram
        numeric = {i: linear.numeric(x.shape) for i, x in enumerate(self.carry)}
        det_at = [i for i, kind in enumerate(kinds) if not kind.ket]
        first_dets = [jnp.broadcast_to(jnp.asarray(self.carry[i].val), numeric[i]) for i in det_at]  # type: ignore[union-attr]
        found: dict[str, Any] = {}

        def step(carried: Any, at: Any) -> Any:
            dets, states = carried
            k, xs = at
            with sealed(gram):
                frame, child, outs = self.interpret(k, dets, xs, kinds, dict(zip(self.keys, states, strict=True)))
                new = []
                for key, old in zip(self.keys, states, strict=True):
                    value = self.advance(child, outs, self.asked[key])
                    new.append(
                        jnp.zeros_like(old) if value is ZERO else jnp.broadcast_to(value, old.shape).astype(old.dtype)
                    )
            arrays: dict[int, Any] = {}
            for v in outs:
                if isinstance(v, Ket):
                    collect(v.node, arrays)
            found.update(outs=outs, arrays=list(arrays.values()), dyn=frame.dyn_left)
            next_dets = [
                jnp.broadcast_to(jnp.asarray(outs[i].val, d.dtype), d.shape) for i, d in zip(det_at, dets, strict=True)
            ]
            ys = [outs[i].val for i in range(len(kinds), len(outs)) if isinstance(outs[i], Det)]
            return (next_dets, new), (states, [jnp.asarray(a) for a in found["arrays"]], [jnp.asarray(y) for y in ys])

        xs = [jnp.asarray(x.val) for x in self.xs if isinstance(x, Det)]
        (last_dets, _), (states, arrays, ys) = lax.scan(step, (first_dets, self.inits), (jnp.arange(self.length), xs))
        lift = Lift(g, self.length, {id(a): s for a, s in zip(found["arrays"], arrays, strict=True)}, found["dyn"])
        outs = found["outs"]
        self.loop.nexts = [lift(v.node) if isinstance(v, Ket) else None for v in outs[: len(kinds)]]  # type: ignore[misc]
        g.stepped.update({x: (self.loop, i) for i, x in enumerate(self.loop.nexts) if x is not None})
        if not gram.sealed:
            known = gram.solved.setdefault((id(self.loop), id(self.loop), (0, 0)), {})
            known.update({k: s for k, s in zip(self.keys, states, strict=True) if isinstance(self.asked[k][1], Ask)})
        results: list[Value] = []
        dets = iter(last_dets)
        for i, kind in enumerate(kinds):
            if not kind.ket:
                results.append(Det(next(dets), kind.power, self.carry[i].shape, zero=kind.zero))
                continue
            node = self.loop.nexts[i]
            last = g.index(np.full((1,) * (node.rank - 1), self.length - 1))
            view = ViewMap(node.rank - 1, (last, *range(node.rank - 1)))
            results.append(Ket(g.view(node, view), outs[i].layout, kind.power))
        det_ys = iter(ys)
        for v in outs[len(kinds) :]:
            if isinstance(v, Det):
                stacked: Value = replace(v, val=next(det_ys), shape=(self.length, *v.shape))
            else:
                layout = tuple(tuple(Ax(a.axis + 1, a.size) if isinstance(a, Ax) else a for a in at) for at in v.layout)
                stacked = Ket(lift(v.node), ((Ax(0, self.length),), *layout), v.power)
                self.loop.roots.append(stacked.node)
            results.append(linear.rev(it, stacked, dimensions=(0,)) if self.reverse else stacked)
        self.loop.lifted = frozenset(lift.done[x] for x in lift.done if x.local)
        if gated.is_gated(self.loop):
            g.gated[id(self.loop)] = self.loop
            g.keep.append({"loop": self.loop})
        return results


def _leaves(v: Value) -> frozenset[Leaf]:
    if isinstance(v, Mat):
        return frozenset({v.leaf})
    if isinstance(v, Cat):
        return frozenset().union(*(_leaves(p) for p in v.parts))
    if isinstance(v, Operator):
        return frozenset().union(*(_leaves(f) for term in v.terms for f in term.factors))
    return v.node.leaves if isinstance(v, Ket) else frozenset()


def _merged(kind: Kind, v: Value) -> Kind:
    """The kind of a carry that starts as `kind` and is `v` after a step."""
    if isinstance(v, Det):
        if kind.ket:
            raise NeedsUnroll("a carry starts random and becomes deterministic")
        if not kind.zero and not v.zero and v.power != kind.power:
            raise NoLimitError(f"a loop multiplies what it carries by n^{v.power - kind.power} at every step")
        return Kind(v.power if kind.zero else kind.power, False, zero=kind.zero and v.zero)
    assert isinstance(v, Ket)
    if not kind.ket:
        raise NeedsUnroll("a carry starts deterministic and becomes random")
    if is_zero(v.node):
        return kind
    if kind.zero:
        return Kind(v.power, True, v.node.gaussian and kind.gaussian, False, None) if v.node is not None else kind
    if v.power != kind.power:
        raise NoLimitError(f"a loop multiplies what it carries by n^{v.power - kind.power} at every step")
    return replace(kind, gaussian=kind.gaussian and v.node.gaussian)
