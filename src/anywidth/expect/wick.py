r"""Products of Gaussians and at most two other functions: E[u_1 ... u_k f(w) g(w')], all jointly Gaussian.

Every u_i is split into its part along the *core* of its own side and a residual, u_i = alpha_i w + r_i with
alpha_i = Cov(u_i, w) / Var w. The first goes into the function, w^p f(w). The residuals are integrated by Wick's
theorem with Stein's lemma: r_i meets another residual (Cov(r_i, r_j)), or the core of the other side, of which it takes
a derivative (Cov(r_i, w') d/dw'). So E is a sum of products of covariances with the expectations

    E[D^d (w^p f)(w) D^e (w'^q g)(w')],

closed forms or one quadrature for all of them. Without cores this is Isserlis' theorem. At coinciding inputs r_i and w'
are independent and nothing is divided but by own variances: derivatives are right there. With a single core all
residuals are independent of it, and nothing is differentiated.

What a derivative is taken of must be smooth enough, for the values and for their own derivatives (`smooth_enough`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from anywidth.expect import closed, methods, quadrature
from anywidth.expect.atoms import IDENTITY, Generic, as_function, atom_product, monomial, times
from anywidth.expect.numerics import safe_recip

__all__ = ["MOST", "Factor", "expectation", "integrable"]

MOST, MOST_WITH_CORES = 10, 4  # Gaussians in a product

Cov = Callable[[int, int], Any]


class Factor(NamedTuple):
    """A function of one Gaussian, on one side of an expectation."""

    side: int
    node: Any
    atom: Any


def _cores(factors: Sequence[Factor]) -> list[int]:
    return [i for i, f in enumerate(factors) if not monomial(f.atom)]


def _slots(factors: Sequence[Factor]) -> list[int]:
    return [i for i, f in enumerate(factors) if monomial(f.atom) for _ in range(f.atom.k)]


def _own(factors: Sequence[Factor], cores: list[int], i: int) -> int | None:
    """The core along which a Gaussian is split."""
    same = [c for c in cores if factors[c].side == factors[i].side]
    return same[0] if same else cores[0] if cores and len({factors[c].side for c in cores}) == 1 else None


def integrable(factors: Sequence[Factor], cov: Cov) -> bool:
    """Whether `expectation` has a rule for such factors; `cov` tells what is zero by independence."""
    from anywidth.inner import ZERO

    cores, slots = _cores(factors), _slots(factors)
    if len(cores) > 2 or len(slots) > (MOST_WITH_CORES if cores else MOST):
        return False
    if len(cores) < 2:
        return True
    # how many residuals may meet each core
    orders = []
    for core in cores:
        met = 0
        for i in slots:
            own = _own(factors, cores, i)
            if own == core:
                continue
            linked = cov(i, core) is not ZERO
            met += linked or (own is not None and cov(i, own) is not ZERO and cov(own, core) is not ZERO)
        orders.append(met)
    return smooth_enough(*(factors[c].atom for c in cores), *orders)


def smooth_enough(f: Any, g: Any, d: int, e: int) -> bool:
    """Whether d derivatives of f and e of g may be taken, and the expectation of the result be differentiated again."""
    both = closed.has_closed_form(f, g) if not isinstance(f, Generic) and not isinstance(g, Generic) else False

    def fits(atom: Any, order: int) -> bool:
        if order == 0 or not (isinstance(atom, closed.Power) or (isinstance(atom, Generic) and atom.breaks)):
            return order == 0 or not (isinstance(atom, Generic) and atom.jumps)
        return isinstance(atom, closed.Power) and order <= (atom.k if both else atom.k - 1)

    return fits(f, d) and fits(g, e)


def expectation(gram: Any, factors: Sequence[Factor], cov: Cov) -> Any:
    """The expectation of the product, or ZERO. `cov(i, j)` is that of two different factors' Gaussians."""
    from anywidth.expect.choose import variance
    from anywidth.inner import ZERO, add

    cores, slots = _cores(factors), _slots(factors)
    scale = float(np.prod([float(f.atom.plus) for f in factors if monomial(f.atom)]))
    if not cores:
        methods.used(methods.ISSERLIS)

    def between(i: int, j: int) -> Any:
        return gram(factors[i].node, factors[i].node) if i == j else cov(i, j)

    owns = {i: _own(factors, cores, i) for i in slots}
    alpha: dict[int, Any] = {}
    for i, own in owns.items():
        c = ZERO if own is None else between(i, own)
        alpha[i] = ZERO if c is ZERO else c * safe_recip(variance(gram, factors[own].node))  # type: ignore[index]

    def along(i: int, x: Any) -> Any:
        """alpha_i times a covariance with the core of i."""
        return ZERO if alpha[i] is ZERO or x is ZERO else -alpha[i] * x

    def with_core(i: int, core: int) -> Any:
        if core == owns[i]:
            return ZERO
        out = between(i, core)
        return out if owns[i] is None else add(out, along(i, between(owns[i], core)))  # type: ignore[arg-type]

    def residual(i: int, j: int) -> Any:
        """Cov(r_i, u_j - alpha_j w_j)."""
        out = between(i, j)
        if owns[i] is not None:
            out = add(out, along(i, between(owns[i], j)))  # type: ignore[arg-type]
        if owns[j] is not None:
            through = with_core(i, owns[j])  # type: ignore[arg-type]
            out = add(out, along(j, through))
        return out

    residuals: dict[Any, Any] = {}
    with_cores: dict[Any, Any] = {}
    done: dict[Any, Any] = {}

    def wick(rest: tuple[int, ...]) -> dict[tuple[int, ...], Any]:
        """The residuals integrated: a factor for each number of derivatives of the cores; equal ones are counted."""
        if not rest:
            return {(0,) * len(cores): 1.0}
        if rest in done:
            return done[rest]
        out: dict[tuple[int, ...], Any] = {}
        first, others = rest[0], rest[1:]
        for j in dict.fromkeys(others):
            if (first, j) not in residuals:
                residuals[first, j] = residual(first, j)
            c, k = residuals[first, j], others.index(j)
            if c is not ZERO:
                many = float(others.count(j))
                for key, value in wick(others[:k] + others[k + 1 :]).items():
                    out[key] = add(out.get(key, ZERO), times(many, times(c, value)))
        for n, core in enumerate(cores):
            if (first, core) not in with_cores:
                with_cores[first, core] = with_core(first, core)
            c = with_cores[first, core]
            if c is not ZERO:
                for key, value in wick(others).items():
                    raised = tuple(d + (m == n) for m, d in enumerate(key))
                    out[raised] = add(out.get(raised, ZERO), times(c, value))
        done[rest] = out
        return out

    # every product of powers p and derivatives d of the cores, and its factor
    total: dict[tuple[tuple[int, int], ...], Any] = {}
    inside = [i for i in range(len(slots)) if alpha[slots[i]] is not ZERO]
    for chosen in itertools.chain.from_iterable(itertools.combinations(inside, k) for k in range(len(inside) + 1)):
        front: Any = 1.0
        powers = [0] * len(cores)
        for i in chosen:
            front = times(front, alpha[slots[i]])
            powers[cores.index(owns[slots[i]])] += 1  # type: ignore[arg-type]
        for key, value in wick(tuple(s for i, s in enumerate(slots) if i not in chosen)).items():
            at = tuple(zip(powers, key, strict=True))
            total[at] = add(total.get(at, ZERO), times(front, value))
    if not total:
        return ZERO
    if not cores:
        return times(scale, total[()])
    values = _moments(gram, factors, cores, list(total), between)
    out: Any = ZERO
    for at, factor in total.items():
        if values[at] is not ZERO:
            out = add(out, times(factor, values[at]))
    return out if out is ZERO else times(scale, out)


def _moments(gram: Any, factors: Sequence[Factor], cores: list[int], keys: list[Any], between: Cov) -> dict[Any, Any]:
    """E[D^d (w^p f) D^e (w'^q g)] for all keys ((p, d), (q, e))."""
    from anywidth.expect import choose
    from anywidth.inner import ZERO, add

    if len(cores) == 1:
        (core,) = cores
        out: dict[Any, Any] = {}
        for key in keys:
            coef, atom = _power(factors[core].atom, key[0][0])
            value = choose.mean(gram, factors[core].node, atom)
            out[key] = value if value is ZERO else times(coef, value)
        return out
    f, g = (factors[c].atom for c in cores)
    q1, q2 = (choose.variance(gram, factors[c].node) for c in cores)
    c = between(*cores)
    if c is ZERO:  # through a third one only
        c = 0.0 * (q1 * q2)
    lists = {key: [_derived(atom, *at) for atom, at in zip((f, g), key, strict=True)] for key in keys}
    if all(
        not isinstance(x, Generic) and not isinstance(y, Generic) and closed.has_closed_form(x, y)
        for left, right in lists.values()
        for _, x in left
        for _, y in right
    ):
        methods.used(methods.CLOSED)
        out = {}
        for key, (left, right) in lists.items():
            out[key] = ZERO
            for a, x in left:
                for b, y in right:
                    out[key] = add(out[key], times(times(a, b), closed.pair(x, y, q1, q2, c)))
        return out
    methods.used(methods.QUADRATURE)
    (ff, fc, fb), (gf, gc, gb) = as_function(f), as_function(g)
    fgs = [tuple(quadrature.derived(h, *at) for h, at in zip((ff, gf), key, strict=True)) for key in keys]
    like = lambda arrays: choose.aligned(arrays, c)
    values = quadrature.pairs(fgs, like(fc), like(gc), q1, q2, c, f_breaks=like(fb), g_breaks=like(gb))
    return dict(zip(keys, values, strict=True))


def _power(atom: Any, p: int) -> tuple[Any, Any]:
    coef: Any = 1.0
    for _ in range(p):
        c, atom = atom_product(IDENTITY, atom)
        coef = times(coef, c)
    return coef, atom


def _derived(atom: Any, p: int, d: int) -> list[tuple[Any, Any]]:
    """D^d (u^p f) as a sum of atoms with closed forms (or of the function itself, where it has none)."""
    coef, atom = _power(atom, p)
    terms = [(coef, atom)]
    for _ in range(d):
        if any(isinstance(a, Generic) for _, a in terms):
            return terms
        terms = [(times(c, k), b) for c, a in terms for k, b in closed.derivative(a)]
    return terms
