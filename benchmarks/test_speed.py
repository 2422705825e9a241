"""Speed after compilation, against the papers' reference implementations (vectorised NumPy, 2 threads, in seconds)."""

import jax
import numpy as np
import pytest

import anywidth as aw
from anywidth import zoo
from conftest import seconds

RNN = {"varw": 1.0, "varu": 2.0, "varb": 0.2}


def sequences(n, length, d=3):
    return np.random.default_rng(0).standard_normal((n, length, d))


def batches(size, d=20):
    return np.random.default_rng(1).standard_normal((2, size, d))


def timed(benchmark, function, rounds=5):
    jax.block_until_ready(function())  # compiles
    benchmark.pedantic(lambda: jax.block_until_ready(function()), rounds=1)
    return seconds(function, rounds)


@pytest.mark.parametrize(("pool", "reference", "at_most"), [("mean", 0.38, 1.0), ("last", 0.14, 0.2)])
def test_rnn(benchmark, held, pool, reference, at_most):
    kernel, X = aw.ntk(zoo.rnn(3, pool=pool, **RNN)), sequences(32, 64)
    held(timed(benchmark, lambda: aw.gram(kernel, X)), reference, at_most)


def test_transformer(benchmark, held):
    kernel, X = aw.ntk(zoo.transformer(3, 4)), sequences(32, 32)
    held(timed(benchmark, lambda: aw.gram(kernel, X)), 2.2, 0.2)


@pytest.mark.parametrize(
    ("size", "same", "reference", "at_most"),
    [(8, True, 3.5, 1.0), (8, False, 102, 1.0), (32, True, 225, 1.0), (32, False, 10.0, 1.0)],
    ids=["8-same", "8-two", "32-same", "32-two"],
)
def test_batchnorm(benchmark, held, size, same, reference, at_most):
    """Depth 3; two batches of 32 take the reference about 28,000 s, and us at most 10."""
    kernel = jax.jit(aw.kernels(zoo.batchnorm_mlp(20, 3)))
    x, y = batches(size)
    held(timed(benchmark, lambda: kernel(x, x if same else y), rounds=2), reference, at_most)
