"""Functions that are divided by what vanishes with their Gaussians: batch normalisation, against other integrals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf, roots_jacobi

import anywidth as aw
from anywidth import zoo
from anywidth.expect import batch
from anywidth.expect.atoms import SeveralGaussians
from anywidth.expect.poles import coordinates, density, flips, projection, shortened
from anywidth.expect.roots import root

X = np.random.default_rng(0).normal(size=(4, 10))
# jax function, and in NumPy with its derivative
FUNCTIONS = {
    "tanh": (jnp.tanh, np.tanh, lambda u: 1 - np.tanh(u) ** 2),
    "erf": (jax.lax.erf, erf, lambda u: 2 / np.sqrt(np.pi) * np.exp(-u * u)),
}


def sphere(n):
    """Points and weights of an integral over the sphere in three dimensions, exact to rounding for smooth functions."""
    x, w = np.polynomial.legendre.leggauss(n)
    angle = np.pi * (np.arange(2 * n) + 0.5) / n
    across = np.sqrt(1 - x * x)[:, None]
    s = np.stack([across * np.cos(angle), across * np.sin(angle), np.broadcast_to(x[:, None], (n, 2 * n))], -1)
    return s.reshape(-1, 3), np.repeat(w / (4 * n), 2 * n)


def batch_of_four(x, phi, slope, epsilon=0.0):
    """NNGP and NTK of one hidden layer, x with itself: integrals over direction and radius."""
    centre = np.eye(4) - 1 / 4
    S = centre @ x @ x.T @ centre / x.shape[1]
    lam, U = np.linalg.eigh(S)
    L = U[:, 1:] * np.sqrt(lam[1:])
    s, w = sphere(60)
    half, v = np.polynomial.laguerre.laggauss(60) if epsilon else (np.array([0.5]), np.array([1.0]))
    radii = np.sqrt(2 * half)  # r^2 / 2 has a gamma distribution, of density t^(1/2) exp(-t)
    v = v * np.sqrt(half) * 2 / np.sqrt(np.pi) if epsilon else v  # without epsilon E r^-2 = 1 is all that is asked for
    nngp = tangent = 0.0
    for r, weight in zip(radii, v, strict=True):
        h = r * s @ L.T
        sigma = np.sqrt((h**2).mean(1) + epsilon)[:, None]
        u = h / sigma
        g = slope(u)[:, :, None] / sigma[:, :, None] * (np.eye(4) - u[:, :, None] * u[:, None, :] / 4) @ L
        nngp += weight * np.einsum("n,ni,nj->ij", w, phi(u), phi(u))
        tangent += weight * np.einsum("n,nik,njk->ij", w, g, g)
    return nngp, nngp + tangent


def orthonormal(size, phi, slope):
    """The same for `size` orthonormal examples, whose directions are uniform on a sphere: integrals over a disc."""
    d = size - 1
    t, w = roots_jacobi(120, (d - 4) / 2, 0)
    angle = 2 * np.pi * np.arange(400) / 400
    a, b = (np.sqrt((1 + t) / 2)[:, None] * f(angle) for f in (np.cos, np.sin))
    mean = lambda f: float((w / w.sum()) @ f.mean(1))
    cos = -1 / d
    entries = []
    for u, v, same in ((a, a, 1), (a, cos * a + np.sqrt(1 - cos**2) * b, 0)):
        u, v = np.sqrt(d) * u, np.sqrt(d) * v
        nngp = mean(phi(u) * phi(v))
        entries.append((nngp, nngp + size / (d - 2) * mean(slope(u) * slope(v) * (same - 1 / size - u * v / size))))
    return [np.where(np.eye(size) == 1, *k) for k in zip(*entries, strict=True)]


def agrees(found, truth, tol, own=None):
    """Deviations of the size of the stated errors (the entries share their points), and these below the tolerance.

    It is relative to the largest entry of the kernel of the two examples or of one of them, `own`, with itself.
    """
    for value, error, answer, scale in zip(found, found.error, truth, own or truth, strict=True):
        assert 0 < np.max(error) < tol * np.abs(scale).max()
        deviations = np.abs(value - answer) / error
        assert np.sqrt((deviations**2).mean()) < 2.5 and deviations.max() < 6


@pytest.mark.parametrize("name", ["tanh", pytest.param("erf", marks=pytest.mark.long)])
def test_batch_of_four(name):
    phi, *numpy = FUNCTIONS[name]
    agrees(aw.kernels(zoo.batchnorm_mlp(10, 1, phi))(X, X), batch_of_four(X, *numpy), 1e-4)


@pytest.mark.long
@pytest.mark.parametrize("epsilon", [1e-2, 1.0])
def test_with_epsilon(epsilon):
    found = aw.kernels(zoo.batchnorm_mlp(10, 1, jnp.tanh, epsilon=epsilon))(X, X)
    agrees(found, batch_of_four(X, *FUNCTIONS["tanh"][1:], epsilon), 1e-4)


@pytest.mark.long
@pytest.mark.parametrize(("size", "tol"), [(8, 1e-4), (16, 1e-4)])
def test_large_batches(size, tol):
    x = np.sqrt(size) * np.eye(size)
    found = aw.kernels(zoo.batchnorm_mlp(size, 1, jnp.tanh), tol=tol)(x, x)
    agrees(found, orthonormal(size, *FUNCTIONS["tanh"][1:]), tol)


def test_float32():
    found = aw.kernels(zoo.batchnorm_mlp(10, 1, jnp.tanh), tol=1e-3)(X.astype(np.float32), X.astype(np.float32))
    assert found.ntk.dtype == np.float32
    agrees(found, batch_of_four(X, *FUNCTIONS["tanh"][1:]), 1e-3)


@pytest.mark.long
@pytest.mark.parametrize("rows", [slice(0, 4), slice(2, 8)])
def test_relu_agrees_with_its_integral(monkeypatch, rows):
    """Two batches, of the same size and of two sizes, and a batch with itself."""
    y = np.random.default_rng(1).normal(size=(8, 10))[rows] + 0.3 * X[0]
    net = zoo.batchnorm_mlp(10)
    exact = [aw.kernels(net)(X, b) for b in (X, y)]

    def no_rule(*_):
        raise SeveralGaussians

    monkeypatch.setattr(batch, "expectation", no_rule)
    kernels = aw.kernels(net, tol=1e-3)
    for b, truth in zip((X, y), exact, strict=True):
        assert not np.any(truth.error.ntk)
        agrees(kernels(X, b), truth, 1e-3, exact[0])


@pytest.mark.parametrize("dtype", [np.float64, pytest.param(np.float32, marks=pytest.mark.long)])
@pytest.mark.parametrize("phi", [jax.nn.relu, pytest.param(jnp.tanh, marks=pytest.mark.long)])
def test_infinite_tangent_kernels(phi, dtype):
    """Where two examples of a batch of four coincide, for batches without epsilon, and for no other pair."""
    kernels = aw.kernels(zoo.batchnorm_mlp(10, 1, phi), tol=1e-2)
    x, y = X.astype(dtype), X[[0, 1, 2, 2]].astype(dtype)
    with pytest.raises(aw.NoLimitError, match=r"infinite.*epsilon"):
        kernels(y, y)
    assert np.isinf(jax.jit(kernels)(y, y).ntk).all()
    for a, b in ((x, x), (x, y)):
        assert np.isfinite(kernels(a, b).ntk).all()
    assert np.isfinite(kernels(y, y[:, ::-1]).ntk).all()
    nngp = aw.nngp(zoo.batchnorm_mlp(10, 1, phi), tol=1e-2)(y, y)
    np.testing.assert_allclose(nngp[2], nngp[3], rtol=1e-5)


def test_symmetry():
    f = jax.jit(aw.kernels(zoo.batchnorm_mlp(10, 1, jnp.tanh), points=2**14))
    for k, l in zip(f(X, X[::-1] + 0.1), f(X[::-1] + 0.1, X), strict=True):
        np.testing.assert_allclose(k, np.asarray(l).T, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rank", [1, 2, 3, 6])
def test_shortened_points_and_their_weights(rank):
    rng = np.random.default_rng(rank)
    V = np.linalg.qr(rng.normal(size=(8, rank)))[0]
    P = projection(jnp.asarray(rng.normal(size=(rank, rank)) @ V.T))
    np.testing.assert_allclose(P, V @ V.T, atol=1e-12)
    count = 2**16
    xi, U = rng.normal(size=(count, 8)), jnp.asarray(rng.random(count))
    z = shortened(xi, P, U)
    square = ((z @ P) ** 2).sum(-1)
    freedom = rank - 2 if rank > 2 else 1
    assert abs(square.mean() - freedom) < 5 * np.sqrt(2 * freedom / count)  # of a chi squared distribution
    np.testing.assert_allclose(z - z @ P, xi - xi @ P, atol=1e-12)
    weight = 1 / density(square, P)
    for f, mean in ((1.0, 1.0), (z[:, 0] ** 2, 1.0), (z[:, 0] * z[:, 1], 0.0)):
        terms = np.asarray(f * weight)
        assert abs(terms.mean() - mean) < 5 * terms.std() / np.sqrt(count) + 1e-12


def test_changes_of_sign_are_a_group():
    signs = flips(15)
    np.testing.assert_array_equal(signs.T @ signs, 16 * np.eye(15))
    np.testing.assert_array_equal(signs.sum(0), 0)
    found = {tuple(s) for s in signs}
    assert len(found) == 16 and {tuple(s * t) for s in signs for t in signs} == found
    # of the 1365 sets of four, 105 are left: the words of weight four of the Hamming code
    left = sum(abs((signs[:, i] * signs[:, j] * signs[:, k] * signs[:, l]).sum()) > 0
               for i in range(15) for j in range(i) for k in range(j) for l in range(k))  # fmt: skip
    assert left == 105


def test_batches_of_three():
    """Infinite for one batch with itself; two have four independent coordinates: against a simulation of NumPy's."""
    x, y = np.random.default_rng(0).normal(size=(2, 3, 5))
    rng, count = np.random.default_rng(1), 2**19
    theta = rng.normal(size=(count, 5))
    sides = []
    for a in (x, y):
        a = (a - a.mean(0)) / np.sqrt(5)
        u = theta @ a.T
        sigma = np.sqrt((u**2).mean(1, keepdims=True))
        h = u[:, 0:1] / sigma
        sides.append((np.maximum(h[:, 0], 0), (h > 0) * (a[0] - h * ((u / sigma) @ a) / 3) / sigma))
    terms = sides[0][0] * sides[1][0] + (sides[0][1] * sides[1][1]).sum(1)
    kernels = aw.kernels(zoo.batchnorm_mlp(5))
    assert abs(kernels(x, y).ntk[0, 0] - terms.mean()) < 4 * terms.std() / np.sqrt(count)
    for depth in (1, 2):
        with pytest.raises(aw.NoLimitError, match=r"infinite.*epsilon"):
            aw.ntk(zoo.batchnorm_mlp(5, depth))(x, x)


def test_coordinates_are_orthogonal_and_exchange():
    G = np.random.default_rng(3).normal(size=(6, 6))
    S, turn = G @ G.T, np.r_[3:6, 0:3]
    A, B = (np.asarray(coordinates(root(jnp.asarray(K)), True)) for K in (S, S[turn][:, turn]))
    np.testing.assert_allclose(A @ A.T, S, atol=1e-12)
    np.testing.assert_allclose(B, A[turn] * np.r_[1, 1, 1, -1, -1, -1], atol=1e-10)
    same = np.asarray(coordinates(root(jnp.asarray(np.tile(S[:3, :3], (2, 2)))), True))
    np.testing.assert_allclose(same[:, 3:], 0, atol=1e-7)  # one example twice: the difference is nothing
