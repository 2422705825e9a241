"""From an expression to its normal form (`atoms.py`).

Since r > 0 and max(r x, 0) = r max(x, 0), positively homogeneous functions pass through a normaliser. An argument whose
variance is zero (a gain that starts at one and is trained) matters only to first order: the function is expanded to
first order in it, which is exact for the NNGP and for the NTK.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from anywidth.expect.atoms import (
    IDENTITY,
    Form,
    Generic,
    Joint,
    Mono,
    Norm,
    SeveralGaussians,
    as_function,
    constant,
    degree_of,
    factors_product,
    is_number,
    known,
    may_jump,
    merged,
    monomial,
    norm_product,
    times,
    vanishes,
)
from anywidth.expect.breaks import TooMany, roots, union
from anywidth.expect.closed import Power
from anywidth.expect.functions import HOMOGENEOUS, KNOWN, bell_known, difference, narrow, step
from anywidth.expr import COMPARE, Expr, bind

STEPS = {"sign", *COMPARE}
KINKED = {"max", "min", "abs", "relu", *STEPS}  # at the roots of their argument, or of the difference of both
SINGULAR = {"sqrt", "rsqrt", "cbrt", "log", "pow"}
ENDLESS = {"floor", "ceil", "round", "rem", "nextafter"}

FEW = 8  # products of sums of no more terms than this are multiplied out as they are
MANY = 64


@dataclass(frozen=True, eq=False)
class Normaliser:
    """Computes normal forms. `small`: arguments of variance zero; `opaque`: those that are not Gaussian."""

    coefs: Sequence[Any]
    small: frozenset[int]
    opaque: frozenset[int]
    memo: dict[Expr, Form] = field(default_factory=dict)

    # --- algebra ---

    def add(self, x: Form, y: Form, sign: float = 1.0) -> Form:
        """x + sign y."""
        out = list(x)
        for m in y:
            m = replace(m, coef=times(sign, m.coef))
            for i, other in enumerate(out):
                same = merged(other, m)
                if same is not None:
                    out[i] = same
                    break
            else:
                out.append(m)
        return [m for m in out if not is_number(m.coef, 0.0) and not any(vanishes(a) for _, a in m.factors)]

    def mul(self, x: Form, y: Form) -> Form:
        """x y, multiplied out."""
        if len(x) * len(y) > FEW and len({i for m in (*x, *y) for i, _ in m.factors}) > 1:
            x, y = self.gathered(x), self.gathered(y)
            if len(x) * len(y) > MANY:
                raise SeveralGaussians
        out: Form = []
        for a in x:
            for b in y:
                if self.order(a) + self.order(b) > 1:
                    continue
                coef, factors = factors_product(a.factors, b.factors)
                coef = times(times(a.coef, b.coef), coef)
                m = Mono(coef, factors, norm_product(a.norm, b.norm), (*a.joints, *b.joints))
                out = self.add(out, [m])
        return out

    def gathered(self, x: Form, closed: bool = False) -> Form:
        """The same function with all terms in one and the same Gaussian as one atom, and the constants with them.

        1 - sigmoid(u) is one function: products of sums do not swell. `closed`: sums of closed forms are left alone.
        """
        groups: dict[int, Form] = {}
        rest: Form = []
        for m in x:
            if m.univariate and m.factors and not self.order(m) and m.factors[0][0] not in self.opaque:
                groups.setdefault(m.factors[0][0], []).append(m)
            else:
                rest.append(m)
        if closed:
            for i, terms in list(groups.items()):
                if not any(isinstance(m.factors[0][1], Generic) for m in terms):
                    rest += groups.pop(i)
        constants = [m for m in rest if m.constant]
        if len(groups) == 1 and constants:
            rest = [m for m in rest if not m.constant]
            next(iter(groups.values())).extend(constants)
        out = list(rest)
        for i, terms in groups.items():
            out += terms if len(terms) == 1 else [Mono(1.0, ((i, self.univariate(terms)),))]
        return out

    def order(self, m: Mono) -> int:
        """How many small arguments it has."""
        return sum(1 for i, _ in m.factors if i in self.small)

    def split(self, x: Form) -> tuple[Form, Form]:
        """The terms without small arguments, and those with one."""
        return [m for m in x if not self.order(m)], [m for m in x if self.order(m)]

    # --- expressions ---

    def form(self, e: Expr) -> Form:
        """The normal form of an expression."""
        if e not in self.memo:
            try:
                self.memo[e] = self.gathered(self._form(e), closed=True)
            except SeveralGaussians:
                self.memo[e] = [Mono(1.0, (), None, (Joint(e),))]
        return self.memo[e]

    def _form(self, e: Expr) -> Form:
        head = e[0]
        if head == "v":
            return [Mono(1.0, ((e[1], IDENTITY),))]
        if head in ("c", "n"):
            value = self.coefs[e[1]] if head == "c" else e[1]
            return [] if is_number(value, 0.0) else [Mono(value, ())]
        args = [self.form(a) for a in e[2:]]
        if all(m.constant for a in args for m in a):
            value = folded(head, e[1], [constant(a) for a in args])
            return [] if is_number(value, 0.0) else [Mono(value, ())]
        return self.apply(head, e, dict(e[1]), args)

    def apply(self, head: str, e: Expr, params: dict[str, Any], args: list[Form]) -> Form:
        """A primitive applied to normal forms."""
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
            if any(m.univariate and isinstance(a, Generic) for f in args for m in f for _, a in m.factors):
                try:
                    return self.generic(e, args)
                except SeveralGaussians:
                    pass
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
                exponent = constant(y) if all(m.constant for m in y) and y else None
                exponent = float(exponent) if exponent is not None and known(exponent) else None
            return self.power(x, exponent, e, args)
        return self.known_function(head, x, e, args)

    def power(self, x: Form, exponent: float | None, e: Expr, args: list[Form]) -> Form:
        """x^exponent, of a constant or of a normaliser; otherwise whatever function of one Gaussian it is."""
        if exponent is not None:
            if all(m.constant for m in x):
                return [Mono(jnp.asarray(constant(x)) ** exponent if exponent != -1.0 else 1.0 / constant(x), ())]
            if len(x) == 1 and not x[0].factors and not x[0].joints and x[0].norm is not None:
                m = x[0]
                assert m.norm is not None
                coef = 1.0 / m.coef if exponent == -1.0 else jnp.asarray(m.coef) ** exponent
                return [Mono(1.0 if is_number(m.coef, 1.0) else coef, (), replace(m.norm, s=m.norm.s * exponent))]
            x0, x1 = self.split(x)
            inside = [m for m in x0 if m.factors]
            if any(m.joints for m in x):
                raise SeveralGaussians
            if len(inside) == 1 and inside[0].factors[0][0] in self.opaque and not x1 and len(inside[0].factors) == 1:
                rest = [m for m in x0 if not m.factors]
                (i, atom) = inside[0].factors[0]
                if atom is IDENTITY and inside[0].norm is None and all(m.norm is None for m in rest):
                    eps = constant(rest) if rest else 0.0
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
        function = HOMOGENEOUS[what]
        d0, d1 = self.split(d)
        if not d0 and not d1:
            return [] if what not in ("ge", "le") else [Mono(1.0, ())]
        if all(m.constant for m in d0):
            out = [Mono(function(constant(d0)), ())]
            slope = {"relu": lambda v: step(v), "abs": jnp.sign}.get(what)
            if slope and d1:
                out = self.add(out, self.mul([Mono(slope(constant(d0)), ())], d1))
            return out
        if len(d0) == 1 and len(d0[0].factors) == 1 and not d0[0].joints and isinstance(d0[0].factors[0][1], Power):
            m = d0[0]
            i, atom = m.factors[0]
            if i not in self.opaque:
                degree = atom.k if what in ("relu", "abs") else 0
                norm = m.norm if degree or what in ("relu", "abs") else None
                plus, minus = times(m.coef, atom.plus), times(m.coef, atom.minus)
                out = [Mono(1.0, ((i, Power(degree, function(plus), function(minus))),), norm)]
                if d1 and what in ("relu", "abs"):
                    slope = step if what == "relu" else HOMOGENEOUS["sign"]
                    out = self.add(out, self.mul([Mono(1.0, ((i, Power(0, slope(plus), slope(minus))),))], d1))
                return self.add([], out)
        return self.generic(difference(what), [d, []] if what in COMPARE else [d])

    def known_function(self, head: str, x: Form, e: Expr, args: list[Form]) -> Form:
        """A function with a closed form, of an affine function of one Gaussian; or any other."""
        x0, x1 = self.split(x)
        linear = [m for m in x0 if m.factors]
        constants = [m for m in x0 if not m.factors]
        if (
            head in KNOWN
            and len(linear) == 1
            and len(linear[0].factors) == 1
            and linear[0].factors[0][1] is IDENTITY
            and linear[0].factors[0][0] not in self.opaque
            and all(m.norm is None and not m.joints for m in x0)
        ):
            i, a = linear[0].factors[0][0], linear[0].coef
            found = KNOWN[head](a, constant(constants) if constants else 0.0)
        elif head == "exp" and self.bell(linear) and all(m.constant for m in constants):
            i, a = linear[0].factors[0][0], linear[0].coef
            found = bell_known(a, constant(constants) if constants else 0.0)
        else:
            found = None
        if found is not None:
            value, slope = found
            out = self.add([], [Mono(c, ((i, atom),) if atom is not None else ()) for c, atom in value])
            if x1:
                out = self.add(
                    out, self.mul([Mono(c, ((i, atom),) if atom is not None else ()) for c, atom in slope], x1)
                )
            return out
        return self.generic(e, args)

    def bell(self, x: Form) -> bool:
        """Whether this is -a u^2 of one Gaussian, a known and positive."""
        if len(x) != 1 or not x[0].univariate or not known(x[0].coef) or not float(x[0].coef) < 0:
            return False
        i, atom = x[0].factors[0]
        return i not in self.opaque and monomial(atom) and atom.k == 2 and atom.plus == 1.0

    def generic(self, e: Expr, args: list[Form]) -> Form:
        """Any function, of forms that depend on one Gaussian (and to first order on small ones)."""
        parts = [self.split(a) for a in args]
        variables = {i for a0, _ in parts for m in a0 for i, _ in m.factors}
        if len(variables) != 1 or variables & self.opaque or any(m.norm or m.joints for a in args for m in a):
            raise SeveralGaussians
        if e[0] in ENDLESS:
            raise SeveralGaussians  # jumps without number
        (i,) = variables
        inner = [self.univariate(a0) for a0, _ in parts]
        counts = np.cumsum([0] + [len(g.coefs) for g in inner])
        head, params = e[0], e[1]

        def operands(u: Any, coefs: Sequence[Any]) -> list[Any]:
            return [g.function(u, *coefs[counts[k] : counts[k + 1]]) for k, g in enumerate(inner)]

        def function(u: Any, *coefs: Any) -> Any:
            value = bind(head, params, operands(u, coefs))
            return value.astype(u.dtype) if value.dtype == jnp.bool_ else value  # a number, with derivative zero

        coefs = tuple(c for g in inner for c in g.coefs)
        breaks = union(*(g.breaks for g in inner))
        degree = None
        if head in KINKED:
            degree = 0 if head in STEPS else inner[0].degree  # relu, abs
            breaks = union(breaks, self.roots(inner))
        elif head in SINGULAR and (head == "cbrt" or inner[0].degree is not None):
            breaks = union(breaks, self.roots(inner[:1]))
        elif head == "select_n":
            degrees = [g.degree for g in inner[1:]]
            degree = None if None in degrees else max(degrees)  # type: ignore[type-var]
        else:
            breaks = union(breaks, *(narrow(a0) for a0, _ in parts))
        jumping = head in STEPS or any(g.jumps for g in inner)
        out = [Mono(1.0, ((i, Generic(function, coefs, breaks, degree, jumping)),))]
        for k, (_, a1) in enumerate(parts):
            if a1:

                def slope(u: Any, *coefs: Any, k: int = k) -> Any:
                    values = operands(u, coefs)
                    return jax.jvp(
                        lambda v: bind(head, params, [*values[:k], v, *values[k + 1 :]]),
                        (values[k],), (jnp.ones_like(values[k]),),
                    )[1]  # fmt: skip

                kinked = head in KINKED or jumping
                out = self.add(out, self.mul([Mono(1.0, ((i, Generic(slope, coefs, breaks, None, kinked)),))], a1))
        return out

    def roots(self, operands: Sequence[Generic]) -> tuple[Any, ...]:
        """Where a function of one Gaussian is zero, or equal to another one."""
        f = operands[0]
        if len(operands) == 2:
            g, m = operands[1], len(f.coefs)
            degree = None if f.degree is None or g.degree is None else max(f.degree, g.degree)
            difference = lambda u, *c, f=f: f.function(u, *c[:m]) - g.function(u, *c[m:])
            f = Generic(difference, f.coefs + g.coefs, union(f.breaks, g.breaks), degree)
        try:
            return roots(f.function, f.coefs, f.breaks, f.degree)
        except TooMany:
            raise SeveralGaussians from None  # to be sampled

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

        atoms = [m.factors[0][1] for m in x if m.factors]
        degrees = [degree_of(a) for a in atoms]
        degree = None if None in degrees else max(degrees, default=0)  # type: ignore[type-var]
        return Generic(function, tuple(coefs), union(breaks), degree, any(may_jump(a) for a in atoms))


def folded(head: str, params: Any, values: Sequence[Any]) -> Any:
    """A primitive of constants; of known numbers a number, also while something is traced."""
    if not all(known(v) for v in values):
        return bind(head, params, values)
    with jax.ensure_compile_time_eval():
        value = np.asarray(bind(head, params, values))
    return float(value) if value.ndim == 0 and np.issubdtype(value.dtype, np.floating) else value
