"""The numbers of the papers' reference implementations, corrected (tests/reference), through `nngp` and `ntk`."""

from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest

import anywidth as aw
from anywidth import zoo

REFERENCE = Path(__file__).parent / "reference"
NB = {"varw": 1.0, "varu": 2.0, "varb": 0.2, "varv": 1.0}
UNIT = {"varw": 1.0, "varu": 1.0, "varb": 0.0, "varv": 1.0}  # the bias starts at zero and is trained
SINGLE = 1e-5

SENTENCES = ("The brown fox jumps over the dog", "The quick brown fox jumps over the lazy dog")


@cache
def load(name):
    with np.load(REFERENCE / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def close(found, expected, tolerance, dtype, single=SINGLE):
    found = np.asarray(found)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, expected, rtol=tolerance if dtype == np.float64 else single)


@pytest.fixture(params=[np.float64, np.float32], ids=["float64", "float32"])
def dtype(request):
    return request.param


def both(net):
    return {"nngp": aw.nngp(net), "ntk": aw.ntk(net)}


@pytest.mark.parametrize("kernel", ["nngp", "ntk"])
@pytest.mark.parametrize("pool", ["avg", "last"])
@pytest.mark.parametrize(("name", "variances"), [("nb", NB), ("unit", UNIT)], ids=["nb", "unit"])
def test_rnn(name, variances, pool, kernel, dtype):
    data = load("rnn")
    net = zoo.rnn(3, pool={"avg": "mean", "last": "last"}[pool], **variances)
    K = aw.gram(both(net)[kernel], data["x_i"].astype(dtype), data["x_i"].astype(dtype))
    close(K, data[f"i_{name}_{pool}_{kernel}"], 1e-9, dtype)


@pytest.mark.parametrize("kernel", ["nngp", "ntk"])
@pytest.mark.parametrize("pool", ["avg", "last"])
def test_rnn_on_sequences_of_different_lengths(pool, kernel, dtype):
    data = load("rnn")
    tokens = data["var_537_tokens"].astype(dtype)
    X = [tokens[start : start + length] for start, length in zip(data["var_537_starts"], (5, 3, 7), strict=True)]
    net = zoo.rnn(3, pool={"avg": "mean", "last": "last"}[pool], **NB)
    expected = data[f"var_537_nb_loop_{pool}" + ("_nngp" if kernel == "nngp" else "")]
    close(aw.gram(both(net)[kernel], X, X), expected, 1e-9, dtype)
    close(aw.gram(both(net)[kernel], X), expected, 1e-9, dtype)


@pytest.mark.parametrize("kernel", ["nngp", "ntk"])
@pytest.mark.parametrize(
    ("name", "depth", "variances"),
    [("d1_unit", 1, {}), ("d1_vw", 1, {"varw": 1.7}), ("d2_unit", 2, {}), ("d2_vu", 2, {"varu": 1.6})],
    ids=["d1_unit", "d1_vw", "d2_unit", "d2_vu"],
)
def test_transformer(name, depth, variances, kernel, dtype):
    data = load("transformer")
    X = data["x_i"].astype(dtype)
    K = aw.gram(both(zoo.transformer(3, depth, **variances))[kernel], X, X)
    close(K, data[f"i_{name}_{kernel}"], 1e-9, dtype)


@pytest.mark.parametrize("kernel", ["nngp", "ntk"])
@pytest.mark.parametrize(("pair", "i", "j"), [("1", 0, 0), ("2", 1, 1), ("x", 0, 1)], ids=["1", "2", "x"])
@pytest.mark.parametrize("depth", [1, 2])
def test_batchnorm(depth, pair, i, j, kernel, dtype):
    data = load("batchnorm")
    batches = [data["x1"].astype(dtype), data["x2"].astype(dtype)]
    K = jax.jit(both(zoo.batchnorm_mlp(10, depth))[kernel])(batches[i], batches[j])
    close(K, data[f"d{depth}_{kernel}{pair}"], {"nngp": 1e-9, "ntk": 1e-8}[kernel], dtype, single=1e-4)


def sentences():
    """Tokens whose products over d are exactly the reference's: a triangular factor over distinct words."""
    words = [word for sentence in SENTENCES for word in sentence.split()]
    distinct = sorted(set(words), key=words.index)
    first = [words.index(word) for word in distinct]
    covariance = load("gp4a")["glove_cov"].astype(float)
    factor = np.linalg.cholesky(covariance[np.ix_(first, first)]) * np.sqrt(len(distinct))
    tokens = factor[[distinct.index(word) for word in words]]
    np.testing.assert_allclose(tokens @ tokens.T / len(distinct), covariance, rtol=1e-12)
    return tokens[:7], tokens[7:]


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("rnn_erf", lambda d: zoo.rnn(d, pool="none")),
        ("rnn_relu", lambda d: zoo.rnn(d, jax.nn.relu, pool="none")),
        (
            "transformer_d2_nb",
            lambda d: zoo.transformer(d, 2, pool="none", causal=True, varu=2.0, varw=3.0, varb=0.1),
        ),
        ("transformer_d1_unit", lambda d: zoo.transformer(d, 1, pool="none", causal=True, varb=0.0)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_token_kernels(name, make, dtype):
    X = [x.astype(dtype) for x in sentences()]
    kernel = jax.jit(aw.nngp(make(X[0].shape[1])))
    K = np.block([[np.asarray(kernel(x, y)) for y in X] for x in X])
    close(K, load("gp4a")[name], 1e-9, dtype)
