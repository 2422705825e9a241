"""Closed forms against mpmath: every pair of atoms, values and derivatives, at every correlation."""

import itertools
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
import moments_oracle as oracle

from anywidth.expect.closed import (
    ErfPower,
    ExpPower,
    GaussPower,
    Power,
    TrigPower,
    derivative,
    evaluate,
    has_closed_form,
    is_polynomial,
    mean,
    pair,
)

ATOMS = {
    "relu": Power(1, 1, 0),
    "abs": Power(1, 1, 1),
    "identity": Power(1, 1, -1),
    "square": Power(2, 1, 1),
    "step": Power(0, 1, 0),
    "sign": Power(0, 1, -1),
    "relu2": Power(2, 1, 0),
    "relu3": Power(3, 1, 0),
    "leaky": Power(1, 1, -0.01),
    "odd2": Power(2, 1.0, -0.3),
    "constant": Power(0, 1, 1),
    "erf": ErfPower(0, 1.3),
    "u erf": ErfPower(1, 0.7),
    "u2 erf": ErfPower(2, 1.0),
    "bell": GaussPower(0, 0.8),
    "u bell": GaussPower(1, 0.5),
    "exp": ExpPower(0, 0.6),
    "u exp": ExpPower(1, -0.4),
    "sin": TrigPower(0, 1.1, -np.pi / 2),
    "cos": TrigPower(0, 0.8, 0.3),
    "u cos": TrigPower(1, 0.9, 0.2),
}
POWER_PAIRS = [
    ("relu", "relu"),
    ("relu", "step"),
    ("step", "step"),
    ("abs", "abs"),
    ("sign", "sign"),
    ("sign", "relu"),
    ("leaky", "leaky"),
    ("relu", "leaky"),
    ("identity", "relu"),
    ("square", "relu"),
    ("relu2", "relu2"),
    ("relu3", "relu2"),
    ("relu3", "relu3"),
    ("odd2", "relu2"),
    ("constant", "relu"),
    ("identity", "sign"),
]


def mostly_long(cases, *quick):
    """All cases, those that are not named being left to `make long`."""
    return [case if case in quick else pytest.param(case, marks=pytest.mark.long) for case in cases]


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def covariances(n, seed):
    """Non-round variances from 1e-8 to 1e8, and correlations down to 1e-15 from +-1."""
    rng = np.random.default_rng(seed)
    q1, q2 = 10 ** rng.uniform(-8, 8, (2, n))
    gap = 10 ** rng.uniform(-14.9, 0, n)
    gap[:3] = 1e-15, 1.0 - 1e-9, 1.0
    sign = rng.choice([-1, 1], n)
    return (
        q1,
        q2,
        np.array([float(mp.sqrt(mp.mpf(a) * b) * (1 - mp.mpf(g)) * int(s)) for a, b, g, s in zip(q1, q2, gap, sign)]),
    )


def difference(got, exact, scale):
    """Relative to the exact value, or to scale where that is zero (to the oracle's own accuracy)."""
    return float(abs((mp.mpf(float(got)) - exact) / (exact if abs(exact) > 1e-16 * scale else scale)))


def norm(f, g, q1, q2):
    return mp.sqrt(oracle.powers(f, f, q1, q1, q1) * oracle.powers(g, g, q2, q2, q2))


@pytest.mark.parametrize(
    "names",
    mostly_long(POWER_PAIRS, ("relu", "relu"), ("step", "step"), ("leaky", "leaky"), ("relu3", "relu2")),
    ids=" ".join,
)
def test_powers_to_machine_precision(names):
    f, g = (ATOMS[n] for n in names)
    q1, q2, c = covariances(12, 3)
    got = jax.jit(partial(pair, f, g))(q1, q2, c)
    for args, value in zip(zip(q1, q2, c), got):
        exact = oracle.powers(f, g, *args)
        assert difference(value, exact, norm(f, g, *args[:2])) < 1e-13, args


@pytest.mark.parametrize(
    "names",
    mostly_long(
        [n for n in POWER_PAIRS if n[0] not in ("identity", "square")],
        ("relu", "relu"),
        ("abs", "abs"),
        ("sign", "relu"),
    ),
    ids=" ".join,
)
def test_first_derivatives_of_powers(names):
    """Against differences of the oracle in 60 digits."""
    f, g = (ATOMS[n] for n in names)
    q = covariances(4, 5)
    got = jax.jit(jax.vmap(jax.grad(partial(pair, f, g), (0, 1, 2))))(*q)
    for i, args in enumerate(zip(*q)):
        with mp.workdps(60):
            args = [mp.mpf(float(x)) for x in args]
            gap = (args[0] * args[1] - args[2] ** 2) / (args[0] * args[1])
            for j in range(3):
                size = [args[0], args[1], mp.sqrt(args[0] * args[1])][j]
                h = size * gap * mp.mpf(10) ** -18
                moved = [oracle.powers(f, g, *(x + (k == j) * s * h for k, x in enumerate(args))) for s in (1, -1)]
                exact = (moved[0] - moved[1]) / (2 * h)
                scale = norm(f, g, *args[:2]) / size
                error = abs(mp.mpf(float(got[j][i])) - exact)
                # A vanishing derivative (d/dq of u |v|_+) is known to the oracle up to 1e-22 only.
                assert error <= 1e-12 * abs(exact) + 1e-20 * scale / gap, (args, j)


SMOOTH = [
    ("erf", "erf"),
    ("u erf", "u erf"),
    ("erf", "u erf"),
    ("u2 erf", "erf"),
    ("bell", "bell"),
    ("bell", "u2 erf"),
    ("u bell", "u erf"),
    ("exp", "exp"),
    ("exp", "u exp"),
    ("sin", "sin"),
    ("cos", "sin"),
    ("u cos", "sin"),
    ("u cos", "u exp"),
    ("cos", "square"),
    ("sin", "identity"),
    ("exp", "identity"),
]


def as_mpmath(f):
    """The atom as an mpmath function of one number."""
    match f:
        case Power(k, p, m):
            return lambda u: (p if u > 0 else m if u < 0 else (p + m) / 2) * abs(u) ** k
        case ErfPower(k, a):
            return lambda u: u**k * mp.erf(a * u)
        case GaussPower(k, a):
            return lambda u: u**k * mp.exp(-a * u * u)
        case ExpPower(k, a):
            return lambda u: u**k * mp.exp(a * u)
        case TrigPower(k, a, phase):
            return lambda u: u**k * mp.cos(a * u + phase)


def by_product_rule(f, g, q1, q2, c):
    """E[f g] on a fine product grid of independent normals in float64: exact to 1e-13 for these smooth atoms."""
    z = np.linspace(-11, 11, 441)
    w = np.exp(-z * z / 2) * (z[1] - z[0]) / np.sqrt(2 * np.pi)
    u = np.sqrt(q1) * z
    v = c / np.sqrt(q1) * z[:, None] + np.sqrt(max(q2 - c * c / q1, 0.0)) * z
    return float(w @ (np.asarray(evaluate(f, jnp.asarray(u))) * (np.asarray(evaluate(g, jnp.asarray(v))) @ w)))


@pytest.mark.parametrize(
    "names",
    mostly_long(SMOOTH, ("erf", "erf"), ("bell", "u2 erf"), ("exp", "u exp"), ("sin", "sin"), ("u cos", "u exp")),
    ids=",".join,
)
def test_smooth_atoms(names):
    f, g = (ATOMS[n] for n in names)
    q1, q2 = np.array([[1.3, 0.7], [0.9, 2.1], [1.0, 1.0], [1.7, 0.4], [0.3, 1e-3]]).T
    c = np.array([0.4, -0.95, 1.0, -1.0, 0.0]) * np.sqrt(q1 * q2)

    @jax.jit
    def ours(q1, q2, c):
        value, slope = jax.jvp(partial(pair, f, g, q1, q2), (c,), (jnp.ones_like(c),))
        price = sum(a * b * pair(df, dg, q1, q2, c) for a, df in derivative(f) for b, dg in derivative(g))
        return value, slope, price

    for (*args,), value, slope, price in zip(zip(q1, q2, c), *ours(q1, q2, c)):
        x, y, _ = args
        scale = np.sqrt(by_product_rule(f, f, x, x, x) * by_product_rule(g, g, y, y, y))
        assert abs(value - by_product_rule(f, g, *args)) < 1e-12 * scale, args
        # Price's theorem, with the atoms that `derivative` returns.
        assert abs(slope - price) < 1e-12 * (abs(price) + scale), args


@pytest.mark.parametrize(
    "names",
    mostly_long(
        [
            ("erf", "sign"),
            ("erf", "step"),
            ("u erf", "relu"),
            ("u2 erf", "sign"),
            ("bell", "relu"),
            ("u erf", "abs"),
            ("bell", "step"),
        ]
    ),
    ids=",".join,
)
def test_smooth_with_piecewise(names):
    f, g = (ATOMS[n] for n in names)
    q1, q2, c = 1.7, 0.6, -0.55
    # Conditioning on v leaves a smooth inner integral; the outer one is cut at the kink.
    given = lambda v: mp.quad(
        lambda y: mp.npdf(y) * as_mpmath(f)(c / q2 * v + mp.sqrt(q1 - c * c / q2) * y), [-10, 0, 10]
    )
    with mp.workdps(15):
        s = mp.sqrt(q2)
        exact = mp.quad(lambda z: mp.npdf(z) * as_mpmath(g)(s * z) * given(s * z), [-10, 0, 10])
    assert abs(pair(f, g, q1, q2, c) - float(exact)) < 1e-12


def test_erf_with_wide_gaussians_and_near_correlation_one():
    """Williams's formula in 40 digits: where 1 - rho matters, next to variances of 1e8."""
    f = ErfPower(0, 1.0)
    points = covariances(40, 11)
    for *args, value, slope in zip(*points, *jax.jit(jax.vmap(jax.value_and_grad(partial(pair, f, f), 2)))(*points)):
        q1, q2, c = map(mp.mpf, args)
        exact = 2 / mp.pi * mp.asin(2 * c / mp.sqrt((1 + 2 * q1) * (1 + 2 * q2)))
        assert difference(value, exact, 1) < 1e-13
        exact = 4 / mp.pi / mp.sqrt(1 + 2 * q1 + 2 * q2 + 4 * (q1 * q2 - c * c))
        assert difference(slope, exact, 0) < 1e-12


CONTINUOUS = ["relu", "abs", "identity", "square", "relu2", "leaky", "erf", "u erf", "bell"]


@pytest.mark.parametrize(
    "names",
    mostly_long(
        list(itertools.combinations_with_replacement(CONTINUOUS, 2)), ("relu", "relu"), ("abs", "leaky"), ("erf", "erf")
    ),
    ids=",".join,
)
def test_finite_at_singular_points(names):
    """Value, gradient and Hessian at coinciding, opposite and zero inputs."""
    value = partial(pair, *(ATOMS[n] for n in names))
    points = jnp.array(
        [
            [1.0, 1.0, 1.0],
            [2.0, 2.0, -2.0],
            [0.0, 1.0, 0.0],
            [1.0, 0.0, 0.0],
            [0.0, 0.0, 0.0],
            [3.1, 0.7, np.sqrt(3.1 * 0.7)],
        ]
    )
    at = lambda x: value(*x)
    found = jax.jit(jax.vmap(lambda x: (at(x), jax.grad(at)(x), jax.hessian(at)(x))))(points)
    assert all(jnp.isfinite(part).all() for part in found)


def test_zero_variance_is_the_value_at_zero():
    for f, at_zero in (("step", 0.5), ("sign", 0.0), ("relu", 0.0), ("bell", 1.0), ("constant", 1.0)):
        for g in ("relu", "step", "bell", "erf", "u erf"):
            assert np.isclose(pair(ATOMS[f], ATOMS[g], 0.0, 1.7, 0.0), at_zero * mean(ATOMS[g], 1.7), atol=1e-15)


def test_duplicates_rounded_differently_have_correlation_one():
    q = 0.7310585786300049
    up, down = np.nextafter(q, 1), np.nextafter(q, 0)
    step = ATOMS["step"]
    for args in ((q, up, q), (up, up, q), (q, q, up), (down, up, q)):
        assert float(pair(step, step, *args)) == 0.5
    assert float(pair(step, step, 1.0, 1.0, 1 - 1e-15)) < 0.5


@settings(max_examples=60, deadline=None)
@given(
    st.floats(-8, 8),
    st.floats(-8, 8),
    st.floats(-1, 1),
    st.sampled_from(["relu", "leaky", "abs", "step", "relu2", "erf", "u erf"]),
)
def test_symmetry_and_cauchy_schwarz(a, b, rho, name):
    f, q1, q2 = ATOMS[name], 10.0**a, 10.0**b
    c = rho * np.sqrt(q1) * np.sqrt(q2)
    value = pair(f, f, q1, q2, c)
    assert np.isclose(value, pair(f, f, q2, q1, c), rtol=1e-13)
    assert abs(value) <= np.sqrt(pair(f, f, q1, q1, q1)) * np.sqrt(pair(f, f, q2, q2, q2)) * (1 + 1e-13)


@pytest.mark.parametrize("name", ATOMS)
def test_mean_is_the_pair_with_a_constant(name):
    z = np.linspace(-11, 11, 4400)
    w = np.exp(-z * z / 2) * (z[1] - z[0]) / np.sqrt(2 * np.pi)
    assert np.isclose(
        mean(ATOMS[name], 1.3),
        w @ np.asarray(evaluate(ATOMS[name], jnp.asarray(np.sqrt(1.3) * z))),
        rtol=1e-4,
        atol=1e-12,
    )
    assert jnp.isfinite(jax.grad(lambda q: mean(ATOMS[name], q))(0.0))


@pytest.mark.parametrize(
    "f", [Power(1, 1.0, -0.2), Power(0, 0.3, 0.8), ErfPower(1, 0.7), ExpPower(0, 0.4), TrigPower(0, 0.9, 0.2)]
)
def test_gradients_in_the_parameters(f):
    leaves, tree = jax.tree.flatten(f)
    value = lambda x: pair(jax.tree.unflatten(tree, x), jax.tree.unflatten(tree, x), 1.3, 0.8, -0.4)
    got = jax.grad(value)([jnp.float64(x) for x in leaves])
    for i, g in enumerate(got):
        h = 1e-5
        moved = [value([x + s * h * (i == j) for j, x in enumerate(leaves)]) for s in (1, -1)]
        assert np.isclose(g, (moved[0] - moved[1]) / (2 * h), rtol=1e-8)


def test_higher_derivatives():
    """The gradient of a ReLU NTK layer against differences, in forward and reverse mode, jit and vmap."""
    ntk = lambda q: jax.jvp(lambda c: pair(ATOMS["relu"], ATOMS["relu"], q[0], q[1], c), (q[2],), (q[2],))[1]
    points = jnp.array([[1.3, 0.8, 0.5], [2.0, 1.0, -1.2]])
    got = jax.jit(jax.vmap(jax.grad(ntk)))(points)
    eye = 1e-5 * jnp.eye(3)
    expected = jnp.stack([(jax.vmap(ntk)(points + e) - jax.vmap(ntk)(points - e)) / 2e-5 for e in eye], -1)
    assert np.allclose(got, expected, rtol=1e-8)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64])
@pytest.mark.parametrize("name", ATOMS)
def test_dtype_and_strict_promotion(dtype, name):
    f = ATOMS[name]
    g = f if has_closed_form(f, f) else ATOMS["relu"]

    def both(q):
        return pair(f, g, q[:, None], q[None], jnp.full((3, 3), 0.5, dtype)), mean(f, q)

    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        outer, single = jax.eval_shape(both, jax.ShapeDtypeStruct((3,), dtype))
    assert (outer.dtype, outer.shape, outer.weak_type) == (dtype, (3, 3), False)
    assert single.dtype == dtype


def test_float32():
    q1, q2 = (10 ** np.random.default_rng(0).uniform(-8, 8, (2, 400))).astype(np.float32)
    c = np.sqrt(q1) * np.sqrt(q2) * np.random.default_rng(1).uniform(-0.99, 0.99, 400).astype(np.float32)
    for name in ("relu", "leaky", "abs", "step", "relu2", "relu3", "erf"):
        value = jax.jit(partial(pair, ATOMS[name], ATOMS[name]))
        low, high = value(q1, q2, c), value(*(np.float64(x) for x in (q1, q2, c)))
        assert low.dtype == jnp.float32
        scale = np.sqrt(value(*[np.float64(q1)] * 3) * value(*[np.float64(q2)] * 3))
        assert np.max(np.abs(low - high) / scale) < 1e-6


def test_zero_tangents_cost_nothing():
    """A tangent in c alone asks for E[f' g'] and nothing else: no square root of the density's line integrals."""
    relu = ATOMS["relu"]
    only_c = jax.make_jaxpr(lambda c: jax.jvp(lambda c: pair(relu, relu, 1.0, 1.0, c), (c,), (c,)))(0.5)
    everything = jax.make_jaxpr(lambda c: jax.jvp(lambda *a: pair(relu, relu, *a), (c, c, c), (c, c, c)))(0.5)
    assert 1.3 * len(str(only_c)) < len(str(everything))


def test_which_have_closed_forms():
    assert has_closed_form(ATOMS["relu"], ATOMS["erf"]) and has_closed_form(ATOMS["sin"], ATOMS["square"])
    assert not has_closed_form(ATOMS["sin"], ATOMS["relu"]) and not has_closed_form(ATOMS["exp"], ATOMS["erf"])
    assert is_polynomial(ATOMS["identity"]) and not is_polynomial(ATOMS["relu"])
    with pytest.raises(NotImplementedError, match="TrigPower with Power"):
        pair(ATOMS["sin"], ATOMS["relu"], 1.0, 1.0, 0.5)
