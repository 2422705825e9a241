r"""A normalised batch against itself: one integral, and the derivatives in each of its two roles.

The pair expectation of `normalised.py` is K(S11, S22, S12) = E[F_i(g) G_j(g')] with F = f(g_i) r^(-s/2) and
G = g(g'_j) r'^(-t/2). Where g = g' almost surely it is a single expectation, E[f(g_i) g(g_j) r^(-p/2)], p = s + t,
and by Price's theorem its derivatives are single ones as well:

    dK = sum_kl E[d_k F d_l G] dS12_kl + sum_kl E[d_k d_l F G] dS11_kl / 2 + sum_kl E[F d_k d_l G] dS22_kl / 2.

The derivatives of r^(-s/2) are powers of r times powers of g. The powers of r become weights exp(-x g'g / 2) under
which g ~ N(0, M), M = S (I + x S)^(-1); Stein's lemma turns the powers of g into derivatives of the closed form
V(q1, q2, c) = E[f(u) g(v)]::

    E[(D g)_i f'(g_i) g(g_j)] = 2 (D M)_ii V_q1 + (D M)_ij V_c
    E[g' D g f(g_i) g(g_j)]   = tr(D M) V + 2 (M D M)_ii V_q1 + 2 (M D M)_jj V_q2 + ((M D M)_ij + (M D M)_ji) V_c.

So every derivative is a `jax.jvp` through the closed form V, and nothing is ever divided by a vanishing number.

>>> import jax, jax.numpy as jnp
>>> from anywidth.expect.closed import Power
>>> line, S = Power(1, 1.0, -1.0), jnp.eye(6) - 1 / 6
>>> K = lambda C: pair_with_itself(line, line, 1, 1, True, S, S, C, 1 / 6, 1 / 6, 0.0, 0.0)
>>> value, slope = jax.jvp(K, (S,), (S,))          # E[u u'] = (6/5) S, and its derivative
>>> print(f"{value[0, 0]:.4f} {slope[0, 0]:.4f}")
1.0000 1.3333
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .closed import Power
from .normalised import coinciding, far_end, prepare, single, value
from .numerics import is_zero
from .resolvents import noise, resolvents

__all__ = ["pair_with_itself"]


class _Slope(NamedTuple):
    """alpha V + beta1_i V_q1 + beta2_j V_q2 + gamma_ij V_c, for every weight."""

    alpha: jax.Array
    beta1: jax.Array
    beta2: jax.Array
    gamma: jax.Array


def _stein(D, M, left, quadratic, right):
    """The `_Slope` of left E[(D g)_i f' g] + quadratic E[g' D g f g] + right E[(D' g)_j f g'], factors one a weight."""
    DM, MD = D @ M, M @ D
    Q = MD @ M
    spread = lambda z: z[:, None]
    diag = lambda X: jnp.diagonal(X, axis1=-2, axis2=-1)
    return _Slope(
        quadratic * jnp.trace(DM, axis1=-2, axis2=-1),
        2 * (spread(left) * diag(DM) + spread(quadratic) * diag(Q)),
        2 * (spread(right) * diag(MD) + spread(quadratic) * diag(Q)),
        spread(spread(left)) * DM
        + spread(spread(right)) * MD
        + spread(spread(quadratic)) * (Q + jnp.swapaxes(Q, -1, -2)),
    )


def _static(x):
    return isinstance(x, (int, float))


def pair_with_itself(f, g, s, t, centred, S11, S22, S12, a1, a2, eps1, eps2):
    """K for S11 = S22 = S12, a1 = a2, eps1 = eps2 (to rounding: their averages are used), differentiable in each."""
    params = f.plus, f.minus, g.plus, g.minus
    known = tuple(float(x) if _static(x) else None for x in params)
    traced = tuple(x for x in params if not _static(x))
    return _itself((f.k, g.k, s, t, centred, known), traced, S11, S22, S12, a1, a2, eps1, eps2)


def _functions(static, traced):
    k, l, *_, known = static
    rest = iter(traced)
    p = [next(rest) if x is None else x for x in known]
    return Power(k, p[0], p[1]), Power(l, p[2], p[3])


def _value(static, traced, S, a, eps):
    _, _, s, t, centred, _ = static
    f, g = _functions(static, traced)
    return single(f, g, s + t, S, a, eps, centred)


def _common(S11, S22, S12, a1, a2, eps1, eps2):
    return (S11 + S22 + (S12 + S12.T)) / 4, (a1 + a2) / 2, (eps1 + eps2) / 2


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _itself(static, traced, *arrays):
    return _value(static, traced, *_common(*arrays))


def _rule(static, primals, tangents):
    traced, *arrays = primals
    d_traced, *d_arrays = tangents
    S, a, eps = _common(*arrays)
    out = _value(static, traced, S, a, eps)
    slope = jnp.zeros_like(out)
    if not all(map(is_zero, d_arrays)):
        slope = slope + _along(static, traced, S, a, eps, d_arrays)
    for i, d in enumerate(d_traced):
        if not is_zero(d):
            change = lambda x, i=i: _value(static, (*traced[:i], x, *traced[i + 1 :]), S, a, eps)
            slope = slope + jax.jvp(change, (traced[i],), (d,))[1]
    return out, slope


_itself.defjvp(_rule, symbolic_zeros=True)


def _along(static, traced, S, a, eps, tangents):
    """The derivative along tangents of S11, S22, S12, a1, a2, eps1, eps2, those known to be zero left out."""
    _, _, s, t, centred, _ = static
    f, g = _functions(static, traced)
    p = s + t
    q = jnp.diagonal(S)
    sign = coinciding(q, q, S)
    A, unit, front, x, w = prepare(f.k + g.k, p, S, a, eps, far_end(S, True))
    logdet, _, M = resolvents(A, noise(A), x, centred)
    one, two = x / p, x * x / (p * (p + 2))  # what r^(-1) and r^(-2) become
    slopes = []
    add = lambda *parts: slopes.append(_Slope(*parts))
    none = jnp.zeros((), S.dtype)
    d11, d22, d12, da1, da2, de1, de2 = tangents
    if not is_zero(d12):
        D = d12 * (unit * unit)
        add(none, none, none, D)
        slopes.append(_stein(D, M, -t * one, s * t * two, -s * one))
    if not is_zero(d11):
        D = d11 * (unit * unit)
        add(-s / 2 * one * jnp.trace(D), jnp.diagonal(D), none, none)
        slopes.append(_stein(D, M, -s * one, s * (s + 2) / 2 * two, 0 * one))
    if not is_zero(d22):
        D = d22 * (unit * unit)
        add(-t / 2 * one * jnp.trace(D), none, jnp.diagonal(D), none)
        slopes.append(_stein(D, M, 0 * one, t * (t + 2) / 2 * two, -t * one))
    for d, power in ((da1, s), (da2, t)):
        if not is_zero(d):
            D = jnp.eye(S.shape[-1], dtype=S.dtype)
            slopes.append(_stein(D, M, 0 * one, -power / 2 * one * (d / a), 0 * one))
    for d, power in ((de1, s), (de2, t)):
        if not is_zero(d):
            add(-power * one * (d * unit * unit / (2 * a)), none, none, none)
    shapes = x.shape, M.shape[:-1], M.shape[:-1], M.shape
    total = [
        jnp.broadcast_to(sum(parts[1:], parts[0]), shape)
        for parts, shape in zip(zip(*slopes, strict=True), shapes, strict=True)
    ]
    q = jnp.diagonal(M, axis1=-2, axis2=-1)
    V, dV = jax.jvp(lambda q1, q2, c: value(f, g, q1, q2, c, sign), (q, q, M), tuple(total[1:]))
    return front * jnp.tensordot(w * jnp.exp(-logdet / 2), total[0][:, None, None] * V + dV, 1)
