"""Networks as strangers write them: the table every test of the engine runs over.

Each network here is plain JAX, written in a style of its own, and has an infinite-width NNGP and NTK. None of
them was written with the engine in mind. `oracle.py` simulates them; `refused.py` holds those with no limit.
A test picks its cases by kind: `with_kind("rnn")`, `without_kind("hard")`.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from anywidth.network import Network, Normal


@dataclass(frozen=True)
class Case:
    """A network, two examples of it, and what a test needs to know to read its kernels."""

    name: str
    net: Network
    x: Any
    y: Any
    kinds: frozenset[str] = field(default_factory=frozenset)
    # The output's form. "scalar": (), "tokens": (T,) or any shape without i.i.d. axes, "classes": (k,) i.i.d.,
    # "tokens classes": (T, k), the last axis i.i.d., "tree": a tuple or dict of outputs without i.i.d. axes.
    output: str = "scalar"
    # The parameters in which the output is linear and which are independent of all else, with mean zero; None
    # if there are none. The NNGP kernel is the variance-weighted NTK of these (see `oracle.py`).
    readout: Callable[[Any], Any] | None = None


CASES: list[Case] = []


def case(x, y, kinds: str, output: str = "scalar", readout=lambda p: p["v"]):
    """Register a function that returns (init, apply) as the case of its name."""

    def register(build):
        net = Network(*build())
        CASES.append(Case(build.__name__, net, x, y, frozenset(kinds.split()), output, readout))
        return build

    return register


def get(name: str) -> Case:
    return next(c for c in CASES if c.name == name)


def with_kind(*kinds: str) -> list[Case]:
    return [c for c in CASES if c.kinds & set(kinds)]


def without_kind(*kinds: str) -> list[Case]:
    return [c for c in CASES if not c.kinds & set(kinds)]


def gaussian(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


# Vectors of three numbers, sequences of three-dimensional tokens (T = 4 and 3), sequences of integer tokens.
vx, vy = np.array([0.9, -0.4, 1.1]), np.array([0.5, 0.8, 0.7])
sx, sy = gaussian(3, 4, 3), gaussian(4, 3, 3)
ix, iy = np.array([0, 3, 1, 3], np.int32), np.array([3, 2, 0, 1], np.int32)


# ---- Multi-layer perceptrons ------------------------------------------------------------------------------


@case(vx, vy, "mlp relu loop")
def mlp_relu():
    def init(n):
        return {
            "first": Normal((n, 3)),
            "hidden": [Normal((n, n)) for _ in range(3)],
            "v": Normal((n,)),
        }

    def apply(params, x):
        n = params["first"].shape[0]
        h = jax.nn.relu(params["first"] @ x * math.sqrt(2 / 3))
        for W in params["hidden"]:
            h = jax.nn.relu(W @ h * math.sqrt(2 / n))
        return params["v"] @ h / math.sqrt(n)

    return init, apply


@case(vx, vy, "mlp tanh bias quadrature tuple_params", readout=lambda p: p[-1])
def mlp_tuple_tanh():
    def init(n):
        return (
            (Normal((n, 3), var=1.5), Normal((n,), var=0.1)),
            (Normal((n, n), var=1.5), Normal((n,), var=0.1)),
            Normal((n,)),
        )

    def apply(params, x):
        *layers, v = params
        h = x
        for W, b in layers:
            h = jnp.tanh(W @ h * W.shape[1] ** -0.5 + b)
        return jnp.sum(v * h) * len(v) ** -0.5

    return init, apply


@case(vx, vy, "mlp relu einsum maximum")
def mlp_einsum_maximum():
    def init(n):
        return dict(w0=Normal((3, n), 2.0), w1=Normal((n, n), 2.0), v=Normal((n,)))  # noqa: C408

    def apply(p, x):
        h0 = jnp.einsum("i,ij->j", x, p["w0"]) / 3**0.5
        h1 = jnp.einsum("i,ij->j", jnp.maximum(h0, 0), p["w1"]) / p["w1"].shape[0] ** 0.5
        return jnp.einsum("i,i->", jnp.maximum(0.0, h1), p["v"]) / p["v"].size ** 0.5

    return init, apply


@case(vx, vy, "mlp relu tensordot where")
def mlp_tensordot_where():
    def init(n):
        return {"a": Normal((n, 3)), "b": Normal((n, n)), "v": Normal((n,))}

    def relu(z):
        return jnp.where(z > 0, z, 0)

    def apply(p, x):
        n = p["v"].shape[-1]
        z = jnp.tensordot(p["a"], x, axes=1)
        z = jnp.tensordot(p["b"], relu(z), axes=([1], [0])) / jnp.sqrt(n)
        return jnp.dot(p["v"], relu(z)) / jnp.sqrt(n)

    return init, apply


@case(vx, vy, "mlp leaky_relu bias output_bias dot classes", "classes", lambda p: (p["V"], p["c"]))
def mlp_leaky_classes():
    def init(n):
        return {
            "U": Normal((n, 3)),
            "W": Normal((n, n), var=1.8),
            "b": Normal((n,), var=0.3),
            "V": Normal((5, n)),
            "c": Normal((5,), var=0.2),
        }

    def apply(p, x):
        n = p["b"].shape[0]
        h = jax.nn.leaky_relu(p["U"].dot(x) / jnp.sqrt(3), negative_slope=0.2)
        h = jax.nn.leaky_relu(p["W"].dot(h) / jnp.sqrt(n) + p["b"], negative_slope=0.2)
        return p["V"].dot(h) / jnp.sqrt(n) + p["c"]

    return init, apply


class Weights(NamedTuple):
    inp: Any
    mid: Any
    out: Any


@case(vx, vy, "mlp abs row_vectors tuple_params", readout=lambda p: p.out)
def mlp_row_vectors_abs():
    def init(n):
        return Weights(Normal((3, n)), Normal((n, n)), Normal((n, 1)))

    def apply(w, x):
        n, _ = w.mid.shape
        row = x[None, :]
        row = jnp.abs(row @ w.inp)
        row = jnp.abs(row @ w.mid / n**0.5)
        return (row @ w.out / n**0.5).squeeze()

    return init, apply


@case(vx, vy, "mlp gelu jit matmul")
def mlp_nested_jit_gelu():
    def init(n):
        return {"U": Normal((n, 3)), "W1": Normal((n, n)), "W2": Normal((n, n)), "v": Normal((n,))}

    @jax.jit
    def dense(W, h):
        return jnp.matmul(W, h) / jnp.sqrt(W.shape[-1])

    @functools.partial(jax.jit, static_argnames="exact")
    def block(W, h, exact):
        return jax.nn.gelu(dense(W, h), approximate=not exact)

    def apply(p, x):
        h = block(p["U"], x, exact=True)
        h = block(p["W1"], h, exact=True)
        h = block(p["W2"], h, exact=True)
        return dense(p["v"][None], h)[0]

    return init, apply


@case(vx, vy, "mlp sin cos concatenate_width")
def random_features_then_dense():
    def init(n):
        return {"omega": Normal((n, 3)), "W": Normal((n, 2 * n)), "v": Normal((n,))}

    def apply(p, x):
        phase = p["omega"] @ x
        features = jnp.concatenate([jnp.cos(phase), jnp.sin(phase)])
        h = lax.erf(p["W"] @ features / math.sqrt(features.shape[0]))
        return p["v"] @ h / math.sqrt(h.shape[0])

    return init, apply


@case(vx, vy, "mlp dot_general erf zero_bias")
def mlp_dot_general():
    def init(n):
        return {
            "U": Normal((n, 3), var=2.0),
            "W": Normal((n, n), var=2.0),
            "b": Normal((n,), var=0.0),
            "v": Normal((n,)),
        }

    def mm(A, h):
        return lax.dot_general(A, h, dimension_numbers=(((1,), (0,)), ((), ())))

    def apply(p, x):
        n = x.dtype.type(p["v"].shape[0])
        h = lax.erf(mm(p["U"], x))
        h = lax.erf(lax.add(mm(p["W"], h) / n**0.5, p["b"]))
        return lax.dot(p["v"], h) / n**0.5

    return init, apply


@case(vx, vy, "mlp checkpoint silu sigmoid quadrature")
def mlp_checkpoint_silu_sigmoid():
    def init(n):
        return {"U": Normal((n, 3)), "W": Normal((2, n, n)), "v": Normal((n,))}

    @jax.checkpoint
    def layer(W, h):
        return jax.nn.silu(W @ h / np.sqrt(W.shape[1]))

    def apply(p, x):
        n = p["v"].shape[0]
        h = jax.nn.sigmoid(p["U"] @ x)
        h = layer(p["W"][0], h)
        h = layer(p["W"][1], h)
        return p["v"] @ h / np.sqrt(n)

    return init, apply


@case(vx, vy, "mlp widths bottleneck relu")
def mlp_bottleneck_expand():
    def init(n):
        return {
            "a": Normal((n, 3)),
            "down": Normal((n // 2, n)),
            "up": Normal((4 * n, n // 2)),
            "back": Normal((n, 4 * n)),
            "v": Normal((n,)),
        }

    def apply(p, x):
        def dense(name, h):
            return p[name] @ h / np.sqrt(p[name].shape[1])

        h = dense("a", x)
        h = h + dense("back", jax.nn.relu(dense("up", dense("down", h))))
        return p["v"] @ h / np.sqrt(h.size)

    return init, apply


# One hidden layer of every function with a character of its own, then a second layer: a function of one Gaussian
# under another of another variance.
ACTIVATIONS = {
    "square": lambda z: 0.5 * z**2,
    "cube": lambda z: z + 0.1 * z**3,
    "exp": lambda z: jnp.exp(0.5 * z),
    "softplus": jax.nn.softplus,
    "elu": jax.nn.elu,
    "gelu_tanh": lambda z: jax.nn.gelu(z, approximate=True),
    "hard_tanh": lambda z: jnp.clip(z, -1.0, 1.0),
    "sine_plus_linear": lambda z: z + jnp.sin(2 * z),
    "gauss": lambda z: jnp.exp(-(z**2)),
    "shifted_relu": lambda z: jnp.maximum(z - 0.3, 0),
}


def _activation(phi):
    def init(n):
        return {"U": Normal((n, 3)), "W": Normal((n, n)), "v": Normal((n,))}

    def apply(p, x):
        n = p["W"].shape[0]
        z = p["U"] @ x / jnp.sqrt(3)
        z = p["W"] @ phi(z) / jnp.sqrt(n) + 0.5 * z
        return p["v"] @ phi(z) / jnp.sqrt(n)

    return init, apply


_closed = {"square", "cube", "exp", "sine_plus_linear", "gauss"}
for _name, _phi in ACTIVATIONS.items():
    _kinds = f"mlp activation {_name} residual " + ("" if _name in _closed else "quadrature")
    CASES.append(
        Case(
            f"activation_{_name}",
            Network(*_activation(_phi)),
            0.8 * vx,
            0.8 * vy,
            frozenset(_kinds.split()),
            readout=lambda p: p["v"],
        )
    )


# ---- Weight sharing and residual branches -----------------------------------------------------------------


@case(vx, vy, "residual relu loop")
def resnet_identity_relu():
    def init(n):
        return {"U": Normal((n, 3)), "W": [Normal((n, n)) for _ in range(3)], "v": Normal((n,))}

    def apply(p, x):
        h = p["U"] @ x
        for W in p["W"]:
            h = h + jax.nn.relu(W @ h / jnp.sqrt(h.shape[0]))
        return p["v"] @ h / jnp.sqrt(h.shape[0])

    return init, apply


@case(vx, vy, "residual deep_branch tanh relu erf quadrature")
def resnet_deep_branches():
    def init(n):
        blocks = [[Normal((n, n)) for _ in range(3)] for _ in range(2)]
        return {"embed": Normal((n, 3)), "blocks": blocks, "v": Normal((n,))}

    def apply(p, x):
        n = p["v"].shape[0]
        h = jax.nn.relu(p["embed"] @ x)
        for first, second, third in p["blocks"]:
            r = jnp.tanh(first @ h / n**0.5)
            r = jax.nn.relu(second @ r / n**0.5)
            r = lax.erf(third @ r / n**0.5)
            h = h + r
        return p["v"] @ h / n**0.5

    return init, apply


@case(vx, vy, "sharing branches relu")
def same_branch_twice():
    def init(n):
        return {"U": Normal((n, 3)), "W": Normal((n, n)), "v": Normal((n,))}

    def apply(p, x):
        n = p["W"].shape[0]

        def h(x):
            return jax.nn.relu(p["W"] @ jax.nn.relu(p["U"] @ x) / jnp.sqrt(n))

        return p["v"] @ (h(x) + h(x) + h(-x)) / jnp.sqrt(n)

    return init, apply


@case((vx, gaussian(5, 3)), (vy, gaussian(6, 3)), "sharing siamese tuple_input erf")
def siamese_sum():
    def init(n):
        return {"U": Normal((n, 3)), "W": Normal((n, n)), "v": Normal((n,))}

    def apply(p, pair):
        left, right = pair
        n = p["W"].shape[0]

        def tower(z):
            return lax.erf(p["W"] @ lax.erf(p["U"] @ z) / jnp.sqrt(n))

        return p["v"] @ (tower(left) + 0.5 * tower(right)) / jnp.sqrt(n)

    return init, apply


@case(vx, vy, "sharing tied_depth relu skip sampled")
def same_matrix_in_every_layer():
    def init(n):
        return {"U": Normal((n, 3)), "W": Normal((n, n), var=2.0), "v": Normal((n,))}

    def apply(p, x):
        n = p["W"].shape[0]
        h1 = jax.nn.relu(p["U"] @ x)
        h2 = jax.nn.relu(p["W"] @ h1 / jnp.sqrt(n))
        h3 = jax.nn.relu(p["W"] @ h2 / jnp.sqrt(n) + h1)
        h4 = p["W"] @ (h3 + h1) / jnp.sqrt(n)
        return (p["v"] @ h4 + p["v"] @ h2) / jnp.sqrt(n)

    return init, apply


@case(vx, vy, "sharing tied_depth fori_loop tanh quadrature bias")
def fori_loop_tied_depth():
    def init(n):
        return {"U": Normal((n, 3)), "W": Normal((n, n)), "b": Normal((n,), 0.1), "v": Normal((n,))}

    def apply(p, x):
        n = len(p["b"])

        def body(_, h):
            return jnp.tanh(p["W"] @ h / jnp.sqrt(n) + p["b"])

        h = lax.fori_loop(0, 4, body, jnp.tanh(p["U"] @ x))
        return p["v"] @ h / jnp.sqrt(n)

    return init, apply


@case(vx, vy, "scan scan_layers stacked_params residual relu bias")
def scan_over_stacked_layers():
    depth = 4

    def init(n):
        layers = {"W": Normal((depth, n, n)), "b": Normal((depth, n), var=0.2)}
        return {"U": Normal((n, 3)), "layers": layers, "v": Normal((n,))}

    def apply(p, x):
        n = p["v"].shape[0]

        def layer(h, w):
            return h + 0.5 * jax.nn.relu(w["W"] @ h / jnp.sqrt(n) + w["b"]), None

        h, _ = lax.scan(layer, p["U"] @ x, p["layers"])
        return p["v"] @ h / jnp.sqrt(n)

    return init, apply


@case(vx, vy, "dense_net concatenate_width widths relu", readout=lambda p: p[-1])
def dense_net_concatenation():
    def init(n):
        return [Normal((n, 3)), Normal((n, n)), Normal((n, 2 * n)), Normal((3 * n,))]

    def apply(params, x):
        *layers, v = params
        h = x
        for i, W in enumerate(layers):
            new = jax.nn.relu(W @ h * np.sqrt(2 / W.shape[1]))
            h = new if i == 0 else jnp.concatenate((h, new))
        return v @ h / np.sqrt(v.shape[0])

    return init, apply


# ---- Normalisation over the width -------------------------------------------------------------------------


@case(vx, vy, "layer_norm gain zero_bias relu")
def layer_norm_after_relu():
    def init(n):
        layer = lambda d: {  # noqa: E731
            "W": Normal((n, d)),
            "g": Normal((n,), mean=1.0, var=0.0),
            "b": Normal((n,), var=0.0),
        }
        return {"layers": [layer(3), layer(n), layer(n)], "v": Normal((n,))}

    def apply(p, x):
        h = x
        for w in p["layers"]:
            h = jax.nn.relu(w["W"] @ h / jnp.sqrt(h.shape[0]))
            mu, var = jnp.mean(h), jnp.var(h)
            h = w["g"] * (h - mu) / jnp.sqrt(var + 1e-5) + w["b"]
        return p["v"] @ h / jnp.sqrt(h.shape[0])

    return init, apply


@case(vx, vy, "layer_norm gain zero_bias erf pre_activation")
def layer_norm_before_erf():
    def init(n):
        return {
            "U": Normal((n, 3)),
            "W": Normal((n, n)),
            "gamma": Normal((2, n), mean=1.0, var=0.0),
            "beta": Normal((2, n), var=0.0),
            "v": Normal((n,)),
        }

    def norm(h, g, b):
        c = h - h.mean()
        return g * c * lax.rsqrt((c * c).mean() + 1e-6) + b

    def apply(p, x):
        n = p["W"].shape[0]
        h = lax.erf(norm(p["U"] @ x, p["gamma"][0], p["beta"][0]))
        h = lax.erf(norm(p["W"] @ h / jnp.sqrt(n), p["gamma"][1], p["beta"][1]))
        return p["v"] @ h / jnp.sqrt(n)

    return init, apply


@case(vx, vy, "layer_norm rms_norm residual gelu")
def rms_norm_residual():
    def init(n):
        return {"U": Normal((n, 3)), "W": Normal((3, n, n)), "v": Normal((n,))}

    def rms(x):
        return x * lax.rsqrt(jnp.mean(x**2) + 1e-6)

    def apply(p, x):
        n = p["v"].shape[0]
        h = p["U"] @ x
        for i in range(3):
            h = h + jax.nn.gelu(p["W"][i] @ rms(h) / jnp.sqrt(n), approximate=False)
        return p["v"] @ rms(h) / jnp.sqrt(n)

    return init, apply


@case(vx, vy, "layer_norm norm ddof standardize relu")
def norm_by_other_means():
    def init(n):
        return {"U": Normal((n, 3)), "W": Normal((n, n)), "R": Normal((n, n)), "v": Normal((n,))}

    def apply(p, x):
        n = p["W"].shape[0]
        h = jax.nn.relu(p["U"] @ x)
        h = h / jnp.linalg.norm(h) * jnp.sqrt(n)
        h = jax.nn.relu(p["W"] @ h / jnp.sqrt(n))
        h = (h - h.mean()) / h.std(ddof=1)
        h = jax.nn.relu(p["R"] @ h / jnp.sqrt(n))
        h = jax.nn.standardize(h, epsilon=1e-3)
        return p["v"] @ h / jnp.sqrt(n)

    return init, apply


@case(vx, vy, "layer_norm group_norm reshape_width tanh quadrature")
def group_norm():
    groups = 4

    def init(n):
        return {"U": Normal((n, 3), var=2.0), "W": Normal((n, n)), "v": Normal((n,))}

    def apply(p, x):
        n = p["W"].shape[0]
        h = (p["U"] @ x).reshape(groups, n // groups)
        h = (h - h.mean(axis=1, keepdims=True)) / jnp.sqrt(h.var(axis=1, keepdims=True) + 1e-3)
        h = jnp.tanh(h).reshape(n)
        return p["v"] @ jnp.tanh(p["W"] @ h / jnp.sqrt(n)) / jnp.sqrt(n)

    return init, apply


@case(gaussian(7, 5, 3), gaussian(8, 5, 3), "batch_norm relu", "tokens")
def batch_norm_relu():
    def init(n):
        return {"U": Normal((3, n)), "W": Normal((n, n)), "v": Normal((n,))}

    def norm(h):
        return (h - h.mean(0)) / jnp.sqrt(h.var(0) + 0.1)

    def apply(p, batch):
        n = p["W"].shape[0]
        h = jax.nn.relu(norm(batch @ p["U"]))
        h = jax.nn.relu(norm(h @ p["W"] / jnp.sqrt(n)))
        return h @ p["v"] / jnp.sqrt(n)

    return init, apply


# ---- Means that are not zero, products --------------------------------------------------------------------


@case(vx, vy, "mean gain product relu")
def random_gain_with_mean():
    def init(n):
        return {
            "U": Normal((n, 3)),
            "g": Normal((n,), mean=1.0, var=0.1),
            "W": Normal((n, n)),
            "v": Normal((n,)),
        }

    def apply(p, x):
        n = p["g"].shape[0]
        h = p["g"] * jax.nn.relu(p["U"] @ x)
        h = jax.nn.relu(p["W"] @ h / jnp.sqrt(n))
        return p["v"] @ (p["g"] * h) / jnp.sqrt(n)

    return init, apply


@case(vx, vy, "mean hard bias relu quadrature")
def bias_with_mean():
    def init(n):
        return {
            "U": Normal((n, 3)),
            "W": Normal((n, n)),
            "b": Normal((n,), mean=0.5, var=0.2),
            "c": Normal((n,), mean=0.5, var=0.0),
            "v": Normal((n,)),
        }

    def apply(p, x):
        n = p["b"].shape[0]
        h = jax.nn.relu(p["U"] @ x + p["b"])
        h = jax.nn.relu(p["W"] @ h / jnp.sqrt(n) + p["c"])
        return p["v"] @ h / jnp.sqrt(n)

    return init, apply


@case(vx, vy, "product polynomial")
def product_of_linear_kets():
    def init(n):
        return {"U": Normal((n, 3)), "V": Normal((n, 3)), "W": Normal((n, n)), "v": Normal((n,))}

    def apply(p, x):
        n = p["W"].shape[0]
        h = (p["U"] @ x) * (p["V"] @ x) / 3
        h = jax.nn.relu(p["W"] @ h / jnp.sqrt(n))
        return p["v"] @ h / jnp.sqrt(n)

    return init, apply


# ---- Recurrent networks -----------------------------------------------------------------------------------


def _rnn(n, **more):
    """The parameters of a plain RNN."""
    plain = {
        "U": Normal((n, 3)),
        "W": Normal((n, n)),
        "b": Normal((n,), var=0.2),
        "v": Normal((n,)),
    }
    return plain | more


@case(sx, sy, "rnn scan erf bias mean_pool lengths")
def rnn_erf_mean_pool():
    def init(n):
        return _rnn(n, U=Normal((n, 3), var=2.0))

    def apply(params, x):
        n = params["b"].shape[0]

        def step(s, x_t):
            z = params["W"] @ s / jnp.sqrt(n) + params["U"] @ x_t / jnp.sqrt(3) + params["b"]
            s = jax.lax.erf(z)
            return s, s

        _, states = jax.lax.scan(step, jnp.zeros(n), x)
        return params["v"] @ states.mean(0) / jnp.sqrt(n)

    return init, apply


@case(sx, sy, "rnn scan relu zero_bias last_state lengths")
def rnn_last_state_relu():
    def init(n):
        return _rnn(n, W=Normal((n, n), var=2.0), b=Normal((n,), var=0.0))

    def apply(p, x):
        n = p["b"].shape[0]

        def step(h, x_t):
            return jax.nn.relu(p["W"] @ h * n**-0.5 + p["U"] @ x_t + p["b"]), None

        h = lax.scan(step, jnp.zeros_like(p["b"]), x)[0]
        return p["v"] @ h * n**-0.5

    return init, apply


@case(sx, sy, "rnn scan tanh quadrature pre_activation initial_state lengths")
def rnn_preactivation():
    def init(n):
        return _rnn(n, h0=Normal((n,), var=0.5))

    def apply(p, x):
        n = p["h0"].shape[0]
        inputs = x @ p["U"].T  # all the products with the input before the loop

        def step(h, u):
            return p["W"] @ jnp.tanh(h) / jnp.sqrt(n) + u + p["b"], None

        h, _ = lax.scan(step, p["h0"], inputs)
        return p["v"] @ jnp.tanh(h) / jnp.sqrt(n)

    return init, apply


@case(sx, sy, "rnn scan residual relu tokens lengths", "tokens")
def rnn_residual_every_state():
    def apply(p, x):
        n = p["b"].shape[0]

        def step(h, x_t):
            h = h + 0.5 * jax.nn.relu(p["W"] @ h / jnp.sqrt(n) + p["U"] @ x_t)
            return h, p["v"] @ h / jnp.sqrt(n)

        return lax.scan(step, p["b"], x)[1]

    return _rnn, apply


@case(sx, sy, "rnn scan two_scans erf sum_pool lengths")
def rnn_two_scans():
    def init(n):
        return _rnn(n, U2=Normal((n, n)), W2=Normal((n, n)))

    def run(W, inputs, n):
        def step(s, u):
            s = lax.erf(W @ s / n**0.5 + u)
            return s, s

        return lax.scan(step, jnp.zeros(n), inputs)[1]

    def apply(p, x):
        n = p["b"].shape[0]
        first = run(p["W"], jnp.einsum("nd,td->tn", p["U"], x) + p["b"], n)
        second = run(p["W2"], jnp.einsum("nm,tm->tn", p["U2"], first) / n**0.5, n)
        return jnp.sum(second @ p["v"]) / n**0.5

    return init, apply


@case(sx, sy, "rnn scan stacked tuple_carry relu last_state lengths")
def rnn_stacked_in_one_scan():
    def init(n):
        return _rnn(n, U2=Normal((n, n)), W2=Normal((n, n)))

    def apply(p, x):
        n = p["b"].shape[0]
        s = 1 / math.sqrt(n)

        def step(carry, x_t):
            low, high = carry
            low = jax.nn.relu(s * p["W"] @ low + p["U"] @ x_t + p["b"])
            high = jax.nn.relu(s * (p["W2"] @ high + p["U2"] @ low))
            return (low, high), None

        (_, high), _ = lax.scan(step, (jnp.zeros(n), jnp.zeros(n)), x)
        return s * jnp.vdot(p["v"], high)

    return init, apply


@case(sx, sy, "rnn scan reverse bidirectional concatenate_width tokens lengths", "tokens")
def rnn_bidirectional():
    def init(n):
        direction = {"U": Normal((n, 3)), "W": Normal((n, n), var=0.8)}
        return {"forward": direction, "backward": direction, "M": Normal((n, 2 * n)), "v": Normal((n,))}

    def apply(p, x):
        n = p["v"].shape[0]

        def run(w, reverse):
            def step(s, x_t):
                s = lax.erf(w["W"] @ s / jnp.sqrt(n) + w["U"] @ x_t)
                return s, s

            return lax.scan(step, jnp.zeros(n), x, reverse=reverse)[1]

        both = jnp.concatenate([run(p["forward"], False), run(p["backward"], True)], axis=-1)
        h = jax.nn.relu(both @ p["M"].T / jnp.sqrt(2 * n))
        return h @ p["v"] / jnp.sqrt(n)

    return init, apply


@case(sx, sy, "rnn scan counter tuple_carry erf lengths")
def rnn_running_mean_with_counter():
    def init(n):
        return _rnn(n)

    def apply(p, x):
        n = p["b"].shape[0]

        def step(carry, x_t):
            t, h, average = carry
            h = lax.erf(p["W"] @ h / jnp.sqrt(n) + p["U"] @ x_t + p["b"])
            average = average + (h - average) / (t + 1)
            return (t + 1, h, average), None

        (_, _, average), _ = lax.scan(step, (0, jnp.zeros(n), jnp.zeros(n)), x)
        return p["v"] @ average / jnp.sqrt(n)

    return init, apply


@case(
    {"tokens": gaussian(9, 5, 3), "length": np.int32(3)},
    {"tokens": gaussian(10, 5, 3), "length": np.int32(4)},
    "rnn scan mask dict_input tanh quadrature",
)
def rnn_masked_by_length():
    def apply(p, x):
        n = p["b"].shape[0]
        alive = jnp.arange(x["tokens"].shape[0]) < x["length"]

        def step(h, inputs):
            x_t, keep = inputs
            new = jnp.tanh(p["W"] @ h / jnp.sqrt(n) + p["U"] @ x_t + p["b"])
            return jnp.where(keep, new, h), None

        h, _ = lax.scan(step, jnp.zeros(n), (x["tokens"], alive))
        return p["v"] @ h / jnp.sqrt(n)

    return _rnn, apply


@case(sx, sy, "rnn loop stack relu mean_pool lengths")
def rnn_python_loop():
    def apply(p, x):
        n = p["b"].shape[0]
        h, states = jnp.zeros(n), []
        for x_t in x:
            h = jax.nn.relu(p["W"] @ h / jnp.sqrt(n) + p["U"] @ x_t + p["b"])
            states.append(h)
        return p["v"] @ jnp.mean(jnp.stack(states), axis=0) / jnp.sqrt(n)

    return _rnn, apply


@case(ix, iy, "rnn scan embedding integer_input erf layer_norm two_layers")
def rnn_on_embedded_tokens():
    vocabulary = 5

    def init(n):
        return _rnn(n, U=Normal((n, n)), E=Normal((vocabulary, n)))

    def apply(p, tokens):
        n = p["b"].shape[0]

        def step(h, token):
            z = (p["W"] @ h + p["U"] @ p["E"][token]) / jnp.sqrt(n) + p["b"]
            h = lax.erf(z)
            return (h - jnp.mean(h)) / jnp.sqrt(jnp.var(h) + 1e-5), None

        h, _ = lax.scan(step, jnp.zeros(n), tokens)
        return p["v"] @ h / jnp.sqrt(n)

    return init, apply


# ---- Embeddings, tokens, pooling, convolutions ------------------------------------------------------------


@case(ix, iy, "embedding integer_input take positional relu vmap mean_pool")
def embedding_with_positions():
    def init(n):
        return {
            "E": Normal((6, n)),
            "P": Normal((10, n), var=0.5),
            "W": Normal((n, n)),
            "v": Normal((n,)),
        }

    def apply(p, tokens):
        n = p["W"].shape[0]
        h = jnp.take(p["E"], tokens, axis=0) + p["P"][: len(tokens)]
        h = jax.vmap(lambda t: jax.nn.relu(p["W"] @ t / jnp.sqrt(n)))(h)
        return jnp.dot(jnp.mean(h, axis=0), p["v"]) / jnp.sqrt(n)

    return init, apply


@case(ix, iy, "embedding integer_input one_hot erf tokens classes", "tokens classes", lambda p: p["head"])
def one_hot_embedding_token_classes():
    def init(n):
        return {"E": Normal((5, n)), "W": Normal((n, n), var=1.5), "head": Normal((n, 7))}

    def apply(p, tokens):
        n = p["W"].shape[0]
        h = jax.nn.one_hot(tokens, 5) @ p["E"]
        mix = jnp.cumsum(h, axis=0) / (1 + jnp.arange(len(tokens)))[:, None]
        h = lax.erf(jnp.einsum("ij,tj->ti", p["W"], mix) / jnp.sqrt(n)) + h
        return jnp.einsum("ti,ik->tk", h, p["head"]) / jnp.sqrt(n)

    return init, apply


@case(ix, iy, "embedding integer_input hard tied_readout relu classes", "classes", None)
def embedding_tied_to_readout():
    def init(n):
        return {"E": Normal((4, n)), "W": Normal((n, n), var=2.0)}

    def apply(p, tokens):
        n = p["W"].shape[0]
        h = jax.nn.relu(p["W"] @ p["E"][tokens].mean(0) / jnp.sqrt(n))
        return p["E"] @ h / jnp.sqrt(n)

    return init, apply


@case(sx, sy, "mixing constant_matrix relu residual concatenate_time lengths")
def fixed_mixing_and_class_token():
    def init(n):
        return {
            "U": Normal((3, n)),
            "cls": Normal((1, n), var=0.7),
            "A": Normal((n, n)),
            "B": Normal((n, n)),
            "v": Normal((n,)),
        }

    def apply(p, x):
        n = p["A"].shape[0]
        h = jnp.concatenate([p["cls"], x @ p["U"]], axis=0)
        T = h.shape[0]
        M = np.cos(np.arange(T)[:, None] * (1 + np.arange(T))[None, :]) / math.sqrt(T)
        for W in (p["A"], p["B"]):
            h = h + M @ jax.nn.relu(h @ W / jnp.sqrt(n))
        return h[0] @ p["v"] / jnp.sqrt(n)

    return init, apply


@case(gaussian(11, 4, 3), gaussian(12, 4, 3), "convolution pad relu mean_pool")
def convolution_of_shifts():
    def init(n):
        return {"first": Normal((3, n, 3)), "second": Normal((3, n, n)), "v": Normal((n,))}

    def conv(w, h):
        fan_in = w.shape[0] * w.shape[2]
        padded = jnp.pad(h, ((1, 1), (0, 0)))
        return sum(padded[k : k + h.shape[0]] @ w[k].T for k in range(3)) / np.sqrt(fan_in)

    def apply(p, x):
        h = jax.nn.relu(conv(p["first"], x))
        h = jax.nn.relu(conv(p["second"], h))
        return h.mean(axis=0) @ p["v"] / np.sqrt(h.shape[1])

    return init, apply


@case(gaussian(13, 4, 3), gaussian(14, 4, 3), "convolution roll erf flatten average_pool", readout=lambda p: p["out"])
def circular_convolution_flatten():
    def init(n):
        return {"first": Normal((3, n)), "second": Normal((n, 3 * n), var=1.5), "out": Normal((2, n))}

    def apply(p, x):
        n = p["first"].shape[1]
        h = lax.erf(x @ p["first"])
        patches = jnp.concatenate([jnp.roll(h, 1, axis=0), h, jnp.roll(h, -1, axis=0)], axis=1)
        h = lax.erf(patches @ p["second"].T / jnp.sqrt(3 * n))
        pooled = h.reshape(2, 2, n).mean(axis=1)  # two windows of two positions
        return jnp.sum(pooled * p["out"]) / jnp.sqrt(2 * n)

    return init, apply


@case(gaussian(15, 4, 4, 2), gaussian(16, 4, 4, 2), "convolution conv_primitive relu mean_pool extra")
def convolution_primitive_2d():
    def init(n):
        return {"k1": Normal((3, 3, 2, n)), "k2": Normal((3, 3, n, n)), "v": Normal((n,))}

    def conv(h, k):
        out = lax.conv_general_dilated(h[None], k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return out[0] * jnp.sqrt(2 / (9 * k.shape[2]))

    def apply(p, image):
        h = jax.nn.relu(conv(image, p["k1"]))
        h = jax.nn.relu(conv(h, p["k2"]))
        return h.mean((0, 1)) @ p["v"] / jnp.sqrt(p["v"].shape[0])

    return init, apply


@case(sx, sy, "lax_map sinusoidal relu mask masked_mean late_scaling lengths")
def masked_mean_with_sinusoids():
    def init(n):
        return {"U": Normal((n, 3)), "W": Normal((n, n)), "v": Normal((n,))}

    def apply(p, x):
        n = p["W"].shape[0]
        T, d = x.shape
        x = x + np.sin(np.arange(T)[:, None] / 10.0 ** np.arange(d))
        mask = x[:, 0] > -0.5  # some tokens do not count
        h = lax.map(lambda t: jax.nn.relu(p["W"] @ jax.nn.relu(p["U"] @ t)) / jnp.sqrt(n), x)
        pooled = jnp.sum(jnp.where(mask[:, None], h, 0.0), axis=0) / mask.sum()
        return p["v"] @ pooled / jnp.sqrt(n)

    return init, apply


@case(sx, sy, "vmap vmap_batch in_axes_none relu tokens", "tokens")
def vmap_over_a_batch():
    def init(n):
        return {"U": Normal((n, 3)), "W": Normal((n, n)), "v": Normal((n,))}

    def one(p, x):
        n = p["W"].shape[0]
        h = jax.nn.relu(p["U"] @ x)
        h = jax.nn.relu(p["W"] @ h / jnp.sqrt(n))
        return p["v"] @ h / jnp.sqrt(n)

    def apply(p, batch):
        return jax.vmap(one, in_axes=(None, 0))(p, batch)

    return init, apply


# ---- Several outputs --------------------------------------------------------------------------------------


@case(vx, vy, "outputs dict_output relu", "tree", lambda p: (p["value"], p["policy"], p["bias"]))
def two_heads_dict():
    def init(n):
        return {
            "U": Normal((n, 3)),
            "W": Normal((n, n)),
            "value": Normal((n,)),
            "policy": Normal((n,), var=2.0),
            "bias": Normal((), var=0.3),
        }

    def apply(p, x):
        n = p["W"].shape[0]
        h1 = jax.nn.relu(p["U"] @ x)
        h2 = jax.nn.relu(p["W"] @ h1 / jnp.sqrt(n))
        return {
            "policy": p["policy"] @ h2 / jnp.sqrt(n),
            "value": p["value"] @ h1 / jnp.sqrt(n) + p["bias"],
        }

    return init, apply


@case(sx, sy, "outputs tuple_output rnn scan erf lengths", "tree")
def rnn_last_and_mean():
    def apply(p, x):
        n = p["b"].shape[0]

        def step(s, x_t):
            s = lax.erf(p["W"] @ s / jnp.sqrt(n) + p["U"] @ x_t + p["b"])
            return s, s

        last, states = lax.scan(step, jnp.zeros(n), x)
        return p["v"] @ last / jnp.sqrt(n), p["v"] @ states.mean(0) / jnp.sqrt(n)

    return _rnn, apply


# ---- Attention --------------------------------------------------------------------------------------------


@case(sx, sy, "attention causal mask relu layer_norm residual transformer mean_pool lengths")
def transformer_shared_qk_causal():
    def init(n):
        block = lambda: {  # noqa: E731
            "QK": Normal((n, n)),
            "V": Normal((n, n)),
            "W1": Normal((n, n)),
            "W2": Normal((n, n)),
        }
        return {"E": Normal((n, 3)), "blocks": [block(), block()], "v": Normal((n,))}

    def norm(h):
        mean = jnp.mean(h, axis=-1, keepdims=True)
        return (h - mean) / jnp.sqrt(jnp.var(h, axis=-1, keepdims=True) + 1e-5)

    def apply(p, x):
        T = x.shape[0]
        n = p["v"].shape[0]
        mask = jnp.tril(jnp.ones((T, T), bool))
        h = x @ p["E"].T
        for w in p["blocks"]:
            q = h @ w["QK"].T / jnp.sqrt(n)
            value = h @ w["V"].T / jnp.sqrt(n)
            scores = jnp.where(mask, q @ q.T / n, -1e30)
            h = norm(h + jax.nn.softmax(scores, axis=-1) @ value)
            hidden = jax.nn.relu(h @ w["W1"].T / jnp.sqrt(n))
            h = norm(h + hidden @ w["W2"].T / jnp.sqrt(n))
        return h.mean(0) @ p["v"] / jnp.sqrt(n)

    return init, apply


@case(sx, sy, "attention multi_head reshape_width softmax_by_hand mask inf tokens lengths", "tokens")
def multi_head_reshaped():
    heads = 8

    def init(n):
        return {
            "E": Normal((3, n)),
            "Wq": Normal((n, n)),
            "Wv": Normal((n, n)),
            "Wo": Normal((n, n)),
            "v": Normal((n,)),
        }

    def apply(p, x):
        n = p["v"].shape[0]
        T = len(x)
        size = n // heads
        h = x @ p["E"] / jnp.sqrt(3)
        q = (h @ p["Wq"] / jnp.sqrt(n)).reshape(T, heads, size)
        value = (h @ p["Wv"] / jnp.sqrt(n)).reshape(T, heads, size)
        scores = jnp.einsum("thd,shd->hts", q, q) / size
        scores = jnp.where(np.tri(T, dtype=bool), scores, -jnp.inf)
        weights = jnp.exp(scores - scores.max(-1, keepdims=True))
        weights = weights / weights.sum(-1, keepdims=True)
        mixed = jnp.einsum("hts,shd->thd", weights, value).reshape(T, n)
        h = h + mixed @ p["Wo"] / jnp.sqrt(n)
        return jax.nn.relu(h) @ p["v"] / jnp.sqrt(n)

    return init, apply


@case(sx, sy, "attention fused_qkv split widths positional gelu ffn causal lengths")
def transformer_fused_qkv():
    def init(n):
        return {
            "E": Normal((n, 3)),
            "pos": Normal((4, n), var=0.25),
            "qkv": Normal((3 * n, n)),
            "ff1": Normal((4 * n, n)),
            "ff2": Normal((n, 4 * n)),
            "v": Normal((n,)),
        }

    def apply(p, x):
        T, n = x.shape[0], p["E"].shape[0]
        h = x @ p["E"].T / jnp.sqrt(3) + p["pos"][:T]
        q, k, value = jnp.split(h @ p["qkv"].T / jnp.sqrt(n), 3, axis=-1)
        # maximal-update scaling: independent q and k score zero in the limit, q with itself does not
        scores = (q @ k.T + q @ q.T) / n
        causal = jnp.arange(T)[:, None] >= jnp.arange(T)[None, :]
        weights = jax.nn.softmax(jnp.where(causal, scores, jnp.finfo(scores.dtype).min))
        h = h + weights @ value
        h = h + jax.nn.gelu(h @ p["ff1"].T / jnp.sqrt(n), approximate=False) @ p["ff2"].T / jnp.sqrt(4 * n)
        return h[-1] @ p["v"] / jnp.sqrt(n)

    return init, apply


@case(sx, sy, "attention vmap vmap_heads stacked_params independent_qk relu sum_pool lengths sampled")
def attention_vmapped_heads():
    heads = 4

    def init(n):
        m = n // heads
        return {
            "E": Normal((n, 3)),
            "Q": Normal((heads, m, n)),
            "K": Normal((heads, m, n)),
            "V": Normal((heads, m, n)),
            "O": Normal((heads, n, m)),
            "v": Normal((n,)),
        }

    def apply(p, x):
        n = p["E"].shape[0]
        h = jax.vmap(lambda t: jax.nn.relu(p["E"] @ t))(x)

        def head(Q, K, V, O):  # noqa: E741
            q, k, u = (h @ w.T / jnp.sqrt(n) for w in (Q, K, V))
            weights = jax.nn.softmax(q @ k.T / q.shape[-1], axis=-1)
            return weights @ u @ O.T / jnp.sqrt(n)

        out = jax.vmap(head)(p["Q"], p["K"], p["V"], p["O"]).sum(axis=0)
        return jnp.sum(jax.nn.relu(out + h) @ p["v"]) / jnp.sqrt(n)

    return init, apply


@case(sx, sy, "attention tied_depth scan scan_layers transformer checkpoint jit relu layer_norm lengths")
def universal_transformer():
    def init(n):
        return {"E": Normal((n, 3)), "A": Normal((n, n)), "V": Normal((n, n)), "F": Normal((n, n)), "v": Normal((n,))}

    @jax.jit
    def block(p, h):
        n = h.shape[-1]
        q = h @ p["A"].T / jnp.sqrt(n)
        h = h + jax.nn.softmax(q @ q.T / n) @ (h @ p["V"].T) / jnp.sqrt(n)
        h = h + jax.nn.relu(h @ p["F"].T / jnp.sqrt(n))
        return h * lax.rsqrt(jnp.mean(h**2, axis=-1, keepdims=True) + 1e-6)

    def apply(p, x):
        step = jax.checkpoint(lambda h, _: (block(p, h), None))
        h, _ = lax.scan(step, x @ p["E"].T, None, length=3)
        return jnp.mean(h @ p["v"]) / jnp.sqrt(p["v"].shape[0])

    return init, apply


@case(
    {"query": gaussian(17, 3, 3), "memory": gaussian(18, 5, 3)},
    {"query": gaussian(19, 2, 3), "memory": gaussian(20, 4, 3)},
    "attention cross_attention dict_input sharing late_scaling erf lengths",
)
def cross_attention_shared_embedding():
    def init(n):
        return {"E": Normal((n, 3)), "A": Normal((n, n)), "V": Normal((n, n)), "v": Normal((n,))}

    def apply(p, x):
        n = p["v"].shape[0]
        q = lax.erf(x["query"] @ p["E"].T)
        m = lax.erf(x["memory"] @ p["E"].T)
        scores = jnp.einsum("qi,mi->qm", q @ p["A"].T, m @ p["A"].T) / n**2
        gates = jax.nn.softmax(2.0 * scores, axis=1)
        return jnp.einsum("qm,mi,i->", gates, lax.erf(m @ p["V"].T / n**0.5), p["v"]) / n**0.5

    return init, apply


@case(sx, sy, "attention dot_product_attention relu extra lengths")
def library_dot_product_attention():
    heads = 4

    def init(n):
        return {"E": Normal((3, n)), "A": Normal((n, n)), "V": Normal((n, n)), "v": Normal((n,))}

    def apply(p, x):
        n = p["v"].shape[0]
        h = jax.nn.relu(x @ p["E"])
        q = (h @ p["A"] / jnp.sqrt(n)).reshape(-1, heads, n // heads)
        u = (h @ p["V"] / jnp.sqrt(n)).reshape(-1, heads, n // heads)
        out = jax.nn.dot_product_attention(q, q, u, scale=heads / n, is_causal=True)
        return jax.nn.relu(out.reshape(-1, n)).mean(0) @ p["v"] / jnp.sqrt(n)

    return init, apply


@case(sx, sy, "attention linear_attention outer_product relu lengths")
def linear_attention():
    def init(n):
        return {"E": Normal((3, n)), "K": Normal((n, n)), "V": Normal((n, n)), "v": Normal((n,))}

    def apply(p, x):
        n = p["v"].shape[0]
        h = x @ p["E"] / jnp.sqrt(3)
        k = jax.nn.relu(h @ p["K"] / jnp.sqrt(n))
        u = h @ p["V"] / jnp.sqrt(n)
        memory = k.T @ u / (n * len(x))  # (n, n), of finite rank
        return jax.nn.relu(k @ memory).mean(0) @ p["v"] / jnp.sqrt(n)

    return init, apply


import architectures  # noqa: E402, F401
import made  # noqa: E402, F401
import many_heads  # noqa: E402, F401
import several  # noqa: E402, F401
import strangers  # noqa: E402, F401  registers more cases
