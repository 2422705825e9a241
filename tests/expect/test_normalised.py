"""Expectations of normalised batches: reference numbers, simulation, symmetries, derivatives, degenerate batches."""

import functools
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anywidth.expect import coinciding, normalised
from anywidth.expect.closed import Power
from anywidth.expect.normalised import check_finite, normalised_mean, normalised_pair, normalised_self

RELU = Power(1, 1.0, 0.0)
LEAKY = Power(1, 1.0, -0.2)
SQUARE = Power(2, 1.0, 0.0)
REFERENCE = pathlib.Path(__file__).parents[1] / "reference" / "batchnorm.npz"


long = pytest.mark.long  # a kernel of two batches takes some seconds to compile


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def centre(S):
    S = S - S.mean(-1, keepdims=True)
    return S - S.mean(-2, keepdims=True)


def blocks(x, y, dtype=np.float64):
    return tuple(jnp.asarray(centre(u @ v.T / x.shape[1]).astype(dtype)) for u, v in ((x, x), (y, y), (x, y)))


def batches(B, B2, d=9, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((B, d)), rng.standard_normal((B2, d))


@functools.partial(jax.jit, static_argnames=("f", "centred", "refined"))
def kernel(A, B, C, f=RELU, eps=0.0, centred=True, refined=False):
    """The NNGP and the derivative in the cross block along itself. `refined` only tells the jit caches apart."""
    F = lambda C: normalised_pair(f, f, f.k, f.k, A, B, C, 1 / len(A), 1 / len(B), eps, eps, centred=centred)
    return jax.jvp(F, (C,), (C,))


self_ = jax.jit(normalised_self, static_argnums=(0, 1, 2, 3), static_argnames="centred")


def error(a, b):
    a, b = np.asarray(a, float), np.asarray(b, float)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@long
@pytest.mark.parametrize(("which", "x", "y"), [("1", "x1", "x1"), ("2", "x2", "x2"), ("x", "x1", "x2")])
def test_reference(which, x, y):
    z = np.load(REFERENCE)
    nngp, tangent = kernel(*blocks(z[x], z[y]))
    assert error(nngp, z["d1_nngp" + which]) < 1e-9
    assert error(nngp + tangent, z["d1_ntk" + which]) < 1e-8
    if which != "1":  # rank 3: needs `centred` for its last digits
        nngp, tangent = kernel(*blocks(z[x], z[y]), centred=False)
        assert error(nngp + tangent, z["d1_ntk" + which]) < 1e-8


@long
@pytest.mark.parametrize(
    ("s", "t", "f", "g"),
    [
        (1, 1, RELU, LEAKY),
        (2, 1, SQUARE, RELU),
        (0, 1, RELU, RELU),
        (1, 0, RELU, RELU),
        (0, 0, RELU, RELU),
        (1.5, 1, RELU, RELU),
        (3, 1, SQUARE, RELU),
    ],
)
def test_simulation(s, t, f, g):
    x, y = batches(5, 7)
    a1, a2, e1, e2 = 0.2, 0.3, 0.1, 0.2
    A, B, C = (np.asarray(M) for M in blocks(x, y))
    got = jax.jit(lambda *S: normalised_pair(f, g, s, t, *S, a1, a2, e1, e2))(A, B, C)
    w = np.random.default_rng(1).standard_normal((100_000, 9)) / 3
    u, v = w @ (x - x.mean(0)).T, w @ (y - y.mean(0)).T
    apply = lambda h, u: np.where(u > 0, h.plus, h.minus) * np.abs(u) ** h.k
    F = apply(f, u) * (a1 * (u**2).sum(1, keepdims=True) + e1) ** (-s / 2)
    G = apply(g, v) * (a2 * (v**2).sum(1, keepdims=True) + e2) ** (-t / 2)
    spread = np.sqrt((F**2).T @ G**2 / len(w))
    assert np.all(np.abs(got - F.T @ G / len(w)) < 5 * spread / np.sqrt(len(w)))
    if s:
        np.testing.assert_allclose(normalised_mean(f, s, A, a1, e1), F.mean(0), rtol=3e-2)
        H = apply(g, u) * (a1 * (u**2).sum(1, keepdims=True) + e1) ** (-t / 2)
        np.testing.assert_allclose(normalised_self(f, g, s, t, A, a1, e1), F.T @ H / len(w), rtol=3e-2, atol=3e-3)


@pytest.mark.parametrize(
    ("f", "g", "s", "t", "eps"),
    [
        (RELU, LEAKY, 1, 1, 0.3),
        pytest.param(RELU, LEAKY, 1, 1, 0.0, marks=long),
        pytest.param(SQUARE, RELU, 2, 1, 0.3, marks=long),
        pytest.param(RELU, RELU, 1.5, 1, 0.1, marks=long),
    ],
)
def test_one_integral_and_two(f, g, s, t, eps):
    """A batch with itself: value and every derivative by the single integral and by the double one."""
    x, y = batches(9, 9, d=12)
    S, D, E = blocks(x, x)[0], *blocks(x, y)[1:]
    arrays = S, S, S, *(jnp.float64(z) for z in (0.2, 0.2, eps, eps))
    tangents = E + E.T, D, E, *(jnp.float64(z) for z in (0.1, -0.3, 0.2, 0.7))
    one = lambda *args: coinciding.pair_with_itself(f, g, s, t, True, *args)
    two = lambda *args: normalised._double(f, g, s, t, True, *args)

    @jax.jit
    def along(which):
        """The derivatives along each array's own tangent: those of the mixed ones are linear in it."""
        chosen = tuple(which[i] * z for i, z in enumerate(tangents))
        return jax.jvp(one, arrays, chosen), jax.jvp(two, arrays, chosen)

    for which in np.eye(7 if eps else 5, 7):
        (value, slope), (value2, slope2) = along(which)
        assert error(value, value2) < 1e-10
        assert error(slope, slope2) < 1e-9, which


@long
@pytest.mark.parametrize("B", [4, 40])
def test_exact_identities(B):
    """sum_j u_j^2 = B; one batch through the single integral and through the double one."""
    x, _ = batches(B, 2, d=60)
    S = blocks(x, x)[0]
    absolute, line = Power(1, 1.0, 1.0), Power(1, 1.0, -1.0)
    for f in (absolute, line):
        assert abs(jnp.trace(self_(f, f, 1, 1, S, 1 / B, 0.0, centred=True)) / B - 1) < 1e-10
        assert abs(jnp.trace(kernel(S, S, S, f)[0]) / B - 1) < 1e-10
    once = self_(RELU, RELU, 1, 1, S, 1 / B, 0.0, centred=True)
    assert error(kernel(S, S, S)[0], once) < 1e-10
    # the batch seen in another scale and order is the same normalised batch
    order = np.random.default_rng(0).permutation(B)
    moved = kernel(S, 9 * S[order][:, order], 3 * S[:, order])
    assert error(moved[0], once[:, order]) < 1e-10
    assert error(moved[1], kernel(S, S, S)[1][:, order]) < (1e-6 if B == 4 else 1e-9)


@long
@pytest.mark.parametrize(
    ("f", "B", "eps"),
    [(RELU, 4, 0.0), (RELU, 24, 1e-5), (RELU, 24, 0.0), (RELU, 24, 30.0), (SQUARE, 6, 0.0), (SQUARE, 6, 1e-5)],
)
@pytest.mark.parametrize("spectrum", ["flat", "spread", "dominated"])
def test_converged(f, B, eps, spectrum, monkeypatch):
    """Twice the points change nothing."""
    rng = np.random.default_rng(3)
    lam = {"flat": np.ones(B), "spread": np.logspace(0, -6, B), "dominated": np.r_[1, np.full(B - 1, 1e-4)]}[spectrum]
    S, T = (centre((Q * lam) @ Q.T) for Q in (np.linalg.qr(rng.standard_normal((B, B)))[0] for _ in range(2)))
    points = normalised._points
    for args in ((S, S, S), (S, 0.64 * S + 0.36 * T, 0.8 * S)):
        args = tuple(jnp.asarray(M) for M in args)
        got = kernel(*args, f=f, eps=eps)
        with monkeypatch.context() as m:
            m.setattr(normalised, "_points", lambda *a: (2 * points(*a)[0], points(*a)[1]))
            fine = kernel(*args, f=f, eps=eps, refined=True)
        assert error(got[0], fine[0]) < 1e-9
        assert error(got[1], fine[1]) < 1e-8


@long
@pytest.mark.parametrize("case", ["two", "same", "duplicates", "zero"])
@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_gradients(case, eps):
    """Reverse mode in everything against finite differences along directions that keep the joint covariance one."""
    x, y = batches(6, 5)
    if case == "same":
        y = x
    if case == "duplicates":
        x[1] = x[0]
        y[:2] = x[:2]
    if case == "zero":
        x[2] = 0
        y[2] = 0
    G = (lambda B: np.eye(B)) if case == "zero" else (lambda B: np.eye(B) - 1 / B)
    weights = np.random.default_rng(5).standard_normal((len(x), len(y)))

    def covariance(z):
        x, y = z[: len(G1)], z[len(G1) :]
        return G1 @ x @ x.T @ G1, G2 @ y @ y.T @ G2, G1 @ x @ y.T @ G2

    def loss(S, a, e):
        return (weights * normalised_pair(RELU, LEAKY, 1, 1, *S, a, 2 * a, e, 3 * e)).sum()

    G1, G2 = G(len(x)), G(len(y))
    z = np.concatenate([x, y]) / 3
    grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(covariance(jnp.asarray(z)), 0.2, eps)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    dz, da, de = np.random.default_rng(6).standard_normal(z.shape), 0.03, 0.02 * (eps > 0)
    if case == "zero":  # |x| is not differentiable at x = 0: leave that row
        dz[2] = dz[len(x) + 2] = 0
    if case in ("same", "duplicates"):  # neither is the angle of two equal rows: move them together
        dz[len(x) : len(x) + (6 if case == "same" else 2)] = dz[: 6 if case == "same" else 2]
        if case == "duplicates":
            dz[1] = dz[0]
            dz[len(x) + 1] = dz[0]
    line = jax.jit(lambda h: loss(covariance(z + h * dz), 0.2 + h * da, eps + h * de))
    h = 1e-3
    slope = (8 * (line(h) - line(-h)) - (line(2 * h) - line(-2 * h))) / (12 * h)
    dS = jax.jvp(covariance, (jnp.asarray(z),), (jnp.asarray(dz),))[1]
    along = sum((g * d).sum() for g, d in zip(grads[0], dS)) + grads[1] * da + grads[2] * de
    assert abs(along - slope) < 1e-6 * abs(slope)


@long
def test_gradient_of_the_ntk():
    x, y = batches(6, 6)

    def ntk(scale, y):
        y = scale * y
        A, B, C = x @ x.T, y @ y.T, x @ y.T
        F = lambda C: normalised_pair(RELU, RELU, 1, 1, centre(A), centre(B), centre(C), 1 / 6, 1 / 6, 0.1, 0.1)
        return jax.jvp(F, (C,), (C,))[1].sum()

    ntk = jax.jit(ntk)
    slope = (ntk(1 + 1e-4, y) - ntk(1 - 1e-4, y)) / 2e-4
    assert abs(jax.jit(jax.grad(ntk))(1.0, y) - slope) < 1e-6 * abs(slope)
    assert np.isfinite(jax.jit(jax.grad(ntk))(1.0, x))  # the same batch


@long
@pytest.mark.parametrize("case", ["two", "same", "near", "duplicates"])
@pytest.mark.parametrize(("B", "eps"), [(4, 0.0), (6, 0.0), (32, 1e-5)])
def test_float32(case, B, eps):
    x, y = batches(B, B, d=40)
    if case == "same":
        y = x
    elif case == "near":
        y = x + 0.05 * y
    elif case == "duplicates":
        x[1], x[0] = x[0], y[0]
        y[1] = x[1]
    rounded = blocks(x, y, np.float32)
    got = kernel(*rounded, eps=eps)
    assert got[0].dtype == got[1].dtype == jnp.float32
    want = kernel(*blocks(x, y), eps=eps)
    assert error(got[0], want[0]) < 1e-5
    assert error(got[1], want[1]) < 1e-4


@long
def test_symmetric_and_psd():
    x, y = batches(6, 4)
    A, B, C = blocks(x, y)
    one, other = kernel(A, B, C), kernel(B, A, C.T)
    for k in range(2):
        assert error(one[k], other[k].T) < 1e-10
    for K in kernel(A, A, A):
        assert error(K, K.T) < 1e-10
        assert np.linalg.eigvalsh(K + K.T).min() > -1e-10


@long
def test_leading_dimensions_jit_vmap():
    pairs = [blocks(*batches(4, 5, seed=k)) for k in range(6)]
    S = [jnp.stack(M).reshape(2, 3, *M[0].shape) for M in zip(*pairs)]
    F = lambda A, B, C: normalised_pair(RELU, RELU, 1, 1, A, B, C, 0.25, 0.2, 1e-3, 1e-3)
    F = jax.jit(F)
    whole = F(*S)
    assert whole.shape == (2, 3, 4, 5)
    for k, (A, B, C) in enumerate(pairs):
        np.testing.assert_allclose(whole.reshape(6, 4, 5)[k], F(A, B, C), rtol=1e-10)
    np.testing.assert_allclose(jax.jit(jax.vmap(jax.vmap(F)))(*S), whole, rtol=1e-10)
    np.testing.assert_allclose(F(S[0][:, :1], S[1][:, :1], S[2])[:, 0], whole[:, 0], rtol=1e-10)
    assert normalised_self(RELU, RELU, 1, 1, S[0], 0.25, 0.0).shape == (2, 3, 4, 4)
    assert normalised_mean(RELU, 1, S[0], 0.25, 0.0).shape == (2, 3, 4)


@long
def test_nothing_but_zeros():
    Z = jnp.zeros((4, 4))
    for eps in (0.0, 1e-3):
        loss = lambda A, B, C: normalised_pair(RELU, RELU, 1, 1, A, B, C, 0.25, 0.25, eps, eps).sum()
        value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(Z, Z, Z)
        assert value == 0 and all(np.isfinite(g).all() for g in grads)


def test_finiteness():
    assert check_finite(1, 1, 1) and not check_finite(2, 1, 1, derivative=True)
    assert check_finite(3, 1, 1, derivative=True) and check_finite(2, 1, 1, derivative=True, same=False)
    assert check_finite(1, 2, 2, degrees=(1, 1)) is False


def test_strict_promotion_and_dtype():
    with jax.numpy_dtype_promotion("strict"):
        S = jnp.eye(4, dtype=jnp.float32) - np.float32(0.25)
        for f in (RELU, SQUARE):
            outputs = jax.eval_shape(
                lambda S: (
                    normalised_pair(f, f, f.k, f.k, S, S, S, 0.25, 0.25, 0.0, 0.0),
                    normalised_self(f, f, f.k, f.k, S, 0.25, 1e-5),
                    normalised_mean(f, f.k, S, 0.25, 0.0),
                ),
                S,
            )
            assert all(out.dtype == jnp.float32 for out in outputs)


@long
def test_fast():
    """Two batches of 32, value and derivative (about 0.2 s; the bound leaves room for a busy machine)."""
    A, B, C = blocks(*batches(32, 32, d=50))
    F = lambda C: normalised_pair(RELU, RELU, 1, 1, A, B, C, 1 / 32, 1 / 32, 0.0, 0.0)
    run = jax.jit(lambda C: jax.jvp(F, (C,), (C,))).lower(C).compile()
    assert run.memory_analysis().temp_size_in_bytes < 200e6
    start = time.perf_counter()
    jax.block_until_ready(run(C))
    assert time.perf_counter() - start < 5
