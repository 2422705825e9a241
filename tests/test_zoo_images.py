"""The zoo over images, graphs and tokens: theory against simulation, and what every kernel has to be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import anywidth as aw
from anywidth import zoo

rng = np.random.default_rng(7)
IMAGES = rng.normal(size=(3, 4, 4, 2))
EDGES = np.triu(rng.uniform(size=(3, 5, 5)) < 0.5, 1).astype(float)
TOKENS = rng.normal(size=(2, 3)) + 0.7 * rng.normal(size=(3, 2, 3))
GRAPHS = (EDGES + EDGES.transpose(0, 2, 1), rng.normal(size=(3, 5, 2)))

NETWORKS = {
    "cnn_pooled": (zoo.cnn(2, 2, varb=0.1), IMAGES),
    "cnn_flattened": (zoo.cnn(2, 2, strides=2, size=(4, 4)), IMAGES),
    "cnn_erf_valid": (zoo.cnn(2, 2, jax.lax.erf, window=2, padding="VALID", varb=0.0), IMAGES),
    "resnet": (zoo.resnet(2), IMAGES),
    "unet": (zoo.unet(2, 1), IMAGES),
    "gcn": (zoo.gcn(2), GRAPHS),
    "gcn_nodes": (zoo.gcn(2, pool="none"), GRAPHS),
    "vit": (zoo.vit(2, (4, 4), patch=2), IMAGES),
    "attention": (zoo.attention(3), TOKENS),
    "attention_transformer": (zoo.attention(3, block="transformer", causal=True), TOKENS),
    "maxpool": (zoo.maxpool_cnn(2, 6), rng.normal(size=(3, 6, 2))),
}
# Their NTK has a jump within an expectation that is sampled: the slope of the NNGP alone is there.
SAMPLED_WITH_JUMPS = {"maxpool"}
VARIED = {
    "cnn_pooled": lambda varw, varv: zoo.cnn(2, 2, varb=0.1, varw=varw, varv=varv),
    "cnn_flattened": lambda varw, varv: zoo.cnn(2, 2, strides=2, size=(4, 4), varw=varw, varv=varv),
    "resnet": lambda varw, varv: zoo.resnet(2, varw=varw, varv=varv),
    "unet": lambda varw, varv: zoo.unet(2, 1, varw=varw, varv=varv),
    "gcn": lambda varw, varv: zoo.gcn(2, varw=varw, varv=varv),
    "vit": lambda varw, varv: zoo.vit(2, (4, 4), patch=2, varw=varw, varv=varv),
    "attention": lambda varw, varv: zoo.attention(3, varw=varw, varv=varv),
    "maxpool": lambda varw, varv: zoo.maxpool_cnn(2, 6, varw=varw, varv=varv),
}


def example(X, i):
    return jax.tree.map(lambda a: jnp.asarray(a[i]), X)


def simulated(net, x, y, n, seeds):
    """The mean of the empirical NTK over draws, and its standard error."""
    net = net.along(lambda n: n) if net.second_width else net
    one = jax.jit(lambda key: aw.empirical_ntk(net)(net.sample(key, n, dtype=jnp.float64), x, y))
    found = np.array([one(key) for key in jax.random.split(jax.random.key(0), seeds)])
    return found.mean(0), found.std(0, ddof=1) / np.sqrt(seeds)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "maxpool"])  # which test_simulation.py has
def test_theory_against_simulation(name):
    net, X = NETWORKS[name]
    x, y = example(X, 0), example(X, 1)
    wanted = np.asarray(aw.ntk(net)(x, y))
    sizes = ((8, 900), (24, 250)) if net.second_width else ((32, 96), (96, 32))
    small, big = (simulated(net, x, y, n, seeds) for n, seeds in sizes)
    value = (3 * big[0] - small[0]) / 2  # what is of order 1/n dies out
    error = np.hypot(3 * big[1], small[1]) / 2
    assert (error < 0.1 * np.abs(wanted).max()).all()
    assert (np.abs(value - wanted) < 4 * error + 0.02 * np.abs(wanted).max()).all(), (value, error, wanted)


SLOW = {
    "resnet",
    "unet",
    "cnn_erf_valid",
    "vit",
    "gcn_nodes",
    "attention",
    "attention_transformer",
    "maxpool",
    "gcn",
    "cnn_pooled",
}


def marked(names, quick=None):
    """Those that are slow to compile are `long`."""
    quick = set(NETWORKS) - SLOW if quick is None else quick
    return [name if name in quick else pytest.param(name, marks=pytest.mark.long) for name in names]


def total(net, kinds, x, y):
    return sum(jnp.sum(getattr(aw, kind)(net)(x, y)) for kind in kinds)


def differences(f, t, step=1e-3):
    """The slope of a function of one number, of fourth order in the step."""
    return (8 * (f(t + step) - f(t - step)) - (f(t + 2 * step) - f(t - 2 * step))) / (12 * step)


@pytest.mark.parametrize("name", marked(NETWORKS))
def test_a_kernel_is_symmetric_positive_and_differentiable(name):
    net, X = NETWORKS[name]
    pairs = jax.jit(jax.vmap(jax.vmap(aw.kernels(net), (None, 0)), (0, None)))
    K = pairs(X, X)
    for k in (K.nngp, K.ntk):
        rank = (k.ndim - 2) // 2
        matrix = np.asarray(k).transpose((0, *range(2, 2 + rank), 1, *range(2 + rank, 2 + 2 * rank)))
        side = int(np.sqrt(matrix.size))
        np.testing.assert_allclose(matrix.reshape(side, side), matrix.reshape(side, side).T, rtol=1e-7, atol=1e-9)
        assert np.linalg.eigvalsh(matrix.reshape(side, side)).min() > -1e-7 * np.abs(matrix).max()
    single = pairs(*(jax.tree.map(lambda a: np.asarray(a, np.float32), X) for _ in range(2)))
    assert single.ntk.dtype == jnp.float32
    for kind in ("nngp", "ntk"):
        one, two = getattr(single, kind), getattr(K, kind)
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-5 * np.abs(two).max())
    pair = aw.kernels(net)(example(X, 0), example(X, 1))
    sampled = 4 * np.abs(pair.error.ntk + K.error.ntk[0, 1])
    assert (np.abs(pair.ntk - K.ntk[0, 1]) <= 1e-7 * np.abs(pair.ntk) + 1e-9 + sampled).all()
    x = example(X, 0)
    for other in (example(X, 1), x):
        kinds = ("nngp",) if name in SAMPLED_WITH_JUMPS else ("ntk",)
        slopes = jax.grad(lambda z, other=other, kinds=kinds: total(net, kinds, z, other))(x)
        assert all(np.isfinite(s).all() for s in jax.tree.leaves(slopes))


@pytest.mark.parametrize("name", marked(NETWORKS, {"cnn_flattened"}))
def test_slopes_in_the_inputs(name):
    """Along a direction, of two examples and of one with itself, moved as one."""
    net, X = NETWORKS[name]
    kinds = ("nngp",) if name in SAMPLED_WITH_JUMPS else ("nngp", "ntk")
    x, y = example(X, 0), example(X, 1)
    way = jax.tree.map(lambda a: jnp.asarray(np.random.default_rng(1).normal(size=a.shape)), x)

    @jax.jit
    def along(t, y, both):
        moved, other = (jax.tree.map(lambda a, d, s=s: a + s * d, z, way) for z, s in ((x, t), (y, t * both)))
        return total(net, kinds, moved, other)

    slope = jax.jit(jax.grad(along))
    for other, both in ((y, 0.0), (x, 1.0)):
        wanted = differences(lambda t, o=other, b=both: along(t, o, b), 0.0)
        # of an example with itself, the angle between two that are one is known to 1e-8, and divided by the step
        rounding = 2e-8 / 1e-3 * both * abs(along(0.0, other, both))
        close = 1e-3 if name in SAMPLED_WITH_JUMPS else 1e-6  # what is sampled, to the tolerance of its values
        np.testing.assert_allclose(slope(0.0, other, both), wanted, rtol=close, atol=rounding)


@pytest.mark.parametrize("name", marked(VARIED, {"cnn_flattened"}))
def test_slopes_in_the_variances(name):
    _, X = NETWORKS[name]
    x, y = example(X, 0), example(X, 1)

    @jax.jit
    def kernel(log):
        return total(
            VARIED[name](jnp.exp(log), jnp.exp(-log)), ("nngp",) if name == "maxpool" else ("nngp", "ntk"), x, y
        )

    np.testing.assert_allclose(jax.jit(jax.grad(kernel))(0.2), differences(kernel, 0.2), rtol=1e-7)
