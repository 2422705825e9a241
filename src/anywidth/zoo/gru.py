"""The gated recurrent unit (Cho et al. 2014), as in Tensor Programs I."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from anywidth import Network, Normal

__all__ = ["gru"]


def gru(
    d: int,
    nonlinearity: Callable[[Array], Array] = jnp.tanh,
    *,
    gate: Callable[[Array], Array] = jax.nn.sigmoid,
    pool: Literal["mean", "last", "none"] = "mean",
    varw: float = 1.0,
    varu: float = 1.0,
    varb: float | None = None,
    varv: float = 1.0,
) -> Network:
    """A GRU from `h_0 = 0`, and a readout `v h / sqrt(n)`. With `L(h, x) = W h / sqrt(n) + U x / sqrt(d) + b`,

        z = gate(L_z(h, x)),   r = gate(L_r(h, x)),   h <- (1 - z) h + z nonlinearity(L_h(r h, x)).

    Args:
        d: number of features of a token.
        nonlinearity: of the candidate, a coordinatewise function.
        gate: of the gates, a coordinatewise function.
        pool: what is read: "mean" the average of the states over time, "last" the last state, "none" every
            state (one output per token: its NNGP is the kernel of the states, times varv).
        varw, varu, varb, varv: variances of the entries of the W, the U, the b, v. `varb=None` for no biases, 0.0
            for biases that start at zero and are trained.

    Returns:
        A network from a sequence of shape (T, d), T free, to an output of shape () or, for "none", (T,).

    Raises:
        ValueError: if d is less than 1 or `pool` is not one of the three.
    """
    if d < 1:
        raise ValueError(f"gru needs d >= 1, and got d={d}")
    if pool not in ("mean", "last", "none"):
        raise ValueError(f'pool is "mean", "last" or "none", and it is {pool!r}')

    def init(n):
        params = {"v": Normal((n,), var=varv)}
        for name in "zrh":
            params |= {f"W{name}": Normal((n, n), var=varw), f"U{name}": Normal((n, d), var=varu)}
            if varb is not None:
                params[f"b{name}"] = Normal((n,), var=varb)
        return params

    def apply(params, x):
        n = params["v"].shape[0]

        def layer(name, h, x_t):
            out = params[f"W{name}"] @ h / jnp.sqrt(n) + params[f"U{name}"] @ x_t / jnp.sqrt(d)
            return out if varb is None else out + params[f"b{name}"]

        def step(h, x_t):
            z, r = gate(layer("z", h, x_t)), gate(layer("r", h, x_t))
            h = (1 - z) * h + z * nonlinearity(layer("h", r * h, x_t))
            return h, h

        start = jnp.zeros(n, jnp.result_type(params["v"], x))
        last, states = jax.lax.scan(step, start, x)
        read = {"mean": states.mean(0), "last": last, "none": states}[pool]
        return read @ params["v"] / jnp.sqrt(n)

    return Network(init, apply)
