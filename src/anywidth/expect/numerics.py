"""Arithmetic that does not lose digits: determinants, angles and roots of 2 x 2 covariances.

A pair of centred Gaussians (u, v) has three numbers, q1 = Var u, q2 = Var v and c = Cov(u, v). Near
correlation +-1, where every kernel is most interesting (an input and its neighbour, an input and its
negative), everything depends on ``det = q1 q2 - c^2``, of which naive arithmetic keeps no digit. `det`
computes it from error-free products.

Products are made error-free by masking: each factor is split into a high half and a low half, so that a
product of halves is exact in the working precision. Unlike Veltkamp's split this survives a compiler that
contracts ``a * b + c`` into one fused operation (XLA:CPU does): fusing an exact product changes nothing.

Decisions may be taken twice. XLA recomputes cheap operations in every fusion that wants them, contracted differently,
and keeps the results of dear ones (roots, quotients, angles). So ``where(x > 0, sqrt(where(x > 0, x, 1)), 0)`` can be 1
for an x that is rounded to zero or not: one fusion took the root of 1, the other believed it. Hence the rule for every
guard in this package: it stands before the dear operation and not after it, and what it puts in the place of x makes
the result the wanted one by itself (1 / inf = 0). Either decision is then right to the rounding of x.

>>> import jax.numpy as jnp
>>> e = jnp.float32(2.0 ** -13)
>>> q, c = 1 + e, jnp.float32(1.0)
>>> float(det(q, 1 - e, c)) == -float(e) ** 2, float(q * (1 - e) - c * c)
(True, 0.0)
"""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

# Determinants below so many eps q1 q2 are zero: see `gram_det`.
COINCIDING = 6.5

# The low bits cleared by the split: half of the significand, rounded up for the low half.
_SPLIT = {np.dtype("float32"): (np.uint32, 0xFFFFF000), np.dtype("float64"): (np.uint64, 0xFFFFFFFFF8000000)}


def is_zero(tangent):
    """Whether a tangent handed to a rule with ``symbolic_zeros=True`` is known to be zero."""
    return type(tangent) is SymbolicZero


def add_tangents(out, *terms):
    """Sum of ``slope() * tangent`` over the (slope, tangent) pairs whose tangent is not a symbolic zero.

    Slopes are thunks, so a tangent that is known to be zero costs nothing.
    """
    parts = [slope() * t for slope, t in terms if not is_zero(t)]
    return sum(parts[1:], parts[0]) if parts else jnp.zeros_like(out)


def _split(x):
    uint, mask = _SPLIT[np.dtype(x.dtype)]
    high = lax.bitcast_convert_type(lax.bitcast_convert_type(x, uint) & np.array(mask, uint), x.dtype)
    return high, x - high


def _two_sum(x, y):
    """x + y as a rounded sum and its exact error (Knuth)."""
    s = x + y
    t = s - x
    return s, (x - (s - t)) + (y - t)


def tied(value, *others):
    """`value`, which formally depends on the others.

    Under vmap a function with a rule of its own must be batched wherever its derivative is; JAX finds out by tracing
    the value alone, and gives the two different shapes where the value leaves out an argument that the derivative uses.
    """
    for x in others:
        value = jnp.where(x == x, value, value)
    return value


@jax.custom_jvp
def det(q1, q2, c):
    """q1 q2 - c^2, elementwise on equal shapes, to full relative accuracy; not clipped at zero.

    In float32 the middle sum is left uncompensated: its error, 2^-36 relative to q1 q2, is far below what
    rounding the inputs to float32 does, and the operation is on the critical path of every ReLU network.
    """
    (a, b), (d, e), (g, h) = _split(q1), _split(q2), _split(c)
    high, low = a * d - g * g, b * e - h * h
    if q1.dtype == jnp.float32:
        return high + ((a * e + b * d - 2 * g * h) + low)
    mid, err1 = _two_sum(a * e, b * d)
    mid, err2 = _two_sum(mid, -2 * g * h)
    return (high + mid) + (err1 + err2 + low)


@partial(det.defjvp, symbolic_zeros=True)
def _(primals, tangents):
    q1, q2, c = primals
    d1, d2, dc = tangents
    out = det(q1, q2, c)
    return out, add_tangents(out, (lambda: q2, d1), (lambda: q1, d2), (lambda: -2 * c, dc))


def gram_det(q1, q2, c):
    """`det`, with what rounding of the inputs could have made of zero snapped to zero.

    Two copies of one variance that differ in the last place must count as correlation one. Rounding q1, q2
    and c, a few times each, moves det by at most 6 eps q1 q2 (1 - |corr| by 3 eps: in float64 1 - 1e-15, where det is
    9 eps q1 q2, is told apart from 1). The bound is no whole number of eps because determinants near zero are, for
    variances near one, and no decision should hang on the last bit. The derivative is that of det, snapped or not.
    """
    d = det(q1, q2, c)
    return _keep(d, d > COINCIDING * float(jnp.finfo(d.dtype).eps) * (q1 * q2))


@jax.custom_jvp
def _keep(d, keep):
    return jnp.where(keep, d, jnp.zeros_like(d))


@_keep.defjvp
def _(primals, tangents):
    return _keep(*primals), tangents[0]


@jax.custom_jvp
def safe_sqrt(x):
    """sqrt(x) for x > 0, and 0 with every derivative 0 elsewhere."""
    return jnp.sqrt(jnp.where(x > 0, x, 0))


@safe_sqrt.defjvp
def _(primals, tangents):
    return safe_sqrt(*primals), safe_rsqrt(*primals) / 2 * tangents[0]


def safe_recip(x):
    """1 / x for x > 0, and 0 with every derivative 0 elsewhere."""
    return 1 / jnp.where(x > 0, x, np.inf)


def safe_rsqrt(x):
    """1 / sqrt(x) for x > 0, and 0 with every derivative 0 elsewhere."""
    return 1 / jnp.sqrt(jnp.where(x > 0, x, np.inf))


def powi(x, k):
    """x ** k for a static integer k >= 0, by multiplication (so that 0 ** 0 is 1 and derivatives are finite)."""
    return lax.integer_pow(x, k) if k else jnp.ones_like(x)


@lru_cache(None)
def chebyshev(func, degree):
    """Monomial coefficients in y = 2 x - 1 of the interpolant of func on 0 <= x <= 1, highest first."""
    poly = np.polynomial.Chebyshev.interpolate(lambda y: func((y + 1) / 2), degree)
    return tuple(float(a) for a in poly.convert(kind=np.polynomial.Polynomial).coef[::-1])


def horner(coefs, y):
    """The polynomial with these coefficients (Python floats, highest first) at y."""
    out = jnp.full_like(y, coefs[0])
    for a in coefs[1:]:
        out = out * y + a
    return out


def _atan_over_x(x2):
    x = np.sqrt(x2)
    return np.where(x > 0, np.arctan(x) / np.where(x > 0, x, 1), 1.0)


def half_angle(y, x, sign=1):
    """`sign` times atan2(y, x) for y >= 0 and x >= 0: an angle between 0 and pi / 2, 0 if both are zero.

    The C library's `atan2`, which XLA calls on CPU for every element, would cost more than everything else in a kernel
    together. In float32 a polynomial of degree 10 in the squared slope (error 2e-8) takes its place, in float64 XLA's
    own arctangent. Both sides of the decision agree where it is taken.
    """
    low, high = jnp.minimum(x, y), jnp.maximum(jnp.maximum(x, y), jnp.finfo(y.dtype).tiny)
    slope, right = low / high, np.asarray(np.pi / 2, y.dtype)
    if y.dtype != jnp.float32:
        acute = jnp.arctan(slope)
        return sign * jnp.where(y > x, right - acute, acute)
    # The quotient comes last: XLA keeps quotients, and what comes after is computed anew in every later layer.
    acute = low * horner(chebyshev(_atan_over_x, 10), 2 * (slope * slope) - 1)
    return sign * jnp.where(y > x, right * high - acute, acute) / high


@jax.custom_jvp
def signed_angle(c, det):
    """atan2(c, sqrt(det)); for det <= 0, +-pi / 2 by the sign of c, or 0 if that is 0, with every derivative 0."""
    return half_angle(jnp.abs(c), safe_sqrt(det), jnp.sign(c))


@signed_angle.defjvp
def _(primals, tangents):
    c, det = primals
    dc, ddet = tangents
    # c^2 + det > 0 where det > 0; elsewhere the factors in front are zero
    scale = safe_recip(c * c + det)
    return signed_angle(c, det), scale * (safe_sqrt(det) * dc - c * safe_rsqrt(det) / 2 * ddet)
