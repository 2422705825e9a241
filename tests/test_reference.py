"""The numbers of the papers' reference implementations, corrected (tests/reference), through `nngp` and `ntk`."""

from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import anywidth as aw
from anywidth import zoo

REFERENCE = Path(__file__).parent / "reference"
NB = {"varw": 1.0, "varu": 2.0, "varb": 0.2, "varv": 1.0}
UNIT = {"varw": 1.0, "varu": 1.0, "varb": 0.0, "varv": 1.0}  # the bias starts at zero and is trained
SINGLE = 1e-5


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


# Single precision of what takes longest to compile is left to `make long`; the quicker networks have it in `make test`.
mostly_double = pytest.mark.parametrize(
    "dtype", [np.float64, pytest.param(np.float32, marks=pytest.mark.long)], ids=["float64", "float32"]
)


@pytest.mark.parametrize("pool", ["avg", "last"])
@pytest.mark.parametrize(("name", "variances"), [("nb", NB), ("unit", UNIT)], ids=["nb", "unit"])
def test_rnn(name, variances, pool, dtype):
    data = load("rnn")
    net = zoo.rnn(3, pool={"avg": "mean", "last": "last"}[pool], **variances)
    X = data["x_i"].astype(dtype)
    found = aw.gram(aw.kernels(net), X, X)
    close(found.nngp, data[f"i_{name}_{pool}_nngp"], 1e-9, dtype)
    close(found.ntk, data[f"i_{name}_{pool}_ntk"], 1e-9, dtype)


@mostly_double
@pytest.mark.parametrize(
    ("pool", "count"), [("avg", 2), *(pytest.param(pool, 3, marks=pytest.mark.long) for pool in ("avg", "last"))]
)
def test_rnn_on_sequences_of_different_lengths(pool, count, dtype):
    """A program for each pair of lengths: three for two sequences, six for three."""
    data = load("rnn")
    tokens = data["var_537_tokens"].astype(dtype)
    X = [tokens[start : start + length] for start, length in zip(data["var_537_starts"], (5, 3, 7), strict=True)]
    found = aw.gram(aw.kernels(zoo.rnn(3, pool={"avg": "mean", "last": "last"}[pool], **NB)), X[:count])
    close(found.nngp, data[f"var_537_nb_loop_{pool}_nngp"][:count, :count], 1e-9, dtype)
    close(found.ntk, data[f"var_537_nb_loop_{pool}"][:count, :count], 1e-9, dtype)


@pytest.mark.parametrize(
    ("name", "depth", "variances"),
    [("d1_unit", 1, {}), ("d1_vw", 1, {"varw": 1.7}), ("d2_unit", 2, {}), ("d2_vu", 2, {"varu": 1.6})],
    ids=["d1_unit", "d1_vw", "d2_unit", "d2_vu"],
)
def test_transformer(name, depth, variances, dtype):
    data = load("transformer")
    X = data["x_i"].astype(dtype)
    found = aw.gram(aw.kernels(zoo.transformer(3, depth, **variances)), X, X)
    close(found.nngp, data[f"i_{name}_nngp"], 1e-9, dtype)
    close(found.ntk, data[f"i_{name}_ntk"], 1e-9, dtype)


@cache
def batchnorm_kernels(depth):
    return jax.jit(aw.kernels(zoo.batchnorm_mlp(10, depth)))


@mostly_double
@pytest.mark.parametrize(
    ("pair", "i", "j"), [("1", 0, 0), pytest.param("2", 1, 1, marks=pytest.mark.long), ("x", 0, 1)], ids=["1", "2", "x"]
)
@pytest.mark.parametrize("depth", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_batchnorm(depth, pair, i, j, dtype):
    """Elementwise but for `ntkx`: there the stored numbers are off by 1e-10 of their largest.

    Twice and three times the points, and a longer reach, change ours by less than 1e-13 of each entry; entries that are
    5e-3 of the largest differ from the stored ones by 1.5e-8 of themselves.
    """
    data = load("batchnorm")
    batches = [data["x1"].astype(dtype), data["x2"].astype(dtype)]
    found = batchnorm_kernels(depth)(batches[i], batches[j])
    for kernel, tolerance in (("nngp", 1e-9), ("ntk", 1e-8)):
        K = np.asarray(getattr(found, kernel))
        expected = data[f"d{depth}_{kernel}{pair}"]
        assert K.dtype == dtype
        slack = 2e-10 * np.abs(expected).max() if (kernel, pair) == ("ntk", "x") else 0.0
        np.testing.assert_allclose(K, expected, rtol=tolerance if dtype == np.float64 else 1e-4, atol=slack)


def sentences():
    """Tokens (16, 2 * 16) of both sentences: x = (p, m) with p p^T - m m^T = d * glove_cov, for d = 2 * 16.

    The reference's covariance was rounded to float32, so the two copies of a word that is in both sentences do not
    quite agree and the matrix has eigenvalues of -1e-8. No tokens have such products; `signed` makes up for that.
    """
    values, vectors = np.linalg.eigh(load("gp4a")["glove_cov"].astype(float))
    roots = vectors * np.sqrt(2 * 16 * np.abs(values))
    tokens = np.concatenate([roots * (values > 0), roots * (values < 0)], axis=1)
    return tokens[:7], tokens[7:]


def signed(net, where, variance, sign):
    """`net` with the variance of its input weights times `sign` on the second half of the input features.

    A traced variance is taken on trust, so it can be negative.
    """

    other = sign * variance

    def init(n):
        params = net.init(n)
        holder, name, axis = where(params)
        shape = list(holder[name].shape)
        shape[axis] //= 2
        holder[name] = (aw.Normal(tuple(shape), variance), aw.Normal(tuple(shape), other))
        return params

    def apply(params, x):
        params = jax.tree.map(lambda leaf: leaf, params)
        holder, name, axis = where(params)
        holder[name] = jnp.concatenate(holder[name], axis)
        return net.apply(params, x)

    return aw.Network(init, apply)


def rnn_input(params):
    return params, "U", 1


def transformer_input(params):
    return params["layers"][0], "U", 0


TRANSFORMER_NB = {"varu": 2.0, "varw": 3.0, "varb": 0.1}


def erf_recursion(clipped):
    """The recursion of the erf RNN written out, with determinants of covariances left as they are or clipped at zero.

    Williams's arcsine as an angle: tan = 2 c / sqrt(1 + 2 p + 2 q + 4 (p q - c^2)).
    """
    covariance = load("gp4a")["glove_cov"].astype(float)
    h, k = np.zeros((16, 16)), np.zeros((16, 16))
    for a in range(16):
        for b in range(a + 1):
            h[a, b] = h[b, a] = c = covariance[a, b] + (0.0 if {a, b} & {0, 7} else k[a - 1, b - 1])
        for b in range(a + 1):  # an entry needs both diagonal ones
            p, q, c = h[a, a], h[b, b], h[a, b]
            det = 0.0 if a == b else p * q - c * c
            det = max(det, 0.0) if clipped else det
            k[a, b] = k[b, a] = 2 / np.pi * np.arctan2(2 * c, np.sqrt(1 + 2 * p + 2 * q + 4 * det))
    return k


def test_why_rnn_erf_differs_from_what_tokens_can_have():
    """Both sentences begin with one word: glove_cov, rounded to float32, gives the two a correlation of 1 + 1.4e-7.

    The stored rnn_erf is the recursion that goes on as if nothing were wrong. With the determinant clipped at zero, as
    in the library, it differs along the equal beginnings and nowhere else.
    """
    stored, clipped = load("gp4a")["rnn_erf"], erf_recursion(clipped=True)
    np.testing.assert_allclose(erf_recursion(clipped=False), stored, rtol=1e-13)
    differs = np.abs(clipped / stored - 1) > 1e-12
    assert set(zip(*np.nonzero(differs), strict=True)) == {p for i in range(7) for p in ((i, i + 7), (i + 7, i))}
    np.testing.assert_allclose(clipped, stored, rtol=2e-7)


@mostly_double
@pytest.mark.parametrize(
    ("name", "net", "where", "varu"),
    [
        ("rnn_erf", zoo.rnn(32, pool="none"), rnn_input, 1.0),
        pytest.param(
            "transformer_d2_nb",
            zoo.transformer(32, 2, pool="none", causal=True, **TRANSFORMER_NB),
            transformer_input,
            2.0,
            marks=pytest.mark.long,
        ),
        (
            "transformer_d1_unit",
            zoo.transformer(32, 1, pool="none", causal=True, varb=0.0),
            transformer_input,
            1.0,
        ),
    ],
    ids=["rnn_erf", "transformer_d2_nb", "transformer_d1_unit"],
)
def test_token_kernels(name, net, where, varu, dtype):
    X = [x.astype(dtype) for x in sentences()]
    kernel = jax.jit(lambda sign, x, y: aw.nngp(signed(net, where, varu, sign))(x, y))
    K = np.block([[np.asarray(kernel(dtype(-1.0), x, y)) for y in X] for x in X])
    expected = erf_recursion(clipped=True) if name == "rnn_erf" else load("gp4a")[name]
    assert K.dtype == dtype
    if dtype == np.float64:
        np.testing.assert_allclose(K, expected, rtol=1e-9)
    else:  # inner products of nearly orthogonal tokens are rounded in proportion to the lengths of the tokens
        lengths = np.sqrt(np.diag(expected))
        off = np.abs(K - expected) - SINGLE * np.abs(expected)
        assert (off <= np.finfo(dtype).eps * np.outer(lengths, lengths)).all()


def relu_recursion(largest):
    """The recursion of the relu RNN written out, with correlations clipped at `largest`."""
    covariance = load("gp4a")["glove_cov"].astype(float)
    h, k = np.zeros((16, 16)), np.zeros((16, 16))
    for a in range(16):
        for b in range(a + 1):  # earlier rows and columns first; an entry needs both diagonal ones
            h[a, b] = covariance[a, b] + (0.0 if {a, b} & {0, 7} else k[a - 1, b - 1])
            h[b, a] = h[a, b]
            if a == b:
                r = largest
                k[a, a] = h[a, a] * (np.sqrt(1 - r * r) + (np.pi - np.arccos(r)) * r) / (2 * np.pi)
        for b in range(a):
            scale = np.sqrt(h[a, a] * h[b, b])
            r = np.clip(h[a, b] / scale, -1.0, largest)
            k[a, b] = k[b, a] = scale * (np.sqrt(1 - r * r) + (np.pi - np.arccos(r)) * r) / (2 * np.pi)
    return k


def test_why_rnn_relu_differs():
    """The stored rnn_relu is the recursion with correlations clipped at 1 - 1e-5, against what its README says."""
    np.testing.assert_allclose(relu_recursion(1 - 1e-5), load("gp4a")["rnn_relu"], rtol=1e-13)


def test_relu_rnn_against_the_recursion_without_clipping(dtype):
    """Within each sentence: across them a float32 rounding makes a correlation of 1 + 1e-7."""
    for x, part in zip(sentences(), (slice(0, 7), slice(7, 16)), strict=True):
        x = x.astype(dtype)
        net = zoo.rnn(32, jax.nn.relu, pool="none")
        kernel = jax.jit(lambda sign, x, net=net: aw.nngp(signed(net, rnn_input, 1.0, sign))(x, x))
        close(kernel(dtype(-1.0), x), relu_recursion(1.0)[part, part], 1e-9, dtype)
