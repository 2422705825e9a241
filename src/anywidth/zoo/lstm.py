"""Long short-term memory (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000)."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from anywidth import Network, Normal

__all__ = ["lstm"]


def lstm(
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
    """An LSTM from `h_0 = c_0 = 0`, and a readout `v h / sqrt(n)`.

    With `(i, f, g, o) = W h / sqrt(n) + U x / sqrt(d) + b`,

        c <- gate(f) c + gate(i) nonlinearity(g),   h <- gate(o) nonlinearity(c).

    Args:
        d: number of features of a token.
        nonlinearity: of the cell, a coordinatewise function.
        gate: of the gates, a coordinatewise function.
        pool: what is read: "mean" the average of the states h over time, "last" the last one, "none" every
            one (one output per token: its NNGP is the kernel of the states, times varv).
        varw, varu, varb, varv: variances of the entries of W, U, b, v. `varb=None` for no biases, 0.0 for biases that
            start at zero and are trained.

    Returns:
        A network from a sequence of shape (T, d), T free, to an output of shape () or, for "none", (T,).

    Raises:
        ValueError: if d is less than 1 or `pool` is not one of the three.
    """
    if d < 1:
        raise ValueError(f"lstm needs d >= 1, and got d={d}")
    if pool not in ("mean", "last", "none"):
        raise ValueError(f'pool is "mean", "last" or "none", and it is {pool!r}')

    def init(n):
        params = {
            "W": Normal((4 * n, n), var=varw),
            "U": Normal((4 * n, d), var=varu),
            "v": Normal((n,), var=varv),
        }
        if varb is not None:
            params["b"] = Normal((4 * n,), var=varb)
        return params

    def apply(params, x):
        n = params["v"].shape[0]

        def step(carry, x_t):
            h, c = carry
            out = params["W"] @ h / jnp.sqrt(n) + params["U"] @ x_t / jnp.sqrt(d)
            if varb is not None:
                out = out + params["b"]
            i, f, g, o = jnp.split(out, 4)
            c = gate(f) * c + gate(i) * nonlinearity(g)
            h = gate(o) * nonlinearity(c)
            return (h, c), h

        start = jnp.zeros(n, jnp.result_type(params["v"], x))
        (last, _), states = jax.lax.scan(step, (start, start), x)
        read = {"mean": states.mean(0), "last": last, "none": states}[pool]
        return read @ params["v"] / jnp.sqrt(n)

    return Network(init, apply)
