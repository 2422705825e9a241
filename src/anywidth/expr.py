"""Coordinatewise functions as expressions.

An expression is a nested tuple: `("v", i)` the i-th argument, `("c", j)` the j-th coefficient array, `("n", x)` a
number, `(primitive, params, *operands)` a primitive of JAX, and `("call", (function, how), *operands)` a Python
function (`how` is "jump", "kink" or "smooth"). Parts of it may be shared.

>>> float(evaluated(("mul", (), ("v", 0), ("add", (), ("v", 0), ("n", 1.0))), [3.0], []))
12.0
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

Expr = tuple[Any, ...]
PRIMITIVES: dict[str, Any] = {}  # by name; filled as programs are read

COMPARE = {"gt": np.greater, "ge": np.greater_equal, "lt": np.less, "le": np.less_equal}
LEAVES = ("v", "c", "n")
JUMPS = {"sign", "floor", "ceil", "round", "rem", "select_n", "is_finite", "eq", "ne", *COMPARE}
KINKED = {"max", "min", "abs", "clamp", "relu", *JUMPS}


def substituted(e: Expr, variables: Any, coefs: Any) -> Expr:
    """The expression with its arguments and, unless None, its coefficients replaced by expressions."""
    if e[0] == "v":
        return variables[e[1]]
    if e[0] == "c":
        return e if coefs is None else coefs[e[1]]
    if e[0] == "n":
        return e
    return (e[0], e[1], *(substituted(a, variables, coefs) for a in e[2:]))


def variables(e: Expr) -> set[int]:
    """The arguments that occur."""
    if e[0] in LEAVES:
        return {e[1]} if e[0] == "v" else set()
    return set().union(*(variables(a) for a in e[2:]))


# primitives whose parameters an expression does not carry
_PLAIN: dict[str, Callable[..., Any]] = {
    name: getattr(lax, name) for name in ("add", "sub", "mul", "div", "max", "min", "pow", *COMPARE, "eq", "ne")
}


def bind(head: str, params: tuple[tuple[str, Any], ...], operands: Sequence[Any]) -> Any:
    """Applies a primitive to operands of different shapes and Python numbers, broadcasting them."""
    if head == "relu":
        return jnp.maximum(operands[0], 0)
    if head == "copy" or head == "name":
        return operands[0]
    arrays = [jnp.asarray(x) for x in operands]
    if head == "select_n":
        predicate = arrays[0] if arrays[0].dtype == jnp.bool_ else arrays[0] != 0
        return jnp.where(predicate, arrays[2], arrays[1]) if len(arrays) == 3 else _select(predicate, arrays[1:])
    if head in ("not", "and", "or"):
        arrays = [a if a.dtype == jnp.bool_ else a != 0 for a in arrays]
    else:
        wanted = next((a.dtype for a, x in zip(arrays, operands, strict=True) if not isinstance(x, float | int)), None)
        if head != "pow":
            wanted = (
                jnp.result_type(
                    *[a.dtype for a, x in zip(arrays, operands, strict=True) if not isinstance(x, float | int)]
                )
                if wanted is not None
                else None
            )
        if wanted is not None:
            arrays = [
                a.astype(wanted)
                if a.dtype != wanted and (head != "pow" or jnp.issubdtype(a.dtype, jnp.floating))
                else a
                for a in arrays
            ]
    shape = np.broadcast_shapes(*(a.shape for a in arrays))
    arrays = [jnp.broadcast_to(a, shape) for a in arrays]
    return _PLAIN[head](*arrays) if head in _PLAIN else PRIMITIVES[head].bind(*arrays, **dict(params))


def _select(which: Any, cases: Sequence[Any]) -> Any:
    return jnp.select([which == i for i in range(len(cases))], list(cases))


def evaluated(
    e: Expr, args: Sequence[Any], coefs: Sequence[Any], detach: bool = True, held: Sequence[Any] | None = None
) -> Any:
    """The expression at values of its arguments and coefficients, shared parts once.

    `detach`: whether `stop_gradient` stops gradients; `held`: the arguments below it, if they are to be others.
    """
    memo: dict[tuple[int, bool], Any] = {}

    def of(e: Expr, below: bool) -> Any:
        if e[0] in LEAVES:
            known = held if below and held is not None else args
            return known[e[1]] if e[0] == "v" else coefs[e[1]] if e[0] == "c" else e[1]
        if e[0] == "stop_gradient" and (held is not None or not detach):
            return of(e[2], held is not None)
        key = (id(e), below)
        if key not in memo:
            operands = [of(a, below) for a in e[2:]]
            memo[key] = e[1][0](*operands) if e[0] == "call" else bind(e[0], e[1], operands)
        return memo[key]

    return of(e, False)
