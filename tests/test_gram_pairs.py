"""A matrix is what its pairs are, one by one, to rounding: for every network of the zoo, at the inputs that are hard.

Under `gram` everything is compiled into one program, in which XLA recomputes what is cheap with other roundings than
for a pair alone. A decision (is this correlation one?) that then falls differently must not show.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import anywidth as aw
from anywidth import zoo


def hard(*shape, zeros=True):
    """Two examples, the first once more and its opposite; zeros, or if those have no kernel an example half zero."""
    x, y = np.random.default_rng(5).normal(size=(2, *shape))
    half = y * (1 - np.arange(len(y)) % 2).reshape(-1, *[1] * (y.ndim - 1))
    return np.stack([x, y, x, -x, 0 * x if zeros else half])


def graphs():
    edges = np.array([[0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0]], float)
    return np.stack([edges] * 5), hard(4, 2)


# Where an average over positions rounds the covariance of an example with itself otherwise than its variance, the angle
# between the two is 1e-8, and a relu's derivative sees it; batch norm's integrals, with batches x and -x, do so too.
ANGLE = 1e-8

# name: (network, examples, tolerance of the NTK in float64)
TABLE = {
    "mlp": (lambda: zoo.mlp(3, 2, varb=0.1), hard(3), 1e-12),
    "mlp sign": (lambda: zoo.mlp(3, 2, jnp.sign), hard(3), 1e-12),
    "rnn": (lambda: zoo.rnn(3, jax.nn.relu, varb=0.0), hard(3, 3), 1e-12),
    "transformer": (lambda: zoo.transformer(3, 2), hard(4, 3, zeros=False), 1e-12),
    "transformer causal": (lambda: zoo.transformer(3, 1, causal=True, varb=0.1), hard(4, 3, zeros=False), 1e-12),
    "batchnorm": (lambda: zoo.batchnorm_mlp(5, 1, epsilon=0.1), hard(4, 5), ANGLE),
    "cnn": (lambda: zoo.cnn(2, 2), hard(3, 3, 2), 1e-12),
    "resnet": (lambda: zoo.resnet(2), hard(4, 4, 2), 1e-12),
    "unet": (lambda: zoo.unet(2, 1), hard(4, 4, 2), ANGLE),
    "gcn": (lambda: zoo.gcn(2), graphs(), 1e-12),
    "glu": (lambda: zoo.glu_mlp(3), hard(3), 1e-12),
    "highway": (lambda: zoo.highway(3, 1), hard(3), 1e-12),
    "vit": (lambda: zoo.vit(2, (4, 4), patch=2), hard(4, 4, 2), ANGLE),
    "gru": (lambda: zoo.gru(3), hard(2, 3), 1e-12),
    "lstm": (lambda: zoo.lstm(3), hard(2, 3), 1e-12),
    "maxpool": (lambda: zoo.maxpool_cnn(2, 4), hard(4, 2), 1e-12),
}
QUICK = {"mlp", "mlp sign", "transformer causal", "cnn"}
DTYPES = {"float64": np.float64, "float32": np.float32}
CASES = [
    pytest.param(
        name, dtype, id=f"{name}-{dtype}", marks=() if name in QUICK and dtype != "float32" else pytest.mark.long
    )
    for name in TABLE
    for dtype in DTYPES
]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_gram_is_its_pairs(name, dtype):
    net, X, ntk_tolerance = TABLE[name]
    dtype = DTYPES[dtype]
    X = jax.tree.map(lambda a: a.astype(dtype), X)
    kernel = aw.kernels(net())
    pair = jax.jit(kernel)
    found = aw.gram(kernel, X)
    n = len(jax.tree.leaves(X)[0])
    one = lambda i: jax.tree.map(lambda a: a[i], X)  # noqa: E731
    for key in ("nngp", "ntk"):
        K = np.asarray(getattr(found, key))
        # what is sampled is symmetric by computing one triangle
        wanted = np.array([[getattr(pair(one(min(i, j)), one(max(i, j))), key) for j in range(n)] for i in range(n)])
        wanted = np.where(np.tri(n, k=-1).reshape(n, n, *[1] * (K.ndim - 2)) > 0, K, wanted)
        assert K.dtype == dtype
        half = K.ndim // 2 - 1
        assert np.array_equal(K, K.transpose(1, 0, *range(2 + half, K.ndim), *range(2, 2 + half)))
        size = np.array([np.sqrt(np.abs(wanted[i, i]).max()) for i in range(n)])
        scale = np.multiply.outer(size, size).reshape(n, n, *[1] * (K.ndim - 2))
        tolerance = 1e-5 if dtype == np.float32 else 1e-12 if key == "nngp" else ntk_tolerance
        assert (np.abs(K - wanted) <= tolerance * scale).all(), np.abs(K - wanted).max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_transformer(dtype):
    """Two of its tokens have a correlation that is four units in the last place from one: one or not, by rounding."""
    with np.load(Path(__file__).parent / "reference" / "transformer.npz") as file:
        X, wanted = file["x_i"].astype(DTYPES[dtype]), {k: file[f"i_d2_unit_{k}"] for k in ("nngp", "ntk")}
    found = aw.gram(aw.kernels(zoo.transformer(3, 2)), X)
    for key, K in wanted.items():
        np.testing.assert_allclose(getattr(found, key), K, rtol=1e-12 if dtype == "float64" else 1e-5)


@pytest.mark.long
def test_guards_give_the_limit_by_themselves():
    """Zero where there is nothing, with zero derivatives of any order; no decision is taken on the result."""
    from anywidth.expect.numerics import safe_recip, safe_rsqrt, safe_sqrt, signed_angle

    for x in (0.0, -1e-20):
        for f in (safe_sqrt, safe_recip, safe_rsqrt, lambda x: signed_angle(0.0, x)):
            for g in (f, jax.grad(f), jax.grad(jax.grad(f)), jax.jacfwd(jax.grad(f))):
                assert float(g(x)) == 0.0
        for sign in (1.0, -1.0):
            assert float(signed_angle(sign, x)) == sign * np.pi / 2
            assert jax.grad(signed_angle, (0, 1))(sign, x) == (0.0, 0.0)
    np.testing.assert_allclose(jax.grad(signed_angle, (0, 1))(1.0, 3.0), (3**0.5 / 4, -1 / (8 * 3**0.5)), rtol=1e-14)
