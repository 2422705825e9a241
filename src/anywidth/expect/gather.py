"""Functions of linear combinations of Gaussians, as functions of one Gaussian.

max(a, b) = b + relu(a - b), and a - b is one Gaussian: so maxima, |a - b|, gates of sums, ... of two correlated
Gaussians need no more than functions of one. Where a coordinatewise function is not a sum of products of functions of
one of its arguments each, the linear combinations in it become arguments of their own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from anywidth.expect.atoms import infinite, is_number, known, times
from anywidth.expr import COMPARE, Expr
from anywidth.kets import Node, Pointwise

__all__ = ["gathered"]


class _Linear(NamedTuple):
    """The sum of coefficients times arguments, and a constant."""

    terms: dict[int, Any]
    constant: Any

    @property
    def several(self) -> bool:
        return len(self.terms) > 1


def gathered(graph: Any, node: Pointwise) -> Pointwise:
    """The same function, the combinations of Gaussians that go into nonlinear functions being arguments."""
    key = ("gathered", node)
    if key not in graph.table:
        reading = _Reading(graph, node)
        e, _ = reading.read(node.expr)
        new = node
        if len(reading.args) > len(node.args):
            new = graph.pointwise(e, reading.args, reading.coefs)
            graph.origin[new] = graph.origin.get(node, graph.current)
        graph.table[key] = new
    return graph.table[key]


class _Reading:
    def __init__(self, graph: Any, node: Pointwise) -> None:
        self.graph, self.rank = graph, node.rank
        self.args: list[Node] = list(node.args)
        self.coefs: list[Any] = list(node.coefs)
        self.places: dict[Any, int] = {}
        self.memo: dict[int, tuple[Expr, _Linear | None]] = {}

    def read(self, e: Expr) -> tuple[Expr, _Linear | None]:
        """The new expression, and what it is if it is linear in Gaussians."""
        if id(e) not in self.memo:
            self.memo[id(e)] = self._read(e)
        return self.memo[id(e)]

    def _read(self, e: Expr) -> tuple[Expr, _Linear | None]:
        head = e[0]
        if head == "v":
            return e, _Linear({e[1]: 1.0}, 0.0) if self.args[e[1]].gaussian else None
        if head in ("c", "n"):
            value = self.coefs[e[1]] if head == "c" else e[1]
            # differences of the infinite, as of scores that a mask leaves out, are no numbers
            return e, None if infinite(value) else _Linear({}, value)
        pairs = [self.read(a) for a in e[2:]]
        operands, forms = [p[0] for p in pairs], [p[1] for p in pairs]
        combined = _combined(head, e[1], forms)
        if combined is not None:
            return (head, e[1], *operands), combined
        if head in ("max", "min", *COMPARE):
            d = _sum(forms[0], forms[1], -1.0)
            if d is not None and d.several:
                if head in COMPARE:
                    return (head, e[1], self.variable(d), ("n", 0.0)), None
                return ("add", (), operands[1], (head, e[1], self.variable(d), ("n", 0.0))), None
        if head == "select_n" and len(operands) == 3:
            d = _sum(forms[2], forms[1], -1.0)
            if d is not None and d.several:
                return ("add", (), operands[1], ("mul", (), operands[0], self.variable(d))), None
        if head == "mul" and None not in forms:
            return (head, e[1], *operands), None  # a polynomial
        return (head, e[1], *(self._operand(x, f) for x, f in zip(operands, forms, strict=True))), None

    def _operand(self, e: Expr, form: _Linear | None) -> Expr:
        return self.variable(form) if form is not None and form.several else e

    def variable(self, form: _Linear) -> Expr:
        """A combination as one argument, the same one for all its multiples, times a number plus a number."""
        first = next(iter(sorted(form.terms)))
        scale = form.terms[first]
        if known(scale):
            terms = {i: times(1.0 / float(scale), c) for i, c in form.terms.items()}
        else:
            scale, terms = 1.0, form.terms
        key = tuple((i, float(c) if known(c) else id(c)) for i, c in sorted(terms.items()))
        if key not in self.places:
            self.places[key] = len(self.args)
            self.args.append(
                self.graph.sum(
                    [(None if is_number(c, 1.0) else self._array(c), self.args[i]) for i, c in sorted(terms.items())]
                )
            )
            self.graph.keep.append(terms)
        e: Expr = ("v", self.places[key])
        if not is_number(scale, 1.0):
            e = ("mul", (), e, ("n", float(scale)))
        return e if is_number(form.constant, 0.0) else ("add", (), e, self._constant(form.constant))

    def _array(self, c: Any) -> Any:
        return np.full((1,) * self.rank, float(c)) if known(c) else c

    def _constant(self, c: Any) -> Expr:
        if known(c):
            return ("n", float(c))
        self.coefs.append(c if np.ndim(c) == self.rank else jnp.reshape(c, (1,) * self.rank))
        return ("c", len(self.coefs) - 1)


def _combined(head: str, params: Any, forms: list[_Linear | None]) -> _Linear | None:
    """A linear operation on linear forms, if it is one."""
    if None in forms:
        return None
    x = forms[0]
    y = forms[1] if len(forms) > 1 else None
    assert x is not None
    if head in ("add", "add_any", "sub"):
        return _sum(x, y, -1.0 if head == "sub" else 1.0)
    if head == "neg":
        return _scaled(x, -1.0)
    if head in ("copy", "copy_p", "name"):
        return x
    if head == "convert_element_type" and jnp.issubdtype(dict(params)["new_dtype"], jnp.floating):
        return x
    if head == "mul" and y is not None and (not x.terms or not y.terms):
        return _scaled(y, x.constant) if not x.terms else _scaled(x, y.constant)
    if head == "div" and y is not None and not y.terms:
        return _scaled(x, 1.0 / y.constant)
    return None


def _sum(x: _Linear | None, y: _Linear | None, sign: float) -> _Linear | None:
    if x is None or y is None:
        return None
    terms = dict(x.terms)
    for i, c in y.terms.items():
        c = times(sign, c)
        terms[i] = terms[i] + c if i in terms else c
    plus = times(sign, y.constant)
    constant = plus if is_number(x.constant, 0.0) else x.constant if is_number(plus, 0.0) else x.constant + plus
    return _Linear({i: c for i, c in terms.items() if not is_number(c, 0.0)}, constant)


def _scaled(x: _Linear, c: Any) -> _Linear:
    constant = x.constant if is_number(x.constant, 0.0) else times(x.constant, c)
    return _Linear({i: times(a, c) for i, a in x.terms.items()}, constant)
