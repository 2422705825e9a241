"""Slow, independent values in mpmath of the expectations the tests ask for."""

import mpmath as mp

mp.mp.dps = 40


def orthant(k, l, q1, q2, c):
    """E[u^k v^l; u, v > 0] from the polar integral; inputs are floats, taken as exact."""
    q1, q2, c = map(mp.mpf, (q1, q2, c))
    rho = max(-1, min(1, c / mp.sqrt(q1 * q2)))
    # acos loses digits near 1 in any precision; 40 digits leave 25.
    phi = mp.acos(-rho)
    if k == 0 and l == 0:
        integral = phi
    elif (k, l) == (1, 1):
        integral = (mp.sin(phi) - phi * mp.cos(phi)) / 2
    else:
        integral = phi * mp.quad(lambda t: mp.sin(phi * t) ** k * mp.sin(phi * (1 - t)) ** l, [0, 0.5, 1])
    m = k + l
    scale = mp.mpf(2) ** (mp.mpf(m) / 2) * mp.gamma(mp.mpf(m) / 2 + 1) / (2 * mp.pi)
    return mp.sqrt(q1) ** k * mp.sqrt(q2) ** l * scale * integral


def powers(f, g, q1, q2, c):
    """E[f(u) g(v)] of two Power atoms with float parameters."""
    a, b = mp.mpf(f.plus) * g.plus + mp.mpf(f.minus) * g.minus, mp.mpf(f.plus) * g.minus + mp.mpf(f.minus) * g.plus
    return a * orthant(f.k, g.k, q1, q2, c) + b * orthant(f.k, g.k, q1, q2, -mp.mpf(c))


def bivariate(f, g, q1, q2, c, breaks=()):
    """E[f(u) g(v)] by a two-dimensional mpmath quadrature in independent normals, for |corr| < 1 or = 1."""
    q1, q2, c = map(mp.mpf, (q1, q2, c))
    s1 = mp.sqrt(q1)
    slope = c / s1
    rest = mp.sqrt(max(0, q2 - slope**2))
    weight = lambda z: mp.exp(-z * z / 2) / mp.sqrt(2 * mp.pi)
    cut = 13
    if rest == 0:
        return mp.quad(lambda z: weight(z) * f(s1 * z) * g(slope * z), [-cut, -4, 0, 4, cut])
    inner = lambda z: mp.quad(lambda y: weight(y) * g(slope * z + rest * y), [-cut, -4, 0, 4, cut])
    return mp.quad(lambda z: weight(z) * f(s1 * z) * inner(z), [-cut, -4, 0, 4, cut])
