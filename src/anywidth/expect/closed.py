r"""Expectations with a closed form, of one function of each of two Gaussians.

Let (u, v) be centred Gaussian with Var u = q1, Var v = q2, Cov(u, v) = c. The kernel of a layer with
activation f is E[f(u) f(v)], and, by Price's theorem (1958), its derivative in c, which the neural tangent
kernel is made of, is E[f'(u) f'(v)]. An *atom* is a function for which such expectations are known:

    Power(k, plus, minus)    plus |u|^k for u > 0, minus |u|^k for u < 0     ReLU, abs, step, sign, u^k, ...
    ErfPower(k, a)           u^k erf(a u)                                     erf, and GELU with Power
    GaussPower(k, a)         u^k exp(-a u^2)                                  their derivatives
    ExpPower(k, a)           u^k exp(a u)
    TrigPower(k, a, phase)   u^k cos(a u + phase)                             sin, cos, random features

`pair` is exact to a few units in the last place for every correlation, +-1 and zero variance included, and so
is its derivative. The derivatives at a point where the true one is infinite (sqrt(q) at 0, the derivative of
a step's kernel at correlation +-1) are defined as 0, never NaN. The mathematics is in `powers` (piecewise
powers: Cho & Saul 2009), `stein` (erf, sign, bell curves: Williams 1997) and `waves` (exp, cos).

>>> import jax, jax.numpy as jnp
>>> relu = Power(1, 1.0, 0.0)
>>> one, half = jnp.float32(1.0), jnp.float32(0.5)
>>> value, slope = jax.jvp(lambda c: pair(relu, relu, one, one, c), (half,), (one,))
>>> print(f"{value:.5f} {slope:.5f} {pair(*derivative(relu)[0][1:] * 2, one, one, half):.5f}")
0.30450 0.33333 0.33333
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from anywidth.expect import powers, stein, waves
from anywidth.expect.numerics import powi, safe_sqrt

_atom = lambda *params: partial(jax.tree_util.register_dataclass, data_fields=list(params), meta_fields=["k"])


@_atom("plus", "minus")
@dataclass(frozen=True)
class Power:
    """plus |u|^k for u > 0 and minus |u|^k for u < 0; at 0, the average. k >= 0 is a static integer.

    ReLU is (1, 1, 0), abs (1, 1, 1), the identity (1, 1, -1), u^2 (2, 1, 1), step (0, 1, 0), sign (0, 1, -1),
    a leaky ReLU (1, 1, -slope), a constant (0, 1, 1).
    """

    k: int
    plus: float | jax.Array
    minus: float | jax.Array


@_atom("a")
@dataclass(frozen=True)
class ErfPower:
    """u^k erf(a u)."""

    k: int
    a: float | jax.Array


@_atom("a")
@dataclass(frozen=True)
class GaussPower:
    """u^k exp(-a u^2), a >= 0."""

    k: int
    a: float | jax.Array


@_atom("a")
@dataclass(frozen=True)
class ExpPower:
    """u^k exp(a u)."""

    k: int
    a: float | jax.Array


@_atom("a", "phase")
@dataclass(frozen=True)
class TrigPower:
    """u^k cos(a u + phase)."""

    k: int
    a: float | jax.Array
    phase: float | jax.Array


Atom = Power | ErfPower | GaussPower | ExpPower | TrigPower


def _static(x):
    return isinstance(x, (int, float, np.number))


def is_polynomial(f):
    """Whether f is known to be coef * u^k: a Power whose coefficients are Python numbers that agree."""
    return isinstance(f, Power) and _static(f.plus) and _static(f.minus) and f.minus == (-1) ** f.k * f.plus


def evaluate(f, u):
    """f(u), elementwise; the parameters of f broadcast against u by numpy's rules."""
    if isinstance(f, Power):
        side = jnp.where(u > 0, f.plus, jnp.where(u < 0, f.minus, (f.plus + f.minus) / 2)).astype(u.dtype)
        return side * powi(jnp.abs(u), f.k)
    match f:
        case ErfPower():
            factor = jax.lax.erf(f.a * u)
        case GaussPower():
            factor = jnp.exp(-f.a * u * u)
        case ExpPower():
            factor = jnp.exp(f.a * u)
        case TrigPower():
            factor = jnp.cos(f.a * u + f.phase)
    return powi(u, f.k) * factor


def derivative(f):
    """The almost-everywhere derivative of f, as a list of (coefficient, atom) to be summed; jumps give nothing."""
    lower = [(f.k, f.__class__(f.k - 1, *_params(f)))] if f.k else []
    match f:
        case Power():
            return [(f.k, Power(f.k - 1, f.plus, -f.minus))] if f.k else []
        case ErfPower():
            return [*lower, (2 / math.sqrt(math.pi) * f.a, GaussPower(f.k, f.a * f.a))]
        case GaussPower():
            return [*lower, (-2 * f.a, GaussPower(f.k + 1, f.a))]
        case ExpPower():
            return [*lower, (f.a, f)]
        case TrigPower():
            return [*lower, (f.a, TrigPower(f.k, f.a, f.phase + math.pi / 2))]


def _params(f):
    return (f.plus, f.minus) if isinstance(f, Power) else (f.a, f.phase) if isinstance(f, TrigPower) else (f.a,)


def has_closed_form(f, g):
    """Whether `pair(f, g, ...)` is known: within {Power, ErfPower, GaussPower}, or {ExpPower, TrigPower, u^k}."""
    wave = lambda h: isinstance(h, (ExpPower, TrigPower)) or is_polynomial(h)
    bell = lambda h: isinstance(h, (Power, ErfPower, GaussPower))
    return (bell(f) and bell(g)) or (wave(f) and wave(g))


def _prepare(atoms, arrays):
    """Arrays of one shape and dtype (float32 for half precision); parameters as floats or arrays of that shape."""
    arrays = [jnp.asarray(x) for x in arrays]
    given = jnp.result_type(*arrays)
    dtype = given if given in (jnp.float32, jnp.float64) else jnp.dtype(jnp.float32)
    params = [p for f in atoms for p in _params(f) if not _static(p)]
    shape = jnp.broadcast_shapes(*(jnp.shape(x) for x in arrays + params))
    spread = lambda x: jnp.broadcast_to(jnp.asarray(x).astype(dtype), shape)
    atoms = [f.__class__(f.k, *(float(p) if _static(p) else spread(p) for p in _params(f))) for f in atoms]
    return atoms, [spread(x) for x in arrays], given


def pair(f, g, q1, q2, c):
    """E[f(u) g(v)], elementwise over arrays q1, q2, c (and the atoms' parameters) that broadcast.

    Differentiable any number of times, forward and backward, in q1, q2, c and the parameters; a tangent in c
    alone, which is what an NTK asks for, costs E[f' g'] and nothing else. The dtype is that of the arrays.
    """
    if not has_closed_form(f, g):
        raise NotImplementedError(f"no closed form for {type(f).__name__} with {type(g).__name__}; use quadrature")
    (f, g), (q1, q2, c), given = _prepare((f, g), (q1, q2, c))
    if is_polynomial(f) and is_polynomial(g):
        out = f.plus * g.plus * stein.moment(f.k, g.k, None, None, stein.covariance(q1, q2, c))
    elif isinstance(f, Power) and isinstance(g, Power):
        same, cross = f.plus * g.plus + f.minus * g.minus, f.plus * g.minus + f.minus * g.plus
        out = powers.combine(same, cross, f.k, g.k, q1, q2, c)
    elif isinstance(f, (ExpPower, TrigPower)) or isinstance(g, (ExpPower, TrigPower)):
        (a, f), (b, g) = _wave(f), _wave(g)
        out = a * b * waves.moment(f[0], g[0], f[1:], g[1:], q1, q2, c)
    else:
        out = _bells(f, g, stein.covariance(q1, q2, c))
    return (out + jnp.zeros_like(c)).astype(given)


def mean(f, q):
    """E[f(u)], elementwise over q = Var u and the parameters of f, with the same guarantees as `pair`."""
    (f,), (q,), given = _prepare((f,), (q,))
    if isinstance(f, Power):
        root = powi(q, f.k // 2) * (safe_sqrt(q) if f.k % 2 else 1.0)
        out = (f.plus + f.minus) / 2 * powers.abs_moment(f.k) * root
    else:
        out = pair(f, Power(0, 1.0, 1.0), q, jnp.zeros_like(q), jnp.zeros_like(q))
    return (out + jnp.zeros_like(q)).astype(given)


def _wave(f):
    """A coefficient and the arguments of `waves.moment`."""
    match f:
        case Power():
            return f.plus, (f.k, "exp", 0.0)
        case ExpPower():
            return 1.0, (f.k, "exp", f.a)
        case TrigPower():
            return 1.0, (f.k, "cos", f.a, f.phase)


def _bell_terms(f):
    """f as a sum of coef u^k S(u) exp(-w u^2 / 2), S a smoothed sign or None: a list of (coef, k, S, w)."""
    match f:
        case Power():
            parity = (-1) ** f.k
            terms = [
                ((f.plus + parity * f.minus) / 2, f.k, None, 0.0),
                ((f.plus - parity * f.minus) / 2, f.k, (1.0, 0.0), 0.0),
            ]
            return [t for t in terms if not (_static(t[0]) and t[0] == 0)]
        case ErfPower():
            return [(1.0, f.k, (math.sqrt(2) * f.a, 1.0), 0.0)]
        case GaussPower():
            return [(1.0, f.k, None, 2 * f.a)]


def _bells(f, g, cov):
    total = 0.0
    for a, k, s, w in _bell_terms(f):
        for b, l, t, x in _bell_terms(g):
            scale, tilted = stein.absorb(w, x, cov)
            total += a * b * scale * stein.moment(k, l, s, t, tilted)
    return total
