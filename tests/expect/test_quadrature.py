"""Quadrature against closed forms, and against a brute-force product rule that shares no code with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import anywidth as aw
from anywidth.expect import closed, quadrature
from anywidth.expect.breaks import continuous, roots
from anywidth.expect.closed import ErfPower, GaussPower, Power

RHOS = np.array([-1.0, -1 + 1e-9, -0.9, 0.0, 0.5, 0.999, 1 - 1e-10, 1.0])
STDS = [(1e-4, 1e-4), (0.3, 1.1), (1.0, 1.0), (3.0, 3.0), (1e2, 1e2), (1e4, 1e4), (1e-4, 1e2), (1e2, 1e-4)]
clip = lambda u: jnp.clip(u, -1, 1)
shifted = lambda u: jnp.maximum(u + 0.7, 0)
SMOOTH = {
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "softplus": jax.nn.softplus,
    "mish": jax.nn.mish,
    "gelu": jax.nn.gelu,  # by tanh
}
KINKED = {"elu": (jax.nn.elu, (0.0,)), "clip": (clip, (-1.0, 1.0)), "shifted": (shifted, (-0.7,))}


long = pytest.mark.long  # each takes some seconds to compile


def quick(*cases, rest):
    """`cases` in `make test`, and `rest` in `make long`."""
    return [pytest.param(*case) for case in cases] + [
        pytest.param(*case, marks=long) for case in rest if case not in cases
    ]


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def legendre(edges):
    """A 20-point Gauss-Legendre rule on every interval between the edges."""
    x, w = np.polynomial.legendre.leggauss(20)
    edges = np.unique(edges)
    low, high = edges[:-1, None], edges[1:, None]
    return ((low + high) / 2 + (high - low) / 2 * x).ravel(), ((high - low) / 2 * w).ravel()


def rule(centre, s, marks):
    """Nodes and weights for N(centre, s^2), refined geometrically at the marks."""
    if s == 0:
        return np.array([centre]), np.ones(1)
    near = 10.0 ** np.arange(-9, 6, 0.5)
    edges = (
        [centre + s * np.arange(-9, 9.5)]
        + [m + sign * near for m in (0.0, *marks) for sign in (1, -1)]
        + [np.array([0.0, *marks])]
    )
    u, w = legendre(np.clip(np.concatenate(edges), centre - 9 * s, centre + 9 * s))
    return u, w * np.exp(-((u - centre) ** 2) / (2 * s * s)) / (s * np.sqrt(2 * np.pi))


def brute(f, g, f_marks, g_marks, s1, s2, rho):
    u, w = rule(0.0, s1, [*f_marks, *(b * s1 / (rho * s2) for b in g_marks if rho)])
    rest = s2 * np.sqrt(max((1 - rho) * (1 + rho), 0.0))
    rules = [rule(rho * s2 / s1 * x, rest, g_marks) for x in u]
    v, wv = np.concatenate([r[0] for r in rules]), np.concatenate([r[1] for r in rules])
    inner = np.add.reduceat(wv * np.asarray(g(jnp.asarray(v))), np.cumsum([0] + [len(r[0]) for r in rules[:-1]]))
    return float(w @ (np.asarray(f(jnp.asarray(u))) * inner))


ATOMS = {
    "erf": (jax.lax.erf, (), ErfPower(0, 1.0)),
    "bell": (lambda u: jnp.exp(-u * u), (), GaussPower(0, 1.0)),
    "relu": (jax.nn.relu, (0.0,), Power(1, 1.0, 0.0)),
}


@pytest.mark.parametrize(
    ("name", "s1", "s2"),
    quick(("relu", 1.0, 1.0), rest=[(n, *stds) for n in ATOMS for stds in STDS]),
)
def test_against_closed_forms(name, s1, s2):
    f, breaks, atom = ATOMS[name]
    q1, q2, c = np.full(8, s1 * s1), np.full(8, s2 * s2), RHOS * (s1 * s2)
    got = quadrature.pair(f, (), f, (), q1, q2, c, breaks, breaks)
    scale = np.sqrt(closed.pair(atom, atom, q1, q1, q1) * closed.pair(atom, atom, q2, q2, q2))
    assert np.max(np.abs(got - closed.pair(atom, atom, q1, q2, c)) / scale) < 1e-9
    assert np.allclose(quadrature.mean(f, (), q1, breaks), closed.mean(atom, q1), rtol=1e-9, atol=1e-12)


PAIRS = [("tanh", "tanh"), ("sigmoid", "silu"), ("softplus", "mish"), ("gelu", "gelu")]
PAIRS += [("elu", "elu"), ("clip", "clip"), ("shifted", "tanh")]


@pytest.mark.parametrize(
    ("first", "second", "s1", "s2"),
    quick(
        ("tanh", "tanh", 0.3, 1.1),
        rest=[(*names, *stds) for names in PAIRS for stds in [(1e-4, 1e-4), (0.3, 1.1), (3.0, 3.0), (1e2, 1e2)]],
    ),
)
def test_against_brute_force(first, second, s1, s2):
    (f, fb), (g, gb) = (KINKED[n] if n in KINKED else (SMOOTH[n], ()) for n in (first, second))
    rhos = np.array([-1.0, -0.9, 0.5, 0.999, 1.0])
    got = quadrature.pair(f, (), g, (), s1 * s1, s2 * s2, rhos * (s1 * s2), fb, gb)
    scale = np.sqrt(brute(f, f, fb, fb, s1, s1, 1.0) * brute(g, g, gb, gb, s2, s2, 1.0))
    for rho, value in zip(rhos, got):
        assert abs(value - brute(f, g, fb, gb, s1, s2, rho)) < 1e-8 * scale, rho


@long
def test_zero_variance():
    q = jnp.array([0.0, 0.0, 1.3])
    got = quadrature.pair(jax.nn.sigmoid, (), jax.nn.softplus, (), q, q[::-1], 0.0)
    expected = [
        0.5 * quadrature.mean(jax.nn.softplus, (), 1.3),
        0.5 * np.log(2),
        np.log(2) * quadrature.mean(jax.nn.sigmoid, (), 1.3),
    ]
    assert np.allclose(got, [expected[0], 0.5 * quadrature.mean(jax.nn.softplus, (), 0.0), expected[2]], rtol=1e-9)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", ["tanh", pytest.param("elu", marks=long)])
def test_line(name, dtype):
    """E[u f(v)] as one integral: its value and derivatives, and what is left of them without variance."""
    f, breaks = KINKED.get(name, (SMOOTH.get(name), ()))
    line = lambda q, c: quadrature.line(f, (), q, c, breaks)
    values = jax.jit(line)
    grads = jax.jit(jax.vmap(jax.grad(line, (0, 1))))
    q, c = np.array([0.09, 1.3, 1e4]), np.array([0.2, -0.4, 30.0])

    def wanted(q, c):
        v, w = rule(0.0, np.sqrt(q), breaks)
        return float(w @ (v * np.asarray(f(jnp.asarray(v))))) * c / q

    close = {"rtol": 1e-8 if dtype == np.float64 else 3e-6}
    truth = [wanted(*at) for at in zip(q, c)]
    got = values(q.astype(dtype), c.astype(dtype))
    assert got.dtype == dtype
    np.testing.assert_allclose(got, truth, **close)
    slopes = [(wanted(a * (1 + 1e-4), b) - wanted(a * (1 - 1e-4), b)) / (2e-4 * a) for a, b in zip(q, c)]
    along_q, along_c = grads(q.astype(dtype), c.astype(dtype))
    np.testing.assert_allclose(along_q, slopes, rtol=2e-5, atol=1e-7 if dtype == np.float64 else 1e-5)
    np.testing.assert_allclose(along_c, np.array(truth) / c, **close)
    none = np.zeros(1, dtype)
    assert values(none, none) == 0
    along_q, along_c = grads(none, none)
    assert along_q == 0
    np.testing.assert_allclose(along_c, jax.grad(f)(0.0), rtol=1e-6)


@long
@pytest.mark.parametrize("name", ["erf", "relu"])
def test_derivatives(name):
    f, breaks, atom = ATOMS[name]
    """Price's rule against the closed forms' own derivatives, where they are singular too; forward and reverse."""
    points = jnp.array([[1.3, 0.7, 0.4], [1.0, 1.0, 1.0], [1.0, 1.0, -1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    ours = lambda x: quadrature.pair(f, (), f, (), x[0], x[1], x[2], breaks, breaks)
    exact = lambda x: closed.pair(atom, atom, x[0], x[1], x[2])
    got, expected = jax.jit(jax.vmap(jax.grad(ours)))(points), jax.vmap(jax.grad(exact))(points)
    assert jnp.isfinite(got).all()
    assert np.allclose(got[:3], expected[:3], rtol=1e-8, atol=1e-8)
    assert np.allclose(jax.jvp(ours, (points[0],), (points[0],))[1], expected[0] @ points[0], rtol=1e-8)


@long
def test_gradient_of_an_ntk_and_of_coefficients():
    f = lambda u, a: jnp.tanh(a * u)
    ntk = lambda c, a: jax.jvp(lambda c: quadrature.pair(f, (a,), f, (a,), 1.2, 0.9, c), (c,), (c,))[1]
    got = jax.grad(ntk, (0, 1))(0.6, 0.8)
    h = 1e-4
    assert np.allclose(
        got,
        [(ntk(0.6 + h, 0.8) - ntk(0.6 - h, 0.8)) / (2 * h), (ntk(0.6, 0.8 + h) - ntk(0.6, 0.8 - h)) / (2 * h)],
        rtol=1e-6,
    )


@long
def test_coefficients_are_elementwise():
    f = lambda u, a: jnp.maximum(u + a, 0)
    a = jnp.array([-0.4, 0.0, 1.1])
    got = quadrature.pair(f, (a,), f, (a,), 1.2, 0.9, 0.3, (-a,), (-a,))
    one = [quadrature.pair(f, (x,), f, (x,), 1.2, 0.9, 0.3, (-x,), (-x,)) for x in a]
    assert np.allclose(got, jnp.stack(one), rtol=1e-9)


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=long)])
def test_low_precision(dtype):
    q = jnp.array([0.5, 2.0], dtype)
    got = quadrature.pair(jnp.tanh, (), jnp.tanh, (), q[:, None], q, jnp.full((2, 2), 0.5, dtype))
    high = quadrature.pair(jnp.tanh, (), jnp.tanh, (), np.float64(q)[:, None], np.float64(q), 0.5)
    assert got.dtype == dtype and np.allclose(got.astype(float), high, rtol=2e-6 if dtype == jnp.float32 else 1e-2)


def _selected(u):
    return jnp.where(u <= -1, 0.0, jnp.where(u >= 1, u, (u + 1) ** 2 / 4))


@pytest.mark.parametrize(
    ("f", "breaks", "degree", "expected"),
    [
        (lambda u: 2 - jnp.maximum(u + 1, 0), (-1.0,), 1, [1.0]),
        (lambda u: jnp.clip(u, -1, 1) - 0.3, (-1.0, 1.0), 1, [0.3]),
        (lambda u: 3 * u**2 - 0.75, (), 2, [-0.5, 0.5]),
        (lambda u: u**2 + 1, (), 2, []),
        (lambda u: _selected(u) - 0.25, (-1.0, 1.0), 2, [0.0]),
        (lambda u: jnp.tanh(u) - u / 2, (), None, [-1.9150080481545, 0.0, 1.9150080481545]),
    ],
)
def test_kinks_are_found(f, breaks, degree, expected):
    np.testing.assert_allclose(sorted(roots(f, (), breaks, degree)), expected, atol=1e-12)
    traced = jax.jit(lambda a, *b: [x + a for x in roots(lambda u, a: f(u - a), (a,), tuple(x + a for x in b), degree)])
    found = np.asarray(traced(0.7, *breaks)) - 1.4 if degree != 0 else []
    assert all(np.min(np.abs(found - x)) < 1e-11 for x in expected)  # others are out of the way


def test_continuity_is_seen():
    assert continuous(_selected, (), (-1.0, 1.0))
    assert continuous(jax.nn.elu, (), (0.0,))
    assert not continuous(lambda u: jnp.where(u > 0.3, u, u - 1e-3), (), (0.3,))


@pytest.mark.parametrize(("f", "breaks"), [(jnp.tanh, ()), pytest.param(shifted, (-0.7,), marks=long)])
def test_a_line_times_a_function(f, breaks):
    """E[u f(v)] as a single integral and as a double one, and its derivatives."""
    line = lambda q, c: quadrature.line(f, (), q, c, breaks)
    pair = lambda q, c: quadrature.pair(lambda u: u, (), f, (), 1.3, q, c, (), breaks)
    found, expected = (jax.value_and_grad(g, (0, 1))(1.7, 0.6) for g in (line, pair))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-9)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-7)


def test_a_narrow_feature_of_a_polynomial_is_seen():
    """exp(-1e6 (u - 3)^2) of a Gaussian of variance 100, also with one of variance 25."""
    init = lambda n: {"U": aw.Normal((n, 1)), "v": aw.Normal((n,))}
    bump = lambda u: jnp.exp(-1e6 * (u - 3.0) ** 2)
    net = aw.Network(init, lambda p, x: p["v"] @ bump(p["U"] @ x) / jnp.sqrt(p["v"].size))
    kernel = aw.nngp(net)
    for x, y in ((10.0, 10.0), (10.0, 5.0), (10.0, -5.0)):
        S = np.array([[x * x, x * y], [x * y, y * y]])
        M = np.eye(2) + 2e6 * S
        exact = np.exp(-1e6 * np.full(2, 3.0) @ np.linalg.solve(M, np.full(2, 3.0))) / np.sqrt(np.linalg.det(M))
        np.testing.assert_allclose(kernel(np.array([x]), np.array([y])), exact, rtol=1e-7, atol=1e-30)
