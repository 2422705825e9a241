"""Networks with two widths, init(n, heads), and rotary embeddings. They are simulated with as many heads as n."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from anywidth.network import Normal
from networks import case, gaussian, sx, sy

hx = gaussian(31, 3, 3)
hy = 0.8 * hx[:2] + 0.5 * gaussian(32, 2, 3)  # alike: sampling is to a tolerance relative to the kernel


def _weights(n, heads, fan_in, names="QKV", **more):
    return {name: Normal((heads, n, fan_in)) for name in names} | more


def _projected(x, w):
    return jnp.einsum("ti,hdi->htd", x, w) / jnp.sqrt(x.shape[-1])


def _attended(q, k, v, mask=True):
    scores = jnp.einsum("hsd,htd->hst", q, k) / jnp.sqrt(q.shape[-1])
    return jnp.einsum("hst,htd->hsd", jax.nn.softmax(jnp.where(mask, scores, -jnp.inf)), v)


@case(hx, hy, "heads head_layers relu zero_bias lengths sampled")
def heads_with_layers_of_their_own():
    """What a head attends to goes through a relu and a matrix of the head before the heads are read."""

    def init(n, heads):
        return _weights(n, heads, 3, M=Normal((heads, n, n)), b=Normal((heads, n), var=0.2), v=Normal((heads, n)))

    def apply(p, x):
        heads, n = p["v"].shape
        o = _attended(*(_projected(x, p[name]) for name in "QKV"))
        o = jnp.einsum("hsd,hde->hse", jax.nn.relu(o + p["b"][:, None]), p["M"]) / jnp.sqrt(n)
        return jnp.einsum("hsd,hd->", o, p["v"]) / jnp.sqrt(n * heads)

    return init, apply


@case(hx, hy, "heads layer_norm causal residual lengths sampled")
def heads_on_a_normalised_stream():
    def init(n, heads):
        return _weights(n, heads, n, E=Normal((n, 3)), O=Normal((heads, n, n)), v=Normal((n,)))

    def apply(p, x):
        h = x @ p["E"].T / jnp.sqrt(3)
        heads, n, _ = p["O"].shape
        z = (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-5)
        o = _attended(*(_projected(z, p[name]) for name in "QKV"), jnp.tri(len(x), dtype=bool))
        h = h + jnp.einsum("hsd,hdm->sm", o, p["O"]) / jnp.sqrt(heads * n)
        h = h / jnp.sqrt((h**2).mean(-1, keepdims=True) + 1e-5)
        return h.mean(0) @ p["v"] / jnp.sqrt(n)

    return init, apply


@case(hx, hy, "heads shared_qk lengths sampled")
def heads_with_shared_scores_over_n():
    """Scores of shared weights over n: the same number in every head."""

    def init(n, heads):
        return _weights(n, heads, n, "QV", E=Normal((n, 3)), O=Normal((heads, n, n)), v=Normal((n,)))

    def apply(p, x):
        h = lax.erf(x @ p["E"].T)
        heads, n, _ = p["O"].shape
        q, v = _projected(h, p["Q"]), _projected(h, p["V"])
        a = jax.nn.softmax(q @ q.transpose(0, 2, 1) / n)
        h = h + jnp.einsum("hst,htd,hdm->sm", a, v, p["O"]) / jnp.sqrt(heads * n)
        return jax.nn.relu(h).mean(0) @ p["v"] / jnp.sqrt(n)

    return init, apply


@case(hx, hy, "heads independent_qk lengths sampled")
def heads_with_scores_that_vanish():
    """Scores of independent weights over n vanish: every token attends to all alike."""

    def init(n, heads):
        return _weights(n, heads, 3, v=Normal((heads, n)))

    def apply(p, x):
        heads, n = p["v"].shape
        q, k, v = (_projected(x, p[name]) for name in "QKV")
        o = jax.nn.softmax(q @ k.transpose(0, 2, 1) / n) @ v
        return jnp.einsum("hsd,hd->s", lax.erf(o), p["v"]).mean() / jnp.sqrt(n * heads)

    return init, apply


@case(
    {"query sampled": gaussian(33, 2, 3), "memory": hx, "known": np.array([True, True, False])},
    {"query": gaussian(35, 1, 3), "memory": hx[::-1], "known": np.array([True, True, True])},
    "heads cross_attention mask dict_input lengths",
)
def heads_across_with_a_mask():
    def init(n, heads):
        return _weights(n, heads, 3, O=Normal((heads, n, n)), b=Normal((n,), var=0.0), v=Normal((n,)))

    def apply(p, x):
        heads, n, _ = p["O"].shape
        q = _projected(x["query"], p["Q"])
        o = _attended(q, *(_projected(x["memory"], p[name]) for name in "KV"), x["known"])
        h = jnp.einsum("hsd,hdm->sm", o, p["O"]) / jnp.sqrt(heads * n)
        return jax.nn.relu(h + p["b"]).mean(0) @ p["v"] / jnp.sqrt(n)

    return init, apply


@case(hx, hy, "heads packed positional sinusoidal lengths sampled")
def heads_with_positions():
    """A stream of n heads coordinates with learned and fixed positions; the last token is read."""

    def init(n, heads):
        wide = n * heads
        return {name: Normal((wide, wide)) for name in "QKVO"} | {
            "E": Normal((3, wide)), "P": Normal((4, wide), var=0.3), "S": Normal((2, wide)), "v": Normal((heads, n)),
        }  # fmt: skip

    def apply(p, x):
        (heads, n), T = p["v"].shape, len(x)
        wide = heads * n
        t = jnp.arange(T)
        fixed = jnp.stack([jnp.sin(t), jnp.cos(t)], -1) @ p["S"]
        h = x @ p["E"] / jnp.sqrt(3) + p["P"][:T] + fixed
        q, k, v = ((h @ p[name] / jnp.sqrt(wide)).reshape(T, heads, n).transpose(1, 0, 2) for name in "QKV")
        o = _attended(q, k, v).transpose(1, 0, 2).reshape(T, wide)
        return (h + o @ p["O"] / jnp.sqrt(wide))[-1] @ p["v"].ravel() / jnp.sqrt(wide)

    return init, apply


@case(sx, sy, "attention rotary multi_head reshape_width lengths")
def rotary_embeddings_of_few_frequencies():
    """Two heads, every one of three blocks of pairs of coordinates, each turned by a frequency of its own."""
    heads, rates = 2, np.array([1.0, 0.3, 0.05])

    def turned(q):
        T = q.shape[0]
        pairs = q.reshape(T, heads, 3, 2, -1)
        angle = (jnp.arange(T)[:, None] * rates)[:, None, :, None]
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        sin, cos = jnp.sin(angle), jnp.cos(angle)
        return jnp.stack([a * cos - b * sin, a * sin + b * cos], -2).reshape(T, heads, -1)

    def init(n):
        return {"E": Normal((3, n))} | {k: Normal((n, 6 * n)) for k in "AV"} | {"v": Normal((6 * n,))}

    def apply(p, x):
        h = jax.nn.relu(x @ p["E"])
        q = turned(h @ p["A"] / jnp.sqrt(h.shape[1]))
        v = (h @ p["V"] / jnp.sqrt(h.shape[1])).reshape(len(x), heads, -1)
        a = jax.nn.softmax(jnp.einsum("shc,thc->hst", q, q) / q.shape[-1])
        return jax.nn.relu(jnp.einsum("hst,thc->shc", a, v).reshape(len(x), -1)).mean(0) @ p["v"] / jnp.sqrt(v[0].size)

    return init, apply
