"""A convolutional network with max pooling."""

import jax
import jax.numpy as jnp

from anywidth import Network, Normal

__all__ = ["maxpool_cnn"]


def maxpool_cnn(
    d: int, size: int, *, window: int = 2, varw: float = 2.0, varv: float = 1.0, classes: int | None = None
) -> Network:
    """Over sequences: relu of a circular convolution over three neighbours, max pooling, relu of a dense layer, mean.

    The channels are the width. `h[t] = relu((W_0 x[t-1] + W_1 x[t] + W_2 x[t+1]) / sqrt(3 d))`, then the maximum of
    each channel over `window` consecutive positions, then `relu(D h / sqrt(n))`, the mean over the pooled positions
    and a readout `v h / sqrt(n)`.

    Args:
        d: number of features of a position.
        size: number of positions, a multiple of `window`.
        window: how many positions are pooled, at least 1.
        varw: variance of the weights.
        varv: variance of the readout.
        classes: None for one output; k for k outputs with i.i.d. readouts (their kernel is returned once).

    Returns:
        A network from an example of shape (size, d) to an output of shape () or (classes,).

    Raises:
        ValueError: if d or window is less than 1, or size is not a positive multiple of window.
    """
    if d < 1 or window < 1 or size < 1 or size % window:
        raise ValueError(
            f"maxpool_cnn needs d >= 1, window >= 1 and size a multiple of window, and got d={d}, window={window}, "
            f"size={size}"
        )

    def init(n):
        return {
            "W": Normal((3, n, d), var=varw),
            "D": Normal((n, n), var=varw),
            "v": Normal((n,) if classes is None else (classes, n), var=varv),
        }

    def apply(params, x):
        n = params["D"].shape[0]
        shifted = [jnp.roll(x, shift, axis=0) for shift in (1, 0, -1)]
        h = sum(s @ w.T for s, w in zip(shifted, params["W"], strict=True)) / jnp.sqrt(3 * d)
        pooled = jax.nn.relu(h).reshape(size // window, window, n).max(axis=1)
        h = jax.nn.relu(pooled @ params["D"].T / jnp.sqrt(n)).mean(0)
        return params["v"] @ h / jnp.sqrt(n)

    return Network(init, apply)
