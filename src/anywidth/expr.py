"""Coordinatewise functions as expressions, and their normal form.

An expression is a nested tuple: `("v", i)` the i-th argument, `("c", j)` the j-th coefficient array,
`("n", x)` a number, `(primitive, params, *operands)` a primitive of JAX. Its normal form is a sum of monomials,

    coef * prod_i atom_i(Z_i) * r^(-s/2),

one atom for each Gaussian and at most one normaliser r = alpha S + eps, S a sum of squares over a finite axis
(batch norm). Atoms with closed forms are those of `expect/closed.py`; any other function of one Gaussian is a
`Generic` atom, left to quadrature. Since r > 0 and max(r x, 0) = r max(x, 0), positively homogeneous functions
pass through the normaliser.

An argument whose variance is zero (a gain that starts at one and is trained) matters only to first order:
the function is expanded to first order in it, which is exact for the NNGP and for the NTK.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from anywidth import _compat
from anywidth.expect.closed import ErfPower, ExpPower, GaussPower, Power, TrigPower, evaluate

Expr = tuple[Any, ...]
PRIMITIVES: dict[str, Any] = {}  # by name; filled as programs are read

IDENTITY = Power(1, 1.0, -1.0)
COMPARE = {"gt": np.greater, "ge": np.greater_equal, "lt": np.less, "le": np.less_equal}
KINKED = {"max", "min", "abs", "sign", "select_n", "clamp", "floor", "ceil", "round", *COMPARE, "eq", "ne"}


class SeveralGaussians(Exception):
    """A function of several correlated Gaussians, which no rule here can integrate."""


@dataclass(frozen=True, eq=False)
class Generic:
    """f(u, *coefs) with kinks or jumps at `breaks`; `core` is its innermost affine argument."""

    function: Callable[..., Any]
    coefs: tuple[Any, ...]
    breaks: tuple[Any, ...] = ()
    core: tuple[Any, Any] | None = None


@dataclass(frozen=True, eq=False)
class Norm:
    """r^(-s/2) with r = alpha * argument + eps."""

    argument: int
    alpha: Any
    eps: Any
    s: float


@dataclass(frozen=True, eq=False)
class Mono:
    coef: Any
    factors: tuple[tuple[int, Any], ...]
    norm: Norm | None = None


Form = list[Mono]


def known(x: Any) -> bool:
    return not _compat.is_tracer(x) and np.ndim(x) == 0


def times(x: Any, y: Any) -> Any:
    if known(x) and float(x) == 1.0:
        return y
    if known(y) and float(y) == 1.0:
        return x
    if known(x) and known(y):
        return float(x) * float(y)
    return x * y


def _is(x: Any, value: float) -> bool:
    return known(x) and float(x) == value


def monomial(atom: Any) -> bool:
    """u^k, up to a factor."""
    return (
        isinstance(atom, Power)
        and known(atom.plus)
        and known(atom.minus)
        and (float(atom.minus) == (-1) ** atom.k * float(atom.plus))
    )


def jumps(atom: Any) -> bool:
    return (
        isinstance(atom, Power)
        and atom.k == 0
        and not (known(atom.plus) and known(atom.minus) and float(atom.plus) == float(atom.minus))
    )


def as_function(atom: Any) -> tuple[Callable[..., Any], tuple[Any, ...], tuple[Any, ...]]:
    """(f, coefs, breaks) of any atom, for quadrature."""
    if isinstance(atom, Generic):
        return atom.function, atom.coefs, atom.breaks
    if monomial(atom):
        scale = float(atom.plus)
        return (lambda u: u if (atom.k, scale) == (1, 1.0) else scale * u**atom.k), (), ()
    leaves, tree = jax.tree.flatten(atom)
    traced = [i for i, x in enumerate(leaves) if not known(x)]

    def function(u: Any, *coefs: Any) -> Any:
        filled = dict(zip(traced, coefs, strict=True))
        return evaluate(jax.tree.unflatten(tree, [filled.get(i, x) for i, x in enumerate(leaves)]), u)

    kink = isinstance(atom, Power) and not monomial(atom)
    return function, tuple(leaves[i] for i in traced), (0.0,) if kink else ()


def atom_product(f: Any, g: Any) -> tuple[Any, Any]:
    """(coefficient, atom) of the product of two functions of the same Gaussian."""
    if isinstance(f, Power) and isinstance(g, Power):
        return 1.0, Power(f.k + g.k, times(f.plus, g.plus), times(f.minus, g.minus))
    for x, y in ((f, g), (g, f)):
        if monomial(x) and isinstance(y, ErfPower | GaussPower | ExpPower | TrigPower):
            return x.plus, replace(y, k=y.k + x.k)
    if isinstance(f, ExpPower) and isinstance(g, ExpPower):
        return 1.0, ExpPower(f.k + g.k, f.a + g.a)
    return 1.0, _generic_product(f, g)


def _generic_product(f: Any, g: Any) -> Generic:
    (ff, fc, fb), (gf, gc, gb) = as_function(f), as_function(g)
    m = len(fc)
    return Generic(lambda u, *c: ff(u, *c[:m]) * gf(u, *c[m:]), fc + gc, fb + gb)


def _factors_product(f: tuple[Any, ...], g: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    out = dict(f)
    coef: Any = 1.0
    for i, atom in g:
        if i in out:
            c, out[i] = atom_product(out[i], atom)
            coef = times(coef, c)
        else:
            out[i] = atom
    kept = {
        i: a for i, a in out.items() if not (isinstance(a, Power) and a.k == 0 and _is(a.plus, 1) and _is(a.minus, 1))
    }
    return coef, tuple(sorted(kept.items(), key=lambda item: item[0]))


@dataclass(frozen=True, eq=False)
class Normaliser:
    """Computes normal forms. `small`: arguments of variance zero; `opaque`: those that are not Gaussian."""

    coefs: Sequence[Any]
    small: frozenset[int]
    opaque: frozenset[int]

    # --- algebra ---

    def add(self, x: Form, y: Form, sign: float = 1.0) -> Form:
        out = list(x)
        for m in y:
            m = replace(m, coef=times(sign, m.coef))
            for i, other in enumerate(out):
                same = _merged(other, m)
                if same is not None:
                    out[i] = same
                    break
            else:
                out.append(m)
        return [m for m in out if not _is(m.coef, 0.0) and not any(_vanishes(a) for _, a in m.factors)]

    def mul(self, x: Form, y: Form) -> Form:
        out: Form = []
        for a in x:
            for b in y:
                if self.order(a) + self.order(b) > 1:
                    continue
                coef, factors = _factors_product(a.factors, b.factors)
                out = self.add(out, [Mono(times(times(a.coef, b.coef), coef), factors, _norm_product(a.norm, b.norm))])
        return out

    def order(self, m: Mono) -> int:
        return sum(1 for i, _ in m.factors if i in self.small)

    def split(self, x: Form) -> tuple[Form, Form]:
        return [m for m in x if not self.order(m)], [m for m in x if self.order(m)]

    # --- expressions ---

    def form(self, e: Expr) -> Form:
        head = e[0]
        if head == "v":
            return [Mono(1.0, ((e[1], IDENTITY),))]
        if head in ("c", "n"):
            value = self.coefs[e[1]] if head == "c" else e[1]
            return [] if _is(value, 0.0) else [Mono(value, ())]
        params = dict(e[1])
        args = [self.form(a) for a in e[2:]]
        if all(not m.factors and m.norm is None for a in args for m in a):
            value = bind(head, e[1], [_constant(a) for a in args])
            return [] if _is(value, 0.0) else [Mono(value, ())]
        return self.apply(head, e, params, args)

    def apply(self, head: str, e: Expr, params: dict[str, Any], args: list[Form]) -> Form:
        x = args[0]
        y = args[1] if len(args) > 1 else []
        if head in ("add", "sub", "add_any"):
            return self.add(x, y, -1.0 if head == "sub" else 1.0)
        if head == "mul":
            return self.mul(x, y)
        if head == "neg":
            return self.add([], x, -1.0)
        if head == "stop_gradient":
            raise SeveralGaussians  # its value and its derivative are those of different functions
        if head in ("copy", "copy_p", "name", "reduce_precision") or (
            head == "convert_element_type" and jnp.issubdtype(params["new_dtype"], jnp.floating)
        ):
            return x
        if head == "square":
            return self.mul(x, x)
        if head == "integer_pow" and params["y"] >= 0:
            out: Form = [Mono(1.0, ())]
            for _ in range(params["y"]):
                out = self.mul(out, x)
            return out
        if head == "max":
            return self.add(y, self.homogeneous("relu", self.add(x, y, -1.0), e, args))
        if head == "min":
            return self.add(x, self.homogeneous("relu", self.add(x, y, -1.0), e, args), -1.0)
        if head in ("abs", "sign"):
            return self.homogeneous(head, x, e, args)
        if head in COMPARE:
            return self.homogeneous(head, self.add(x, y, -1.0), e, args)
        if head in ("eq", "ne") and not self.add(x, y, -1.0):
            return [Mono(1.0, ())] if head == "eq" else []
        if head == "select_n" and len(args) == 3:
            p, if_false, if_true = args
            return self.add(if_false, self.mul(p, self.add(if_true, if_false, -1.0)))
        if head == "not":
            return self.add([Mono(1.0, ())], x, -1.0)
        if head == "and":
            return self.mul(x, y)
        if head == "or":
            return self.add(self.add(x, y), self.mul(x, y), -1.0)
        if head == "div":
            return self.mul(x, self.power(y, -1.0, e, [y]))
        if head in ("sqrt", "rsqrt", "pow", "integer_pow"):
            exponent = {"sqrt": 0.5, "rsqrt": -0.5, "integer_pow": params.get("y")}.get(head)
            if head == "pow":
                exponent = _constant(y) if all(not m.factors for m in y) and y else None
                exponent = float(exponent) if exponent is not None and known(exponent) else None
            return self.power(x, exponent, e, args)
        return self.known_function(head, x, e, args)

    def power(self, x: Form, exponent: float | None, e: Expr, args: list[Form]) -> Form:
        """x^exponent, of a constant or of a normaliser; otherwise whatever function of one Gaussian it is."""
        if exponent is not None:
            if all(not m.factors and m.norm is None for m in x):
                return [Mono(jnp.asarray(_constant(x)) ** exponent if exponent != -1.0 else 1.0 / _constant(x), ())]
            if len(x) == 1 and not x[0].factors and x[0].norm is not None:
                m = x[0]
                coef = 1.0 / m.coef if exponent == -1.0 else jnp.asarray(m.coef) ** exponent
                return [Mono(1.0 if _is(m.coef, 1.0) else coef, (), replace(m.norm, s=m.norm.s * exponent))]
            x0, x1 = self.split(x)
            inside = [m for m in x0 if m.factors]
            if len(inside) == 1 and inside[0].factors[0][0] in self.opaque and not x1 and len(inside[0].factors) == 1:
                rest = [m for m in x0 if not m.factors]
                (i, atom) = inside[0].factors[0]
                if atom is IDENTITY and inside[0].norm is None and all(m.norm is None for m in rest):
                    eps = _constant(rest) if rest else 0.0
                    return [Mono(1.0, (), Norm(i, inside[0].coef, eps, -2.0 * exponent))]
            if exponent == int(exponent) and 0 <= exponent <= 16:
                out: Form = [Mono(1.0, ())]
                for _ in range(int(exponent)):
                    out = self.mul(out, x)
                return out
        if exponent == -1.0:
            return self.generic(("div", (), ("n", 1.0), ("hole",)), [[Mono(1.0, ())], *args])
        return self.generic(e, args)

    def homogeneous(self, what: str, d: Form, e: Expr, args: list[Form]) -> Form:
        """relu, abs, sign or a comparison with zero, of d."""
        function = _HOMOGENEOUS[what]
        d0, d1 = self.split(d)
        if not d0 and not d1:
            return [] if what not in ("ge", "le") else [Mono(1.0, ())]
        if all(not m.factors and m.norm is None for m in d0):
            out = [Mono(function(_constant(d0)), ())]
            slope = {"relu": lambda v: _step(v), "abs": jnp.sign}.get(what)
            if slope and d1:
                out = self.add(out, self.mul([Mono(slope(_constant(d0)), ())], d1))
            return out
        if len(d0) == 1 and len(d0[0].factors) == 1 and isinstance(d0[0].factors[0][1], Power):
            m = d0[0]
            i, atom = m.factors[0]
            if i not in self.opaque:
                degree = atom.k if what in ("relu", "abs") else 0
                norm = m.norm if degree or what in ("relu", "abs") else None
                plus, minus = times(m.coef, atom.plus), times(m.coef, atom.minus)
                out = [Mono(1.0, ((i, Power(degree, function(plus), function(minus))),), norm)]
                if d1 and what in ("relu", "abs"):
                    slope = _step if what == "relu" else _HOMOGENEOUS["sign"]
                    out = self.add(out, self.mul([Mono(1.0, ((i, Power(0, slope(plus), slope(minus))),))], d1))
                return self.add([], out)
        return self.generic(_as_expr_of_difference(what), [d])

    def known_function(self, head: str, x: Form, e: Expr, args: list[Form]) -> Form:
        x0, x1 = self.split(x)
        linear = [m for m in x0 if m.factors]
        constants = [m for m in x0 if not m.factors]
        if (
            head in _KNOWN
            and len(linear) == 1
            and len(linear[0].factors) == 1
            and linear[0].factors[0][1] is IDENTITY
            and linear[0].factors[0][0] not in self.opaque
            and all(m.norm is None for m in x0)
        ):
            i, a = linear[0].factors[0][0], linear[0].coef
            found = _KNOWN[head](a, _constant(constants) if constants else 0.0)
            if found is not None:
                value, slope = found
                out = self.add([], [Mono(c, ((i, atom),) if atom is not None else ()) for c, atom in value])
                if x1:
                    out = self.add(
                        out, self.mul([Mono(c, ((i, atom),) if atom is not None else ()) for c, atom in slope], x1)
                    )
                return out
        return self.generic(e, args)

    def generic(self, e: Expr, args: list[Form]) -> Form:
        """Any function, of forms that depend on one Gaussian (and to first order on small ones)."""
        parts = [self.split(a) for a in args]
        variables = {i for a0, _ in parts for m in a0 for i, _ in m.factors}
        if len(variables) != 1 or variables & self.opaque or any(m.norm for a in args for m in a):
            raise SeveralGaussians
        (i,) = variables
        inner = [self.univariate(a0) for a0, _ in parts]
        counts = np.cumsum([0] + [len(g.coefs) for g in inner])
        head, params = e[0], e[1]

        def operands(u: Any, coefs: Sequence[Any]) -> list[Any]:
            return [g.function(u, *coefs[counts[k] : counts[k + 1]]) for k, g in enumerate(inner)]

        def function(u: Any, *coefs: Any) -> Any:
            return bind(head, params, operands(u, coefs))

        coefs = tuple(c for g in inner for c in g.coefs)
        breaks = [b for g in inner for b in g.breaks]
        core = None
        if head in KINKED or head == "relu":
            cores = [g.core for g in inner if g.core is not None]
            constants = [_constant(a0) for a0, _ in parts if all(not m.factors for m in a0)] or [0.0]
            if cores:
                core = cores[0]
                breaks += [(c - core[1]) / core[0] for c in constants if np.ndim(c) or not known(c) or math.isfinite(c)]
        out = [Mono(1.0, ((i, Generic(function, coefs, tuple(breaks), core)),))]
        for k, (_, a1) in enumerate(parts):
            if a1:

                def slope(u: Any, *coefs: Any, k: int = k) -> Any:
                    values = operands(u, coefs)
                    return jax.jvp(
                        lambda v: bind(head, params, [*values[:k], v, *values[k + 1 :]]),
                        (values[k],), (jnp.ones_like(values[k]),),
                    )[1]  # fmt: skip

                out = self.add(out, self.mul([Mono(1.0, ((i, Generic(slope, coefs, tuple(breaks))),))], a1))
        return out

    def univariate(self, x: Form) -> Generic:
        """A form of one Gaussian as one function."""
        terms = [(m.coef, as_function(m.factors[0][1]) if m.factors else None) for m in x]
        coefs: list[Any] = []
        plan = []
        breaks: list[Any] = []
        for c, f in terms:
            start = len(coefs)
            coefs += [*([] if known(c) else [c]), *(f[1] if f else ())]
            breaks += f[2] if f else ()
            plan.append((start, len(coefs), float(c) if known(c) else None, f[0] if f else None))

        def function(u: Any, *cs: Any) -> Any:
            total: Any = None
            for start, stop, number, f in plan:
                value = cs[start].astype(u.dtype) if number is None else number
                rest = cs[start + (number is None) : stop]
                term = jnp.full_like(u, value) if f is None else f(u, *rest) if number == 1.0 else value * f(u, *rest)
                total = term if total is None else total + term
            return jnp.zeros_like(u) if total is None else total

        core = None
        linear = [m for m in x if m.factors]
        if len(linear) == 1:
            atom = linear[0].factors[0][1]
            offsets = [m.coef for m in x if not m.factors]
            if atom is IDENTITY:
                core = (linear[0].coef, _constant([m for m in x if not m.factors]) if offsets else 0.0)
            elif isinstance(atom, Generic) and not offsets and _is(linear[0].coef, 1.0):
                core = atom.core
            elif isinstance(atom, Generic) and atom.core is not None:
                shift = _constant([m for m in x if not m.factors]) if offsets else 0.0
                core = (linear[0].coef * atom.core[0], linear[0].coef * atom.core[1] + shift)
        return Generic(function, tuple(coefs), tuple(breaks), core)


def _vanishes(atom: Any) -> bool:
    return isinstance(atom, Power) and _is(atom.plus, 0.0) and _is(atom.minus, 0.0)


def _merged(x: Mono, y: Mono) -> Mono | None:
    """x + y as one monomial, if they differ in coefficients only."""
    if (x.norm is None) != (y.norm is None) or (x.norm is not None and not _same_norm(x.norm, y.norm)):
        return None
    if [i for i, _ in x.factors] != [i for i, _ in y.factors]:
        return None
    if not x.factors:
        return replace(x, coef=x.coef + y.coef)
    if all(
        a is b or (monomial(a) and monomial(b) and a.k == b.k and a.plus == b.plus)
        for (_, a), (_, b) in zip(x.factors, y.factors, strict=True)
    ):
        return replace(x, coef=x.coef + y.coef)
    if len(x.factors) == 1:
        (i, a), (_, b) = x.factors[0], y.factors[0]
        if isinstance(a, Power) and isinstance(b, Power) and a.k == b.k:
            plus = times(x.coef, a.plus) + times(y.coef, b.plus)
            minus = times(x.coef, a.minus) + times(y.coef, b.minus)
            if known(plus) and known(minus) and plus != 0 and minus == (-1) ** a.k * plus:
                atom = IDENTITY if a.k == 1 else Power(a.k, 1.0, (-1.0) ** a.k)
                return Mono(plus, ((i, atom),) if a.k else (), x.norm)
            return Mono(1.0, ((i, Power(a.k, plus, minus)),), x.norm)
        if (
            isinstance(a, ErfPower)
            and isinstance(b, ErfPower)
            and a.k == b.k
            and known(a.a)
            and known(b.a)
            and a.a == b.a
        ):
            return replace(x, coef=x.coef + y.coef)
    return None


def _same_norm(x: Norm | None, y: Norm | None) -> bool:
    if x is None or y is None:
        return x is y
    same = lambda a, b: a is b or (known(a) and known(b) and a == b)  # noqa: E731
    return x.argument == y.argument and x.s == y.s and same(x.alpha, y.alpha) and same(x.eps, y.eps)


def _norm_product(x: Norm | None, y: Norm | None) -> Norm | None:
    if x is None or y is None:
        return x or y
    if not _same_norm(replace(x, s=0.0), replace(y, s=0.0)):
        raise SeveralGaussians
    return replace(x, s=x.s + y.s) if x.s + y.s else None


def _constant(x: Form) -> Any:
    total: Any = 0.0
    for m in x:
        total = m.coef if known(total) and float(total) == 0.0 else total + m.coef
    return total


def _step(v: Any) -> Any:
    return float(v > 0) if known(v) else jnp.where(v > 0, jnp.ones_like(v), jnp.zeros_like(v))


def _lifted(known_function: Callable[[float], float], function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda v: known_function(float(v)) if known(v) else function(v)


_HOMOGENEOUS: dict[str, Callable[[Any], Any]] = {
    "relu": _lifted(lambda v: max(v, 0.0), lambda v: jnp.maximum(v, 0)),
    "abs": _lifted(abs, jnp.abs),
    "sign": _lifted(lambda v: float(np.sign(v)), jnp.sign),
} | {
    name: _lifted(
        lambda v, f=f: float(f(v, 0.0)), lambda v, f=f: getattr(jnp, f.__name__)(v, 0).astype(jnp.asarray(v).dtype)
    )
    for name, f in COMPARE.items()
}


def _as_expr_of_difference(what: str) -> Expr:
    return (what, (), ("hole",), ("n", 0.0)) if what in COMPARE else (what, (), ("hole",))


def _exp_known(a: Any, b: Any) -> Any:
    value = [(1.0 if _is(b, 0.0) else jnp.exp(b), ExpPower(0, a))]
    return value, value


def _erf_known(a: Any, b: Any) -> Any:
    if not _is(b, 0.0):
        return None
    return [(1.0, ErfPower(0, a))], [(2 / math.sqrt(math.pi), GaussPower(0, a * a))]


def _erfc_known(a: Any, b: Any) -> Any:
    if not _is(b, 0.0):
        return None
    return [(1.0, None), (-1.0, ErfPower(0, a))], [(-2 / math.sqrt(math.pi), GaussPower(0, a * a))]


def _cos_known(shift: float) -> Callable[[Any, Any], Any]:
    def found(a: Any, b: Any) -> Any:
        return [(1.0, TrigPower(0, a, b + shift))], [(1.0, TrigPower(0, a, b + shift + math.pi / 2))]

    return found


_KNOWN: dict[str, Callable[[Any, Any], Any]] = {
    "exp": _exp_known,
    "erf": _erf_known,
    "erfc": _erfc_known,
    "cos": _cos_known(0.0),
    "sin": _cos_known(-math.pi / 2),
}


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
    if e[0] in ("v", "c", "n"):
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
