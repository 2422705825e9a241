"""The distribution of a parameter, read off the program that draws it.

A library's initialiser is traced, not run: each value of the program is a law of its entries, a number or an i.i.d.
family with a mean and a standard deviation, and the operations on it move those exactly. So the scale of an
initialiser is known to rounding at any width, where samples would leave noise.

>>> import jax, jax.numpy as jnp
>>> draw = lambda key: jax.random.uniform(key, (3, 5), minval=-2.0, maxval=2.0) / 2 + jnp.ones(5)
>>> (law,) = laws_of(jax.make_jaxpr(draw)(jax.random.key(0)))
>>> law.family, law.mean, round(law.std**2, 6)
('uniform', 1.0, 0.333333)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import jax
import numpy as np

from anywidth import _compat

__all__ = ["Law", "laws_of", "rounded"]


@dataclass(frozen=True)
class Law:
    """Entries that are i.i.d. of a family ("constant", "normal", "truncated normal" or "uniform"), or None of these."""

    family: str | None
    mean: float = 0.0
    std: float = 0.0
    reason: str = ""

    def moved(self, scale: float, shift: float = 0.0) -> Law:
        """The law of scale * x + shift."""
        return self if self.family is None else replace(self, mean=scale * self.mean + shift, std=abs(scale) * self.std)


_SHAPES = {
    "reshape",
    "transpose",
    "squeeze",
    "expand_dims",
    "copy",
    "copy_p",
    "stop_gradient",
    "convert_element_type",
    "reduce_precision",
    "rev",
    "device_put",
    "sharding_constraint",
    "optimization_barrier",
    "pvary",
}


def laws_of(closed: Any) -> list[Law]:
    """The law of each output of a program whose inputs are random keys."""
    jaxpr, consts = _compat.open_jaxpr(closed)
    return _walk(jaxpr, [_law_of_array(c) for c in consts], [_unread("a random key") for _ in jaxpr.invars])


def _unread(reason: str) -> Law:
    return Law(None, reason=reason)


def _law_of_array(a: Any) -> Law:
    if _compat.is_tracer(a) or not hasattr(a, "dtype") or not jax.numpy.issubdtype(a.dtype, np.number):
        return _unread("a value that is not a number")
    first = np.ravel(np.asarray(a))[:1]
    same = first.size and np.all(np.asarray(a) == first[0])
    return Law("constant", float(first[0])) if same else _unread("a fixed array of different entries")


def _walk(jaxpr: Any, consts: Sequence[Law], inputs: Sequence[Law]) -> list[Law]:
    env = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(zip(jaxpr.invars, inputs, strict=True))

    def read(v: Any) -> Law:
        return _law_of_array(np.asarray(v.val)) if isinstance(v, _compat.Literal) else env[v]

    for eqn in jaxpr.eqns:
        out = _equation(eqn, [read(v) for v in eqn.invars])
        env |= dict(zip(eqn.outvars, out, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _equation(eqn: Any, xs: list[Law]) -> list[Law]:
    name = eqn.primitive.name
    family = _compat.random_family(eqn)
    if family is not None:
        law = _drawn(family, xs)
        if law is not None:
            return [law]
    if name in _compat.CALLS:
        jaxpr, consts = _compat.open_jaxpr(eqn.params[_compat.CALLS[name]])
        return _walk(jaxpr, [_law_of_array(c) for c in consts], xs)
    single = _single(name, eqn, xs) if len(eqn.outvars) == 1 else None
    line = _compat.user_line(eqn)
    where = f"'{name}'" + (f" at {line}" if line else "")
    return [single] if single is not None else [_unread(where)] * len(eqn.outvars)


def _drawn(family: str, xs: Sequence[Law]) -> Law | None:
    """A fresh draw of a family from a key and its numbers."""
    bounds = [x.mean for x in xs[1:]]
    if any(x.family != "constant" for x in xs[1:]):
        return None
    if family == "normal" and not bounds:
        return Law("normal", 0.0, 1.0)
    if len(bounds) != 2:
        return None
    lo, hi = bounds
    if family == "uniform":
        return Law("uniform", (lo + hi) / 2, (hi - lo) / math.sqrt(12))
    return _truncated(lo, hi)


def _truncated(lo: float, hi: float) -> Law:
    density = [math.exp(-t * t / 2) / math.sqrt(2 * math.pi) if math.isfinite(t) else 0.0 for t in (lo, hi)]
    weighted = [t * d if math.isfinite(t) else 0.0 for t, d in zip((lo, hi), density, strict=True)]
    mass = (math.erf(hi / math.sqrt(2)) - math.erf(lo / math.sqrt(2))) / 2
    mean = (density[0] - density[1]) / mass
    return Law("truncated normal", mean, math.sqrt(1 + (weighted[0] - weighted[1]) / mass - mean * mean))


def _single(name: str, eqn: Any, xs: list[Law]) -> Law | None:
    """The law of an operation with one result; None for what is not read."""
    if any(x.family is None for x in xs):
        return next(x for x in xs if x.family is None) if name in _SHAPES or name in ("add", "sub", "mul") else None
    aval = eqn.outvars[0].aval
    if not jax.numpy.issubdtype(aval.dtype, np.number):
        return None
    x = xs[0] if xs else None
    if x is None:
        return None
    if name in _SHAPES:
        return x
    if name == "broadcast_in_dim":
        grows = math.prod(aval.shape) != math.prod(eqn.invars[0].aval.shape)
        return x if x.family == "constant" or not grows else None
    if all(y.family == "constant" for y in xs):
        return _number(eqn, xs)
    if name == "neg":
        return x.moved(-1.0)
    if name in ("add", "add_any", "sub", "mul", "div") and len(xs) == 2:
        y = xs[1]
        if y.family == "constant":
            c = y.mean
            moves = {"add": (1.0, c), "add_any": (1.0, c), "sub": (1.0, -c), "mul": (c, 0.0)}
            return x.moved(*moves[name]) if name != "div" else x.moved(1 / c)
        if x.family == "constant" and name != "div":
            c = x.mean
            return y.moved(*{"add": (1.0, c), "add_any": (1.0, c), "sub": (-1.0, c), "mul": (c, 0.0)}[name])
    return None


def _number(eqn: Any, xs: Sequence[Law]) -> Law | None:
    """An operation on equal entries, done on one of them."""
    if eqn.primitive.name not in _ELEMENTWISE:
        return None
    value = _ELEMENTWISE[eqn.primitive.name](*(np.float64(x.mean) for x in xs), **_kept(eqn))
    return Law("constant", float(value)) if np.isfinite(value) else None


def _kept(eqn: Any) -> dict[str, Any]:
    return {"y": eqn.params["y"]} if eqn.primitive.name == "integer_pow" else {}


_ELEMENTWISE: dict[str, Any] = {
    "add": np.add, "add_any": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "neg": np.negative,
    "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x), "square": np.square, "exp": np.exp, "log": np.log,
    "abs": np.abs,    "pow": np.power, "integer_pow": lambda x, y: x**y, "max": np.maximum, "min": np.minimum,
}  # fmt: skip


def rounded(c: float) -> float:
    """The fraction that a number computed in single precision stands for, if it is a simple one."""
    if not math.isfinite(c) or c == 0:
        return c
    near = float(Fraction(c).limit_denominator(1000))
    return near if abs(near - c) <= 5e-7 * abs(c) else c
