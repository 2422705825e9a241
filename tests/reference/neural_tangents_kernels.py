"""Kernels of neural-tangents 0.6.5 for tests/test_neural_tangents.py.

neural-tangents does not import on current JAX; run this in an environment of its own:

    python -m venv /tmp/nt && /tmp/nt/bin/pip install neural-tangents==0.6.5 jax==0.4.38 jaxlib==0.4.38 tf2jax==0.3.6
    /tmp/nt/bin/python tests/reference/neural_tangents_kernels.py

It writes neural_tangents.json: for every network the NNGP and NTK of three examples, to 13 digits; null where they are
NaN (`RectifiedMonomial` of an example with itself). All of its layers are there but `Dropout`, which is no function of
parameters and an example.
"""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

jax.config.update("jax_enable_x64", True)

from neural_tangents import stax  # noqa: E402


def data(*shape: int) -> np.ndarray:
    """Three examples; the same in the test."""
    return np.random.default_rng([len(shape), *shape]).normal(size=(3, *shape))


W, B = 1.3, 0.2


def dense(n=8, w=W, b=B):
    return stax.Dense(n, W_std=w, b_std=b, parameterization="ntk")


def conv(filter_shape, strides=None, padding="SAME", n=8, w=W, b=B):
    return stax.Conv(n, filter_shape, strides, padding, W_std=w, b_std=b, parameterization="ntk")


def mlp(phi):
    return stax.serial(dense(), phi, dense(), phi, dense(1, 1.0, None)), data(4)


def head():
    return dense(1, 1.0, None)


def cnn(shape, *layers):
    return stax.serial(*layers, head()), data(*shape)


def residual(*branch):
    return stax.serial(stax.FanOut(2), stax.parallel(stax.Identity(), stax.serial(*branch)), stax.FanInSum())


def unit(x):
    """Examples whose entries have mean square one."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True))


def standard(n):
    return stax.Dense(n, W_std=W, b_std=B, parameterization="standard")


MIXING = np.random.default_rng(8).normal(size=(4, 4))

NETWORKS = {
    # nonlinearities
    "mlp_identity": lambda: mlp(stax.Identity()),
    "mlp_relu": lambda: mlp(stax.Relu()),
    "mlp_leaky_relu": lambda: mlp(stax.LeakyRelu(0.1)),
    "mlp_abs": lambda: mlp(stax.Abs()),
    "mlp_ab_relu": lambda: mlp(stax.ABRelu(-0.3, 1.2)),
    "mlp_erf": lambda: mlp(stax.Erf()),
    "mlp_gelu": lambda: mlp(stax.Gelu()),
    "mlp_sin": lambda: mlp(stax.Sin(1.1, 0.7, 0.3)),
    "mlp_cos": lambda: mlp(stax.Cos(1.1, 0.7, 0.3)),
    "mlp_exp": lambda: mlp(stax.Exp(0.9, 0.4)),
    "mlp_gaussian": lambda: mlp(stax.Gaussian(1.1, -0.4)),
    "mlp_rbf": lambda: mlp(stax.Rbf(0.6)),
    "mlp_monomial": lambda: mlp(stax.Monomial(3)),
    "mlp_polynomial": lambda: mlp(stax.Polynomial([0.3, 0.5, -0.2])),
    "mlp_sign": lambda: mlp(stax.Sign()),
    "mlp_sigmoid_like": lambda: mlp(stax.Sigmoid_like()),
    "mlp_gabor": lambda: mlp(stax.Gabor()),
    "mlp_monomial_4": lambda: mlp(stax.Monomial(4)),
    "shallow_rectified_monomial_0": lambda: cnn((4,), dense(), stax.RectifiedMonomial(0)),
    "shallow_rectified_monomial_1": lambda: cnn((4,), dense(), stax.RectifiedMonomial(1)),
    "shallow_rectified_monomial_2": lambda: cnn((4,), dense(), stax.RectifiedMonomial(2)),
    "mlp_elementwise_square": lambda: mlp(
        stax.Elementwise(lambda x: x**2, lambda cov12, var1, var2: 2 * cov12**2 + var1 * var2)
    ),
    # of variance one before each nonlinearity, which this layer asks for
    "mlp_hermite": lambda: (
        stax.serial(dense(w=1.0, b=None), stax.Hermite(3), dense(w=1.0, b=None), stax.Hermite(2), head()),
        unit(data(4)),
    ),
    "mlp_exp_normalized": lambda: mlp(stax.ExpNormalized(0.5, -1)),
    "mlp_standard_parameterization": lambda: (
        stax.serial(standard(8), stax.Relu(), standard(8), stax.Erf(), standard(1)), data(4)
    ),
    "mlp_tanh": lambda: mlp(stax.ElementwiseNumerical(jnp.tanh, 120)),
    # convolutions
    "conv1d_same_gap": lambda: cnn((7, 3), conv((3,)), stax.Relu(), conv((3,)), stax.Relu(), stax.GlobalAvgPool()),
    "conv1d_valid_flatten": lambda: cnn(
        (8, 3), conv((3,), padding="VALID"), stax.Relu(), conv((3,), padding="VALID"), stax.Erf(), stax.Flatten()
    ),
    "conv2d_same_gap": lambda: cnn(
        (5, 4, 3), conv((3, 3)), stax.Relu(), conv((3, 2)), stax.Relu(), stax.GlobalAvgPool()
    ),
    "conv2d_same_flatten": lambda: cnn((5, 4, 3), conv((3, 3)), stax.Relu(), conv((3, 3)), stax.Relu(), stax.Flatten()),
    "conv2d_valid_gap": lambda: cnn(
        (6, 5, 2), conv((3, 2), padding="VALID"), stax.Relu(), conv((2, 3), padding="VALID"), stax.Erf(),
        stax.GlobalAvgPool(),
    ),
    "conv2d_strided_gap": lambda: cnn(
        (7, 6, 2), conv((3, 3), (2, 1)), stax.Relu(), conv((3, 3), (2, 2)), stax.Relu(), stax.GlobalAvgPool()
    ),
    "conv2d_strided_flatten": lambda: cnn(
        (7, 6, 2), conv((3, 3), (2, 2), "VALID"), stax.Relu(), conv((1, 1), (1, 2)), stax.Relu(), stax.Flatten()
    ),
    "conv2d_circular_gap": lambda: cnn(
        (5, 4, 2), conv((3, 3), padding="CIRCULAR"), stax.Relu(), conv((3, 3), padding="CIRCULAR"), stax.Relu(),
        stax.GlobalAvgPool(),
    ),
    "conv2d_circular_flatten": lambda: cnn(
        (5, 4, 2), conv((3, 3), padding="CIRCULAR"), stax.Relu(), conv((3, 3), padding="CIRCULAR"), stax.Relu(),
        stax.Flatten(),
    ),
    "conv3d_same_gap": lambda: cnn(
        (3, 4, 3, 2), conv((2, 3, 3)), stax.Relu(), conv((3, 2, 1)), stax.Relu(), stax.GlobalAvgPool()
    ),
    "conv_local_gap": lambda: cnn(
        (6, 2), stax.ConvLocal(8, (3,), padding="SAME", W_std=W, b_std=B, parameterization="ntk"), stax.Relu(),
        stax.ConvLocal(8, (3,), padding="SAME", W_std=W, b_std=B, parameterization="ntk"), stax.Relu(),
        stax.GlobalAvgPool(),
    ),
    "conv_transpose_gap": lambda: cnn(
        (5, 4, 2), conv((3, 3)), stax.Relu(),
        stax.ConvTranspose(8, (3, 3), (2, 2), "SAME", W_std=W, b_std=B, parameterization="ntk"), stax.Relu(),
        stax.GlobalAvgPool(),
    ),
    "conv_local_2d_flatten": lambda: cnn(
        (5, 4, 2), stax.ConvLocal(8, (2, 3), (2, 1), "VALID", W_std=W, b_std=None, parameterization="ntk"), stax.Relu(),
        stax.ConvLocal(8, (2, 1), padding="SAME", W_std=W, b_std=None, parameterization="ntk"), stax.Relu(),
        stax.Flatten(),
    ),
    "conv_transpose_valid_flatten": lambda: cnn(
        (4, 2), conv((3,)), stax.Relu(),
        stax.ConvTranspose(8, (3,), (2,), "VALID", W_std=W, b_std=B, parameterization="ntk"), stax.Relu(),
        stax.Flatten(),
    ),
    # pooling
    "avg_pool_valid_flatten": lambda: cnn(
        (6, 6, 2), conv((3, 3)), stax.Relu(), stax.AvgPool((2, 2), (2, 2)), conv((3, 3)), stax.Relu(), stax.Flatten()
    ),
    "avg_pool_same_gap": lambda: cnn(
        (5, 5, 2), conv((3, 3)), stax.Relu(), stax.AvgPool((2, 3), (2, 2), "SAME"), conv((3, 3)), stax.Relu(),
        stax.GlobalAvgPool(),
    ),
    "avg_pool_overlapping_flatten": lambda: cnn(
        (6, 5, 2), conv((3, 3)), stax.Relu(), stax.AvgPool((3, 3), (1, 1), "SAME", normalize_edges=True), stax.Flatten()
    ),
    "avg_pool_circular_flatten": lambda: cnn(
        (6, 2), conv((3,)), stax.Relu(), stax.AvgPool((3,), (2,), "CIRCULAR"), conv((2,)), stax.Relu(), stax.Flatten()
    ),
    "sum_pool_same_flatten": lambda: cnn(
        (5, 2), conv((3,)), stax.Relu(), stax.SumPool((3,), (2,), "SAME"), conv((2,)), stax.Relu(), stax.Flatten()
    ),
    "sum_pool_valid_gap": lambda: cnn(
        (6, 6, 2), conv((3, 3)), stax.Relu(), stax.SumPool((2, 2), (2, 2)), conv((3, 3)), stax.Relu(),
        stax.GlobalSumPool(),
    ),
    # images upwards
    "image_resize_nearest_flatten": lambda: cnn(
        (3, 2, 2), conv((3, 3)), stax.Relu(), conv((3, 3)), stax.Relu(), stax.ImageResize((-1, 6, 4, -1), "nearest"),
        conv((3, 3)), stax.Relu(), stax.GlobalAvgPool(),
    ),
    "image_resize_linear_gap": lambda: cnn(
        (3, 2, 2), conv((3, 3)), stax.Relu(), conv((3, 3)), stax.Relu(), stax.ImageResize((-1, 6, 4, -1), "linear"),
        conv((3, 3)), stax.Relu(), stax.GlobalAvgPool(),
    ),
    # fixed linear maps of the positions
    "dot_general_left": lambda: cnn(
        (4, 3), conv((3,)), stax.Relu(),
        stax.DotGeneral(lhs=jnp.asarray(MIXING), dimension_numbers=(((1,), (1,)), ((), ()))),
        stax.Dense(8, W, B, batch_axis=1), stax.Relu(), stax.GlobalAvgPool(batch_axis=1),
    ),
    # branches
    "residual_cnn_gap": lambda: cnn(
        (4, 5, 3), conv((3, 3)), residual(stax.Relu(), conv((3, 3)), stax.Relu(), conv((3, 3))), stax.Relu(),
        stax.GlobalAvgPool(),
    ),
    "residual_cnn_flatten": lambda: cnn(
        (4, 5, 3), conv((3, 3)), residual(stax.Relu(), conv((3, 3))), residual(stax.Relu(), conv((3, 3))), stax.Relu(),
        stax.Flatten(),
    ),
    "wide_resnet_block": lambda: cnn(
        (6, 6, 3), conv((3, 3)),
        stax.serial(
            stax.FanOut(2),
            stax.parallel(
                stax.serial(stax.Relu(), conv((3, 3), (2, 2)), stax.Relu(), conv((3, 3))), conv((3, 3), (2, 2))
            ),
            stax.FanInSum(),
        ),
        stax.Relu(), stax.AvgPool((2, 2)), stax.Flatten(),
    ),
    "concatenated_branches": lambda: cnn(
        (4, 4, 2), conv((3, 3)),
        stax.serial(
            stax.FanOut(2),
            stax.parallel(stax.serial(stax.Relu(), conv((3, 3))), stax.serial(stax.Erf(), conv((1, 1)))),
            stax.FanInConcat(-1),
        ),
        conv((3, 3)), stax.Relu(), stax.GlobalAvgPool(),
    ),
    "concatenated_positions": lambda: cnn(
        (4, 2), conv((3,)), stax.serial(
            stax.FanOut(2), stax.parallel(stax.serial(stax.Relu(), conv((3,))), stax.serial(stax.Erf(), conv((1,)))),
            stax.FanInConcat(1),
        ), stax.Relu(), conv((3,)), stax.Relu(), stax.Flatten(),
    ),
    "product_of_convolutions": lambda: cnn(
        (4, 2), conv((3,)), stax.serial(
            stax.FanOut(2),
            stax.parallel(stax.serial(conv((3,)), stax.Relu()), stax.serial(conv((2,)), stax.Erf())), stax.FanInProd(),
        ), conv((3,)), stax.Relu(), stax.Flatten(),
    ),
    "product_of_branches": lambda: cnn(
        (4,), dense(), stax.serial(
            stax.FanOut(2), stax.parallel(stax.serial(dense(), stax.Relu()), stax.serial(dense(), stax.Erf())),
            stax.FanInProd(),
        ),
    ),
    # normalisation
    "layer_norm_channels": lambda: cnn(
        (4, 3), conv((3,)), stax.LayerNorm(axis=-1, eps=1e-5), stax.Relu(), conv((3,)), stax.Relu(),
        stax.GlobalAvgPool(),
    ),
    "layer_norm_all": lambda: cnn(
        (4, 3), conv((3,)), stax.LayerNorm(axis=(1, 2), eps=1e-5), stax.Relu(), conv((3,)), stax.Relu(), stax.Flatten()
    ),
    # slices
    "slice_of_positions": lambda: cnn(
        (6, 5, 2), conv((3, 3)), stax.Relu(), stax.Index(stax.Slice[:, 1:5:2, :3]), conv((2, 2)), stax.Relu(),
        stax.Flatten(),
    ),
    "index_of_a_position": lambda: cnn(
        (6, 2), conv((3,)), stax.Relu(), conv((3,)), stax.Relu(), stax.Index(stax.Slice[:, 2])
    ),
}  # fmt: skip


def graph() -> tuple:
    """Aggregation over a dense adjacency, one for each example."""
    pattern = np.random.default_rng(5).uniform(size=(3, 5, 5)) * (
        np.random.default_rng(6).uniform(size=(3, 5, 5)) < 0.5
    )
    _init, _apply, kernel = stax.serial(
        dense(), stax.Relu(), stax.Aggregate(aggregate_axis=1, batch_axis=0, channel_axis=2), dense(), stax.Relu(),
        stax.Aggregate(aggregate_axis=1, batch_axis=0, channel_axis=2), stax.GlobalAvgPool(), head(),
    )  # fmt: skip
    x = data(5, 3)
    return lambda get: kernel(x, None, get, pattern=(jnp.asarray(pattern), jnp.asarray(pattern)))


def edges() -> tuple:
    """Aggregation along the edges of one graph, given as pairs of nodes."""
    layers = [dense(), stax.Relu(), stax.Aggregate(1, 0, 2, implementation="SPARSE")]
    _init, _apply, kernel = stax.serial(*layers, *layers, stax.GlobalAvgPool(), head())
    x, pattern = data(5, 3), jnp.asarray([[[0, 1], [3, 1], [3, 2], [4, 0], [1, 4], [2, 2]]] * 3)
    return lambda get: kernel(x, None, get, pattern=(pattern, pattern))


def attention(mechanism: str, x=None, linear_scaling=True, mask=None, **positions) -> tuple:
    layer = stax.GlobalSelfAttention(
        8, n_chan_key=8, n_chan_val=8, n_heads=2, linear_scaling=linear_scaling, W_key_std=1.1, W_value_std=1.2,
        W_query_std=0.9, W_out_std=1.3, b_std=0.2, attention_mechanism=mechanism, **positions,
    )  # fmt: skip
    _, _, kernel = stax.serial(dense(), stax.Relu(), layer, stax.Relu(), stax.GlobalAvgPool(), head())
    x = data(4, 3) if x is None else x
    return lambda get: kernel(x, None, get, mask_constant=mask)


def masked():
    """Sequences of four, two and three tokens."""
    x = data(4, 3)
    x[1, 2:] = x[2, 3:] = 100.0
    return x


SPECIAL = {
    "graph_dense": graph,
    "attention_softmax": lambda: attention("SOFTMAX"),
    "attention_identity": lambda: attention("IDENTITY"),
    "attention_relu": lambda: attention("RELU"),
    "attention_abs": lambda: attention("ABS"),
    "attention_positions_summed": lambda: attention("SOFTMAX", pos_emb_type="SUM", W_pos_emb_std=0.8),
    "attention_positions_of_values": lambda: attention(
        "SOFTMAX", pos_emb_type="SUM", W_pos_emb_std=0.8, val_pos_emb=True
    ),
    "attention_positions_concatenated": lambda: attention(
        "SOFTMAX", pos_emb_type="CONCAT", n_chan_pos_emb=4, W_pos_emb_std=0.8, val_pos_emb=True
    ),
    "attention_identity_root": lambda: attention("IDENTITY", linear_scaling=False),
    "attention_masked": lambda: attention("SOFTMAX", masked(), mask=100.0),
    "graph_edges": edges,
}


def main(names: list[str]) -> None:
    path = pathlib.Path(__file__).with_name("neural_tangents.json")
    out = json.loads(path.read_text()) if path.exists() and names else {}
    for name, build in {**NETWORKS, **SPECIAL}.items():
        if names and name not in names:
            continue
        if name in SPECIAL:
            values = build()(("nngp", "ntk"))
        else:
            (_, _, kernel), x = build()
            values = kernel(x, None, ("nngp", "ntk"))
        out[name] = {
            k: [[float(f"{v:.13g}") if np.isfinite(v) else None for v in row] for row in np.asarray(getattr(values, k))]
            for k in ("nngp", "ntk")
        }
        print(name, out[name]["ntk"][0], flush=True)
    lines = [f'"{name}": {json.dumps(value)}' for name, value in sorted(out.items())]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
