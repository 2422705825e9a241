"""The graph convolutional network of Kipf and Welling (2017)."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from anywidth import Network, Normal

__all__ = ["gcn"]


def gcn(
    d: int,
    depth: int = 2,
    nonlinearity: Callable[[Array], Array] = jax.nn.relu,
    *,
    pool: Literal["mean", "none"] = "mean",
    varw: float = 2.0,
    varv: float = 1.0,
) -> Network:
    """`h <- nonlinearity(S h W / sqrt(fan_in))` with `S = D^(-1/2) (A + 1) D^(-1/2)`, D the degrees of A + 1.

    The graph is part of the example: `(A, x)`, with A its adjacency matrix (symmetric, weights allowed).

    Args:
        d: number of features of a node.
        depth: number of layers, at least 1.
        nonlinearity: a coordinatewise function.
        pool: "mean" for one output per graph, "none" for one per node.
        varw, varv: variances of the weights and of the readout.

    Returns:
        A network from a graph, `(A, x)` of shapes (N, N) and (N, d), N free, to an output of shape () or (N,).

    Raises:
        ValueError: if d or depth is less than 1 or `pool` is not one of the two.
    """
    if d < 1 or depth < 1:
        raise ValueError(f"gcn needs d >= 1 and depth >= 1, and got {d=}, {depth=}")
    if pool not in ("mean", "none"):
        raise ValueError(f'pool is "mean" or "none", and it is {pool!r}')

    def init(n):
        return {
            "W": [Normal((d if layer == 0 else n, n), var=varw) for layer in range(depth)],
            "v": Normal((n,), var=varv),
        }

    def apply(params, graph):
        adjacency, h = graph
        adjacency = adjacency + jnp.eye(len(adjacency), dtype=h.dtype)
        root = jax.lax.rsqrt(adjacency.sum(1))
        spread = root[:, None] * adjacency * root
        for w in params["W"]:
            h = nonlinearity(spread @ h @ w / jnp.sqrt(w.shape[0]))
        h = h.mean(0) if pool == "mean" else h
        return h @ params["v"] / jnp.sqrt(h.shape[-1])

    return Network(init, apply)
