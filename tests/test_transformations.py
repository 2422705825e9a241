"""Kernels are pure functions of a pair: symmetric, positive semidefinite, and jit, vmap and grad go through them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import anywidth as aw
import networks

NAMES = [
    "mlp_relu",
    pytest.param("mlp_dot_general", marks=pytest.mark.long),
    "resnet_identity_relu",
    "layer_norm_after_relu",
    "product_of_linear_kets",
]
x, y = networks.vx, networks.vy
# among them duplicates, opposite vectors, parallel vectors and zeros
X = np.stack([x, y, x, -x, 0 * x, 2 * y, np.array([0.0, 0.0, 1e-3])])


@pytest.fixture(scope="module", params=NAMES)
def net(request):
    return networks.get(request.param).net


def grams(net, X):
    both = jax.jit(jax.vmap(jax.vmap(aw.kernels(net), (None, 0)), (0, None)))
    out = both(X, X)
    return {"nngp": np.asarray(out.nngp), "ntk": np.asarray(out.ntk)}


def test_matrices(net):
    """vmap of vmap is the pairs; symmetric and positive semidefinite to rounding; float32 is near float64."""
    found = grams(net, X)
    single = grams(net, X.astype(np.float32))
    pair = aw.kernels(net)(X[0], X[3])
    for kind, K in found.items():
        scale = K.max()
        np.testing.assert_allclose(K[0, 3], getattr(pair, kind), rtol=1e-12, atol=1e-14 * scale)
        np.testing.assert_allclose(K, K.T, rtol=0, atol=1e-14 * scale)
        np.testing.assert_allclose(K[0], K[2], rtol=0, atol=1e-14 * scale)
        assert np.linalg.eigvalsh(K).min() > -1e-7 * scale, kind
        assert single[kind].dtype == np.float32
        np.testing.assert_allclose(single[kind], K, rtol=0, atol=1e-5 * scale)


def test_gradients_in_the_inputs(net):
    """Finite at coinciding, opposite, parallel and zero inputs; finite differences where the kernel is smooth."""

    def total(a, b):
        out = aw.kernels(net)(a, b)
        return out.nngp + out.ntk

    slope = jax.jit(jax.vmap(jax.grad(total), (None, 0)))
    for a in (x, 0 * x):
        assert np.isfinite(slope(a, X)).all()
    step = 1e-5 * np.array([0.3, -0.5, 0.8])
    ends = jax.vmap(total, (0, None))(np.stack([x + step, x - step]), y)
    np.testing.assert_allclose(slope(x, X)[1] @ step * 2, ends[0] - ends[1], rtol=1e-5)


def scaled(var):
    def init(n):
        return {"U": aw.Normal((n, 3), var=var), "W": aw.Normal((n, n), var=var / n), "v": aw.Normal((n,))}

    def apply(p, x):
        h = jax.nn.relu(p["W"] @ jax.nn.relu(p["U"] @ x))
        return p["v"] @ h / jnp.sqrt(len(p["v"]))

    return aw.Network(init, apply)


def test_gradient_in_a_variance():
    """A traced variance, also one that is divided by the width: the kernel is proportional to its square."""
    value, slope = jax.jit(jax.value_and_grad(lambda var: aw.nngp(scaled(var))(x, y)))(1.7)
    np.testing.assert_allclose(value, aw.nngp(scaled(1.7))(x, y), rtol=1e-12)
    np.testing.assert_allclose(slope, 2 * value / 1.7, rtol=1e-12)
    assert np.isfinite(jax.grad(lambda var: aw.nngp(scaled(var))(x, x))(1.0))


def test_gradient_in_numbers_of_a_whole_matrix():
    """Reverse mode through two vmaps, in a variance and in a number of apply at once."""
    X = np.random.default_rng(0).normal(size=(4, 3))

    def total(numbers, transform):
        def init(n):
            return {"u": aw.Normal((n, 3)), "b": aw.Normal((n,), var=numbers["var"]), "v": aw.Normal((n,))}

        def apply(p, x):
            h = p["u"] @ x + p["b"]
            return p["v"] @ (jax.nn.relu(h) + numbers["slope"] * h) / jnp.sqrt(h.size)

        return transform(aw.nngp(aw.Network(init, apply)))

    def by_vmap(kernel):
        return jax.vmap(jax.vmap(kernel, (None, 0)), (0, None))(X, X).sum()

    def by_pairs(kernel):
        return sum(kernel(x, y) for x in X for y in X)

    numbers = {"var": 0.3, "slope": 0.5}
    found = jax.grad(lambda numbers: total(numbers, by_vmap))(numbers)
    for key in numbers:
        step = {k: v + 1e-5 * (k == key) for k, v in numbers.items()}
        back = {k: v - 1e-5 * (k == key) for k, v in numbers.items()}
        slope = (total(step, by_vmap) - total(back, by_vmap)) / 2e-5
        np.testing.assert_allclose(found[key], slope, rtol=1e-7)
    np.testing.assert_allclose(total(numbers, by_vmap), total(numbers, by_pairs), rtol=1e-12)


def many_points():
    """Sixty inputs, among them duplicates, opposites, multiples, zeros and near neighbours."""
    rng = np.random.default_rng(9)
    some = rng.normal(size=(14, 3))
    near = some[:6] * (1 + 1e-9 * rng.normal(size=(6, 3)))
    return np.concatenate([some, some[:10], -some[:12], 1e-4 * some[:6], 1e4 * some[:6], near, 0 * some[:6]])


SEMIDEFINITE = [
    "mlp_relu", "mlp_leaky_classes", "mlp_row_vectors_abs", "mlp_nested_jit_gelu", "mlp_dot_general",
    "random_features_then_dense", "resnet_identity_relu", "same_branch_twice", "dense_net_concatenation",
    "activation_square",
]  # fmt: skip


SLOW = {"random_features_then_dense", "mlp_nested_jit_gelu", "mlp_dot_general"}  # to compile


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long) if n in SLOW else n for n in SEMIDEFINITE])
def test_sixty_points_are_semidefinite_to_rounding(name):
    X = many_points()
    X = np.where(np.abs(X) > 1e3, 1e-3 * X, X) if name == "activation_square" else X
    found = aw.gram(aw.kernels(networks.get(name).net), X)
    # an NTK sees the angle between neighbours through the derivative of a kink, and no angle below 1e-8 can be known
    for K, rounding in ((np.asarray(found.nngp), 1e-12), (np.asarray(found.ntk), 1e-8)):
        assert K.shape == (60, 60)
        assert np.array_equal(K, K.T)
        size = np.where(np.diag(K) > 0, np.sqrt(np.diag(K)), 1.0)
        values = np.linalg.eigvalsh(K / np.outer(size, size))
        assert values.min() >= -rounding * values.max(), values.min()


def test_a_while_loop_that_counts_is_the_loop_written_out():
    def network(loop):
        def init(n):
            return {"U": aw.Normal((n, 3)), "W": aw.Normal((n, n)), "v": aw.Normal((n,))}

        def apply(p, x):
            n = len(p["v"])
            h = loop(lambda h: jax.nn.relu(p["W"] @ h / jnp.sqrt(n)), p["U"] @ x)
            return p["v"] @ h / jnp.sqrt(n)

        return aw.Network(init, apply)

    def counted(f, h):
        return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, f(c[1])), (0, h))[1]

    found, wanted = (aw.kernels(network(loop))(x, y) for loop in (counted, lambda f, h: f(f(f(h)))))
    np.testing.assert_allclose(found.nngp, wanted.nngp, rtol=1e-14)
    np.testing.assert_allclose(found.ntk, wanted.ntk, rtol=1e-14)
