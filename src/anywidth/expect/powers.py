r"""Orthant moments of two Gaussians: the closed forms behind ReLU, absolute value, step and their powers.

With (u, v) centred Gaussian, Var u = q1, Var v = q2, Cov(u, v) = c = sqrt(q1 q2) cos(theta), polar
coordinates turn the moments of the positive orthant into one integral of a positive function::

    J_kl = E[u^k v^l; u > 0, v > 0]
         = q1^(k/2) q2^(l/2) 2^(m/2) Gamma(m/2 + 1) / (2 pi) * I_kl(phi),      m = k + l,
    I_kl(phi) = int_0^phi sin(t)^k sin(phi - t)^l dt,                         phi = pi - theta.

I_00 = phi is the step function's kernel, I_11 = (sin phi - phi cos phi) / 2 that of ReLU (Cho & Saul 2009,
degrees 0 and 1). Written with sines and cosines, I_kl loses all its digits as phi -> 0 (opposite inputs),
where it vanishes like phi^(m + 1). But I_kl / phi^(m + 1) is an entire, positive, slowly varying function of
phi^2, so one short polynomial in phi^2 gives I_kl to full relative accuracy for every angle.

All derivatives come from Price's theorem (1958), d/dc E[f g] = E[f' g'] and d/dq1 E[f g] = E[f'' g] / 2,
where the derivative of a jump is a density on the line u = 0. They never divide by a vanishing number.

>>> import jax.numpy as jnp
>>> one = jnp.float32(1.0)
>>> [round(float(orthant(1, 1, one, one, jnp.float32(c))), 6) for c in (-1.0, 0.0, 1.0)]   # 0, 1/(2 pi), 1/2
[0.0, 0.159155, 0.5]
"""

import math
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from anywidth.expect import stein
from anywidth.expect.numerics import (
    add_tangents,
    chebyshev,
    gram_det,
    half_angle,
    horner,
    powi,
    safe_recip,
    safe_rsqrt,
    safe_sqrt,
    tied,
)


def abs_moment(k):
    """E|z|^k of a standard normal z: 2^(k/2) Gamma((k + 1) / 2) / sqrt(pi)."""
    return 2 ** (k / 2) * math.gamma((k + 1) / 2) / math.sqrt(math.pi)


@lru_cache(None)
def _scaled_integral(k, l):
    """x -> I_kl(phi) / phi^(m + 1) at phi = pi sqrt(x), by Gauss-Legendre (the integrand is positive)."""
    nodes, weights = np.polynomial.legendre.leggauss(24 + (k + l) // 2)
    t, weights = (nodes + 1) / 2, weights / 2

    def func(x):
        phi = np.pi * np.sqrt(np.asarray(x, float))[..., None]
        sinc = lambda s: np.sinc(phi * s / np.pi) * s
        return (sinc(t) ** k * sinc(1 - t) ** l) @ weights

    return func


def _angles(q1, q2, c):
    """phi = pi - theta and theta, each to full relative accuracy, and det; independent if a variance is 0."""
    d = gram_det(q1, q2, c)
    proper = (q1 > 0) & (q2 > 0)
    acute = half_angle(jnp.where(proper, safe_sqrt(d), 1), jnp.where(proper, jnp.abs(c), 0))
    obtuse = float(np.pi) - acute
    return jnp.where(c < 0, acute, obtuse), jnp.where(c < 0, obtuse, acute), d


def _from_angle(k, l, q1, q2, phi):
    m = k + l
    if m == 0:
        return phi / (2 * math.pi)
    x = phi * phi
    # Degrees that reach half an ulp for every k, l in use; I / phi^(m+1) varies faster as m grows.
    degree = (7 if phi.dtype == jnp.float32 else 14) + m // 2
    shape = horner(chebyshev(_scaled_integral(k, l), degree), x * (2 / math.pi**2) - 1)
    # One over the scale, infinite without variance. The quotient comes last: XLA keeps quotients, and would compute
    # the polynomial anew in everything that reads the result.
    r1, r2 = (1 / jnp.sqrt(jnp.maximum(q, 0)) for q in (q1, q2))
    const = 2 ** (m / 2) * math.gamma(m / 2 + 1) / (2 * math.pi)
    return const * shape * powi(phi, m + 1) / (powi(r1, k) * powi(r2, l))


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def orthant(k, l, q1, q2, c):
    """J_kl = E[u^k v^l; u > 0, v > 0], elementwise on equal shapes. A variable without variance counts half.

    Cho & Saul (2009) for k = l; every k, l >= 0 here.
    """
    return tied(_from_angle(k, l, q1, q2, _angles(q1, q2, c)[0]), q1, q2, c)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def odd_moment(k, l, q1, q2, c):
    """E[sgn(u) |u|^k sgn(v) |v|^l] = 2 J_kl(c) - 2 J_kl(-c), to full relative accuracy as c -> 0."""
    jump = (1.0, 0.0)
    moment = stein.moment(k, l, None if k % 2 else jump, None if l % 2 else jump, stein.covariance(q1, q2, c))
    return tied(moment, q1, q2, c)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def even_moment(k, l, q1, q2, c):
    """E[|u|^k |v|^l] / 2 = J_kl(c) + J_kl(-c), with its slope in c to full relative accuracy as c -> 0."""
    return tied(orthant(k, l, q1, q2, c) + orthant(k, l, q1, q2, -c), q1, q2, c)


def ray(l, q1, q2, c):
    """E[delta(u) v^l; v > 0] = E|z|^l (det / q1)^(l/2) / sqrt(8 pi q1), and 0 where q1 = 0."""
    d = gram_det(q1, q2, c)
    spread = safe_sqrt(d) * safe_rsqrt(q1) if l % 2 else None
    power = powi(d * safe_recip(q1), l // 2)
    out = abs_moment(l) / math.sqrt(8 * math.pi) * power * safe_rsqrt(q1)
    return out * spread if l % 2 else out


def peak(q1, q2, c):
    """E[delta(u) delta(v)] = 1 / (2 pi sqrt(det)), and 0 where det = 0."""
    return safe_rsqrt(gram_det(q1, q2, c)) / (2 * math.pi)


def _slope_c(k, l, q1, q2, c):
    """d/dc of J_kl = E[f' g']."""
    if k and l:
        return k * l * orthant(k - 1, l - 1, q1, q2, c)
    if l:
        return l * ray(l - 1, q1, q2, c)
    return k * ray(k - 1, q2, q1, c) if k else peak(q1, q2, c)


def _slope_q(k, l, q1, q2, c):
    """d/dq1 of J_kl = E[f'' g] / 2. For k = 0 the density's derivative is taken by scaling: -c/(2 q1) d/dc."""
    if k >= 2:
        return k * (k - 1) / 2 * orthant(k - 2, l, q1, q2, c)
    return ray(l, q1, q2, c) / 2 if k else -c * safe_recip(q1) / 2 * _slope_c(k, l, q1, q2, c)


def _odd_slope_c(k, l, q1, q2, c):
    return 2 * (_slope_c(k, l, q1, q2, c) + _slope_c(k, l, q1, q2, -c))


def _odd_slope_q(k, l, q1, q2, c):
    if k >= 2:
        return k * (k - 1) / 2 * odd_moment(k - 2, l, q1, q2, c)
    return jnp.zeros_like(c) if k else -c * safe_recip(q1) / 2 * _odd_slope_c(k, l, q1, q2, c)


def _even_slope_c(k, l, q1, q2, c):
    return k * l / 2 * odd_moment(k - 1, l - 1, q1, q2, c) if k and l else jnp.zeros_like(c)


def _even_slope_q(k, l, q1, q2, c):
    if k >= 2:
        return k * (k - 1) / 2 * even_moment(k - 2, l, q1, q2, c)
    return ray(l, q1, q2, c) if k else jnp.zeros_like(c)


def _rule(value, slope_c, slope_q):
    def rule(k, l, primals, tangents):
        q1, q2, c = primals
        d1, d2, dc = tangents
        out = value(k, l, q1, q2, c)
        return out, add_tangents(
            out,
            (lambda: slope_q(k, l, q1, q2, c), d1),
            (lambda: slope_q(l, k, q2, q1, c), d2),
            (lambda: slope_c(k, l, q1, q2, c), dc),
        )

    value.defjvp(rule, symbolic_zeros=True)


_rule(orthant, _slope_c, _slope_q)
_rule(odd_moment, _odd_slope_c, _odd_slope_q)
_rule(even_moment, _even_slope_c, _even_slope_q)


def _is_number(x):
    return isinstance(x, (int, float))


def combine(a, b, k, l, q1, q2, c):
    """a J_kl(c) + b J_kl(-c): the moment of two piecewise powers with a = f+ g+ + f- g-, b = f+ g- + f- g+.

    The part of a and b that is opposite goes through `odd_moment`, and equal ones through `even_moment`, so nothing
    cancels as c -> 0. Coefficients that are Python numbers select the terms at trace time.
    """
    if _is_number(a) and _is_number(b) and a == b != 0:
        return a * even_moment(k, l, q1, q2, c)
    shared: Any
    if _is_number(a) and _is_number(b):
        shared = math.copysign(min(abs(a), abs(b)), a) if a * b < 0 else 0.0
    else:
        opposite = jnp.where(a * b < 0, jnp.sign(a) * jnp.minimum(jnp.abs(a), jnp.abs(b)), 0)
        shared = jax.lax.stop_gradient(opposite)
    terms = [
        (shared / 2, lambda: odd_moment(k, l, q1, q2, c)),
        (a - shared, lambda: orthant(k, l, q1, q2, c)),
        (b + shared, lambda: orthant(k, l, q1, q2, -c)),
    ]
    parts = [term() if _is_number(w) and w == 1 else w * term() for w, term in terms if not (_is_number(w) and w == 0)]
    return sum(parts[1:], parts[0]) if parts else jnp.zeros_like(c)
