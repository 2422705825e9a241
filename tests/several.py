"""Networks with functions of several correlated Gaussians: gates, maxima, products of branches, pooled channels."""

import jax
import jax.numpy as jnp
from jax import lax

from anywidth.network import Normal
from networks import case, gaussian, sx, sy, vx, vy


def _gate(z):
    return 0.5 + 0.5 * lax.erf(z)


@case(vx, vy, "several gate closed")
def gated_linear_unit():
    def init(n):
        return {"U": Normal((n, 3)), "A": Normal((n, n)), "B": Normal((n, n)), "v": Normal((n,))}

    def apply(p, x):
        n = p["v"].shape[0]
        h = jax.nn.relu(p["U"] @ x)
        return p["v"] @ ((p["A"] @ h) * _gate(p["B"] @ h / jnp.sqrt(n))) / n

    return init, apply


@case(vx, vy, "several gate closed")
def gate_of_its_own_input():
    def init(n):
        return {"U": Normal((n, 3)), "A": Normal((n, n)), "B": Normal((n, n)), "v": Normal((n,))}

    def apply(p, x):
        n = p["v"].shape[0]
        h = jax.nn.relu(p["U"] @ x)
        a, b = (p[w] @ h / jnp.sqrt(n) for w in "AB")
        return p["v"] @ (a * jax.nn.sigmoid(a + b)) / jnp.sqrt(n)

    return init, apply


@case(vx, vy, "several gate highway closed")
def highway_of_gates():
    def init(n):
        W = [{"T": Normal((n, n)), "H": Normal((n, n))} for _ in range(2)]
        return {"U": Normal((n, 3)), "W": W, "b": Normal((n,), var=0.0, mean=-0.5), "v": Normal((n,))}

    def apply(p, x):
        n = p["v"].shape[0]
        h = jax.nn.relu(p["U"] @ x)
        for W in p["W"]:
            t = _gate(W["T"] @ h / jnp.sqrt(n))
            h = (1 - t) * h + t * jax.nn.relu(W["H"] @ h / jnp.sqrt(n))
        return p["v"] @ h / jnp.sqrt(n)

    return init, apply


@case(vx, vy, "several maximum maxout sampled")
def maxout_of_three():
    def init(n):
        return {"U": Normal((3, n, 3)), "W": Normal((3, n, n)), "v": Normal((n,))}

    def apply(p, x):
        n = p["v"].shape[0]
        h = jnp.max(p["U"] @ x, axis=0)
        h = jnp.max(p["W"] @ h / jnp.sqrt(n), axis=0)
        return p["v"] @ h / jnp.sqrt(n)

    return init, apply


@case(sx, sy, "several maximum pooling lengths sampled")
def max_pooling_over_positions():
    def init(n):
        return {"U": Normal((n, 3)), "W": Normal((n, n)), "v": Normal((n,))}

    def apply(p, x):
        n = p["v"].shape[0]
        h = jax.nn.relu(x @ p["U"].T) @ p["W"].T / jnp.sqrt(n)
        return jnp.maximum(h.max(axis=0), 0) @ p["v"] / jnp.sqrt(n)

    return init, apply


@case(sx, sy, "several softmax finite_axis lengths sampled")
def softmax_pooling_of_each_channel():
    def init(n):
        return {"U": Normal((n, 3)), "v": Normal((n,))}

    def apply(p, x):
        h = x @ p["U"].T
        pooled = jnp.sum(jax.nn.softmax(h, axis=0) * h, axis=0) + jax.nn.logsumexp(h, axis=0)
        return p["v"] @ pooled / jnp.sqrt(p["v"].size)

    return init, apply


@case(vx, vy, "several residual sampled")
def nonlinearity_after_the_residual():
    def init(n):
        return {"U": Normal((n, 3)), "W": Normal((n, n)), "v": Normal((n,))}

    def apply(p, x):
        n = p["v"].shape[0]
        h = jnp.tanh(p["U"] @ x)
        h = jnp.tanh(p["W"] @ h / jnp.sqrt(n) + h)
        return p["v"] @ h / jnp.sqrt(n)

    return init, apply


@case(sx, sy[:2], "several siamese absolute_difference lengths sampled")
def absolute_difference_of_branches():
    def init(n):
        return {"U": Normal((n, 3)), "v": Normal((n,))}

    def apply(p, x):
        h = jax.nn.relu(x @ p["U"].T)
        return p["v"] @ jnp.abs(h[0] - h[1]) / jnp.sqrt(p["v"].size)

    return init, apply


@case(sx, sy, "several product_of_branches lengths exact")
def products_of_branches():
    def init(n):
        return {"U": Normal((n, 3)), "V": Normal((n, 3)), "W": Normal((n, n)), "v": Normal((n,))}

    def apply(p, x):
        n = p["v"].shape[0]
        h = (p["U"] @ x[0]) * (p["U"] @ x[1]) + (p["U"] @ x[2]) * (p["V"] @ x[2])
        return p["v"] @ jax.nn.relu(p["W"] @ h / jnp.sqrt(n)) / jnp.sqrt(n)

    return init, apply


@case(sx[:3], sy, "several state_space decay closed")
def diagonal_state_space():
    def init(n):
        return {"U": Normal((n, 3)), "decay": Normal((n,), mean=0.3), "v": Normal((n,))}

    def apply(p, x):
        h = p["U"] @ x[0]
        for x_t in x[1:]:
            h = _gate(p["decay"]) * h + p["U"] @ x_t
        return p["v"] @ h / jnp.sqrt(p["v"].size)

    return init, apply


@case(gaussian(21, 4, 3), gaussian(22, 4, 3), "several batch_norm tanh sampled", "tokens")
def batch_norm_tanh():
    def init(n):
        return {"U": Normal((3, n)), "v": Normal((n,))}

    def apply(p, x):
        h = x @ p["U"]
        h = (h - h.mean(0)) / jnp.sqrt(h.var(0) + 0.3)
        return jnp.tanh(h) @ p["v"] / jnp.sqrt(p["v"].size)

    return init, apply


@case(vx, vy, "several stop_gradient detached sampled")
def detached_gate():
    def init(n):
        return {"U": Normal((n, 3)), "A": Normal((n, n)), "v": Normal((n,))}

    def apply(p, x):
        n = p["v"].shape[0]
        h = jnp.tanh(p["U"] @ x)
        a = p["A"] @ h / jnp.sqrt(n)
        return p["v"] @ (a * jax.lax.stop_gradient(jax.nn.sigmoid(a))) / jnp.sqrt(n)

    return init, apply
