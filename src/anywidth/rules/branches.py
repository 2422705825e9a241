"""Branches: a choice by a known number among the results of all cases; loops that count, step by step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from anywidth.errors import UnsupportedError
from anywidth.interpret import Interpreter, register
from anywidth.rules.elementwise import select
from anywidth.values import Det, Value

MOST_STEPS = 64  # of a while loop: it is written out


@register("cond")
def cond(it: Interpreter, which: Value, *operands: Value, branches: Any, **params: Any) -> list[Value]:
    """Both branches, and a choice between their results."""
    if not isinstance(which, Det):
        raise UnsupportedError("a branch is chosen by a random number")
    eqn = it.eqn
    results = [it.run(b, list(operands)) for b in branches]
    it.eqn = eqn
    return [select(it, replace(which, val=which.val.astype("int32")), *cases) for cases in zip(*results, strict=True)]


@register("while")
def while_(
    it: Interpreter,
    *inputs: Value,
    cond_jaxpr: Any,
    body_jaxpr: Any,
    cond_nconsts: int,
    body_nconsts: int,
    **params: Any,
) -> list[Value]:
    """A loop whose condition is a known number at every step (it counts), written out."""
    eqn = it.eqn
    test, consts = inputs[:cond_nconsts], inputs[cond_nconsts : cond_nconsts + body_nconsts]
    carry = list(inputs[cond_nconsts + body_nconsts :])
    for _ in range(MOST_STEPS):
        (go,) = it.run(cond_jaxpr, [*test, *carry])
        it.eqn = eqn
        if not isinstance(go, Det) or not go.known:
            break
        if not bool(go.val):
            return carry
        carry = it.run(body_jaxpr, [*consts, *carry])
        it.eqn = eqn
    raise UnsupportedError(
        "a while loop over random vectors: its number of steps must be known (a count, not a function of the example) "
        f"and at most {MOST_STEPS}. Use lax.scan, or lax.fori_loop with fixed bounds"
    )
