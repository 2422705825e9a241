"""Branches: a choice by a known number among the results of all cases; loops of unknown length are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from anywidth.errors import UnsupportedError
from anywidth.interpret import Interpreter, register
from anywidth.rules.elementwise import select
from anywidth.values import Det, Value


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
def while_(it: Interpreter, *inputs: Value, **params: Any) -> list[Value]:
    raise UnsupportedError(
        "a while loop over random vectors: its number of steps must be known. Use lax.scan, or lax.fori_loop with "
        "fixed bounds"
    )
