"""What is known of particular functions: those of degree one or zero, and those with closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from anywidth.expect.atoms import Form, is_number, known, monomial
from anywidth.expect.closed import ErfPower, ExpPower, GaussPower, TrigPower
from anywidth.expr import COMPARE, Expr


def step(v: Any) -> Any:
    """1 for v > 0, and 0."""
    return float(v > 0) if known(v) else jnp.where(v > 0, jnp.ones_like(v), jnp.zeros_like(v))


def _lifted(known_function: Callable[[float], float], function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda v: known_function(float(v)) if known(v) else function(v)


def _against_zero(f: Any) -> Callable[[float], float]:
    return lambda v: float(f(v, 0.0))


def _array_against_zero(f: Any) -> Callable[[Any], Any]:
    return lambda v: getattr(jnp, f.__name__)(v, 0).astype(jnp.asarray(v).dtype)


HOMOGENEOUS: dict[str, Callable[[Any], Any]] = {
    "relu": _lifted(lambda v: max(v, 0.0), lambda v: jnp.maximum(v, 0)),
    "abs": _lifted(abs, jnp.abs),
    "sign": _lifted(lambda v: float(np.sign(v)), jnp.sign),
    **{name: _lifted(_against_zero(f), _array_against_zero(f)) for name, f in COMPARE.items()},
}


def difference(what: str) -> Expr:
    """The function as one of the difference of its operands."""
    return (what, (), ("hole",), ("n", 0.0)) if what in COMPARE else (what, (), ("hole",))


def _exp_known(a: Any, b: Any) -> Any:
    value = [(1.0 if is_number(b, 0.0) else jnp.exp(b), ExpPower(0, a))]
    return value, value


def bell_known(a: Any, b: Any) -> Any:
    """exp(a u^2 + b), a < 0."""
    value = [(1.0 if is_number(b, 0.0) else jnp.exp(b), GaussPower(0, -a))]
    return value, value


def _erf_known(a: Any, b: Any) -> Any:
    if not is_number(b, 0.0):
        return None
    return [(1.0, ErfPower(0, a))], [(2 / math.sqrt(math.pi), GaussPower(0, a * a))]


def _erfc_known(a: Any, b: Any) -> Any:
    if not is_number(b, 0.0):
        return None
    return [(1.0, None), (-1.0, ErfPower(0, a))], [(-2 / math.sqrt(math.pi), GaussPower(0, a * a))]


def _cos_known(shift: float) -> Callable[[Any, Any], Any]:
    def found(a: Any, b: Any) -> Any:
        return [(1.0, TrigPower(0, a, b + shift))], [(1.0, TrigPower(0, a, b + shift + math.pi / 2))]

    return found


KNOWN: dict[str, Callable[[Any, Any], Any]] = {
    "exp": _exp_known,
    "erf": _erf_known,
    "erfc": _erfc_known,
    "cos": _cos_known(0.0),
    "sin": _cos_known(-math.pi / 2),
}


NARROW = 100.0


def narrow(x: Form) -> tuple[float, ...]:
    """Where a smooth function of a polynomial of degree two at most has a feature far from zero for its size.

    Such as exp(-1e6 (u - 3)^2) or tanh(1e4 (u - 3)), at 3: where the polynomial has its extremum or its root. A rule
    for integrals has to be told, or none of its points meets the feature.
    """
    c = [0.0, 0.0, 0.0]
    for m in x:
        if not m.univariate or not known(m.coef) or not all(monomial(a) and a.k <= 2 for _, a in m.factors):
            return ()
        plus, k = (float(m.factors[0][1].plus), m.factors[0][1].k) if m.factors else (1.0, 0)
        c[k] += float(m.coef) * plus
    if c[2]:
        at = -c[1] / (2 * c[2])
        return (at,) if abs(c[2]) * at * at > NARROW else ()
    return (-c[0] / c[1],) if c[1] and abs(c[0]) > NARROW else ()
