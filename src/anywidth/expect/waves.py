r"""Moments of powers times exponentials and cosines of two Gaussians.

The moment generating function does everything: for real or imaginary a and b,

    E[u^k v^l exp(a u + b v)] = exp((a^2 q1 + 2 a b c + b^2 q2) / 2) E[(u + m1)^k (v + m2)^l],

with m1 = a q1 + b c and m2 = a c + b q2, and the last factor by Wick's recursion. A cosine is the real part
of an imaginary exponential. (Rahimi & Recht 2007 for cos x cos; Pearce, Tsuchida et al. 2020 for sine networks.)

>>> import jax.numpy as jnp
>>> one = jnp.float32(1.0)
>>> round(float(moment(0, 0, ("exp", 1.0), ("exp", 1.0), one, one, 0 * one)), 5)      # e
2.71828
"""

import jax.numpy as jnp
from jax import lax


def _wick(k, l, m1, m2, q1, q2, c):
    """E[(u + m1)^k (v + m2)^l]."""
    if k == 0:
        return 1.0 if l == 0 else _wick(l, 0, m2, m1, q2, q1, c)
    total = m1 * _wick(k - 1, l, m1, m2, q1, q2, c)
    if k >= 2:
        total += (k - 1) * q1 * _wick(k - 2, l, m1, m2, q1, q2, c)
    if l:
        total += l * c * _wick(k - 1, l - 1, m1, m2, q1, q2, c)
    return total


def _form(a, b, q1, q2, c):
    """Var(a u + b v), arranged so that it is exact for a = -b = 1 and u = v."""
    return a * (a * q1 + b * c) + b * (b * q2 + a * c)


def _real(k, l, a, b, q1, q2, c):
    return jnp.exp(_form(a, b, q1, q2, c) / 2) * _wick(k, l, a * q1 + b * c, a * c + b * q2, q1, q2, c)


def _oscillating(k, l, a, phase, b, growth, q1, q2, c):
    """Re E[u^k v^l exp(i (a u + b v + phase) + growth v)]."""
    size = jnp.exp((growth * growth * q2 - _form(a, b, q1, q2, c)) / 2)
    turn = phase + growth * (a * c + b * q2)
    if k == 0 and l == 0:
        return size * jnp.cos(turn)
    zero = jnp.zeros_like(c)
    m1 = lax.complex(growth * c, a * q1 + b * c)
    m2 = lax.complex(growth * q2, a * c + b * q2)
    q1, q2, c = (lax.complex(x, zero) for x in (q1, q2, c))
    turn = turn + zero
    return size * jnp.real(lax.complex(jnp.cos(turn), jnp.sin(turn)) * _wick(k, l, m1, m2, q1, q2, c))


def _two_cosines(a, p, b, r, q1, q2, c):
    """E[cos(a u + p) cos(b v + r)], with full relative accuracy as c -> 0 (where sin, sin vanishes)."""
    x = a * b * c
    closer = jnp.where(x >= 0, _form(a, -b, q1, q2, c), _form(a, b, q1, q2, c))
    far = jnp.where(x >= 0, jnp.cos(p + r), jnp.cos(p - r))
    return jnp.exp(-closer / 2) * (2 * jnp.cos(p) * jnp.cos(r) + far * jnp.expm1(-2 * jnp.abs(x))) / 2


def moment(k, l, f, g, q1, q2, c):
    """E[u^k v^l F(u) G(v)] with F, G one of ("exp", a) = exp(a u) and ("cos", a, phase) = cos(a u + phase).

    A polynomial is ("exp", 0.0). Arrays have one shape; a and phase are numbers or arrays of that shape.
    """
    if f[0] == "exp" and g[0] == "exp":
        return _real(k, l, f[1], g[1], q1, q2, c)
    if f[0] == "exp":
        return moment(l, k, g, f, q2, q1, c)
    _, a, p = f
    p = jnp.asarray(p, c.dtype)
    if g[0] == "exp":
        return _oscillating(k, l, a, p, 0.0, g[1], q1, q2, c)
    _, b, r = g
    if k == 0 and l == 0:
        return _two_cosines(a, p, b, jnp.asarray(r, c.dtype), q1, q2, c)
    plus, minus = (_oscillating(k, l, a, p + s * r, s * b, 0.0, q1, q2, c) for s in (1, -1))
    return (plus + minus) / 2
