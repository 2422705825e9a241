"""Loops and branches."""

from __future__ import annotations

from typing import Any

from anywidth.errors import NeedsUnroll, UnsupportedError
from anywidth.interpret import Interpreter, register
from anywidth.rules import linear
from anywidth.rules.elementwise import select
from anywidth.values import Cat, Det, Value


@register("scan")
def scan(it: Interpreter, *inputs: Value, jaxpr: Any, length: int, num_carry: int, num_consts: int, reverse: bool, **params: Any) -> list[Value]:
    consts, carry, xs = inputs[:num_consts], inputs[num_consts : num_consts + num_carry], inputs[num_consts + num_carry :]
    return unrolled(it, jaxpr, list(consts), list(carry), list(xs), length, reverse)


def unrolled(it: Interpreter, body: Any, consts: list[Value], carry: list[Value], xs: list[Value], length: int, reverse: bool) -> list[Value]:
    eqn = it.eqn
    collected: list[list[Value]] = []
    for t in reversed(range(length)) if reverse else range(length):
        at = [_at(it, x, t) for x in xs]
        out = it.run(body, [*consts, *carry, *at])
        it.eqn = eqn
        carry = out[: len(carry)]
        collected.append(out[len(carry) :])
    if reverse:
        collected.reverse()
    stacked = [_stacked(it, list(column), out) for column, out in zip(zip(*collected, strict=True), eqn.outputs[len(carry) :], strict=True)] if collected else []  # type: ignore[union-attr]
    return [*carry, *stacked]


def _at(it: Interpreter, x: Value, t: int) -> Value:
    if isinstance(x, Cat):
        from anywidth.rules import pieces

        if x.axis == 0:
            at = 0
            for p, s in zip(x.parts, x.sizes, strict=True):
                if t < at + s:  # type: ignore[operator]
                    return _at(it, p, t - at)
                at += s  # type: ignore[operator]
        return Cat(tuple(_at(it, p, t) for p in x.parts), x.axis - 1)
    starts, stops = [0] * len(x.shape), list(x.shape)
    starts[0], stops[0] = t, t + 1
    return linear.squeeze(it, linear.slice_(it, x, tuple(starts), tuple(stops), None), dimensions=(0,))


def _stacked(it: Interpreter, column: list[Value], out: Any) -> Value | None:
    if out is None:
        return None
    rows = []
    for v in column:
        shape = (1, *v.shape)
        dims = tuple(range(1, len(shape)))
        if isinstance(v, Cat):
            rows.append(Cat(tuple(linear.broadcast_in_dim(it, p, shape=(1, *p.shape), broadcast_dimensions=dims) for p in v.parts), v.axis + 1))
        else:
            rows.append(linear.broadcast_in_dim(it, v, shape=shape, broadcast_dimensions=dims))
    return linear.concatenate(it, *rows, dimension=0)


@register("cond")
def cond(it: Interpreter, which: Value, *operands: Value, branches: Any, **params: Any) -> list[Value]:
    """Both branches, and a choice between their results."""
    if not isinstance(which, Det):
        raise UnsupportedError("a branch is chosen by a random number")
    eqn = it.eqn
    results = [it.run(b, list(operands)) for b in branches]
    it.eqn = eqn
    index = which.val.astype("int32")
    return [select(it, Det(index, which.power, ()), *cases) for cases in zip(*results, strict=True)]


@register("while")
def while_(it: Interpreter, *inputs: Value, **params: Any) -> list[Value]:
    raise UnsupportedError(
        "a while loop over random vectors: its number of steps must be known. Use lax.scan, or lax.fori_loop with fixed bounds"
    )


__all__ = ["NeedsUnroll"]
