"""Products of Gaussians and two functions, against the same by a dense rule in two dimensions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anywidth.expect import wick
from anywidth.expect.atoms import IDENTITY, Generic
from anywidth.expect.closed import ErfPower, Power

FUNCTIONS = {
    "tanh": (Generic(jnp.tanh, ()), np.tanh),
    "sigmoid": (Generic(jax.nn.sigmoid, ()), lambda u: 1 / (1 + np.exp(-u))),
    "relu": (Power(1, 1.0, 0.0), lambda u: np.maximum(u, 0)),
    "relu squared": (Power(2, 1.0, 0.0), lambda u: np.maximum(u, 0) ** 2),
    "erf": (ErfPower(0, 0.7), lambda u: np.asarray(jax.lax.erf(0.7 * u))),
}
# the sides of the Gaussians and their powers, then of the two functions
SHAPES = {
    "a gate": ([(0, 1), (1, 1)], (0, 1)),
    "one side": ([(1, 1)], (0, 0)),
    "squares": ([(0, 1), (1, 2), (1, 1)], (0, 1)),
}


def dense(S, powers, f, g):
    """E[prod u_i^k_i f(w) g(w')], the last two of the covariance being w and w'; the others given these by Wick."""
    n = len(S) - 2
    x, weight = np.polynomial.legendre.leggauss(24)
    edges = np.sort(np.concatenate([np.linspace(-9, 9, 25), [0.0]]))
    low, high = edges[:-1, None], edges[1:, None]
    z = ((low + high) / 2 + (high - low) / 2 * x).ravel()
    p = ((high - low) / 2 * weight).ravel() * np.exp(-z * z / 2) / np.sqrt(2 * np.pi)
    s1 = np.sqrt(S[n, n])
    slope, rest = S[n, n + 1] / s1, np.sqrt(S[n + 1, n + 1] - S[n, n + 1] ** 2 / S[n, n])
    w = s1 * z[:, None] + 0 * z
    # the rule in w', cut where w' is zero
    cuts = np.clip(-slope * z / rest, -9, 9)[:, None]
    y = np.concatenate([(cuts - 9) / 2 + (cuts + 9) / 2 * z / 9, (cuts + 9) / 2 + (9 - cuts) / 2 * z / 9], 1)
    py = np.exp(-y * y / 2) / np.sqrt(2 * np.pi)
    plain = p * np.exp(z * z / 2) * np.sqrt(2 * np.pi) / 9
    py = py * np.concatenate([(cuts + 9) / 2 * plain, (9 - cuts) / 2 * plain], 1)
    w = s1 * z[:, None] + 0 * y
    v = slope * z[:, None] + rest * y
    P = p[:, None] * py
    B = S[:n, n:] @ np.linalg.inv(S[n:, n:])
    m = [B[i, 0] * w + B[i, 1] * v for i in range(n)]
    R = S[:n, :n] - B @ S[n:, :n]
    slots = [i for i, k in enumerate(powers) for _ in range(k)]

    def moment(rest):
        if not rest:
            return 1.0
        i, others = rest[0], rest[1:]
        total = m[i] * moment(others)
        for k, j in enumerate(others):
            total = total + R[i, j] * moment(others[:k] + others[k + 1 :])
        return total

    return float((P * moment(slots) * f(w) * g(v)).sum())


def covariance(n, seed):
    G = np.random.default_rng(seed).normal(size=(n, n + 1))
    return G @ G.T / n


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "names",
    [("relu", "relu"), *(pytest.param(p, marks=pytest.mark.long) for p in [
        ("tanh", "sigmoid"), ("erf", "relu squared"), ("relu squared", "tanh")])],
)  # fmt: skip
def test_against_a_dense_rule(names, shape):
    (f, ff), (g, gg) = (FUNCTIONS[n] for n in names)
    slots, _ = SHAPES[shape]
    n = len(slots)
    S = covariance(n + 2, 5)
    factors, ours = product(shape, f, g)
    if not wick.integrable(factors, lambda i, j: S[i, j]):
        assert shape == "squares"  # too many derivatives of a kink
        assert any("relu" in name for name in names)
        return
    theirs = lambda S: dense(S, [k for _, k in slots], ff, gg)
    scale = np.sqrt(np.prod([S[i, i] ** k for i, (_, k) in enumerate(slots)]))
    with jax.enable_x64(True):
        value, slope = jax.jit(lambda S, dS: jax.jvp(ours, (S,), (dS,)))(jnp.asarray(S), jnp.asarray(S0 := S / 3))
    assert abs(value - theirs(S)) < 1e-8 * scale
    # along an arbitrary direction: all derivatives there are
    h = 1e-4
    assert abs(slope - (theirs(S + h * S0) - theirs(S - h * S0)) / (2 * h)) < 1e-6 * scale


def product(shape, f, g):
    """The factors of a shape, and their expectation as a function of the covariance."""
    slots, sides = SHAPES[shape]
    n = len(slots)
    powers = [IDENTITY if k == 1 else Power(k, 1.0, (-1.0) ** k) for _, k in slots]
    factors = [wick.Factor(side, i, atom) for i, ((side, _), atom) in enumerate(zip(slots, powers, strict=True))]
    factors += [wick.Factor(sides[0], n, f), wick.Factor(sides[1], n + 1, g)]
    return factors, lambda S: wick.expectation(lambda i, j: S[i, j], factors, lambda i, j: S[i, j])


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(
    ("first", "second"), [("relu", "relu"), pytest.param("tanh", "sigmoid", marks=pytest.mark.long)]
)
def test_without_variance_and_in_float32(first, second, dtype):
    """Of a Gaussian, of either function's argument, of all; and where both arguments are one."""
    (f, ff), (g, gg) = (FUNCTIONS[name] for name in (first, second))
    _, ours = product("a gate", f, g)
    S = covariance(4, 5)
    cases = [np.diag([float(i not in gone) for i in range(4)]) for gone in ((), (0,), (2,), (3,), (0, 2), range(4))]
    coinciding = np.eye(4)[[0, 1, 2, 2]]
    h = 1e-3

    def wanted(S, coincide):
        if not coincide:
            small = 1e-12 * np.diag(np.diagonal(S) == 0)
            return dense(S + small, [1, 1], ff, gg)
        z = np.linspace(-12, 12, 100001)
        w = np.sqrt(S[2, 2]) * z
        a, b = S[:2, 2] / S[2, 2]
        u = a * b * w**2 + S[0, 1] - a * b * S[2, 2]
        return float((np.exp(-z * z / 2) * u * ff(w) * gg(w)).sum() * (z[1] - z[0]) / np.sqrt(2 * np.pi))

    with jax.enable_x64(True):
        run = jax.jit(lambda S: (ours(S), jax.jvp(ours, (S,), (S,))[1], jax.grad(ours)(S)))
        for L in (*cases, coinciding):
            C = L @ S @ L.T
            value, slope, gradient = run(jnp.asarray(C, dtype))
            below, at, above = (wanted((1 + e) * C, L is coinciding) for e in (-h, 0, h))
            assert value.dtype == dtype
            assert abs(value - at) < 1e-5
            assert abs(slope - (above - below) / (2 * h)) < 1e-5
            assert np.isfinite(gradient).all()


def test_a_jump_is_not_differentiated():
    S = covariance(3, 1)
    factors = [
        wick.Factor(1, 0, IDENTITY),
        wick.Factor(0, 1, Power(0, 1.0, 0.0)),
        wick.Factor(1, 2, FUNCTIONS["tanh"][0]),
    ]
    assert not wick.integrable(factors, lambda i, j: S[i, j])
