r"""Moments of powers times error functions, signs and bell curves, by Stein's lemma.

For (u, v) centred Gaussian, Stein's lemma is E[u F(u, v)] = q1 E[dF/du] + c E[dF/dv]. It lowers the power
of u, and turns a factor erf(a u) into a bell curve, which in turn is absorbed in the covariance. So it ends,
always, in Williams's arcsine formula (Williams 1997)::

    E[erf(a u) erf(b v)] = (2 / pi) arcsin(2 a b c / sqrt((1 + 2 a^2 q1)(1 + 2 b^2 q2))).

One trick makes a single formula of the error function and the sign: with z ~ N(0, 1) independent,
erf(a u) = E sgn(sqrt(2) a u + z). A *smoothed sign* is a pair (alpha, beta) standing for
u -> E_z sgn(alpha u + beta z); erf(a u) is (sqrt(2) a, 1), and sgn(u) is (1, 0). Determinants are carried along rather
than recomputed, and every sum has terms of one sign for a given sign of c: nothing cancels, at any correlation.

>>> import jax.numpy as jnp
>>> cov = covariance(jnp.float32(1.0), jnp.float32(1.0), jnp.float32(0.5))
>>> round(float(moment(0, 0, (1.0, 0.0), (1.0, 0.0), cov)), 6)     # sign, sign: (2/pi) arcsin(1/2)
0.333333
"""

import math
from typing import NamedTuple

import jax

from anywidth.expect.numerics import gram_det, safe_recip, safe_rsqrt, signed_angle


class Covariance(NamedTuple):
    """Variances q1, q2, covariance c and determinant q1 q2 - c^2 (kept, so it need never be recomputed)."""

    q1: jax.Array
    q2: jax.Array
    c: jax.Array
    det: jax.Array


def covariance(q1, q2, c):
    """The `Covariance` of three arrays of one shape."""
    return Covariance(q1, q2, c, gram_det(q1, q2, c))


def swap(cov):
    """The covariance of (v, u)."""
    return Covariance(cov.q2, cov.q1, cov.c, cov.det)


def tilt(cov, w, b=1.0):
    """The covariance under the density times exp(-w u^2 / (2 b^2)), b = 0 meaning given u = 0."""
    scale = safe_recip(b * b + w * cov.q1)
    r = b * b * scale
    return Covariance(r * cov.q1, scale * (b * b * cov.q2 + w * cov.det), r * cov.c, r * cov.det)


def absorb(w, x, cov):
    """E[exp(-w u^2 / 2 - x v^2 / 2)] and the covariance under that weight. A Python 0.0 is no weight."""
    scale = 1.0
    for weight in (w, x):
        if not (isinstance(weight, float) and weight == 0):
            scale, cov = scale * safe_rsqrt(1 + weight * cov.q1), tilt(cov, weight)
        cov = swap(cov)
    return scale, cov


def _bell(sign, cov):
    """E of the derivative in u of a smoothed sign: 2 alpha / sqrt(2 pi (beta^2 + alpha^2 q1))."""
    alpha, beta = sign
    return math.sqrt(2 / math.pi) * alpha * safe_rsqrt(beta * beta + alpha * alpha * cov.q1)


def _arcsine(s, t, cov):
    """E[S T] of two smoothed signs: (2 / pi) times the signed angle of their augmented covariance."""
    (a, b), (g, d) = s, t
    c = a * g * cov.c
    det = b * b * (d * d + g * g * cov.q2) + a * a * (d * d * cov.q1 + g * g * cov.det)
    # Correlation +-1 of two jumps: the sign of c, without a derivative.
    return (2 / math.pi) * signed_angle(c, det)


def moment(k, l, s, t, cov):
    """E[u^k v^l S(u) T(v)], S and T smoothed signs (alpha, beta) or None. Zero by oddness is a Python 0.0.

    ``cov`` is a `Covariance` of arrays of one shape; alpha and beta are numbers or arrays of that shape.
    """
    if (k + l + (s is not None) + (t is not None)) % 2:
        return 0.0
    if k == 0 and l == 0:
        return 1.0 if s is None and t is None else 0.0 if s is None or t is None else _arcsine(s, t, cov)
    if k == 0:
        return moment(l, 0, t, s, swap(cov))
    total = 0.0
    if k >= 2:
        total += (k - 1) * cov.q1 * moment(k - 2, l, s, t, cov)
    if s is not None:
        alpha, beta = s
        total += cov.q1 * _bell(s, cov) * moment(k - 1, l, None, t, tilt(cov, alpha * alpha, beta))
    if l:
        total += l * cov.c * moment(k - 1, l - 1, s, t, cov)
    if t is not None:
        alpha, beta = t
        tilted = swap(tilt(swap(cov), alpha * alpha, beta))
        total += cov.c * _bell(t, swap(cov)) * moment(k - 1, l, s, None, tilted)
    return total
