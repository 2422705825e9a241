"""Normal forms: sums of products of functions of one Gaussian each.

A monomial is

    coef * prod_i atom_i(Z_i) * r^(-s/2) * prod_k F_k(Z),

one atom for each Gaussian, at most one normaliser r = alpha S + eps, S a sum of squares over a finite axis (batch
norm), and any number of functions F_k of several Gaussians (`Joint`). Atoms with closed forms are those of `closed.py`;
any other function of one Gaussian is a `Generic` atom, left to quadrature.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from dataclasses import fields as dataclass_fields
from functools import cached_property
from typing import Any

import jax
import numpy as np

from anywidth import _compat
from anywidth.expect.breaks import continuous, union
from anywidth.expect.closed import ErfPower, ExpPower, GaussPower, Power, TrigPower, evaluate
from anywidth.expr import Expr


class SeveralGaussians(Exception):
    """A function of several correlated Gaussians, which no rule here can integrate."""


IDENTITY = Power(1, 1.0, -1.0)


@dataclass(frozen=True, eq=False)
class Generic:
    """f(u, *coefs) with kinks at `breaks`, or if `jumps` perhaps jumps.

    `degree`: of the polynomials that it consists of between them, if it does.
    """

    function: Callable[..., Any]
    coefs: tuple[Any, ...]
    breaks: tuple[Any, ...] = ()
    degree: int | None = None
    jumps: bool = False

    @cached_property
    def discontinuous(self) -> bool:
        """May have jumps, as far as its values tell."""
        return self.jumps and not continuous(self.function, self.coefs, self.breaks)


@dataclass(frozen=True, eq=False)
class Norm:
    """r^(-s/2) with r = alpha * argument + eps."""

    argument: int
    alpha: Any
    eps: Any
    s: float


@dataclass(frozen=True, eq=False)
class Joint:
    """A function of several Gaussians (or of what is not Gaussian): an expression of the same arguments."""

    expr: Expr


@dataclass(frozen=True, eq=False)
class Mono:
    """One term of a normal form."""

    coef: Any
    factors: tuple[tuple[int, Any], ...]
    norm: Norm | None = None
    joints: tuple[Joint, ...] = ()

    @property
    def constant(self) -> bool:
        """No function of any argument."""
        return not self.factors and self.norm is None and not self.joints

    @property
    def univariate(self) -> bool:
        """A function of at most one argument, without a normaliser."""
        return len(self.factors) <= 1 and self.norm is None and not self.joints


Form = list[Mono]


def known(x: Any) -> bool:
    """A number that is there already."""
    return not _compat.is_tracer(x) and np.ndim(x) == 0


def times(x: Any, y: Any) -> Any:
    """The product, of numbers as a number."""
    if known(x) and float(x) == 1.0:
        return y
    if known(y) and float(y) == 1.0:
        return x
    if known(x) and known(y):
        return float(x) * float(y)
    return x * y


def is_number(x: Any, value: float) -> bool:
    """Known to be this number."""
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
    """A step, a sign: its derivative is zero almost everywhere."""
    return (
        isinstance(atom, Power)
        and atom.k == 0
        and not (known(atom.plus) and known(atom.minus) and float(atom.plus) == float(atom.minus))
    )


def may_jump(atom: Any) -> bool:
    """May have jumps, as its expression tells."""
    return atom.jumps if isinstance(atom, Generic) else jumps(atom)


def discontinuous(atom: Any) -> bool:
    """May have jumps, as its values tell."""
    return atom.discontinuous if isinstance(atom, Generic) else jumps(atom)


def degree_of(atom: Any) -> int | None:
    """The degree of the polynomials of which an atom consists, if it does."""
    return atom.degree if isinstance(atom, Generic) else atom.k if isinstance(atom, Power) else None


def atom_key(atom: Any) -> Hashable:
    """Equal for equal atoms: numbers count by value, arrays and functions by identity."""
    if isinstance(atom, Generic | Norm | Joint):
        return id(atom)
    fields = [getattr(atom, f.name) for f in dataclass_fields(atom)]
    return (type(atom).__name__, *(float(x) if known(x) else id(x) for x in fields))


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
    if isinstance(f, ExpPower | GaussPower) and type(f) is type(g):
        return 1.0, replace(f, k=f.k + g.k, a=f.a + g.a)
    return 1.0, _generic_product(f, g)


def _generic_product(f: Any, g: Any) -> Generic:
    (ff, fc, fb), (gf, gc, gb) = as_function(f), as_function(g)
    m = len(fc)
    degrees = degree_of(f), degree_of(g)
    degree = None if None in degrees else sum(degrees)  # type: ignore[arg-type]
    product = lambda u, *c: ff(u, *c[:m]) * gf(u, *c[m:])
    return Generic(product, fc + gc, union(fb, gb), degree, may_jump(f) or may_jump(g))


def factors_product(f: tuple[Any, ...], g: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """(coefficient, factors) of the product of two products of atoms."""
    out = dict(f)
    coef: Any = 1.0
    for i, atom in g:
        if i in out:
            c, out[i] = atom_product(out[i], atom)
            coef = times(coef, c)
        else:
            out[i] = atom
    kept = {
        i: a
        for i, a in out.items()
        if not (isinstance(a, Power) and a.k == 0 and is_number(a.plus, 1) and is_number(a.minus, 1))
    }
    return coef, tuple(sorted(kept.items(), key=lambda item: item[0]))


def vanishes(atom: Any) -> bool:
    """Known to be zero."""
    return isinstance(atom, Power) and is_number(atom.plus, 0.0) and is_number(atom.minus, 0.0)


def infinite(coef: Any) -> bool:
    """Known to be, somewhere."""
    return isinstance(coef, float | np.ndarray | np.generic) and bool(np.isinf(coef).any())


def merged(x: Mono, y: Mono) -> Mono | None:
    """x + y as one monomial, if they differ in coefficients only."""
    if [id(j) for j in x.joints] != [id(j) for j in y.joints]:
        return None
    if (x.norm is None) != (y.norm is None) or (x.norm is not None and not _same_norm(x.norm, y.norm)):
        return None
    if [i for i, _ in x.factors] != [i for i, _ in y.factors]:
        return _lifted_step(x, y) or _lifted_step(y, x)
    if not x.factors:
        if infinite(x.coef) and infinite(y.coef):
            raise SeveralGaussians  # the difference of two scores that a mask leaves out is no number
        return replace(x, coef=x.coef + y.coef)
    if all(
        a is b or (monomial(a) and monomial(b) and a.k == b.k and a.plus == b.plus)
        for (_, a), (_, b) in zip(x.factors, y.factors, strict=True)
    ):
        return replace(x, coef=x.coef + y.coef)
    if len(x.factors) == 1 and not x.joints:
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


def _lifted_step(x: Mono, c: Mono) -> Mono | None:
    """A step of one Gaussian plus a constant as one step: 1 - step(u) does not cancel where it is small."""
    if not c.constant or not x.univariate or not x.factors:
        return None
    ((i, a),) = x.factors
    if not jumps(a):
        return None
    plus, minus = times(x.coef, a.plus) + c.coef, times(x.coef, a.minus) + c.coef
    if known(plus) and known(minus) and plus == minus:
        return Mono(plus, ())
    return Mono(1.0, ((i, Power(0, plus, minus)),))


def _same_norm(x: Norm | None, y: Norm | None) -> bool:
    if x is None or y is None:
        return x is y
    same = lambda a, b: a is b or (known(a) and known(b) and a == b)
    return x.argument == y.argument and x.s == y.s and same(x.alpha, y.alpha) and same(x.eps, y.eps)


def norm_product(x: Norm | None, y: Norm | None) -> Norm | None:
    """The product of two powers of one normaliser."""
    if x is None or y is None:
        return x or y
    if not _same_norm(replace(x, s=0.0), replace(y, s=0.0)):
        raise SeveralGaussians
    return replace(x, s=x.s + y.s) if x.s + y.s else None


def constant(x: Form) -> Any:
    """The sum of a form of constants."""
    total: Any = 0.0
    for m in x:
        total = m.coef if known(total) and float(total) == 0.0 else total + m.coef
    return total
