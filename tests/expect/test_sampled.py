"""Functions of several correlated Gaussians: sampled answers, their errors, and what is not sampled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import anywidth as aw
from anywidth import accuracy
from anywidth.expect.points import digits, normals
from anywidth.expect.roots import root
from anywidth.kernels import pair

X, Y = np.array([0.9, -0.4, 1.1]), np.array([0.5, 0.8, 0.7])


def network(combine, count, varu=1.0, readout=1.0):
    """A readout of a function of `count` Gaussians, the last two of which share half their weights."""

    def init(n):
        return {"U": aw.Normal((count, n, 3), var=varu), "v": aw.Normal((n,), var=readout)}

    def apply(p, x):
        u = p["U"] @ x / jnp.sqrt(3)
        return p["v"] @ combine(*u, u[-1] + 0.5 * u[-2]) / jnp.sqrt(p["v"].size)

    return aw.Network(init, apply)


def brute(combine, count, x, y, samples=2**21):
    """NNGP and NTK by plain Monte Carlo, each with its standard error."""
    rng = np.random.default_rng(7)
    U = rng.normal(size=(samples, count, 3))

    def side(x):
        u = jnp.asarray(U @ x / np.sqrt(3))
        f = lambda u: combine(*u, u[-1] + 0.5 * u[-2])
        return jax.vmap(jax.value_and_grad(f))(u)

    (f, df), (g, dg) = side(x), side(y)
    nngp = f * g
    ntk = nngp + (df * dg).sum(1) * (x @ y / 3)
    return [(float(k.mean()), float(k.std() / np.sqrt(samples))) for k in (nngp, ntk)]


CASES = {
    "gate": (lambda a, b, c: jnp.tanh(a) * jax.nn.sigmoid(c), 2),
    "maximum": (lambda a, b, c: jnp.maximum(jnp.maximum(a, b), c), 2),
    "difference": (lambda a, b, c: jnp.abs(jax.nn.relu(a) - jax.nn.relu(c)), 2),
}
# functions of several correlated Gaussians that are integrated all the same
EXACT = {
    "a gate of its own input": lambda a, b, c: a * jax.nn.sigmoid(c),
    "a kinked gate": lambda a, b, c: b * jax.nn.relu(c) - a,
    "two linear factors": lambda a, b, c: a * b * jnp.sin(c),
    "maximum of two": lambda a, b, c: jnp.maximum(b, c + 0.3),
    "maximum written as a choice": lambda a, b, c: jnp.where(b > c, b, c),
    "least of two, and a gate of a sum": lambda a, b, c: jnp.minimum(a, c) + b * jax.lax.erf(a - 2 * b),
    "leaky difference": lambda a, b, c: jax.nn.leaky_relu(c - b) * a,
}


@pytest.mark.parametrize("name", CASES)
def test_against_brute_force(name):
    combine, count = CASES[name]
    found = aw.kernels(network(combine, count), tol=1e-3)(X, Y)
    for value, error, (mean, sigma) in zip(found, found.error, brute(combine, count, X, Y), strict=True):
        assert 0 < float(error) < 1e-3 * 3
        assert abs(float(value) - mean) < 4 * np.hypot(float(error), sigma)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in list(EXACT)[1:5:2] else [pytest.mark.long]) for n in EXACT]
)
def test_what_is_linear_given_the_rest_is_integrated(name):
    combine = EXACT[name]
    kernels = aw.kernels(network(combine, 2))
    for y in (Y, X):
        found = kernels(X, y)
        assert [float(e) for e in found.error] == [0.0, 0.0]
        for value, (mean, sigma) in zip(found, brute(combine, 2, X, y), strict=True):
            assert abs(float(value) - mean) < 4 * sigma


def test_same_example_twice_and_symmetry():
    combine, count = CASES["gate"]
    f = jax.jit(aw.kernels(network(combine, count), points=2**14))
    assert np.isfinite(f(X, X).ntk)
    assert np.isfinite(f(X, -X).ntk)
    assert np.isfinite(f(X, 0 * X).ntk)
    for k, l in zip(f(X, Y), f(Y, X), strict=True):
        np.testing.assert_allclose(k, l, rtol=1e-12)


def test_deterministic_and_independent_of_tiles():
    combine, count = CASES["maximum"]
    data = np.random.default_rng(0).normal(size=(5, 3))
    kernel = aw.nngp(network(combine, count), points=2**14)
    K = np.asarray(aw.gram(kernel, data))
    np.testing.assert_allclose(K, K.T, rtol=1e-12)
    np.testing.assert_allclose(K[1:3, 4], np.asarray(aw.gram(kernel, data[1:3], data[4:]))[:, 0], rtol=1e-12)
    np.testing.assert_allclose(K[0, 3], jax.jit(kernel)(data[0], data[3]), rtol=1e-12)
    other = aw.nngp(network(combine, count), points=2**14, seed=1)
    assert 0 < abs(float(jax.jit(other)(data[0], data[3])) - K[0, 3]) < 1e-2


def test_float32_follows_the_inputs():
    combine, count = CASES["gate"]
    found = jax.jit(aw.kernels(network(combine, count)))(X.astype(np.float32), Y.astype(np.float32))
    wide = jax.jit(aw.kernels(network(combine, count)))(X, Y)
    assert found.ntk.dtype == np.float32
    np.testing.assert_allclose(found.ntk, wide.ntk, rtol=1e-4)


def test_gradients_in_inputs_and_variances():
    combine, count = CASES["gate"]
    kernel = lambda x, v: aw.ntk(network(combine, count, varu=v))(x, jnp.asarray(Y))
    gx, gv = jax.jit(jax.grad(kernel, (0, 1)))(jnp.asarray(X), 1.3)
    h = 1e-5
    fixed = jax.jit(kernel)
    slope = (fixed(jnp.asarray(X) + h * np.eye(3)[0], 1.3) - fixed(jnp.asarray(X) - h * np.eye(3)[0], 1.3)) / (2 * h)
    np.testing.assert_allclose(gx[0], slope, rtol=1e-5)
    np.testing.assert_allclose(
        gv, (fixed(jnp.asarray(X), 1.3 + h) - fixed(jnp.asarray(X), 1.3 - h)) / (2 * h), rtol=1e-5
    )
    at_itself = jax.grad(lambda x: aw.nngp(network(combine, count))(x, jnp.asarray(X)))(jnp.asarray(X))
    assert np.isfinite(at_itself).all()


def test_gradients_through_jumps_are_refused():
    net = network(lambda a, b, c: a * jnp.sign(c + b * a), 2)
    with pytest.raises(aw.UnsupportedError, match="jumps"):
        jax.grad(lambda x: aw.nngp(net)(x, jnp.asarray(Y)))(jnp.asarray(X))


def test_what_is_integrated_has_no_error():
    gate = lambda z: 0.5 + 0.5 * jax.lax.erf(z)
    net = network(lambda a, b, c: a * gate(b), 2)
    found = aw.kernels(net)(X, Y)
    assert [float(e) for e in found.error] == [0.0, 0.0]
    q, k, c = X @ X / 3, Y @ Y / 3, X @ Y / 3
    gates = 0.25 + 0.25 * 2 / np.pi * np.arcsin(2 * c / np.sqrt((1 + 2 * q) * (1 + 2 * k)))
    np.testing.assert_allclose(found.nngp, c * gates, rtol=1e-12)


def test_budget_that_is_not_enough_warns():
    combine, count = CASES["maximum"]
    with pytest.warns(aw.AccuracyWarning, match="budget"):
        found = aw.kernels(network(combine, count), tol=1e-9, budget=2**15)(X, Y)
    assert found.error.nngp > 0


@pytest.mark.parametrize("bad", [{"tol": 0}, {"seed": -1}, {"points": 0}, {"budget": 1.5}])
def test_settings_are_checked(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        aw.kernels(network(*CASES["gate"]), **bad)


def test_points_are_normal_and_nets():
    net = digits(6, 3, 4)
    z = np.concatenate([normals(net.at(2), k, 256, jnp.float64) for k in (0, 256)])
    np.testing.assert_array_equal(z, normals(net.at(2), 0, 512, jnp.float64))
    np.testing.assert_array_equal(z[256:], normals(net.at(2).later(256), 0, 256, jnp.float64))
    counts = np.histogram(z[:, 5], [-np.inf, -0.6744897501960817, 0, 0.6744897501960817, np.inf])[0]
    assert (counts == 128).all()  # each quarter has its share, exactly
    assert np.isfinite(normals(net.at(0), 0, 2**14, jnp.float32)).all()


def test_derivative_of_a_root_at_singular_matrices():
    rng = np.random.default_rng(1)
    G, H = rng.normal(size=(2, 4, 2))
    S = lambda t: (G + t * H) @ (G + t * H).T  # of rank two throughout
    value, slope = jax.jvp(lambda t: root(S(t)), (0.3,), (1.0,))
    np.testing.assert_allclose(value @ value, S(0.3), atol=1e-12)
    np.testing.assert_allclose(slope, (root(S(0.3 + 1e-6)) - root(S(0.3 - 1e-6))) / 2e-6, atol=1e-6)


@pytest.mark.long
def test_points_that_are_held_are_held_in_blocks(monkeypatch):
    """A loop's points, and that the memory does not grow with their number beyond what it may be."""
    net = aw.zoo.gru(2, jnp.sin, pool="last")
    x, y = np.random.default_rng(0).normal(size=(2, 3, 2))
    found, memory = [], []
    for bound in (2**40, 2**21):
        monkeypatch.setattr(accuracy, "MEMORY", bound)
        run = lambda x, y, s: pair(net, "nngp", x, y, s)
        kernel = jax.jit(accuracy.controlled(run, accuracy.Accuracy(points=2**17), lambda: False)).lower(x, y).compile()
        found.append(kernel(x, y))
        memory.append(kernel.memory_analysis().temp_size_in_bytes)
    (whole, error), (blocks, other) = found
    assert memory[1] < 2**22 < memory[0]
    np.testing.assert_allclose(blocks, whole, atol=0.3 * float(error))
    np.testing.assert_allclose(other, error, rtol=0.3)


@pytest.mark.slow
def test_the_same_input_twice_stays_the_same_through_sampled_layers():
    """What is sampled in a layer says of equal inputs that they are equal: their second layer is that of one input."""

    def init(n):
        return {"U": aw.Normal((2, n, 3)), "W": aw.Normal((n, n)), "v": aw.Normal((n,))}

    def apply(p, x):
        n = p["v"].size
        a, b = p["U"] @ x / jnp.sqrt(3)
        h = p["W"] @ (jnp.tanh(a) * jnp.maximum(a + b, jnp.sin(b))) / jnp.sqrt(n)
        return p["v"] @ jnp.sign(h) / jnp.sqrt(n)

    kernel = jax.jit(aw.nngp(aw.Network(init, apply), points=2**14))
    np.testing.assert_allclose(kernel(X, X), 1.0, atol=1e-5)  # an angle of the root of the rounding error
