"""Every nonlinearity of neural-tangents and of jax.nn, in a layer, against integration that knows nothing of ours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax, nn
from scipy.optimize import brentq

import anywidth as aw
from anywidth import Network, Normal

pytestmark = pytest.mark.long  # some forty functions are compiled

SQRT3 = 3**0.5

# where tanh(x) = x / 2 + 0.1
CROSSINGS = [brentq(lambda x: np.tanh(x) - x / 2 - 0.1, *ends) for ends in ((-3, -1), (0, 1), (1, 3))]

# name: (function, its kinks or jumps)

TABLE = {
    "relu": (nn.relu, [0]),
    "leaky_relu": (lambda x: nn.leaky_relu(x, 0.2), [0]),
    "abs": (jnp.abs, [0]),
    "a_relu_b_relu": (lambda x: jnp.where(x > 0, 1.3 * x, -0.4 * x), [0]),
    "erf": (lax.erf, []),
    "erf scaled": (lambda x: 0.7 * lax.erf(1.3 * x + 0.4) - 0.2, []),
    "gelu exact": (lambda x: nn.gelu(x, approximate=False), []),
    "gelu tanh": (lambda x: nn.gelu(x, approximate=True), []),
    "sin": (lambda x: jnp.sin(1.5 * x + 0.3), []),
    "cos": (jnp.cos, []),
    "exp": (lambda x: 0.5 * jnp.exp(0.6 * x), []),
    "rbf": (lambda x: 2**0.5 * jnp.sin(1.4 * x + np.pi / 4), []),
    "gaussian": (lambda x: jnp.exp(-(x**2)), []),
    "exp normalised": (lambda x: jnp.exp(x - 1), []),
    "gabor": (lambda x: jnp.exp(-(x**2)) * jnp.sin(x), []),
    "polynomial": (lambda x: 1 + 0.5 * x - 0.3 * x**2 + 0.1 * x**3, []),
    "polyval": (lambda x: jnp.polyval(jnp.array([0.1, -0.3, 0.5, 1.0]), x), []),
    "monomial": (lambda x: x**3, []),
    "hermite": (lambda x: (x**4 - 6 * x**2 + 3) / 24**0.5, []),
    "rectified monomial": (lambda x: nn.relu(x) ** 2, [0]),
    "rectified cube": (lambda x: jnp.where(x >= 0, x**3, 0.0), [0]),
    "sigmoid": (nn.sigmoid, []),
    "sigmoid like": (lambda x: (lax.erf(x / 2.4) + 1) / 2, []),
    "tanh": (jnp.tanh, []),
    "softplus": (nn.softplus, []),
    "silu": (nn.silu, []),
    "elu": (nn.elu, [0]),
    "celu": (lambda x: nn.celu(x, 1.7), [0]),
    "selu": (nn.selu, [0]),
    "relu6": (lambda x: nn.relu6(4 * x), [0, 1.5]),
    "hard sigmoid": (lambda x: nn.hard_sigmoid(3 * x), [-1, 1]),
    "hard silu": (lambda x: nn.hard_silu(3 * x), [-1, 1]),
    "mish": (nn.mish, []),
    "log sigmoid": (nn.log_sigmoid, []),
    "log1p of square": (lambda x: jnp.log1p(x**2), []),
    "soft sign": (nn.soft_sign, [0]),
    "squareplus": (nn.squareplus, []),
    "sparse sigmoid": (nn.sparse_sigmoid, [-1, 1]),
    "sparse plus": (nn.sparse_plus, [-1, 1]),
    "hard tanh": (nn.hard_tanh, [-1, 1]),
    "clip": (lambda x: jnp.clip(x, -0.5, 0.8), [-0.5, 0.8]),
    "minimum": (lambda x: jnp.minimum(x, 0.3), [0.3]),
    "logaddexp": (lambda x: jnp.logaddexp(x, 0.3), [0.3]),
    "arctan": (jnp.arctan, []),
    "kink of a nonlinear function": (lambda x: jnp.maximum(jnp.tanh(x), x / 2 + 0.1), CROSSINGS),
}
JUMPS = {
    "sign": (jnp.sign, [0]),
    "step": (lambda x: jnp.heaviside(x, 0.5), [0]),
    "comparison": (lambda x: jnp.where(x > 0.4, 1.0, -0.5), [0.4]),
}

x, y = np.array([0.9, -0.4, 1.1]), np.array([0.5, 0.8, -0.7])
COV = np.array([[x @ x, x @ y], [x @ y, y @ y]]) / 3


def network(table):
    """One hidden layer for all functions, and a readout for each."""

    def init(n):
        return {"u": Normal((n, 3)), "v": {name: Normal((n,)) for name in table}}

    def apply(p, x):
        h = p["u"] @ x / SQRT3
        return {name: p["v"][name] @ f(h) / jnp.sqrt(h.size) for name, (f, _) in table.items()}

    return Network(init, apply)


def panels(breaks, lo=-9.5, hi=9.5):
    """Gauss-Legendre nodes and weights between all breaks, in panels no wider than one."""
    t, w = np.polynomial.legendre.leggauss(16)
    edges = np.sort(np.concatenate([np.linspace(lo, hi, 20), np.clip(np.ravel(breaks), lo, hi)]))
    a, b = edges[:-1, None], edges[1:, None]
    return ((a + b) / 2 + (b - a) / 2 * t).ravel(), ((b - a) / 2 * w).ravel()


def expectation(f, g, kinks, cov):
    """E[f(u) g(v)] of two Gaussians, by Gauss-Legendre rules between the kinks of each."""
    (q, c), (_, r) = cov
    slope, rest = c / q, np.sqrt(r - c * c / q)
    a, wa = panels(np.array(kinks) / np.sqrt(q))
    u = np.sqrt(q) * a
    rules = [panels((np.array(kinks) - slope * ui) / rest) for ui in u]
    b, wb = np.stack([n for n, _ in rules]), np.stack([w for _, w in rules])
    inner = (np.asarray(g(slope * u[:, None] + rest * b)) * wb * np.exp(-(b**2) / 2)).sum(1)
    return (np.asarray(f(u)) * wa * np.exp(-(a**2) / 2) * inner).sum() / (2 * np.pi)


def norm(f, kinks, q):
    """E[f(u)^2]."""
    a, w = panels(np.array(kinks) / np.sqrt(q))
    return (np.asarray(f(np.sqrt(q) * a)) ** 2 * w * np.exp(-(a**2) / 2)).sum() / np.sqrt(2 * np.pi)


def derivative(f):
    return lambda u: jax.vmap(jax.grad(f))(jnp.ravel(jnp.asarray(u))).reshape(np.shape(u))


@pytest.fixture(scope="module")
def found():
    kernels = aw.kernels(network(TABLE))(x, y)
    return kernels.nngp, kernels.ntk, aw.nngp(network(JUMPS))(x, y)


@pytest.mark.parametrize("name", TABLE)
def test_in_a_layer(name, found):
    f, kinks = TABLE[name]
    value = expectation(f, f, kinks, COV)
    slope = expectation(derivative(f), derivative(f), kinks, COV)
    assert float(found[0][name]) == pytest.approx(value, rel=1e-9)
    assert float(found[1][name]) == pytest.approx(value + COV[0, 1] * slope, rel=1e-8)


@pytest.mark.parametrize("name", JUMPS)
def test_jumps_have_a_covariance(name, found):
    f, kinks = JUMPS[name]
    # The covariances are smaller than the variances, to which the error of quadrature is relative.
    scale = np.sqrt(norm(f, kinks, COV[0, 0]) * norm(f, kinks, COV[1, 1]))
    assert float(found[2][name]) == pytest.approx(expectation(f, f, kinks, COV), rel=0, abs=1e-8 * scale)
