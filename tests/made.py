"""Networks whose matrices are made of others: products, norms, outer products of vectors; `networks.py` reads it."""

import jax
import jax.numpy as jnp
from jax import lax

from anywidth.network import Normal
from networks import case, gaussian, sx, sy, vx, vy

relu = jax.nn.relu


@case(vx, vy, "matrices associativity einsum relu")
def matrices_multiplied_first():
    def init(n):
        wide = {"A": Normal((2 * n, n)), "B": Normal((n, 2 * n)), "C": Normal((n, n))}
        return wide | {"U": Normal((n, 3)), "v": Normal((n,))}

    def apply(p, x):
        n = p["v"].size
        W = (p["B"] @ p["A"] / jnp.sqrt(2 * n) + 0.5 * p["C"].T) / jnp.sqrt(n)
        return p["v"] @ relu(W @ relu(p["U"] @ x)) / jnp.sqrt(n)

    return init, apply


@case(vx, vy, "weight_normalisation sampled relu", readout=None)
def weight_normalisation():
    def init(n):
        return {"U": Normal((n, 3)), "W": Normal((n, n)), "g": Normal((n,), 0.2, mean=1.0), "v": Normal((n,), 3.0)}

    def apply(p, x):
        W = p["g"][:, None] * p["W"] / jnp.linalg.norm(p["W"], axis=1, keepdims=True)
        return (p["v"] / jnp.linalg.norm(p["v"])) @ jnp.cos(W @ relu(p["U"] @ x))

    return init, apply


@case(vx, vy, "weight_standardisation norm relu")
def weight_standardisation():
    def init(n):
        return {"U": Normal((n, 3)), "W": Normal((n, n)), "C": Normal((n, n)), "v": Normal((n,))}

    def apply(p, x):
        n = p["v"].size
        h = relu(p["U"] @ x)
        W = (p["W"] - p["W"].mean(1, keepdims=True)) / jnp.sqrt(p["W"].var(1, keepdims=True) + 1e-5)
        h = relu(W @ h / jnp.sqrt(n))
        h = relu(jnp.sqrt(n) * p["C"] / jnp.linalg.norm(p["C"]) @ h)  # of Frobenius norm sqrt(n)
        return p["v"] @ h / jnp.sqrt(n)

    return init, apply


def _heads(n):
    return {k: Normal((n, n)) for k in "QKVW"} | {"E": Normal((3, n)), "v": Normal((n,))}


def _queries(p, x):
    n = p["v"].size
    h = relu(x @ p["E"])
    q, k, v = (h @ p[w] / jnp.sqrt(n) for w in "QKV")
    return relu(q), relu(k), v, n


@case(sx, sy, "attention linear_attention heads normalised lengths")
def linear_attention_of_two_heads():
    def apply(p, x):
        q, k, v, n = _queries(p, x)
        q, k, v = (z.reshape(-1, 2, n // 2) for z in (q, k, v))
        memory = jnp.einsum("thd,the->hde", k, v)
        out = jnp.einsum("thd,hde->the", q, memory) / jnp.einsum("thd,hd->th", q, k.sum(0))[..., None]
        return relu(out.reshape(-1, n) @ p["W"] / jnp.sqrt(n)).mean(0) @ p["v"] / jnp.sqrt(n)

    return _heads, apply


@case(gaussian(61, 2, 3), gaussian(62, 3, 3), "attention linear_attention delta_rule scan outer_product")
def delta_rule_in_a_loop():
    def apply(p, x):
        q, k, v, n = _queries(p, x)

        def step(memory, token):
            q, k, v = token
            memory = 0.9 * memory + 0.5 * jnp.outer(v - memory @ k, k) / n
            return memory, memory @ q

        _, out = lax.scan(step, jnp.zeros((n, n), q.dtype), (q, k, v))
        return jnp.tanh(3 * out).mean(0) @ p["v"] / jnp.sqrt(n)

    return _heads, apply


@case(sx, sy, "attention linear_attention causal cumsum outer_product fast_weights lengths")
def causal_memory_added_to_weights():
    def apply(p, x):
        q, k, v, n = _queries(p, x)
        memory = 0.3 * jnp.cumsum(k[:, :, None] * v[:, None, :], 0) / n
        W = p["W"] / jnp.sqrt(n) + memory
        return relu(jnp.einsum("td,tde->te", q, W)).mean(0) @ p["v"] / jnp.sqrt(n)

    return _heads, apply


@case(sx, sy, "experts mixture matrices relu lengths")
def soft_mixture_of_experts_in_the_weights():
    def init(n):
        return {"E": Normal((3, n)), "X": Normal((2, n, n)), "v": Normal((n,))}

    def apply(p, x):
        n = p["v"].size
        gates = jax.nn.softmax(x[:, :2])
        W = jnp.einsum("te,eij->tij", gates, p["X"])
        h = jnp.einsum("tij,tj->ti", W, relu(x @ p["E"])) / jnp.sqrt(n)
        return relu(h).mean(0) @ p["v"] / jnp.sqrt(n)

    return init, apply


@case(vx, vy, "concatenate input skip width relu", readout=None)
def input_joined_to_hidden_layers():
    def init(n):
        return {"U": Normal((n, 3), 2.0), "W": Normal((n, n + 5)), "v": Normal((n + 3,))}

    def apply(p, x):
        n = len(p["U"])
        h = jnp.concatenate([x[:2] * jnp.sqrt(n), relu(p["U"] @ x), x])  # x itself is nothing against the others
        h = relu(p["W"] @ h / jnp.sqrt(n))
        return jnp.concatenate([h, x * jnp.sqrt(n)]) @ p["v"] / jnp.sqrt(n)

    return init, apply


@case(vx, vy, "matrices concatenate width relu")
def matrices_joined_along_the_width():
    def init(n):
        wide = {"A": Normal((n, n)), "B": Normal((n, n)), "C": Normal((n, 2 * n)), "D": Normal((n, n))}
        return wide | {"U": Normal((n, 3)), "v": Normal((n,))}

    def apply(p, x):
        n = p["v"].size
        h = relu(p["U"] @ x)
        h = jnp.concatenate([p["A"], p["B"]]) @ jnp.tanh(h) / jnp.sqrt(n)
        h = jnp.concatenate([p["C"], p["D"].T], 1) @ jnp.concatenate([relu(h), jnp.cos(p["U"] @ x)]) / jnp.sqrt(3 * n)
        return p["v"] @ h / jnp.sqrt(n)

    return init, apply
