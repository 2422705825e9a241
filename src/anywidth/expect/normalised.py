r"""Expectations of homogeneous functions of a *normalised* Gaussian vector (batch normalisation).

A batch ``g`` in R^B of pre-activations is Gaussian with covariance S. Normalising it divides by the square root of

    r = a * sum_j g_j**2 + eps                        (batch norm: S is already centred, a = 1/B),

and a positively homogeneous function of degree s (ReLU, abs, ReLU**2, identity) lets the normaliser pass through:
``phi(g_i / sqrt(r)) = phi(g_i) * r**(-s/2)``. What is needed is therefore

    E[ f(g_i) r**(-s/2)  g(g'_j) r'**(-t/2) ]

for two jointly Gaussian batches (`normalised_pair`), for one batch (`normalised_self`), and for one function
(`normalised_mean`). The powers of r become Gaussian weights by

    r**(-s/2) = 2 / Gamma(s/2) * integral_0^inf w**(s-1) exp(-w**2 r) dw,

under which (g, g') is again Gaussian: with Omega the joint covariance and D = diag(a w**2, a' w'**2),

    E[...] ~ integral integral  det(I + 2 D Omega)**(-1/2) V(Omega (I + 2 Omega D)**(-1)) exp(-eps w**2 - eps' w'**2)

where V is the closed form of E[f g] (`anywidth.expect.closed`). Omega is never inverted: the same batch on both
sides, a centred batch (rank B - 1) and duplicated examples are all singular, and all fine.

**Quadrature.** ``w = c sinh(v)``, ``c = (2 a tr S + eps)**(-1/2)``, and the trapezoid rule in v >= 0, which converges
exponentially: the singularities of the integrand lie on |Im v| >= pi/2. The upper end is read off the spectrum of S
(where the integrand has fallen to the tolerance), the number of points is fixed by the dtype. The integrand is even
in w only for odd s; for every other s the half line is mapped by ``w = c exp(v - exp(-v))``.

**Linear algebra.** One copy is eliminated at a time. Given w, g' has covariance ``B1 = S22 - alpha S21 R1 S12``, with
the resolvent ``R1 = (I + alpha S11)**(-1)``, alpha = 2 a w**2; given w too it has covariance ``B1 R2``,
``R2 = (I + beta B1)**(-1)``, and the cross covariance is ``R1 S12 R2`` (`resolvents.py`). For equal batch sizes B1 is
computed through the differences S12 - S11 and S11 + S22 - S12 - S21, so that nearly equal batches cost few digits;
pairs (i, j) that coincide (correlation +-1) do so exactly under every weight, and are kept so.

**The same batch on both sides** (to rounding) is one integral and not two, of r**(-(s+t)/2), and so is every first
derivative (`coinciding.py`): there the derivative, which for a batch of 4 decays like 1/w only, has all its digits.

**NTK.** `jax.jvp` with a tangent on S12 alone.

**Limits.** Eigenvalues below ``4 B`` units of rounding count as zeros, so in float32 small eigenvalues (1e-5 of the
largest at B = 32) are lost: the derivative then has errors of 1e-3. The derivative of the same batch in another order
is two integrals, and at rank 3 (B = 4) right to 1e-7 (float32 2e-3) only.

**When is it finite?** (`check_finite`.) With eps > 0 always. With eps = 0 and n = rank(S): near r = 0 the density
contributes n dimensions, f of degree k contributes k, the normaliser -s. One batch: n + k > s. The same
batch on both sides: n + k + k' > s + t, and the derivative in S12 takes two more: n + k + k' - s - t > 2. The NTK of
batch norm followed by any function of degree s is finite iff B - 1 > 2. An integral that diverges comes back as a
large finite number without meaning.

>>> import jax.numpy as jnp
>>> from anywidth.expect.closed import Power
>>> relu = Power(1, 1.0, 0.0)
>>> S = jnp.eye(6) - 1 / 6                                # six orthogonal inputs, centred
>>> K = normalised_self(relu, relu, 1, 1, S, 1 / 6, 0.0)  # E[relu(u_i) relu(u_j)], u = batchnorm
>>> print(f"{K[0, 0]:.4f} {K[0, 1]:.4f}")                 # E[relu(u_i)**2] is exactly 1/2
0.5000 0.1123
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from .closed import mean, pair
from .numerics import COINCIDING, tied
from .resolvents import noise, relative_noise, resolvents, resolvents_diag

__all__ = ["check_finite", "infinite_slope", "normalised_mean", "normalised_pair", "normalised_self"]


def check_finite(rank, s, t=0, *, degrees=None, derivative=False, same=True):
    """Whether the expectation is finite for ``eps = 0`` and a batch whose covariance has the given rank.

    ``degrees``: the degrees of the two functions (by default s and t, as in batch norm followed by a homogeneous
    function). ``same``: whether both functions see the same batch (or one almost surely equal to it); otherwise the
    two batches have no singular direction in common and each must be finite on its own. ``derivative``: whether
    the derivative in S12 (the NTK) is asked for.

    >>> check_finite(3 - 1, 1, 1), check_finite(3 - 1, 1, 1, derivative=True)     # a batch of three: NNGP but no NTK
    (True, False)
    >>> check_finite(4 - 1, 1, 1, derivative=True)
    True
    """
    k, l = (s, t) if degrees is None else degrees
    if same:
        return rank + k + l - s - t > (2 if derivative else 0)
    return rank + min(k - s, l - t) > (1 if derivative else 0)


# --- quadrature ------------------------------------------------------------------------------------------------------


def _points(dtype, s):
    """Number of points, and the size of what may be neglected."""
    n, tol = (72, 1e-13) if jnp.finfo(dtype).bits > 32 else (28, 1e-7)
    return (n if _odd(s) else 2 * n), tol


def far_end(S, single):
    """The largest end of the rule in v: far out the integrand sees eigenvalues of relative size exp(-2 v).

    A single integral sees powers of the weight alone there. In a double one eigenvalues below `noise` are unknown, and
    weights that would tell them from zero are left out.
    """
    if single:
        return jnp.asarray(40.0 if jnp.finfo(S.dtype).bits > 32 else 17.5, S.dtype)
    return jnp.asarray(math.asinh((0.5 / relative_noise(S)) ** 0.5), S.dtype)


def _odd(s):
    return s == int(s) and int(s) % 2 == 1


def _scale(S, a, eps):
    """c of ``w = c x``: the width of exp(-w**2 r). Not differentiated: the integral does not depend on it."""
    r = lax.stop_gradient(2 * a * jnp.trace(S) + eps)
    return lax.rsqrt(jnp.where(r > 0, r, jnp.ones_like(r)))


def _nodes(s, k, A, eps, end):
    """Nodes x and weights of ``integral_0^inf x**(s-1) F(x) dx`` for ``F(x) ~ det(I + x**2 A)**(-1/2) exp(-eps x**2)``.

    Not differentiated: an exact rule's value does not depend on its nodes.
    """
    n, tol = _points(A.dtype, s)
    A, eps = lax.stop_gradient((A, eps))
    lam = jnp.maximum(jnp.linalg.eigvalsh(A), 0)
    grid = end * jnp.linspace(0, 1, 128, dtype=A.dtype)
    x2 = jnp.sinh(grid) ** 2
    decay = (
        0.5 * jnp.log1p(x2[:, None] * lam).sum(1) - jnp.log1p(x2 * lam[-1]) - max(s - k, 0) * jnp.log1p(grid) + eps * x2
    )
    top = jnp.max(jnp.where(decay < -math.log(tol), grid, 0)) + grid[1]
    m = jnp.arange(n, dtype=A.dtype)
    if _odd(s):
        h = top / (n - 1)
        v = h * m
        x = jnp.sinh(v)
        return x, h * jnp.where(m == 0, 0.5, 1.0).astype(A.dtype) * jnp.cosh(v) * x ** (int(s) - 1)
    low = 1.0  # where exp(-s exp(low)) is negligible
    while s * (low + math.exp(low)) < -math.log(tol):
        low += 0.05
    h = (top + low) / (n - 1)
    v = h * m - low
    x = jnp.exp(v - jnp.exp(-v))
    return x, h * x**s * (1 + jnp.exp(-v))


# --- the closed form under a weight ----------------------------------------------------------------------------------


def coinciding(q1, q2, c):
    """+1 or -1 where two Gaussians are almost surely multiples of one another, else 0."""
    q1, q2, c = lax.stop_gradient((q1[:, None], q2[None, :], c))
    return jnp.where((q1 * q2 > 0) & (q1 * q2 - c * c <= COINCIDING * jnp.finfo(c.dtype).eps * q1 * q2), jnp.sign(c), 0)


def value(f, g, q1, q2, c, sign):
    """V for variances q1 (..., B), q2 (..., B') and covariances c (..., B, B'), with known coincidences `sign`."""
    q1 = _at_least_zero(q1)[..., :, None]
    q2 = _at_least_zero(q2)[..., None, :]
    q1, q2, c = jnp.broadcast_arrays(q1, q2, c)
    full = jnp.sqrt(q1) * jnp.sqrt(q2) * (1 + 4 * jnp.finfo(c.dtype).eps)
    exact = jnp.where(sign != 0, sign * full, jnp.clip(c, -full, full))
    return pair(f, g, q1, q2, _with_value(c, exact))


@jax.custom_jvp
def _with_value(x, value):
    """`value`, with the derivative of x."""
    return tied(value, x)


@_with_value.defjvp
def _(primals, tangents):
    return _with_value(*primals), tangents[0]


def _at_least_zero(q):
    return _with_value(q, jnp.maximum(q, 0))


# --- one batch: one integral -----------------------------------------------------------------------------------------


def prepare(k, s, S, a, eps, end):
    """The covariance in units of the weight, that unit, the factor in front, and the rule for r**(-s/2)."""
    c = _scale(S, a, eps)
    unit = jnp.sqrt(jnp.asarray(2 * a, S.dtype)) * c
    A = S * unit * unit
    eps = jnp.asarray(eps, S.dtype) * c * c
    x, w = _nodes(s, k, A, eps, end)
    front = (2 / math.gamma(s / 2)) * c**s * unit ** (-k)
    return A, unit, front, x * x, w * jnp.exp(-eps * x * x)


def _mean(f, s, S, a, eps, centred):
    if s == 0:
        return mean(f, jnp.diagonal(S))
    A, _, front, x2, w = prepare(f.k, s, S, a, eps, far_end(S, True))
    logdet, _, q = resolvents_diag(A, noise(A), x2, centred)
    return front * ((w * jnp.exp(-logdet / 2)) @ mean(f, _at_least_zero(q)))


def single(f, g, s, S, a, eps, centred):
    """E[f(g_i) g(g_j) r**(-s/2)]."""
    q = jnp.diagonal(S)
    sign = coinciding(q, q, S)
    if s == 0:
        return value(f, g, q, q, S, sign)
    A, _, front, x2, w = prepare(f.k + g.k, s, S, a, eps, far_end(S, True))
    logdet, _, M = resolvents(A, noise(A), x2, centred)
    q = jnp.diagonal(M, axis1=-2, axis2=-1)
    return front * jnp.tensordot(w * jnp.exp(-logdet / 2), value(f, g, q, q, M, sign), 1)


# --- two batches: two integrals --------------------------------------------------------------------------------------


def _eliminate(B, C, E, F, x2, R, M):
    """Covariance of the second batch under the weight x2 on the first. R = (I + x2 A)^-1, M = A R.

    With E = C - A and F = A + B - C - C', both zero for the same batch: B - x2 C' R C = M + F + R E + E' R - x2 E' R E.
    """
    if E is None:
        return B - x2 * (C.T @ (R @ C))
    T = R @ E
    return M + F + (T + T.T) - x2 * (E.T @ T)


def _pair(f, g, s, t, S11, S22, S12, a1, a2, eps1, eps2, centred):
    if s == 0 and t == 0:
        q1, q2 = jnp.diagonal(S11), jnp.diagonal(S22)
        return value(f, g, q1, q2, S12, coinciding(q1, q2, S12))
    if s == 0:
        return _pair(g, f, t, s, S22, S11, S12.T, a2, a1, eps2, eps1, centred).T
    a1, a2, eps1, eps2 = (jnp.asarray(z, S12.dtype) for z in (a1, a2, eps1, eps2))
    arrays = S11, S22, S12, a1, a2, eps1, eps2
    two = lambda *arrays: _double(f, g, s, t, centred, *arrays)
    if t == 0 or S11.shape != S22.shape:
        return two(*arrays)
    from .coinciding import pair_with_itself

    near = lambda S: jnp.all(jnp.abs(S - S11) <= noise(S11))
    same = near(S22) & near(S12) & (a1 == a2) & (eps1 == eps2)
    return lax.cond(same, lambda *arrays: pair_with_itself(f, g, s, t, centred, *arrays), two, *arrays)


def _double(f, g, s, t, centred, S11, S22, S12, a1, a2, eps1, eps2):
    q1, q2 = jnp.diagonal(S11), jnp.diagonal(S22)
    sign = coinciding(q1, q2, S12)
    end = jnp.minimum(far_end(S11, False), far_end(S22, False))
    A, unit1, front, x1, w1 = prepare(f.k, s, S11, a1, eps1, end)
    logdet1, R1, M1 = resolvents(A, noise(A), x1, centred)
    w1 = w1 * jnp.exp(-logdet1 / 2)
    if t == 0:
        C = S12 * unit1
        q1 = jnp.diagonal(M1, axis1=-2, axis2=-1)
        q2 = q2 - x1[:, None] * (C * (R1 @ C)).sum(-2)
        return front * jnp.tensordot(w1, value(f, g, q1, q2, R1 @ C, sign), 1)

    B, unit2, front2, x2, w2 = prepare(g.k, t, S22, a2, eps2, end)
    C = (S12 * unit1) * unit2
    E = F = None
    if S11.shape == S22.shape:  # differences before scaling
        ratio = unit2 / unit1
        E = S12 * ratio - S11
        F = (S22 * ratio * ratio - S11) - (E + E.T)
        E, F = E * unit1 * unit1, F * unit1 * unit1

    @jax.checkpoint
    def step(total, point):
        x, w, R, M = point
        P = R @ C
        B1 = _eliminate(B, C, E, F, x, R, M)
        logdet, R2, q2 = resolvents_diag(B1, noise(B), x2, centred)
        cross = P @ R2
        q1 = jnp.diagonal(M) - x2[:, None] * (cross * P).sum(-1)
        values = value(f, g, q1, q2, cross, sign)
        return total + w * jnp.tensordot(w2 * jnp.exp(-logdet / 2), values, 1), None

    total, _ = lax.scan(step, jnp.zeros_like(S12), (x1, w1, R1, M1))
    return front * front2 * total


# --- the three functions ---------------------------------------------------------------------------------------------


def _over_leading(function, *arrays, cost):
    """`function` of matrices over broadcast leading dimensions, a bounded number of them at a time."""
    lead = jnp.broadcast_shapes(*(x.shape[:-2] for x in arrays))
    if not lead:
        return function(*arrays)
    flat = [jnp.broadcast_to(x, lead + x.shape[-2:]).reshape((-1, *x.shape[-2:])) for x in arrays]
    count = flat[0].shape[0]
    out = lax.map(lambda xs: function(*xs), tuple(flat), batch_size=max(1, min(count, 2**20 // cost)))
    return out.reshape(lead + out.shape[1:])


def normalised_pair(f, g, s, t, S11, S22, S12, a1, a2, eps1, eps2, *, centred=False):
    """E[f(g_i) r**(-s/2) g(g'_j) r'**(-t/2)], shape (..., B, B'), for batches with covariances S11, S22, S12.

    ``r = a1 * sum(g**2) + eps1``, ``r' = a2 * sum(g'**2) + eps2``; f and g are `Power` functions, s and t are static
    and non-negative (0: no normaliser on that side). Differentiable in all arrays and in a1, a2, eps1, eps2.

    `centred`: the caller promises that every covariance, and every tangent, has rows and columns of sum zero (batch
    norm). This drops one dimension exactly. Gradients are then those within the centred subspace.
    """
    S11, S22, S12 = (jnp.asarray(S) for S in (S11, S22, S12))
    function = lambda A, B, C: _pair(f, g, s, t, A, B, C, a1, a2, eps1, eps2, centred)
    n = _points(S12.dtype, s or t)[0]
    return _over_leading(function, S11, S22, S12, cost=n * max(S11.shape[-1], S22.shape[-1]) ** 2)


def normalised_self(f, g, s, t, S, a, eps, *, centred=False):
    """E[f(g_i) g(g_j) r**(-(s+t)/2)], shape (..., B, B), within one batch; ``r = a * sum(g**2) + eps``."""
    S = jnp.asarray(S)
    return _over_leading(
        lambda S: single(f, g, s + t, S, a, eps, centred), S, cost=_points(S.dtype, s + t)[0] * S.shape[-1] ** 2
    )


def normalised_mean(f, s, S, a, eps, *, centred=False):
    """E[f(g_i) r**(-s/2)], shape (..., B), within one batch; ``r = a * sum(g**2) + eps``."""
    S = jnp.asarray(S)
    return _over_leading(lambda S: _mean(f, s, S, a, eps, centred), S, cost=_points(S.dtype, s)[0] * S.shape[-1] ** 2)


def infinite_slope(value, S11, S22, S12):
    """The value (..., B, B'), whose derivative is infinite where the two batches together have rank two or less."""
    top, bottom = jnp.concatenate([S11, S12], -1), jnp.concatenate([jnp.swapaxes(S12, -1, -2), S22], -1)
    S = lax.stop_gradient(jnp.concatenate([top, bottom], -2))
    lam = jnp.linalg.eigvalsh(S)
    few = (lam > noise(S)[..., None]).sum(-1) <= 2
    return _times_slope(value, jnp.where(few, jnp.inf, 1.0)[..., None, None].astype(value.dtype))


@jax.custom_jvp
def _times_slope(value, factor):
    return value


@_times_slope.defjvp
def _(primals, tangents):
    return primals[0], tangents[0] * primals[1]
