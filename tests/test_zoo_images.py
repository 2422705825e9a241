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
@pytest.mark.parametrize("name", NETWORKS)
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
    "gcn",
    "cnn_pooled",
    "resnet",
    "unet",
    "cnn_erf_valid",
    "vit",
    "gcn_nodes",
    "attention",
    "attention_transformer",
}  # to compile


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long) if n in SLOW else n for n in NETWORKS])
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
    np.testing.assert_allclose(single.ntk, K.ntk, rtol=5e-3, atol=1e-3 * np.abs(K.ntk).max())
    x = example(X, 0)
    for other in (example(X, 1), x):
        slopes = jax.jit(jax.grad(lambda z, other=other: aw.ntk(net)(z, other).sum()))(x)
        assert all(np.isfinite(s).all() for s in jax.tree.leaves(slopes))
