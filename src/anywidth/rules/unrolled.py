"""Loops step by step, and stacks: every step is interpreted with the values that the one before left.

A loop whose next carry needs more of the last one than its inner products has no recursion in them; written out, it is
a network like any other, of as many layers as steps.
"""

from __future__ import annotations

from typing import Any

from anywidth.interpret import Interpreter, register
from anywidth.rules import joins, linear
from anywidth.values import Cat, Value


def unrolled(
    it: Interpreter, body: Any, consts: list[Value], carry: list[Value], xs: list[Value], length: int, reverse: bool
) -> list[Value]:
    eqn = it.eqn
    assert eqn is not None
    collected: list[list[Value]] = []
    for t in reversed(range(length)) if reverse else range(length):
        out = it.run(body, [*consts, *carry, *(_at(it, x, t) for x in xs)])
        it.eqn = eqn
        carry = out[: len(carry)]
        collected.append(out[len(carry) :])
    if reverse:
        collected.reverse()
    outs = eqn.outputs[len(carry) :]
    columns = list(zip(*collected, strict=True)) if collected else [() for _ in outs]
    return [*carry, *(None if v is None else stacked(it, list(c)) for c, v in zip(columns, outs, strict=True))]


def _at(it: Interpreter, x: Value, t: int) -> Value:
    from anywidth.rules import pieces

    one = pieces.section(it, x, 0, t, t + 1)
    if isinstance(one, Cat):
        return Cat(tuple(linear.squeeze(it, p, dimensions=(0,)) for p in one.parts), one.axis - 1)
    return linear.squeeze(it, one, dimensions=(0,))


def stacked(it: Interpreter, column: list[Value], axis: int = 0) -> Value:
    """The values as the entries of a new axis."""

    def row(v: Value) -> Value:
        if isinstance(v, Cat):
            return Cat(tuple(row(p) for p in v.parts), v.axis + (v.axis >= axis))
        dims = tuple(i + (i >= axis) for i in range(len(v.shape)))
        shape = list(v.shape)
        shape.insert(axis, 1)
        return linear.broadcast_in_dim(it, v, shape=tuple(shape), broadcast_dimensions=dims)

    return joins.concatenate(it, *(row(v) for v in column), dimension=axis)


@register("stack")
def stack(it: Interpreter, *parts: Value, axis: int = 0, dimension: int | None = None, **params: Any) -> Value:
    return stacked(it, list(parts), axis if dimension is None else dimension)
