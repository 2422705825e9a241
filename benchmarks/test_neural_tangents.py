"""Against neural-tangents on the same machine, one after the other.

It needs an environment of its own (tests/reference/neural_tangents_kernels.py says how); NEURAL_TANGENTS_PYTHON is its
Python. And what it does not say: the digits' kernel of a convolutional network in less than a minute.
"""

import json
import os
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest

import anywidth as aw
from anywidth import zoo
from conftest import seconds

PYTHON = os.environ.get("NEURAL_TANGENTS_PYTHON", "/opt/nt/bin/python")
# name: (network, shape of a data set, at most this many times the seconds of neural-tangents)
BENCHMARKS = {
    "cnn": (zoo.cnn(3, 3), (20, 16, 16, 3), 1 / 5),
    "mlp_3_relu": (zoo.mlp(100, 3), (2000, 100), 1.0),
    "mlp_3_erf": (zoo.mlp(100, 3, jax.lax.erf, varw=1.0), (2000, 100), 1.0),
    "mlp_10_relu": (zoo.mlp(100, 10), (2000, 100), 1.0),
    "mlp_10_erf": (zoo.mlp(100, 10, jax.lax.erf, varw=1.0), (2000, 100), 1.0),
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_against_neural_tangents(name, held):
    net, shape, at_most = BENCHMARKS[name]
    if not Path(PYTHON).exists():
        pytest.skip(f"neural-tangents is not installed at {PYTHON}")
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    kernel = jax.jit(jax.vmap(jax.vmap(aw.ntk(net), (None, 0)), (0, None)))
    jax.block_until_ready(kernel(x, y))
    ours = seconds(lambda: kernel(x, y), 3)
    script = Path(__file__).with_name("neural_tangents_times.py")
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    out = subprocess.run([PYTHON, script, name], capture_output=True, text=True, check=True, env=clean)
    held(ours, json.loads(out.stdout)[name]["seconds"], at_most)


def test_digits_flattened(held):
    """1797 digits of 8 x 8: both kernels of a network of three convolutions, flattened; compilation included."""
    digits = np.random.default_rng(0).uniform(0, 1, size=(1797, 8, 8, 1)).astype(np.float32)
    kernel = aw.kernels(zoo.cnn(1, 3, size=(8, 8)))
    held(seconds(lambda: aw.gram(kernel, digits).ntk, 1), 60.0, 1.0)
