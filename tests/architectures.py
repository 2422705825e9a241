"""Architectures by their names, small, as their papers or their readers would write them; `networks.py` reads it."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from anywidth.network import Normal
from networks import case, gaussian, sx, sy, vx, vy

relu = jax.nn.relu
lx, ly = gaussian(51, 4, 3), gaussian(52, 4, 3)  # lines of four positions


def conv(h, w, stride=1, padding="SAME", groups=1, dilation=1):
    """(position, channel), kernels (window, in, out), over the root of the fan-in."""
    out = lax.conv_general_dilated(
        h[None], w, (stride,), padding, rhs_dilation=(dilation,), feature_group_count=groups,
        dimension_numbers=("NWC", "WIO", "NWC"),
    )  # fmt: skip
    return out[0] / np.sqrt(w.shape[0] * w.shape[1])


@case(lx, ly, "convolution grouped residual relu")
def resnext():
    """A bottleneck with a convolution in four groups."""

    def init(n):
        shapes = {"U": (3, n), "A": (n, n), "G": (3, n // 4, n), "B": (n, n), "v": (n,)}
        return {k: Normal(s) for k, s in shapes.items()}

    def apply(p, x):
        n = p["v"].size
        h = x @ p["U"]
        b = relu(h) @ p["A"] / jnp.sqrt(n)
        h = h + relu(conv(relu(b), p["G"], groups=4)) @ p["B"] / jnp.sqrt(n)
        return relu(h).mean(0) @ p["v"] / jnp.sqrt(n)

    return init, apply


@case(sx, sy, "gate squeeze relu lengths")
def squeeze_and_excite():
    """Every channel is weighed by a gate that a small network makes of the channels' averages over positions."""

    def init(n):
        shapes = {"U": (3, n), "A": (n, n), "S": (n // 4, n), "E": (n, n // 4), "v": (n,)}
        return {k: Normal(s) for k, s in shapes.items()}

    def apply(p, x):
        n = p["v"].size
        h = relu(x @ p["U"]) @ p["A"] / jnp.sqrt(n)
        s = relu(p["S"] @ h.mean(0) / jnp.sqrt(n))
        return (h * jax.nn.sigmoid(p["E"] @ s / jnp.sqrt(n // 4))).mean(0) @ p["v"] / jnp.sqrt(n)

    return init, apply


@case(lx, ly, "convolution causal dilated gate residual skip relu")
def wavenet():
    """Two layers of dilated causal gated convolutions; the sum of their skip connections is read at the end."""

    def init(n):
        layer = {k: Normal((2, n, n)) for k in "FG"} | {k: Normal((n, n)) for k in "RS"}
        return {"U": Normal((3, n)), "layers": [layer, layer], "v": Normal((n,))}

    def apply(p, x):
        n = p["v"].size
        h, skip = x @ p["U"], 0.0
        for dilation, w in zip((1, 2), p["layers"], strict=True):
            a, g = (conv(h, w[k], padding=[(dilation, 0)], dilation=dilation) for k in "FG")
            z = lax.erf(a) * jax.nn.sigmoid(g)
            h = h + z @ w["R"] / jnp.sqrt(n)
            skip = skip + z @ w["S"] / jnp.sqrt(n)
        return relu(skip[-1]) @ p["v"] / jnp.sqrt(n)

    return init, apply


@case(lx, ly, "convolution concatenate_width relu")
def densenet():
    """Every layer reads all before it, concatenated along the channels."""
    layers = 3

    def init(n):
        grown = [Normal((3, n + i * (n // 2), n // 2)) for i in range(layers)]
        return {"U": Normal((3, n)), "layers": grown, "v": Normal((n + layers * (n // 2),))}

    def apply(p, x):
        h = x @ p["U"]
        for w in p["layers"]:
            h = jnp.concatenate([h, conv(relu(h), w)], axis=-1)
        return h.mean(0) @ p["v"] / jnp.sqrt(h.shape[-1])

    return init, apply


EDGES = np.array([[0, 1, 2, 3, 3, 1, 0, 2], [1, 0, 1, 2, 0, 3, 0, 2]])


@case(lx, ly, "graph attention segment_sum relu")
def graph_attention_on_edges():
    """Scores of the two ends of an edge over n, and a softmax over the edges that come in."""
    src, dst = EDGES

    def init(n):
        return {"U": Normal((3, n)), "A": Normal((n, n)), "v": Normal((n,))}

    def apply(p, x):
        n = p["v"].size
        h = relu(x @ p["U"]) @ p["A"] / jnp.sqrt(n)
        s = jax.nn.leaky_relu((h[src] * h[dst]).sum(-1) / n, 0.2)
        s = jnp.exp(s - jax.ops.segment_max(s, dst, 4)[dst])
        w = s / jax.ops.segment_sum(s, dst, 4)[dst]
        return relu(jax.ops.segment_sum(w[:, None] * h[src], dst, 4)).mean(0) @ p["v"] / jnp.sqrt(n)

    return init, apply


@case(gaussian(53, 2, 3), gaussian(54, 2, 3), "heads graph attention sampled")
def graph_attention_of_many_heads():
    """GAT as published: e_ij = leaky_relu(a h_i + b h_j) with vectors a and b of a head, on a complete graph."""

    def init(n, heads):
        return {k: Normal((heads, n)) for k in "abv"} | {"W": Normal((heads, n, 3))}

    def apply(p, x):
        heads, n = p["v"].shape
        h = jnp.einsum("hdi,ti->htd", p["W"], x) / jnp.sqrt(3)
        left, right = (jnp.einsum("htd,hd->ht", h, p[k]) / jnp.sqrt(n) for k in "ab")
        o = jax.nn.softmax(jax.nn.leaky_relu(left[:, :, None] + right[:, None, :], 0.2)) @ h
        return jnp.einsum("hsd,hd->s", o, p["v"]).mean() / jnp.sqrt(n * heads)

    return init, apply


@case(sx, sy, "sets mean relu lengths")
def deep_sets():
    def init(n):
        return {"U": Normal((3, n)), "v": Normal((n,))} | {k: Normal((n, n)) for k in "ABC"}

    def apply(p, x):
        n = p["v"].size
        h = relu(x @ p["U"])
        h = relu((h @ p["A"] - h.mean(0) @ p["B"]) / jnp.sqrt(n))
        return relu(h.sum(0) @ p["C"] / jnp.sqrt(n)) @ p["v"] / jnp.sqrt(n)

    return init, apply


@case(0.7 * vx, 0.7 * vy, "fourier_features skip concatenate_width relu")
def radiance_field():
    """NeRF: sines and cosines of random frequencies, and the input once more in the middle."""

    def init(n):
        shapes = {"A": (2 * n, n), "B": (n + 3, n), "C": (n, n), "v": (n,)}
        return {k: Normal(s) for k, s in shapes.items()} | {"F": Normal((3, n), 2.0)}

    def apply(p, x):
        n = p["v"].size
        z = x @ p["F"]
        h = relu(jnp.concatenate([jnp.cos(z), jnp.sin(z)]) @ p["A"] / jnp.sqrt(n))
        h = relu(jnp.concatenate([h, jnp.sqrt(n) * x]) @ p["B"] / jnp.sqrt(n))
        return relu(h @ p["C"] / jnp.sqrt(n)) @ p["v"] / jnp.sqrt(n)

    return init, apply


@case(gaussian(55, 3, 3), gaussian(56, 3, 3), "routing softmax norm relu")
def capsules_routed_by_agreement():
    """Three capsules vote for two; two rounds of routing, and a squash by the norm."""

    def init(n):
        return {"U": Normal((3, n)), "W": Normal((3, 2, n, n)), "v": Normal((2, n))}

    def apply(p, x):
        n = p["U"].shape[1]
        u = relu(x @ p["U"])
        votes = jnp.einsum("in,ijnm->ijm", u, p["W"]) / jnp.sqrt(n)
        agreement = jnp.zeros((3, 2))
        for _ in range(3):
            s = (jax.nn.softmax(agreement, 1)[:, :, None] * votes).sum(0)
            size = (s**2).sum(-1, keepdims=True) / n
            out = size / (1 + size) * s / jnp.sqrt(size + 1e-6)
            agreement = agreement + (votes * out).sum(-1) / n
        return jnp.vdot(p["v"], out) / jnp.sqrt(n)

    return init, apply


@case(lx, ly, "convolution strided resize concatenate_width skip relu tokens", "tokens")
def unet_on_a_line():
    def init(n):
        shapes = {"U": (3, 3, n), "D": (3, n, 2 * n), "M": (3, 2 * n, 2 * n), "T": (3, 3 * n, n), "v": (n,)}
        return {k: Normal(s) for k, s in shapes.items()}

    def apply(p, x):
        n = p["v"].size
        top = relu(conv(x, p["U"]))
        low = relu(conv(relu(conv(top, p["D"], stride=2)), p["M"]))
        up = jax.image.resize(low, (4, 2 * n), "linear")
        return relu(conv(jnp.concatenate([top, up], -1), p["T"])) @ p["v"] / jnp.sqrt(n)

    return init, apply


@case(gaussian(57, 3, 3), gaussian(58, 2, 3), "heads sets attention lengths sampled")
def set_transformer_pooling():
    """Pooling by attention of a learned seed, with many heads, and a layer after it."""

    def init(n, heads):
        maps = {k: Normal((heads, n, n)) for k in "QKVO"}
        return maps | {"U": Normal((3, n)), "s": Normal((n,)), "v": Normal((n,))}

    def apply(p, x):
        heads, n, _ = p["Q"].shape
        h = relu(x @ p["U"])
        q = jnp.einsum("hdm,m->hd", p["Q"], p["s"]) / jnp.sqrt(n)
        k, v = (jnp.einsum("hdm,tm->htd", p[w], h) / jnp.sqrt(n) for w in "KV")
        a = jax.nn.softmax(jnp.einsum("hd,htd->ht", q, k) / jnp.sqrt(n))
        z = p["s"] + jnp.einsum("ht,htd,hdm->m", a, v, p["O"]) / jnp.sqrt(n * heads)
        return relu(z) @ p["v"] / jnp.sqrt(n)

    return init, apply


@case(lx, ly, "convolution positions concatenate_width relu")
def coordinate_convolution():
    """Channels of the positions' own coordinates beside the others."""

    def init(n):
        return {"U": Normal((3, n)), "A": Normal((3, n + 2, n)), "v": Normal((n,))}

    def apply(p, x):
        n = p["v"].size
        t = jnp.linspace(-1, 1, len(x))
        where = jnp.sqrt(n) * jnp.stack([t, t**2], -1)
        return relu(conv(jnp.concatenate([relu(x @ p["U"]), where], -1), p["A"])).mean(0) @ p["v"] / jnp.sqrt(n)

    return init, apply


@case((sx, vx[:2]), (sy, vy[:2]), "tuple_input conditioning gate relu lengths")
def feature_wise_modulation():
    """FiLM: a condition scales and shifts every channel."""

    def init(n):
        return {"U": Normal((3, n)), "C": Normal((2 * n, 2)), "A": Normal((n, n)), "v": Normal((n,))}

    def apply(p, both):
        x, condition = both
        n = p["v"].size
        gain, shift = jnp.split(p["C"] @ condition, 2)
        h = relu(x @ p["U"]) @ p["A"] / jnp.sqrt(n)
        return ((1 + gain) * h + shift).mean(0) @ p["v"] / jnp.sqrt(n)

    return init, apply


@case(vx, vy, "generated_weights relu")
def hypernetwork():
    """The matrix of a layer is a sum of two, weighed by functions of the input."""

    def init(n):
        return {"U": Normal((3, n)), "H": Normal((n, n, 2)), "v": Normal((n,))}

    def apply(p, x):
        n = p["v"].size
        return relu(p["H"] @ jnp.tanh(x[:2]) @ relu(x @ p["U"]) / jnp.sqrt(n)) @ p["v"] / jnp.sqrt(n)

    return init, apply


@case(gaussian(59, 2, 3), gaussian(60, 2, 3), "mixer residual products sampled relu")
def mixer_with_weights_per_channel():
    """Every channel mixes the tokens with weights of its own, through a relu; then a layer over channels."""

    def init(n):
        return {"U": Normal((3, n)), "M": Normal((2, 2, n)), "A": Normal((n, n)), "v": Normal((n,))}

    def apply(p, x):
        n = p["v"].size
        h = x @ p["U"] / jnp.sqrt(3)
        h = h + relu(jnp.einsum("tsc,sc->tc", p["M"], h) / jnp.sqrt(2))
        h = h + relu(h @ p["A"] / jnp.sqrt(n))
        return h.mean(0) @ p["v"] / jnp.sqrt(n)

    return init, apply


@case(sx[:2], sy[:2], "mixer layer_norm products relu")
def mixer_linear_with_weights_per_channel():
    """Mixed without a nonlinearity: the covariances factorise, and nothing is sampled."""

    def init(n):
        return {"U": Normal((3, n)), "M": Normal((2, 2, n)), "A": Normal((n, n)), "v": Normal((n,))}

    def apply(p, x):
        n = p["v"].size
        h = jnp.einsum("tsc,sc->tc", p["M"], x @ p["U"]) / jnp.sqrt(2)
        h = jax.nn.standardize(relu(h @ p["A"] / jnp.sqrt(n)), axis=-1)
        return h.mean(0) @ p["v"] / jnp.sqrt(n)

    return init, apply
