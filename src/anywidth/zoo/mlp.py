"""The multilayer perceptron."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from anywidth import Network, Normal

__all__ = ["mlp"]


def mlp(
    d: int,
    depth: int = 1,
    nonlinearity: Callable[[Array], Array] = jax.nn.relu,
    *,
    varw: float = 2.0,
    varb: float | None = None,
    varv: float = 1.0,
    classes: int | None = None,
) -> Network:
    """`depth` hidden layers `h = nonlinearity(W h / sqrt(fan_in) + b)` and a readout `v h / sqrt(n)`.

    Args:
        d: number of input features.
        depth: number of hidden layers, at least 1.
        nonlinearity: a coordinatewise function.
        varw: variance of the weights. The default 2 keeps the size of a relu network's activations.
        varb: variance of the biases; None for no biases, 0.0 for biases that start at zero.
        varv: variance of the readout.
        classes: None for one output; k for k outputs with i.i.d. readouts (their kernel is returned once).

    Returns:
        A network from an example of shape (d,) to an output of shape () or (classes,).

    Raises:
        ValueError: if d or depth is less than 1.
    """
    if d < 1 or depth < 1:
        raise ValueError(f"mlp needs d >= 1 and depth >= 1, and got d={d}, depth={depth}")

    def init(n):
        params = {
            "W": [Normal((n, d if layer == 0 else n), var=varw) for layer in range(depth)],
            "v": Normal((n,) if classes is None else (classes, n), var=varv),
        }
        if varb is not None:
            params["b"] = [Normal((n,), var=varb) for _ in range(depth)]
        return params

    def apply(params, x):
        h = x
        for layer, w in enumerate(params["W"]):
            h = w @ h / jnp.sqrt(w.shape[1])
            if varb is not None:
                h = h + params["b"][layer]
            h = nonlinearity(h)
        return params["v"] @ h / jnp.sqrt(h.size)

    return Network(init, apply)
