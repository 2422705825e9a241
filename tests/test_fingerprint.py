"""Fingerprints: the same for the same thing in any process, another for anything else."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

import anywidth as aw
from anywidth.examples import dataset
from anywidth.grams.fingerprint import data_fingerprint, kernel_fingerprint
from anywidth.zoo import mlp, rnn

SPEC = jax.ShapeDtypeStruct((3,), jnp.float64)


def of(kernel, spec=SPEC):
    return kernel_fingerprint(kernel, [(spec, spec)])


def scanned(length, factor):
    def kernel(x, y):
        return jax.lax.scan(lambda c, _: (jnp.tanh(c * factor), None), x @ y, None, length=length)[0]

    return kernel


TABLE = np.arange(3.0)
KERNELS = {
    "dot": lambda x, y: x @ y,
    "scaled": lambda x, y: 2.0 * (x @ y),
    "captured": lambda x, y: x @ (TABLE * y),
    "captured other": lambda x, y: x @ ((TABLE + 1) * y),
    "exchanged": lambda x, y: x @ jnp.sin(y),
    "exchanged other": lambda x, y: jnp.sin(x) @ y,
    "loop": scanned(3, 1.0),
    "longer loop": scanned(4, 1.0),
    "inner number": scanned(3, 1.5),
    "tuple": lambda x, y: (x @ y,),
    "ntk": aw.ntk(mlp(3, 2)),
    "nngp": aw.nngp(mlp(3, 2)),
    "deeper": aw.ntk(mlp(3, 3)),
    "other variance": aw.ntk(mlp(3, 2, varw=2.0000001)),
    "quadrature": aw.ntk(mlp(3, 2, jnp.tanh)),
    "bias": aw.ntk(mlp(3, 2, varb=0.0)),
}


def test_all_are_different():
    found = {of(kernel): name for name, kernel in KERNELS.items()}
    assert len(found) == len(KERNELS)


def test_the_same_from_other_objects():
    assert of(aw.ntk(mlp(3, 2))) == of(KERNELS["ntk"])
    assert of(scanned(3, 1.0)) == of(KERNELS["loop"])


def test_the_same_in_another_process():
    """Hashes of strings, addresses and the order of sets are others there."""
    code = (
        "import jax, json; jax.config.update('jax_enable_x64', True)\n"
        "import test_fingerprint as t, anywidth as aw\n"
        "print(json.dumps({n: t.of(k) for n, k in t.KERNELS.items()} | {'rnn': t.of(t.recurrent(), t.SEQUENCE)}))"
    )
    env = os.environ | {"PYTHONHASHSEED": "77", "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    expected = {name: of(kernel) for name, kernel in KERNELS.items()} | {"rnn": of(recurrent(), SEQUENCE)}
    assert json.loads(out) == expected


SEQUENCE = jax.ShapeDtypeStruct((4, 3), jnp.float64)


def recurrent():
    return aw.ntk(rnn(3))


def test_data():
    X = np.arange(12.0).reshape(4, 3)
    prints = [
        data_fingerprint(dataset(data))
        for data in (X, X + 1, X.astype(np.float32), X.reshape(4, 3, 1), X[::-1], {"a": X}, (X, X), list(X[:3]))
    ]
    assert len(set(prints)) == len(prints)
    assert data_fingerprint(dataset(list(X))) == prints[0]  # the same examples, however they are given
