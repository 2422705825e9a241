"""Against neural-tangents 0.6.5 itself, on what its `stax` computes correctly (reference/neural_tangents_kernels.py).

The same networks as plain JAX. What it gets wrong is not here: branches that share a kernel's randomness (x + x,
x * x), which tests/test_simulation.py compares with simulation. Of `RectifiedMonomial` there is one layer, and no
example with itself: there it is NaN.
"""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import anywidth as aw

REFERENCE = json.loads(Path(__file__).with_name("reference").joinpath("neural_tangents.json").read_text())
W, B = 1.3, 0.2
erf = lax.erf


def data(*shape):
    return np.random.default_rng([len(shape), *shape]).normal(size=(3, *shape))


class Layers:
    """Collects the parameters a network asks for while it is run once at width n, and hands them out afterwards."""

    def __init__(self, n, given=None):
        self.n, self.given, self.shapes = n, given, []

    def __call__(self, *shape):
        self.shapes.append(shape)
        return jnp.zeros(shape) if self.given is None else self.given[len(self.shapes) - 1]


def network(body, example):
    """`body(layers, x)` as a Network whose parameters have variance one."""

    def shapes(n):
        asked = Layers(n)
        jax.eval_shape(lambda x: body(asked, x), example)
        return asked.shapes

    def init(n):
        return [aw.Normal(shape) for shape in shapes(n)]

    def apply(params, x):
        n = max(p.shape[-1] for p in params)
        return body(Layers(n, params), x)

    return aw.Network(init, apply)


def two_widths(body):
    """The same of a body whose heads are many too: parameters (heads, n, n), and one of heads alone."""

    def init(n, heads):
        return {"U": aw.Normal((3, n)), "b": aw.Normal((n,)), "v": aw.Normal((n,)), "c": aw.Normal((n,))} | {
            name: aw.Normal((heads, n, n)) for name in "QKVO"
        }

    return aw.Network(init, body)


def dense(p, x, out=None, w=W, b=B):
    out = p.n if out is None else out
    y = x @ p(x.shape[-1], out) * (w / np.sqrt(x.shape[-1]))
    return y if b is None else y + b * p(out)


def conv(p, x, size, strides=None, padding="SAME", transposed=False):
    d = len(size)
    strides = strides or (1,) * d
    letters = "HWD"[:d]
    numbers = ("N" + letters + "C", letters + "IO", "N" + letters + "C")
    fan_in = int(np.prod(size)) * x.shape[-1]
    kernel = p(*size, x.shape[-1], p.n)
    if padding == "CIRCULAR":
        width = [((k - 1) // 2, k // 2) for k in size] + [(0, 0)]
        x, padding = jnp.pad(x, width, mode="wrap"), "VALID"
    if transposed:
        y = lax.conv_transpose(x[None], kernel, strides, padding, dimension_numbers=numbers)[0]
    else:
        y = lax.conv_general_dilated(x[None], kernel, strides, padding, dimension_numbers=numbers)[0]
    return y * (W / np.sqrt(fan_in)) + B * p(p.n)


def local(p, x, size):
    padded = jnp.pad(x, ((size // 2, size // 2), (0, 0)))
    patches = jnp.stack([padded[o : o + len(x)] for o in range(size)], 1)
    y = jnp.einsum("poc,pocn->pn", patches, p(len(x), size, x.shape[-1], p.n))
    return y * (W / np.sqrt(size * x.shape[-1])) + B * p(len(x), p.n)


def local_2d(p, x, size, strides, padding):
    shape = jax.eval_shape(
        lambda x: lax.conv_general_dilated_patches(
            x[None], size, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        x,
    ).shape
    kernel = p(*shape[1:], p.n)
    y = lax.conv_general_dilated_local(
        x[None], kernel, strides, padding, size, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y[0] * (W / np.sqrt(shape[-1]))


def pool(x, window, strides=None, padding="VALID", counts=False):
    d = len(window)
    strides = strides or (1,) * d
    total = lax.reduce_window(x, 0.0, lax.add, (*window, 1), (*strides, 1), padding)
    if counts:
        ones = lax.reduce_window(jnp.ones((*x.shape[:-1], 1)), 0.0, lax.add, (*window, 1), (*strides, 1), padding)
        return total / ones
    return total / np.prod(window)


def head(p, x):
    return dense(p, x, 1, 1.0, None)[0]


def gap(p, x):
    return head(p, x.mean(tuple(range(x.ndim - 1))))


def flat(p, x):
    return head(p, x.reshape(-1))


def layer_norm(x, axes):
    return (x - x.mean(axes, keepdims=True)) / jnp.sqrt(x.var(axes, keepdims=True) + 1e-5)


relu = jax.nn.relu
NONLINEARITIES = {
    "identity": lambda x: x,
    "relu": relu,
    "leaky_relu": lambda x: jax.nn.leaky_relu(x, 0.1),
    "abs": jnp.abs,
    "ab_relu": lambda x: -0.3 * jnp.minimum(x, 0) + 1.2 * jnp.maximum(x, 0),
    "erf": erf,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "sin": lambda x: 1.1 * jnp.sin(0.7 * x + 0.3),
    "cos": lambda x: 1.1 * jnp.cos(0.7 * x + 0.3),
    "exp": lambda x: 0.9 * jnp.exp(0.4 * x),
    "gaussian": lambda x: 1.1 * jnp.exp(-0.4 * x**2),
    "rbf": lambda x: np.sqrt(2) * jnp.sin(np.sqrt(2 * 0.6) * x + np.pi / 4),
    "monomial": lambda x: x**3,
    "polynomial": lambda x: 0.3 + 0.5 * x - 0.2 * x**2,
    "sign": jnp.sign,
    "sigmoid_like": lambda x: 0.5 * erf(x / 2.4020563531719796) + 0.5,
    "gabor": lambda x: jnp.exp(-(x**2)) * jnp.sin(x),
    "monomial_4": lambda x: x**4,
    "elementwise_square": lambda x: x**2,
    "tanh": jnp.tanh,
}


def hermite(p, x):
    x = dense(p, x / jnp.sqrt((x**2).mean()), w=1.0, b=None)
    x = dense(p, (x**3 - 3 * x) / np.sqrt(6), w=1.0, b=None)
    return head(p, (x**2 - 1) / np.sqrt(2))


def exp_normalized(x, gamma=0.5):
    """The function whose kernel is sqrt(q q') exp(gamma (rho - 1)): its series in Hermite polynomials, to 1e-9."""
    scale = jnp.sqrt((x**2).mean())
    z, last, total = x / scale, jnp.zeros_like(x), 0.0
    now = jnp.ones_like(x)
    for k in range(9):
        total = total + np.sqrt(np.exp(-gamma) * gamma**k) / math.factorial(k) * now
        last, now = now, z * now - k * last
    return scale * total


def rectified(k):
    return lambda p, x: head(p, (lambda z: jnp.where(z >= 0, z**k, 0.0))(dense(p, x)))


def mlp(phi):
    return lambda p, x: dense(p, phi(dense(p, phi(dense(p, x)))), 1, 1.0, None)[0]


def resized(method):
    def body(p, x):
        x = relu(conv(p, relu(conv(p, x, (3, 3))), (3, 3)))
        x = jax.image.resize(x, (6, 4, x.shape[-1]), method)
        return gap(p, relu(conv(p, x, (3, 3))))

    return body


def residual_gap(p, x):
    x = conv(p, x, (3, 3))
    x = x + conv(p, relu(conv(p, relu(x), (3, 3))), (3, 3))
    return gap(p, relu(x))


def residual_flatten(p, x):
    x = conv(p, x, (3, 3))
    for _ in range(2):
        x = x + conv(p, relu(x), (3, 3))
    return flat(p, relu(x))


def wide_resnet(p, x):
    x = conv(p, x, (3, 3))
    y = conv(p, relu(conv(p, relu(x), (3, 3), (2, 2))), (3, 3))
    return flat(p, pool(relu(y + conv(p, x, (3, 3), (2, 2))), (2, 2)))


def concatenated(p, x):
    x = conv(p, x, (3, 3))
    x = jnp.concatenate([conv(p, relu(x), (3, 3)), conv(p, erf(x), (1, 1))], -1)
    return gap(p, relu(conv(p, x, (3, 3))))


def concatenated_positions(p, x):
    x = conv(p, x, (3,))
    x = jnp.concatenate([conv(p, relu(x), (3,)), conv(p, erf(x), (1,))])
    return flat(p, relu(conv(p, relu(x), (3,))))


def product_of_convolutions(p, x):
    x = conv(p, x, (3,))
    return flat(p, relu(conv(p, relu(conv(p, x, (3,))) * erf(conv(p, x, (2,))), (3,))))


def circular_pool(x):
    return pool(jnp.pad(x, ((0, 1), (0, 0)), mode="wrap"), (3,), (2,))


def product(p, x):
    x = dense(p, x)
    return head(p, relu(dense(p, x)) * erf(dense(p, x)))


def attention(mechanism, positions="none", masked=False):
    def body(p, x):
        alive = ~(x == 100.0).all(-1) if masked else np.ones(len(x), bool)
        x = relu(dense(p, x))
        y = u = x
        if positions == "concatenated":  # a third of the channels, in kernels that count eight and four
            y = u = jnp.concatenate([x * np.sqrt(2), 0.8 * p(len(x), p.n)], -1) / np.sqrt(1.5)
        elif positions != "none":
            y = x + 0.8 * p(len(x), p.n)
            u = y if positions == "of values" else x
        heads = []
        for _ in range(2):
            k = y @ p(y.shape[-1], p.n) / y.shape[-1] ** 0.5
            v = u @ p(u.shape[-1], p.n) / u.shape[-1] ** 0.5
            heads.append(mechanism(jnp.where(alive, 0.99 * k @ k.T / p.n, -np.inf if masked else 0.0)) @ v)
        x = 1.3 * 1.2 * jnp.concatenate(heads, -1) @ p(2 * p.n, p.n) / (2 * p.n) ** 0.5 + 0.2 * p(p.n)
        x = jnp.where(alive[:, None], relu(x), 0.0).sum(0) / alive.sum()
        return head(p, x)

    return body


def root_attention(p, x):
    """Scores of independent queries and keys over the root of their size, not normalised, of very many heads."""
    heads, n = p["Q"].shape[:2]
    x = relu(x @ p["U"] * (W / np.sqrt(3)) + B * p["b"])
    q, k, v = (jnp.einsum("ti,hij->htj", x, p[name]) / jnp.sqrt(n) for name in "QKV")
    o = 0.99 * jnp.einsum("htd,hsd->hts", q, k) / jnp.sqrt(n) @ v
    x = 1.3 * 1.2 * jnp.einsum("htj,hji->ti", o, p["O"]) / jnp.sqrt(n * heads) + 0.2 * p["c"]
    return relu(x).mean(0) @ p["v"] / jnp.sqrt(n)


def graph(p, example):
    adjacency, x = example
    x = adjacency.T @ relu(dense(p, x))
    return gap(p, adjacency.T @ relu(dense(p, x)))


def graph_edges(p, x):
    senders, receivers = np.array([[0, 1], [3, 1], [3, 2], [4, 0], [1, 4], [2, 2]]).T
    for _ in range(2):
        x = jax.ops.segment_sum(relu(dense(p, x))[senders], receivers, len(x))
    return gap(p, x)


def stacked(*steps):
    def body(p, x):
        for step in steps:
            x = step(p, x)
        return x

    return body


def c(*size, **more):
    return lambda p, x: conv(p, x, size, **more)


def on(f, *args, **more):
    return lambda p, x: f(x, *args, **more)


def on_parameters(f, *args):
    return lambda p, x: f(p, x, *args)


r, e = on(relu), on(erf)
mixing = np.random.default_rng(8).normal(size=(4, 4))
masked = data(4, 3)
masked[1, 2:] = masked[2, 3:] = 100.0
pattern = np.random.default_rng(5).uniform(size=(3, 5, 5)) * (np.random.default_rng(6).uniform(size=(3, 5, 5)) < 0.5)

NETWORKS = {f"mlp_{name}": (mlp(phi), data(4)) for name, phi in NONLINEARITIES.items()} | {
    **{f"shallow_rectified_monomial_{k}": (rectified(k), data(4)) for k in range(3)},
    "mlp_hermite": (hermite, data(4)),
    "mlp_exp_normalized": (mlp(exp_normalized), data(4)),
    "mlp_standard_parameterization": (
        lambda p, x: dense(p, erf(dense(p, relu(dense(p, x)))), 1)[0],
        data(4),
    ),
    "conv1d_same_gap": (stacked(c(3), r, c(3), r, gap), data(7, 3)),
    "conv1d_valid_flatten": (stacked(c(3, padding="VALID"), r, c(3, padding="VALID"), e, flat), data(8, 3)),
    "conv2d_same_gap": (stacked(c(3, 3), r, c(3, 2), r, gap), data(5, 4, 3)),
    "conv2d_same_flatten": (stacked(c(3, 3), r, c(3, 3), r, flat), data(5, 4, 3)),
    "conv2d_valid_gap": (stacked(c(3, 2, padding="VALID"), r, c(2, 3, padding="VALID"), e, gap), data(6, 5, 2)),
    "conv2d_strided_gap": (stacked(c(3, 3, strides=(2, 1)), r, c(3, 3, strides=(2, 2)), r, gap), data(7, 6, 2)),
    "conv2d_strided_flatten": (
        stacked(c(3, 3, strides=(2, 2), padding="VALID"), r, c(1, 1, strides=(1, 2)), r, flat),
        data(7, 6, 2),
    ),
    "conv2d_circular_gap": (
        stacked(c(3, 3, padding="CIRCULAR"), r, c(3, 3, padding="CIRCULAR"), r, gap),
        data(5, 4, 2),
    ),
    "conv2d_circular_flatten": (
        stacked(c(3, 3, padding="CIRCULAR"), r, c(3, 3, padding="CIRCULAR"), r, flat),
        data(5, 4, 2),
    ),
    "conv3d_same_gap": (stacked(c(2, 3, 3), r, c(3, 2, 1), r, gap), data(3, 4, 3, 2)),
    "conv_local_gap": (
        stacked(lambda p, x: local(p, x, 3), r, lambda p, x: local(p, x, 3), r, gap),
        data(6, 2),
    ),
    "conv_local_2d_flatten": (
        stacked(
            on_parameters(local_2d, (2, 3), (2, 1), "VALID"),
            r,
            on_parameters(local_2d, (2, 1), (1, 1), "SAME"),
            r,
            flat,
        ),
        data(5, 4, 2),
    ),
    "conv_transpose_valid_flatten": (
        stacked(c(3), r, c(3, strides=(2,), padding="VALID", transposed=True), r, flat),
        data(4, 2),
    ),
    "conv_transpose_gap": (stacked(c(3, 3), r, c(3, 3, strides=(2, 2), transposed=True), r, gap), data(5, 4, 2)),
    "avg_pool_valid_flatten": (stacked(c(3, 3), r, on(pool, (2, 2), (2, 2)), c(3, 3), r, flat), data(6, 6, 2)),
    "avg_pool_same_gap": (
        stacked(c(3, 3), r, on(pool, (2, 3), (2, 2), "SAME"), c(3, 3), r, gap),
        data(5, 5, 2),
    ),
    "avg_pool_overlapping_flatten": (
        stacked(c(3, 3), r, on(pool, (3, 3), (1, 1), "SAME", counts=True), flat),
        data(6, 5, 2),
    ),
    "avg_pool_circular_flatten": (stacked(c(3), r, on(circular_pool), c(2), r, flat), data(6, 2)),
    "sum_pool_same_flatten": (
        stacked(c(3), r, lambda p, x: 3 * pool(x, (3,), (2,), "SAME"), c(2), r, flat),
        data(5, 2),
    ),
    "dot_general_left": (stacked(c(3), r, on(lambda x: mixing @ x), lambda p, x: dense(p, x), r, gap), data(4, 3)),
    "sum_pool_valid_gap": (
        stacked(c(3, 3), r, lambda p, x: 4 * pool(x, (2, 2), (2, 2)), c(3, 3), r, lambda p, x: 9 * gap(p, x)),
        data(6, 6, 2),
    ),
    "image_resize_nearest_flatten": (resized("nearest"), data(3, 2, 2)),
    "image_resize_linear_gap": (resized("linear"), data(3, 2, 2)),
    "residual_cnn_gap": (residual_gap, data(4, 5, 3)),
    "residual_cnn_flatten": (residual_flatten, data(4, 5, 3)),
    "wide_resnet_block": (wide_resnet, data(6, 6, 3)),
    "concatenated_branches": (concatenated, data(4, 4, 2)),
    "concatenated_positions": (concatenated_positions, data(4, 2)),
    "product_of_convolutions": (product_of_convolutions, data(4, 2)),
    "product_of_branches": (product, data(4)),
    "layer_norm_channels": (stacked(c(3), on(layer_norm, -1), r, c(3), r, gap), data(4, 3)),
    "layer_norm_all": (stacked(c(3), on(layer_norm, (0, 1)), r, c(3), r, flat), data(4, 3)),
    "slice_of_positions": (
        stacked(c(3, 3), r, lambda p, x: x[1:5:2, :3], c(2, 2), r, flat),
        data(6, 5, 2),
    ),
    "index_of_a_position": (stacked(c(3), r, c(3), r, lambda p, x: head(p, x[2])), data(6, 2)),
    "graph_dense": (graph, (pattern, data(5, 3))),
    "attention_softmax": (attention(jax.nn.softmax), data(4, 3)),
    "attention_identity": (attention(lambda s: s), data(4, 3)),
    "attention_relu": (attention(relu), data(4, 3)),
    "attention_abs": (attention(jnp.abs), data(4, 3)),
    "attention_positions_summed": (attention(jax.nn.softmax, "summed"), data(4, 3)),
    "attention_positions_of_values": (attention(jax.nn.softmax, "of values"), data(4, 3)),
    "attention_positions_concatenated": (attention(jax.nn.softmax, "concatenated"), data(4, 3)),
    "attention_masked": (attention(jax.nn.softmax, masked=True), masked),
    "attention_identity_root": (two_widths(root_attention), data(4, 3)),
    "graph_edges": (graph_edges, data(5, 3)),
}


# neural-tangents' standard parametrization: the rates of parameters of variance one that are divided by what it is not
WIDTH = 8
RATES = {"mlp_standard_parameterization": [4 / W**2, 1 / B**2, WIDTH / W**2, 1 / B**2, WIDTH / W**2, 1 / B**2]}
UNDEFINED_ON_THE_DIAGONAL = {f"shallow_rectified_monomial_{k}" for k in range(3)}


def test_the_table_is_complete():
    assert set(REFERENCE) == set(NETWORKS)


NOT_YET: dict[str, str] = {}
LONG = {  # to compile
    "mlp_abs", "mlp_ab_relu", "mlp_cos", "mlp_sin", "mlp_rbf",
    "mlp_exp_normalized", "mlp_gabor", "mlp_tanh", "mlp_gelu", "avg_pool_valid_flatten", "conv_transpose_gap",
    "image_resize_linear_gap", "concatenated_branches", "wide_resnet_block", "conv3d_same_gap",
    "avg_pool_overlapping_flatten", "conv2d_circular_gap", "residual_cnn_gap", "conv2d_strided_gap",
}  # fmt: skip
assert set(NETWORKS) >= LONG | set(NOT_YET)


def marked(name):
    refused = (
        [pytest.mark.xfail(reason=NOT_YET[name], strict=True, raises=aw.UnsupportedError)] if name in NOT_YET else []
    )
    return pytest.param(name, marks=[*refused, *[pytest.mark.long] * (name in LONG)])


@pytest.mark.parametrize("name", [marked(name) for name in NETWORKS])
def test_against_neural_tangents(name):
    body, x = NETWORKS[name]
    net = body if isinstance(body, aw.Network) else network(body, jax.tree.map(lambda a: a[0], x))
    kernel = aw.kernels(net, lr=RATES.get(name))
    found = jax.jit(jax.vmap(jax.vmap(kernel, (None, 0)), (0, None)))(x, x)
    for kind in ("nngp", "ntk"):
        wanted = np.array(REFERENCE[name][kind], float)
        known = np.isfinite(wanted)
        assert known.all() or (name in UNDEFINED_ON_THE_DIAGONAL and (known == ~np.eye(3, dtype=bool)).all())
        error = np.abs(getattr(found, kind) - wanted)[known].max()
        assert error <= 1e-6 * np.abs(wanted[known]).max(), (kind, found, wanted)
