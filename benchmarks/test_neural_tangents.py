"""Against neural-tangents on the same machine, one after the other.

It needs an environment of its own (tests/reference/neural_tangents_kernels.py says how); NEURAL_TANGENTS_PYTHON is its
Python. And what it does not say: the digits' kernel of a convolutional network in less than a minute.
"""

import itertools
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import anywidth as aw
from anywidth import Network, Normal, zoo
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


def data(shape):
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(np.float32) for _ in range(2)]


def against(name, function, held, at_most):
    """Holds a kernel against that of neural-tangents: its seconds, and its values."""
    if not Path(PYTHON).exists():
        pytest.skip(f"neural-tangents is not installed at {PYTHON}")
    value = np.asarray(function(), np.float64)
    ours = seconds(function, 3)
    script = Path(__file__).with_name("neural_tangents_times.py")
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    out = subprocess.run([PYTHON, script, name], capture_output=True, text=True, check=True, env=clean)
    theirs = json.loads(out.stdout)[name]
    assert list(value.shape) == theirs["shape"]
    size = np.linalg.norm(value)
    assert abs(value.sum() - theirs["sum"]) < 1e-5 * np.sqrt(value.size) * size
    assert abs(value.ravel() @ np.cos(np.arange(value.size)) - theirs["weighted"]) < 1e-4 * size
    held(ours, theirs["seconds"], at_most)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_against_neural_tangents(name, held):
    """Its parameters have variance one and are multiplied by W_std; ours have variance W_std^2: their rate is that."""
    net, shape, at_most = BENCHMARKS[name]
    var = jax.tree.leaves(net.init(8)["W"], is_leaf=lambda p: isinstance(p, Normal))[0].var
    x, y = data(shape)
    kernel = jax.jit(jax.vmap(jax.vmap(aw.ntk(net, lr={"W": float(var)}), (None, 0)), (0, None)))
    against(name, lambda: kernel(x, y), held, at_most)


def relu_mlp():
    """784-512-512-10 with the parameters of neural_tangents_times.py."""
    sizes, rng = (784, 512, 512, 10), np.random.default_rng(1)
    shapes = list(itertools.pairwise(sizes))
    params = [rng.normal(size=shape).astype(np.float32) for shape in shapes]

    def apply(params, x):
        for i, w in enumerate(params):
            x = (jax.nn.relu(x) if i else x) @ w / jnp.sqrt(w.shape[0])
        return x

    return Network(lambda n: [Normal(s) for s in shapes], apply), params


def empirical():
    """The kernel of all 10 x 10 outputs of 100 x 100 examples, as a function to be called again and again."""
    net, params = relu_mlp()
    return partial(aw.gram, partial(aw.empirical_ntk(net), params), *data((100, 784)), progress=False)


def test_empirical_ntk(held):
    """Within twice the time of the structured derivatives."""
    against("empirical", empirical(), held, 2.0)


def test_memory_of_the_empirical_ntk(held):
    """What the process takes beyond what it has before, at its peak."""
    code = """if True:
        import re, jax, test_neural_tangents
        peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
        jax.block_until_ready(jax.numpy.ones(3))
        before = peak()
        jax.block_until_ready(test_neural_tangents.empirical()())
        print(peak() - before)"""
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
    )
    held(float(out.stdout), 2.0**30, 1.0, "bytes")


def test_digits_flattened(held):
    """1797 digits of 8 x 8: both kernels of a network of three convolutions, flattened; compilation included."""
    digits = np.random.default_rng(0).uniform(0, 1, size=(1797, 8, 8, 1)).astype(np.float32)
    kernel = aw.kernels(zoo.cnn(1, 3, size=(8, 8)))
    held(seconds(lambda: aw.gram(kernel, digits).ntk, 1), 60.0, 1.0)
