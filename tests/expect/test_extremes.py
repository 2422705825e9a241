"""Closed forms through `nngp` and `ntk`, against mpmath: variances 1e-8 to 1e8, correlations 1e-15 from +-1, zeros.

The inputs are (s, 0) and t (+-1, d), s and t powers of two and d with few digits, so that their inner products are
exact in float64 and the only errors are ours.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest
from jax import lax, nn

import anywidth as aw

sys.path.insert(0, str(Path(__file__).parent))
import moments_oracle as oracle


def power(k, plus, minus):
    """E[f g] for plus u^k (u > 0), minus |u|^k (u < 0)."""

    def value(p, q, c):
        a, b = mp.mpf(plus) ** 2 + mp.mpf(minus) ** 2, 2 * mp.mpf(plus) * mp.mpf(minus)
        return a * oracle.orthant(k, k, p, q, c) + b * oracle.orthant(k, k, p, q, -c)

    return value


def erf(p, q, c):
    return 2 / mp.pi * mp.asin(2 * c / mp.sqrt((1 + 2 * p) * (1 + 2 * q)))


def gelu(p, q, c):
    """u P(u + z > 0 | u), z ~ N(0, 1): a moment over the orthant of a = u + z and b = v + w."""
    A, B = 1 + p, 1 + q
    D = A * B - c * c
    # u = x a + y b + r, v = z a + w b + s
    x, y, z, w = (p * B - c * c) / D, (c * A - p * c) / D, (c * B - q * c) / D, (q * A - c * c) / D
    rest = c - x * c - y * q  # Cov(r, s) = Cov(r, v)
    J = lambda k, l: oracle.orthant(k, l, A, B, c)
    return x * z * J(2, 0) + (x * w + y * z) * J(1, 1) + y * w * J(0, 2) + rest * J(0, 0)


def cubic(p, q, c):
    """1 + u / 2 - 3 u^2 / 10 + u^3 / 10."""
    a = [mp.mpf(1), mp.mpf(0.5), mp.mpf(-0.3), mp.mpf(0.1)]
    even = a[0] ** 2 + a[0] * a[2] * (p + q) + a[2] ** 2 * (p * q + 2 * c * c)
    return even + a[1] ** 2 * c + 3 * a[1] * a[3] * c * (p + q) + a[3] ** 2 * (9 * p * q * c + 6 * c**3)


# name: (function, E[f(u) f(v)] for exact variances and covariance, whether its derivative is a function)
TABLE = {
    "relu": (nn.relu, power(1, 1, 0), True),
    "leaky relu": (lambda u: nn.leaky_relu(u, 0.25), power(1, 1, -0.25), True),
    "abs": (jnp.abs, power(1, 1, 1), True),
    "relu squared": (lambda u: nn.relu(u) ** 2, power(2, 1, 0), True),
    "relu cubed": (lambda u: jnp.where(u > 0, u**3, 0.0), power(3, 1, 0), True),
    "step": (lambda u: jnp.heaviside(u, 0.5), power(0, 1, 0), False),
    "sign": (jnp.sign, power(0, 1, -1), False),
    "erf": (lax.erf, erf, True),
    "gauss": (lambda u: jnp.exp(-(u**2)), lambda p, q, c: 1 / mp.sqrt((1 + 2 * p) * (1 + 2 * q) - 4 * c * c), True),
    "gelu": (lambda u: nn.gelu(u, approximate=False), gelu, True),
    "sin": (jnp.sin, lambda p, q, c: (mp.exp(c - (p + q) / 2) - mp.exp(-c - (p + q) / 2)) / 2, True),
    "cos": (jnp.cos, lambda p, q, c: (mp.exp(c - (p + q) / 2) + mp.exp(-c - (p + q) / 2)) / 2, True),
    "rbf": (
        lambda u: 2**0.5 * jnp.sin(u + np.pi / 4),
        lambda p, q, c: mp.exp(c - (p + q) / 2),
        True,
    ),
    "cubic": (lambda u: 1 + 0.5 * u - 0.3 * u**2 + 0.1 * u**3, cubic, True),
    "exp": (lambda u: jnp.exp(u / 64), lambda p, q, c: mp.exp((p + q + 2 * c) / 2 / 64**2), True),
}

CLOSE = 3 * 2.0**-26  # correlation 1 - 1e-15
SLOW = {"relu squared": 6, "relu cubed": 9, "gelu": 3}  # of these every so many points
DISTANCES = [0.0, CLOSE, 2.0**-18, 0.5, 3.0, 2.0**18, None]
SIZES = [2.0**-13, 2.0**-4, 1.0, 2.0**7, 2.0**13]


def points():
    """Pairs of inputs, and their variances and covariance."""
    out = [((s, 0.0), (0.0, 0.0)) for s in (0.0, 1.0, 2.0**13)]
    for i, d in enumerate(DISTANCES):
        for sign in (1.0, -1.0):
            for s, t in ((SIZES[i % 5], SIZES[(2 * i + 1) % 5]), (2.0**13, 2.0**13), (1.0, 1.0), (2.0**-13, 2.0**-13)):
                out.append(((s, 0.0), (0.0, t) if d is None else (sign * t, t * d)))
    x, y = (np.array(a) for a in zip(*dict.fromkeys(out), strict=True))
    return x, y


def moments(x, y):
    x, y = [mp.mpf(a) for a in x], [mp.mpf(a) for a in y]
    dot = lambda a, b: a[0] * b[0] + a[1] * b[1]
    return dot(x, x), dot(y, y), dot(x, y)


def network(var, names):
    def init(n):
        return {"u": aw.Normal((n, 2), var=var), "v": {name: aw.Normal((n,)) for name in names}}

    def apply(p, x):
        h = p["u"] @ x
        return {name: p["v"][name] @ TABLE[name][0](h) / jnp.sqrt(h.size) for name in names}

    return aw.Network(init, apply)


@pytest.fixture(scope="module")
def found():
    x, y = points()
    smooth = [name for name, (_, _, has) in TABLE.items() if has]
    nngp = jax.jit(jax.vmap(aw.nngp(network(1.0, list(TABLE)))))(x, y)
    ntk = jax.jit(jax.vmap(aw.ntk(network(1.0, smooth))))(x, y)
    return {k: np.asarray(v) for k, v in nngp.items()}, {k: np.asarray(v) for k, v in ntk.items()}


def slope(E, p, q, c):
    """d/dc, by differences with many more digits than are compared."""
    with mp.workdps(120):
        gap = (p * q - c * c) / (p * q)
        h = mp.sqrt(p * q) * gap * mp.mpf(10) ** -35
        return (E(p, q, c + h) - E(p, q, c - h)) / (2 * h)


@pytest.mark.parametrize("name", TABLE)
def test_kernels_to_twelve_digits(name, found):
    """Of the value; of the sizes of both outputs where the value is what cancellation leaves of them."""
    _, E, has = TABLE[name]
    x, y = points()
    checked = 0
    for i in range(0, len(x), SLOW.get(name, 1)):
        p, q, c = moments(x[i], y[i])
        if p * q == 0:
            continue
        with mp.workdps(80):
            exact, size = E(p, q, c), mp.sqrt(abs(E(p, p, p) * E(q, q, q)))
        if size > 1e300:  # exp of 1e8
            continue
        cancels = name in ("gelu", "rbf", "sin")
        floor = size if cancels else mp.mpf("1e-300")
        value = float(found[0][name][i])
        assert abs(value - exact) <= 1e-12 * max(abs(exact), floor), (x[i], y[i], value, exact)
        checked += 1
        if has and p * q > c * c:
            ntk, theta = float(found[1][name][i]), exact + c * slope(E, p, q, c)
            # a phase of pi / 4, rounded, times a covariance of 1e8
            floor = size + mp.sqrt(p * q) * size if cancels else mp.mpf("1e-300")
            assert abs(ntk - theta) <= 1e-12 * max(abs(theta), floor), (x[i], y[i], ntk, theta)
    assert checked >= 5


def test_at_correlation_one_and_zero_variance(found):
    """NTK of an input with itself, and every kernel with a zero input."""
    x, y = points()
    for name, (f, _, has) in TABLE.items():
        for i in range(len(x)):
            assert name == "exp" or np.isfinite(found[0][name][i])
            assert name == "exp" or not has or np.isfinite(found[1][name][i])
            if not x[i].any() and not y[i].any():
                np.testing.assert_allclose(found[0][name][i], float(f(jnp.float64(0.0))) ** 2, rtol=1e-15, atol=1e-30)
    for i in np.flatnonzero((x == y).all(1) & x.any(1)):
        q = float(x[i] @ x[i])
        np.testing.assert_allclose(found[1]["relu"][i], q, rtol=1e-14)  # q / 2 twice
        np.testing.assert_allclose(found[1]["abs"][i], 2 * q, rtol=1e-14)
        np.testing.assert_allclose(found[1]["sin"][i] - found[0]["sin"][i], q * (1 + np.exp(-2 * q)) / 2, rtol=1e-14)


def test_gradients_are_finite():
    """In both inputs and in a traced variance, of both kernels of every function, at every point."""
    names = [name for name in TABLE if name != "exp"]
    smooth = [name for name in names if TABLE[name][2]]

    def total(x, y, var):
        out = aw.nngp(network(var, names))(x, y), aw.ntk(network(var, smooth))(x, y)
        return sum(jnp.sum(v) for v in jax.tree.leaves(out))

    for g in jax.jit(jax.vmap(jax.grad(total, (0, 1, 2)), (0, 0, None)))(*points(), 1.0):
        assert np.isfinite(g).all()
