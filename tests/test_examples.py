"""The scripts of `examples/` do what they say."""

import importlib.util
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_learn_hyperparameters(key):
    pytest.importorskip("optax")
    pytest.importorskip("sklearn")
    example = load("learn_hyperparameters")
    X = jax.random.normal(key, (40, 3))
    y = jnp.sin(2 * X[:, 0]) + 0.1 * jax.random.normal(key, (40,))
    theta, history = example.learn(X, y, steps=30)
    assert history[-1] > history[0] + 5
    assert all(b > a - 0.5 for a, b in itertools.pairwise(history))
    assert float(jnp.exp(theta["log_noise"])) < 0.5  # the true one is 0.01, and it began at 1
    assert theta["log_scale"][0] > theta["log_scale"][1:].max() + 0.5  # the one feature that matters
