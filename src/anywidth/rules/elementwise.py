"""Coordinatewise primitives: linear ones act on the graph, the others become `Pointwise` nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np

from anywidth.errors import NoLimitError, Resized, UnsupportedError
from anywidth.interpret import Interpreter, evaluated, register
from anywidth.kets import Const, Contract, Product, Sum, View, is_zero
from anywidth.trace import finite, is_wide
from anywidth.values import ZERO_POWER, Det, Ket, Mat, Part, to_ket

# power of n of f(x n^p): a multiple of p
SCALES: dict[str, int | Fraction] = {
    "neg": 1, "abs": 1, "copy": 1, "real": 1, "stop_gradient": 1, "convert_element_type": 1, "reduce_precision": 1,
    "name": 1, "optimization_barrier": 1, "square": 2, "sqrt": Fraction(1, 2), "rsqrt": Fraction(-1, 2),
    "cbrt": Fraction(1, 3), "sign": 0, "device_put": 1, "is_finite": 0,
}  # fmt: skip
LINEAR = {"copy", "real", "convert_element_type", "reduce_precision", "name", "optimization_barrier", "device_put"}
NONLINEAR = [
    "exp",
    "exp2",
    "expm1",
    "log",
    "log1p",
    "sin",
    "cos",
    "tan",
    "asin",
    "acos",
    "atan",
    "sinh",
    "cosh",
    "tanh",
    "asinh",
    "acosh",
    "atanh",
    "logistic",
    "erf",
    "erfc",
    "erf_inv",
    "lgamma",
    "digamma",
    "floor",
    "ceil",
    "round",
    "not",
    "and",
    "or",
    "xor",
    "rem",
    "nextafter",
    "atan2",
    "clamp",
    "is_finite",
    "bessel_i0e",
    "bessel_i1e",
]
COMPARE = ["eq", "ne", "lt", "le", "gt", "ge"]


def _bind(it: Interpreter, params: dict[str, Any], vals: Sequence[Any]) -> Any:
    eqn = it.eqn
    assert eqn is not None
    return evaluated(lambda *v: _broadcast_bind(eqn.primitive, eqn.raw, v), *vals)


def _broadcast_bind(primitive: Any, raw: dict[str, Any], vals: Sequence[Any]) -> Any:
    shape = np.broadcast_shapes(*(np.shape(v) for v in vals))
    return primitive.bind(*(v if np.shape(v) == shape else jnp.broadcast_to(v, shape) for v in vals), **raw)


def _shape(values: Sequence[Det]) -> tuple[Any, ...]:
    return max((x.shape for x in values), key=len)


def _noise(*noises: Fraction | None) -> Fraction | None:
    found = [n for n in noises if n is not None]
    return max(found) if found else None


def _kept(x: Det) -> dict[str, Any]:
    return {"noise": x.noise, "line": x.line}


def common_power(values: Sequence[Det]) -> tuple[Fraction, list[Any]]:
    """The dominant power of n, and each value at that power: what grows more slowly is nothing against it."""
    powers = [x.power for x in values if not x.zero]
    top = max(powers, default=ZERO_POWER)
    return top, [
        x.val if x.zero or x.power == top else np.zeros_like(x.val) if x.known else jnp.zeros_like(x.val)
        for x in values
    ]


@register(*SCALES)
def scaling(it: Interpreter, x: Part, **params: Any) -> Part:
    name = it.eqn.name
    if isinstance(x, Det):
        if name not in LINEAR and name not in ("neg", "stop_gradient"):
            it.settled(x)
            return Det(
                _bind(it, params, [x.val]),
                x.power * SCALES[name],
                x.shape,
                zero=x.zero and name in ("abs", "square", "sqrt"),
            )
        noise = _kept(x)
        if name == "convert_element_type" and not jnp.issubdtype(params["new_dtype"], jnp.inexact) and x.power != 0:
            raise NoLimitError(f"a number that grows like n^{x.power} is converted to an integer")
        return Det(_bind(it, params, [x.val]), x.power, x.shape, zero=x.zero, **noise)
    if name == "is_finite" and isinstance(x, Ket):
        return _truth(x, True)
    if name in LINEAR:
        if name == "convert_element_type" and not jnp.issubdtype(params["new_dtype"], jnp.floating):
            if jnp.issubdtype(params["new_dtype"], jnp.complexfloating):
                raise UnsupportedError(
                    "random vectors are made complex (an FFT?). A transform of a finite axis is a matrix: multiply by "
                    "its cosines and sines instead"
                )
            raise UnsupportedError("random vectors are converted to integers")
        return x
    if name == "neg":
        return it.scale(Det(np.asarray(-1.0), ZERO_POWER, ()), x)
    power = Fraction(x.power * SCALES[name])
    return it.pointwise(name, params, [x], power)


@register("integer_pow")
def integer_pow(it: Interpreter, x: Part, y: int, **params: Any) -> Part:
    if isinstance(x, Det):
        it.settled(x)
        return Det(_bind(it, params, [x.val]), x.power * y, x.shape, zero=x.zero and y > 0)
    return it.pointwise("integer_pow", {"y": y}, [x], x.power * y)


@register("pow")
def power(it: Interpreter, x: Part, y: Part, **params: Any) -> Part:
    p = x.power
    if p != 0:
        if not (isinstance(y, Det) and y.known and np.size(y.val) == 1):
            raise NoLimitError(f"a quantity of order n^{p} is raised to a power that is not a fixed number")
        p = p * Fraction(float(y.val.reshape(()))).limit_denominator(64)
    if isinstance(x, Det) and isinstance(y, Det):
        it.settled(x), it.settled(y)
        return Det(_bind(it, params, [x.val, y.val]), p, _shape([x, y]))
    return it.pointwise("pow", {}, [_of_order_one(it, x) if p == 0 else x, y], p)


@register("add", "sub", "add_any")
def add(it: Interpreter, x: Part, y: Part, **params: Any) -> Part:
    minus = it.eqn.name == "sub"
    if isinstance(x, Det) and isinstance(y, Det):
        top, vals = common_power([x, y])
        zero = x.zero and y.zero
        return Det(
            _bind(it, params, vals),
            top,
            _shape([x, y]),
            zero=zero,
            noise=_noise(x.noise, y.noise),
            line=x.line or y.line,
        )
    if isinstance(x, Mat) or isinstance(y, Mat):
        raise UnsupportedError(
            "parameter matrices are added before they are used: multiply each by the vector and add the results"
        )
    return total(it, [(1.0, x), (-1.0 if minus else 1.0, y)])


def total(it: Interpreter, terms: Sequence[tuple[float, Any]]) -> Ket:
    """The sum of kets and deterministic arrays; what is of lower order in n drops out."""
    live = [(s, x) for s, x in terms if not (x.zero if isinstance(x, Det) else is_zero(x.node))]
    for _, x in live:
        if isinstance(x, Det):
            it.settled(x)
    hidden = [x for _, x in terms if isinstance(x, Ket) and x.wides()]
    if hidden and any(isinstance(x, Ket) and not x.wides() for _, x in live):
        raise NoLimitError("a random scalar shared by all channels is added to a hidden layer: the limit stays random")
    top = _top([x for _, x in live])
    for _, x in live:
        if x.power < top and isinstance(x, Ket):
            leaf = outermost(x.node)
            if leaf is not None and leaf.movable and x.node.leaves == {leaf}:
                raise Resized(leaf, leaf.size + top - x.power)
            it.dropped += [(leaf, x.power - top, it.eqn) for leaf in x.node.leaves]
    live = [(s, x) for s, x in live if x.power == top] or [terms[0] if isinstance(terms[0][1], Ket) else terms[1]]
    keep = next(x for _, x in terms if isinstance(x, Ket))
    aligned, _ = it.aligned([keep, *(x for _, x in live)])
    nodes = []
    for (sign, _), x in zip(live, aligned[1:], strict=True):
        node = x.node if isinstance(x, Ket) else it.graph.const(_rank(x, aligned[0].node.rank))
        nodes.append((None if sign == 1.0 else sign, node))
    return Ket(it.graph.sum(nodes), aligned[0].layout, top)


def _rank(x: Any, rank: int) -> Any:
    return x if np.ndim(x) == rank else x.reshape((1,) * (rank - np.ndim(x)) + np.shape(x))


def _top(terms: Sequence[Det | Ket]) -> Fraction:
    """The dominant power of n. What is zero for certain, as the product with a zero-initialised matrix, has none."""
    zeros = [x for x in terms if isinstance(x, Ket) and (leaf := outermost(x.node)) is not None and leaf.zero_var]
    others = [x.power for x in terms if not any(x is z for z in zeros)]
    top = max(others or [x.power for x in zeros], default=ZERO_POWER)
    for x in zeros:
        leaf = outermost(x.node)
        if x.power != top and leaf.movable:
            raise Resized(leaf, leaf.size + top - x.power)
        if x.power > top:
            raise UnsupportedError(
                f"the zero-initialised parameter '{leaf.name}' is added to terms of different orders in n: use two "
                "parameters"
            )
    return top


def outermost(node: Any) -> Any:
    """The parameter of a node that is one product, possibly scaled or seen through a view."""
    while not isinstance(node, Product):
        if isinstance(node, View | Contract):
            node = node.operand
        elif isinstance(node, Sum) and len(node.terms) == 1:
            node = node.terms[0][1]
        else:
            return None
    # a few rows of a parameter do not decide its order in n
    return None if any(isinstance(k, tuple) and k[0] == "part" for k, _ in node.indices) else node.leaf


@register("mul")
def mul(it: Interpreter, x: Part, y: Part, **params: Any) -> Part:
    if isinstance(x, Det) and isinstance(y, Det):
        noises = [n + o.power for n, o in ((x.noise, y), (y.noise, x)) if n is not None]
        if x.noise is not None and y.noise is not None:
            noises.append(x.noise + y.noise)
        val = _bind(it, params, [x.val, y.val])
        return Det(
            val, x.power + y.power, _shape([x, y]), zero=x.zero or y.zero, noise=_noise(*noises), line=x.line or y.line
        )
    for a, b in ((x, y), (y, x)):
        if isinstance(a, Det):
            return it.scale(a, b)
    for a, b in ((x, y), (y, x)):
        if isinstance(a, Ket) and isinstance(a.node, Const) and isinstance(b, Ket) and b.wides():
            (c, k), _ = it.aligned([a, b])  # numbers along a reshaped width: a linear map
            return Ket(it.graph.scale(c.node.array, k.node), k.layout, a.power + b.power)
    return it.pointwise("mul", {}, [x, y], x.power + y.power)


@register("div")
def div(it: Interpreter, x: Part, y: Part, **params: Any) -> Part:
    if isinstance(x, Det) and isinstance(y, Det):
        it.settled(y)
        noise = None if x.noise is None else x.noise - y.power
        val = _bind(it, params, [x.val, y.val])
        return Det(val, x.power - y.power, _shape([x, y]), zero=x.zero and not y.zero, noise=noise, line=x.line)
    if isinstance(y, Det):
        it.settled(y)
        inverse = evaluated(lambda v: 1.0 / v, y.val)
        return it.scale(Det(inverse, -y.power, y.shape), x)
    return it.pointwise("div", {}, [x, y], x.power - y.power)


@register("max", "min", *COMPARE)
def compare(it: Interpreter, x: Part, y: Part, **params: Any) -> Part:
    name = it.eqn.name
    if isinstance(x, Det) and isinstance(y, Det):
        it.settled(x), it.settled(y)
        top, vals = common_power([x, y])
        val = _bind(it, params, vals)
        return Det(
            val, ZERO_POWER if name in COMPARE else top, _shape([x, y]), zero=name not in COMPARE and x.zero and y.zero
        )
    if isinstance(x, Ket) and isinstance(y, Ket) and x.node is y.node and x.layout == y.layout and name in COMPARE:
        return _truth(x, name in ("eq", "le", "ge"))
    values = [x, y]
    if name in ("max", "min"):
        for v, other in ((x, y), (y, x)):
            if isinstance(v, Det) and v.known and (v.val == (-np.inf if name == "max" else np.inf)).all():
                return other
    powers = {v.power for v in values if not (isinstance(v, Det) and v.zero)}
    if len(powers) > 1:
        raise NoLimitError(f"'{name}' compares quantities of different orders, n^{max(powers)} and n^{min(powers)}")
    return it.pointwise(name, {}, values, ZERO_POWER if name in COMPARE else powers.pop() if powers else ZERO_POWER)


def _truth(x: Ket, value: bool) -> Det:
    shape = x.shape
    return Det(np.full([1 if is_wide(s) else finite(s) for s in shape], value), ZERO_POWER, shape)


@register("select_n")
def select(it: Interpreter, which: Part, *cases: Part) -> Part:
    known = [c for c in cases if isinstance(c, Det)]
    if isinstance(which, Det) and len(known) == len(cases):
        top, vals = common_power(known)
        noise = _noise(*(c.noise for c in known))
        val = evaluated(lambda w, *cs: _select(w, cs), which.val, *vals)
        return Det(val, top, _shape([which, *known]), zero=all(c.zero for c in known), noise=noise)
    if isinstance(which, Det):
        # a fixed mask: each case times its indicator, so that Gaussians stay Gaussian
        terms = []
        for i, case in enumerate(cases):
            mask = evaluated(lambda w, i=i: w == i, which.val)
            if isinstance(case, Det) and case.zero:
                continue
            dtype = next(v.dtype for v in it.eqn.outputs)
            indicator = Det(mask.astype(dtype), ZERO_POWER, which.shape)
            terms.append((1.0, mul_det(it, indicator, case)))
        if not any(isinstance(t, Ket) for _, t in terms):
            terms.append((1.0, to_ket(it.graph, terms[0][1])))
        return total(it, terms)
    powers = {c.power for c in cases if not (isinstance(c, Det) and c.zero)}
    if len(powers) > 1:
        raise NoLimitError("a choice between quantities of different orders in n")
    return it.pointwise("select_n", {}, [which, *cases], powers.pop() if powers else ZERO_POWER)


def mul_det(it: Interpreter, mask: Det, x: Any) -> Any:
    if isinstance(x, Det):
        val = evaluated(lambda m, v: jnp.where(m != 0, v, jnp.zeros_like(v)), mask.val, x.val)
        return replace(x, val=val, shape=_shape([mask, x]))
    return it.scale(mask, x)


def _select(which: Any, cases: Sequence[Any]) -> Any:
    if len(cases) == 2:
        return jnp.where(which.astype(bool), cases[1], cases[0])
    return jnp.select([which == i for i in range(len(cases))], list(cases))


@register(*NONLINEAR)
def nonlinear(it: Interpreter, *values: Part, **params: Any) -> Part:
    name = it.eqn.name
    if len(values) == 1 and (constant := _vanished(it, values[0], params)) is not None:
        return constant
    values = tuple(_of_order_one(it, x) for x in values)
    known = [it.settled(x) for x in values if isinstance(x, Det)]
    if len(known) == len(values):
        return Det(_bind(it, params, [x.val for x in known]), ZERO_POWER, _shape(known))
    if name == "clamp":
        low, x, high = values
        return it.pointwise("min", {}, [it.pointwise("max", {}, [x, low]) if not isinstance(x, Det) else x, high])
    return it.pointwise(name, params, list(values))


def _vanished(it: Interpreter, x: Part, params: dict[str, Any]) -> Det | None:
    """f(0) of what vanishes with the width, where it is the leading order (exp(s) of scores that vanish is one)."""
    if not isinstance(x, Ket) or x.power >= 0 or is_zero(x.node):
        return None
    value = _bind(it, params, [np.zeros((), it.eqn.outputs[0].dtype)])
    if not np.isfinite(value) or value == 0:
        return None
    it.dropped += [(leaf, x.power, it.eqn) for leaf in x.node.leaves]
    ones = np.full([1 if is_wide(s) else finite(s) for s in x.shape], value, value.dtype)
    return Det(ones, ZERO_POWER, x.shape, noise=x.power, line=it.eqn)


def _of_order_one(it: Interpreter, x: Part) -> Part:
    name = it.eqn.name
    if isinstance(x, Det):
        if x.zero or x.power == 0:
            return replace(x, power=ZERO_POWER)
        if x.power < 0:
            zeros = np.zeros_like(x.val) if x.known else jnp.zeros_like(x.val)
            return Det(zeros, ZERO_POWER, x.shape, zero=True, noise=x.noise, line=x.line)
    elif x.power == 0 or (isinstance(x, Ket) and is_zero(x.node)):
        return replace(x, power=ZERO_POWER) if isinstance(x, Ket) else x
    grows = x.power > 0
    raise NoLimitError(
        f"the argument of '{name}' {'diverges' if grows else 'vanishes'} like n^{x.power}; scale it by n^{-x.power} "
        "to have a limit"
    )


@register("iota")
def iota(it: Interpreter, **params: Any) -> Part:
    shape, dimension = params["shape"], params["dimension"]
    if is_wide(shape[dimension]):
        raise UnsupportedError(
            "an array varies along the width (arange, eye, iota over n), and the coordinates of a random vector have "
            "no order. Embeddings of positions whose frequencies run along the width (sinusoids, rotary): take a fixed "
            "number of frequencies, each for a block of n // k channels. The identity times a vector is the vector"
        )
    val = np.arange(shape[dimension]).astype(params["dtype"])
    val = val.reshape([s if i == dimension else 1 for i, s in enumerate(shape)])
    val = np.broadcast_to(val, [1 if is_wide(s) else s for s in shape]).copy()
    return Det(val, ZERO_POWER, tuple(shape))
