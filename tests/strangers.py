"""More networks as strangers write them, in styles that `networks.py` does not have; it imports them."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from anywidth.network import Normal
from networks import case, gaussian, ix, iy, sx, sy, vx, vy

# ---- Other ways to write the same linear algebra ----------------------------------------------------------


@case(vx, vy, "mlp einsum several_operands erf")
def einsum_of_three_operands():
    def init(n):
        return {"U": Normal((n, 3)), "W": Normal((n, n)), "v": Normal((n,))}

    def apply(p, x):
        n = p["W"].shape[0]
        h = lax.erf(jnp.einsum("nd,d->n", p["U"], x))
        return jnp.einsum("i,ij,j->", p["v"], p["W"], h) / n

    return init, apply


@case(gaussian(21, 2, 4, 3), gaussian(22, 2, 4, 3), "batch_dims matmul relu tokens", "tokens")
def batched_matmul_two_batch_axes():
    def init(n):
        return {"U": Normal((3, n)), "W": Normal((n, n)), "v": Normal((n, 1))}

    def apply(p, x):
        n = p["W"].shape[0]
        h = jax.nn.relu(jnp.matmul(x, p["U"]))
        h = jax.nn.relu(jnp.matmul(h, p["W"]) * n**-0.5)
        return jnp.matmul(h, p["v"])[..., 0].mean(axis=1) * n**-0.5

    return init, apply


@case(vx, vy, "named_scope checkpoint math relu float32_constants")
def scopes_and_float32_constants():
    gain = np.float32(math.sqrt(2))

    def init(n):
        return {
            "enc": {"kernel": Normal((3, n))},
            "mid": {"kernel": Normal((n, n)), "bias": Normal((n,), 0.05)},
            "v": Normal((n,)),
        }

    @functools.partial(jax.checkpoint, static_argnums=(2,))
    def layer(p, h, fan_in):
        with jax.named_scope("layer"):
            return jax.nn.relu(h @ p["kernel"] * (gain / np.float32(math.sqrt(fan_in))) + p.get("bias", 0.0))

    def apply(p, x):
        n = p["v"].size
        with jax.named_scope("net"):
            h = layer(p["enc"], x, 3)
            h = layer(p["mid"], h, n)
            return jnp.inner(h, p["v"]) / jnp.float32(n) ** 0.5

    return init, apply


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Example:
    """A pytree of the user's own."""

    tokens: Any
    weight: Any


class Block(NamedTuple):
    up: Any
    down: Any


@case(
    Example(gaussian(23, 3, 3), np.array([0.2, 0.5, 0.3])),
    Example(gaussian(24, 4, 3), np.array([0.1, 0.2, 0.3, 0.4])),
    "dataclass_input namedtuple_params weighted_mean residual erf lengths",
    readout=lambda p: p["out"],
)
def dataclass_input_namedtuple_params():
    def init(n):
        return {
            "embed": Normal((3, n)),
            "blocks": (Block(Normal((n, 2 * n)), Normal((2 * n, n))),) * 1,
            "out": Normal((n,)),
        }

    def apply(p, x):
        n = p["out"].shape[0]
        h = x.tokens @ p["embed"]
        for up, down in p["blocks"]:
            h = h + lax.erf(h @ up / math.sqrt(n)) @ down / math.sqrt(2 * n)
        pooled = jnp.average(h, axis=0, weights=x.weight)
        return pooled @ p["out"] / math.sqrt(n)

    return init, apply


# ---- Shapes: split, stack, take, repeat, tile ---------------------------------------------------------------


@case(sx, sy, "split_width stack take residual relu lengths")
def split_stack_and_take():
    def init(n):
        return {"U": Normal((3, n)), "A": Normal((n, n)), "B": Normal((n // 2, n)), "v": Normal((n,))}

    def apply(p, x):
        n = p["v"].shape[0]
        h = x @ p["U"]
        left, right = jnp.split(h, 2, axis=-1)
        g = jax.nn.relu(left) @ p["B"] / math.sqrt(n / 2) + jnp.concatenate([right, left], -1)
        h = jnp.stack([jax.nn.relu(g @ p["A"] / math.sqrt(n)), g], axis=1)  # (T, 2, n)
        h = jnp.take(h, jnp.array([1, 0, 0]), axis=1).sum(1)
        return h[::2].mean(0) @ p["v"] / math.sqrt(n)

    return init, apply


@case(sx, sx[::-1].copy(), "repeat tile flip relu flatten", readout=lambda p: p["v"])
def repeat_tile_flip():
    def init(n):
        return {"U": Normal((3, n)), "W": Normal((n, n)), "v": Normal((8, n))}

    def apply(p, x):
        n = p["U"].shape[1]
        h = x @ p["U"]
        h = jnp.repeat(h[:2], 2, axis=0) + jnp.flip(jnp.tile(h[:1], (4, 1)), 0) - h
        h = jax.nn.relu(h @ p["W"] / jnp.sqrt(n))
        h = jnp.concatenate((h, h[::-1]))
        return jnp.tensordot(h, p["v"], 2) / jnp.sqrt(n)

    return init, apply


@case(ix, iy, "integer_input one_hot embedding dynamic_index relu")
def embedding_by_traced_index_in_a_loop():
    def init(n):
        return {"E": Normal((4, n)), "W": Normal((n, n)), "v": Normal((n,))}

    def apply(p, tokens):
        n = p["W"].shape[0]

        def body(i, h):
            e = lax.dynamic_index_in_dim(p["E"], jnp.asarray(tokens)[i], 0, keepdims=False)
            return 0.5 * h + p["W"] @ jax.nn.relu(e) / jnp.sqrt(n)

        h = lax.fori_loop(0, tokens.shape[0], body, jnp.zeros(n))
        return p["v"] @ jax.nn.relu(h) / jnp.sqrt(n)

    return init, apply


@case(sx, sy, "fori_loop buffer dynamic_update_slice relu tokens", "tokens")
def states_written_into_a_buffer():
    def init(n):
        return {"U": Normal((n, 3)), "W": Normal((n, n)), "v": Normal((n,))}

    def apply(p, x):
        n = p["W"].shape[0]
        buffer = jnp.zeros((3, n))

        def body(t, carry):
            h, buffer = carry
            h = jax.nn.relu(p["W"] @ h / jnp.sqrt(n) + p["U"] @ lax.dynamic_slice_in_dim(x, t, 1)[0])
            return h, lax.dynamic_update_slice(buffer, h[None], (t, 0))

        _, buffer = lax.fori_loop(0, 3, body, (jnp.zeros(n), buffer))
        return buffer @ p["v"] / jnp.sqrt(n)

    return init, apply


@case(sx, sy, "at_set indexing_update relu lengths")
def rows_replaced_with_at_set():
    def init(n):
        return {"U": Normal((3, n)), "c": Normal((n,)), "W": Normal((n, n)), "v": Normal((n,))}

    def apply(p, x):
        n = p["c"].shape[0]
        h = x @ p["U"]
        h = h.at[0].set(p["c"])
        h = h.at[1:].add(0.5 * p["c"])
        h = jax.nn.relu(h @ p["W"] / jnp.sqrt(n))
        return h.sum(0) @ p["v"] / jnp.sqrt(n)

    return init, apply


# ---- Loops ------------------------------------------------------------------------------------------------


@case(sx, sy, "scan nested_scan relu lengths")
def nested_scans():
    """An outer scan over time, an inner one over the same two layers."""

    def init(n):
        return {"U": Normal((n, 3)), "W": Normal((2, n, n)), "v": Normal((n,))}

    def apply(p, x):
        n = p["v"].shape[0]

        def step(h, x_t):
            def layer(h, W):
                return jax.nn.relu(W @ h / jnp.sqrt(n) + p["U"] @ x_t), None

            return lax.scan(layer, h, p["W"])[0], None

        return p["v"] @ lax.scan(step, jnp.zeros(n), x)[0] / jnp.sqrt(n)

    return init, apply


@case(vx, vy, "scan scan_layers layer_norm relu gain zero_bias")
def scan_over_layers_with_layer_norm():
    def init(n):
        layers = {"W": Normal((3, n, n)), "g": Normal((3, n), var=0.0, mean=1.0), "b": Normal((3, n), var=0.0)}
        return {"U": Normal((n, 3)), "layers": layers, "v": Normal((n,))}

    def apply(p, x):
        n = p["v"].shape[0]

        def layer(h, w):
            c = h - h.mean()
            z = w["g"] * c / jnp.sqrt(jnp.mean(c**2) + 1e-5) + w["b"]
            return h + w["W"] @ jax.nn.relu(z) / jnp.sqrt(n), None

        h, _ = lax.scan(layer, p["U"] @ x, p["layers"])
        return p["v"] @ h / jnp.sqrt(n)

    return init, apply


@case(
    {"x": gaussian(25, 5, 3), "mask": np.array([1, 1, 1, 0, 0], bool)},
    {"x": gaussian(26, 5, 3), "mask": np.array([1, 1, 1, 1, 0], bool)},
    "scan mask bool_input masked_mean relu",
)
def masks_instead_of_while():
    def init(n):
        return {"U": Normal((n, 3)), "W": Normal((n, n)), "v": Normal((n,))}

    def apply(p, x):
        n = p["W"].shape[0]

        def step(carry, inp):
            h, total, count = carry
            x_t, m = inp
            new = jax.nn.relu(p["W"] @ h / jnp.sqrt(n) + p["U"] @ x_t)
            h = jnp.where(m, new, h)
            return (h, total + m * h, count + m), None

        start = (jnp.zeros(n), jnp.zeros(n), 0)
        (_, total, count), _ = lax.scan(step, start, (x["x"], x["mask"]))
        return p["v"] @ (total / count) / jnp.sqrt(n)

    return init, apply


@case(sx, sy, "associative_scan cumsum linear_recurrence erf lengths")
def linear_recurrence_by_cumulative_sums():
    def init(n):
        return {"U": Normal((3, n)), "W": Normal((n, n)), "v": Normal((n,))}

    def apply(p, x):
        n = p["v"].shape[0]
        decay = 0.8 ** jnp.arange(len(x))
        h = jnp.cumsum((x @ p["U"]) / decay[:, None], axis=0) * decay[:, None]
        h = lax.erf(h @ p["W"] / jnp.sqrt(n))
        return h[-1] @ p["v"] / jnp.sqrt(n)

    return init, apply


@case(vx, vy, "cond switch concrete relu")
def branches_on_numbers():
    def init(n):
        return {"U": Normal((n, 3)), "W": Normal((n, n)), "v": Normal((n,))}

    def apply(p, x):
        n = p["W"].shape[0]
        h = p["U"] @ x
        h = lax.cond(x[0] > 0.7, lambda h: jax.nn.relu(h), lambda h: -jax.nn.relu(-h), h)
        k = jnp.argmax(x)
        h = lax.switch(k, [lambda z: z, jax.nn.relu, lambda z: 2 * z], p["W"] @ h / jnp.sqrt(n))
        return p["v"] @ h / jnp.sqrt(n)

    return init, apply


# ---- Vmaps ------------------------------------------------------------------------------------------------


@case(vx, vy, "vmap ensemble stacked_params relu")
def ensemble_by_vmap():
    members = 3

    def init(n):
        return {"U": Normal((members, n, 3)), "W": Normal((n, members, n)), "v": Normal((members, n))}

    def apply(p, x):
        def one(U, W, v):
            n = v.shape[0]
            h = jax.nn.relu(U @ x)
            return v @ jax.nn.relu(W @ h / jnp.sqrt(n)) / jnp.sqrt(n)

        return jax.vmap(one, in_axes=(0, 1, 0))(p["U"], p["W"], p["v"]).sum() / jnp.sqrt(members)

    return init, apply


@case(sx, sy, "vmap vmap_heads attention in_axes erf tokens lengths", "tokens")
def heads_by_vmap_out_axes():
    heads = 2

    def init(n):
        return {
            "E": Normal((3, n)),
            "Q": Normal((n, heads, n // heads)),
            "V": Normal((n, heads, n // heads)),
            "v": Normal((n,)),
        }

    def apply(p, x):
        n = p["E"].shape[1]
        h = x @ p["E"]

        def head(Q, V):
            q = h @ Q / jnp.sqrt(n)
            a = jax.nn.softmax(q @ q.T / q.shape[-1], axis=-1)
            return a @ (h @ V) / jnp.sqrt(n)

        out = jax.vmap(head, in_axes=1, out_axes=1)(p["Q"], p["V"])  # (T, heads, n // heads)
        return lax.erf(out.reshape(len(x), n)) @ p["v"] / jnp.sqrt(n)

    return init, apply


# ---- Normalisation ----------------------------------------------------------------------------------------


@case(vx, vy, "norm linalg_norm relu")
def unit_norm_features():
    def init(n):
        return {"U": Normal((n, 3)), "W": Normal((n, n)), "v": Normal((n,))}

    def apply(p, x):
        n = p["W"].shape[0]
        h = jax.nn.relu(p["U"] @ x)
        h = h / (jnp.linalg.norm(h) / math.sqrt(n))
        h = jax.nn.relu(p["W"] @ h / jnp.sqrt(n))
        return p["v"] @ (h / jnp.linalg.norm(h))

    return init, apply


@case(sx, sy, "layer_norm standardize pre_norm attention transformer gelu gain zero_bias lengths")
def pre_norm_transformer():
    def init(n):
        ln = lambda: {"scale": Normal((n,), 0.0, 1.0), "bias": Normal((n,), 0.0)}  # noqa: E731
        return {
            "E": Normal((3, n)), "ln1": ln(), "ln2": ln(), "A": Normal((n, n)), "V": Normal((n, n)),
            "up": Normal((n, 2 * n)), "down": Normal((2 * n, n)), "v": Normal((n,)),
        }  # fmt: skip

    def norm(h, w):
        return jax.nn.standardize(h, axis=-1, epsilon=1e-5) * w["scale"] + w["bias"]

    def apply(p, x):
        T, n = len(x), p["v"].shape[0]
        h = x @ p["E"] / math.sqrt(3)
        z = norm(h, p["ln1"])
        q = z @ p["A"] / math.sqrt(n)
        logits = jnp.where(jnp.tri(T, dtype=bool), q @ q.T / n, jnp.finfo(x.dtype).min)
        h = h + jax.nn.softmax(logits, -1) @ (z @ p["V"]) / math.sqrt(n)
        z = norm(h, p["ln2"])
        h = h + jax.nn.relu(z @ p["up"] / math.sqrt(n)) @ p["down"] / math.sqrt(2 * n)
        return h.mean(0) @ p["v"] / math.sqrt(n)

    return init, apply


# ---- Functions --------------------------------------------------------------------------------------------


@jax.custom_jvp
def clipped_square(x):
    return jnp.where(x > 0, x * x, 0.0)


@clipped_square.defjvp
def _(primals, tangents):
    (x,), (t,) = primals, tangents
    return clipped_square(x), 2 * jnp.maximum(x, 0) * t


@jax.custom_vjp
def scaled_erf(x):
    return 1.2 * lax.erf(x)


scaled_erf.defvjp(lambda x: (scaled_erf(x), x), lambda x, g: (g * 1.2 * 2 / math.sqrt(math.pi) * jnp.exp(-x * x),))


@case(0.6 * vx, 0.6 * vy, "custom_jvp custom_vjp erf relu_squared")
def functions_with_their_own_derivatives():
    def init(n):
        return {"U": Normal((n, 3)), "W": Normal((n, n)), "v": Normal((n,))}

    def apply(p, x):
        n = p["W"].shape[0]
        h = scaled_erf(p["U"] @ x)
        h = clipped_square(p["W"] @ h / jnp.sqrt(n))
        return p["v"] @ h / jnp.sqrt(n)

    return init, apply


def _library(name, phi, scale=1.0, kinds="quadrature"):
    def build():
        def init(n):
            return {"U": Normal((n, 3)), "v": Normal((n,)), "c": Normal((), var=0.1)}

        def apply(p, x):
            return p["v"] @ phi(scale * (p["U"] @ x)) / jnp.sqrt(len(p["v"])) + p["c"]

        return init, apply

    build.__name__ = f"library_{name}"
    case(vx, vy, f"activation output_bias {kinds}", readout=lambda p: (p["v"], p["c"]))(build)


_library("relu6", jax.nn.relu6, 4.0)


# ---- Weight tying across branches, several readouts, a batch of examples ----------------------------------


@case((vx, 0.5 * vy), (vy, vx), "sharing tuple_input difference outputs tree relu", "tree", lambda p: (p["v"], p["w"]))
def contrastive_pair_two_readouts():
    def init(n):
        return {"U": Normal((n, 3)), "W": Normal((n, n)), "v": Normal((n,)), "w": Normal((n,))}

    def apply(p, pair):
        n = p["W"].shape[0]
        a, b = (jax.nn.relu(p["W"] @ jax.nn.relu(p["U"] @ z) / jnp.sqrt(n)) for z in pair)
        return p["v"] @ (a - b) / jnp.sqrt(n), (p["v"] @ a + p["w"] @ b) / jnp.sqrt(n)

    return init, apply


@case(np.array([1, 0, 2]), np.array([2, 2, 1]), "integer_input int_arithmetic erf")
def integers_as_numbers():
    def init(n):
        return {"U": Normal((n, 3)), "b": Normal((n,), 0.3), "v": Normal((n,))}

    def apply(p, x):
        n = p["b"].shape[0]
        return p["v"] @ lax.erf(p["U"] @ x / 2 + p["b"]) / jnp.sqrt(n)

    return init, apply


@case(sx, sy, "outputs difference tokens relu", "tokens", readout=lambda p: (p["v"], p["w"]))
def array_of_readouts_centred():
    """A scalar readout is added to an array of readouts."""

    def init(n):
        return {"e": Normal((3, n)), "v": Normal((n,)), "w": Normal((n,))}

    def apply(p, x):
        n = p["v"].shape[0]
        h = jax.nn.relu(x @ p["e"])
        y = h @ p["v"] / n**0.5
        return y - y.mean() + 2 * (h.sum(0) @ p["w"] / n**0.5)

    return init, apply


@case(sx, sy, "associative_scan relu")
def associative_scan_of_tokens():
    def init(n):
        return {"e": Normal((3, n)), "w": Normal((n, n)), "v": Normal((n,))}

    def apply(p, x):
        n = p["v"].shape[0]
        h = lax.associative_scan(jnp.add, x @ p["e"], axis=0)
        return jnp.ravel(jax.nn.relu(h @ p["w"] / n**0.5)[-2:].mean(0, keepdims=True) @ p["v"][:, None])[0] / n**0.5

    return init, apply


@case(
    {"x": gaussian(41, 4, 3), "src": np.array([0, 0, 1, 1, 2, 3]), "dst": np.array([1, 2, 0, 3, 0, 1])},
    {"x": gaussian(42, 4, 3), "src": np.array([1, 2, 3, 3, 2, 0]), "dst": np.array([0, 0, 1, 2, 3, 3])},
    "segment_sum message_passing concatenate_width relu",
)
def message_passing_by_segment_sum():
    def init(n):
        return {"e": Normal((3, n)), "m": Normal((n, n)), "u": Normal((2 * n, n)), "v": Normal((n,))}

    def apply(p, g):
        n = p["v"].shape[0]
        h = g["x"] @ p["e"]
        msg = jax.nn.relu(h[g["src"]] @ p["m"] / n**0.5)
        agg = jax.ops.segment_sum(msg, g["dst"], num_segments=len(g["x"]))
        h = jax.nn.relu(jnp.concatenate([h, agg], -1) @ p["u"] / (2 * n) ** 0.5)
        return h.mean(0) @ p["v"] / n**0.5

    return init, apply


@case(sx, sy, "solve linalg gram relu")
def kernel_regression_inside():
    """A linear system of inner products, solved in apply."""

    def init(n):
        return {"e": Normal((3, n)), "w": Normal((n, n)), "v": Normal((n,))}

    def apply(p, x):
        n = p["v"].shape[0]
        h = jax.nn.relu(x @ p["e"])
        a = jnp.linalg.solve(h @ h.T / n + 0.5 * jnp.eye(len(x)), jnp.ones(len(x)))
        return jax.nn.relu((a @ h) @ p["w"] / n**0.5) @ p["v"] / n**0.5

    return init, apply


@case((vx, vy), (vy, -vx), "siamese tuple_input cosine vmap relu")
def siamese_cosine_difference():
    def init(n):
        return {"U": Normal((3, n)), "W": Normal((n, n)), "v": Normal((n,))}

    def apply(p, pair):
        n = p["v"].shape[0]
        a, b = jax.vmap(lambda z: jax.nn.relu(jax.nn.relu(z @ p["U"]) @ p["W"] / n**0.5))(jnp.stack(pair))
        cosine = (a @ b) / (jnp.linalg.norm(a) * jnp.linalg.norm(b))
        return ((a - b) * cosine) @ p["v"] / n**0.5

    return init, apply


@case(vx, vy, "where mean norm clip cos")
def threshold_at_the_mean_and_clipped_norm():
    def init(n):
        return {"U": Normal((n, 3)), "W": Normal((n, n)), "v": Normal((n,))}

    def apply(p, x):
        n = p["v"].shape[0]
        h = p["U"] @ x
        h = jnp.where(h > h.mean(), h, 0.1 * h)
        h = h * jnp.minimum(1.0, 0.5 / jnp.sqrt(jnp.sum(h**2) / n))
        return p["v"] @ jnp.cos(p["W"] @ h / n**0.5) / n**0.5

    return init, apply
