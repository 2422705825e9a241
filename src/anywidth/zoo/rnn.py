"""The simple recurrent network of Tensor Programs I and II."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from anywidth import Network, Normal

__all__ = ["rnn"]


def rnn(
    d: int,
    nonlinearity: Callable[[Array], Array] = jax.lax.erf,
    *,
    pool: Literal["mean", "last", "none"] = "mean",
    varw: float = 1.0,
    varu: float = 1.0,
    varb: float | None = None,
    varv: float = 1.0,
) -> Network:
    """`s_t = nonlinearity(W s_{t-1} / sqrt(n) + U x_t / sqrt(d) + b)` from `s_0 = 0`, and a readout `v s / sqrt(n)`.

    Args:
        d: number of features of a token.
        nonlinearity: a coordinatewise function.
        pool: what is read: "mean" the average of the states over time, "last" the last state, "none" every
            state (one output per token: its NNGP is the kernel of the states, times varv).
        varw, varu, varb, varv: variances of the entries of W, U, b, v. `varb=None` for no bias, 0.0 for a bias
            that starts at zero and is trained.

    Returns:
        A network from a sequence of shape (T, d), T free, to an output of shape () or, for "none", (T,).

    Raises:
        ValueError: if d is less than 1 or `pool` is not one of the three.
    """
    if d < 1:
        raise ValueError(f"rnn needs d >= 1, and got d={d}")
    if pool not in ("mean", "last", "none"):
        raise ValueError(f'pool is "mean", "last" or "none", and it is {pool!r}')

    def init(n):
        params = {"W": Normal((n, n), var=varw), "U": Normal((n, d), var=varu), "v": Normal((n,), var=varv)}
        if varb is not None:
            params["b"] = Normal((n,), var=varb)
        return params

    def apply(params, x):
        n = params["v"].shape[0]

        def step(s, x_t):
            h = params["W"] @ s / jnp.sqrt(n) + params["U"] @ x_t / jnp.sqrt(d)
            if varb is not None:
                h = h + params["b"]
            s = nonlinearity(h)
            return s, s

        start = jnp.zeros(n, jnp.result_type(params["v"], x))
        last, states = jax.lax.scan(step, start, x)
        read = {"mean": states.mean(0), "last": last, "none": states}[pool]
        return read @ params["v"] / jnp.sqrt(n)

    return Network(init, apply)
