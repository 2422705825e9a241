"""The batch-normalised perceptron of Tensor Programs II: its example is a batch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from anywidth import Network, Normal

__all__ = ["batchnorm_mlp"]


def batchnorm_mlp(
    d: int,
    depth: int = 1,
    nonlinearity: Callable[[Array], Array] = jax.nn.relu,
    *,
    epsilon: float = 0.0,
    varw: float = 1.0,
    varv: float = 1.0,
) -> Network:
    """`depth` layers of `nonlinearity(batchnorm(x W / sqrt(fan_in)))` and a readout `y v / sqrt(n)` per sample.

    Batch norm subtracts the mean over the batch and divides by `sqrt(biased variance + epsilon)`, without gain and
    bias. The samples of a batch interact, so the batch is the network's example. Without epsilon the NTK exists
    for batches of 4 or more that have no duplicates to shrink them.

    Args:
        d: number of input features.
        depth: number of hidden layers, at least 1.
        nonlinearity: a coordinatewise function.
        epsilon: added to the variance over the batch.
        varw, varv: variances of the weights and of the readout.

    Returns:
        A network from a batch of shape (B, d), B free, to an output of shape (B,).

    Raises:
        ValueError: if d or depth is less than 1, or epsilon is negative.
    """
    if d < 1 or depth < 1:
        raise ValueError(f"batchnorm_mlp needs d >= 1 and depth >= 1, and got d={d}, depth={depth}")
    if epsilon < 0:
        raise ValueError(f"epsilon must not be negative, and it is {epsilon}")

    def init(n):
        return {
            "W": [Normal((d if layer == 0 else n, n), var=varw) for layer in range(depth)],
            "v": Normal((n,), var=varv),
        }

    def batchnorm(h):
        h = h - h.mean(0)
        return h / jnp.sqrt((h**2).mean(0) + epsilon)

    def apply(params, x):
        for w in params["W"]:
            x = nonlinearity(batchnorm(x @ w / jnp.sqrt(x.shape[1])))
        return x @ params["v"] / jnp.sqrt(x.shape[1])

    return Network(init, apply)
