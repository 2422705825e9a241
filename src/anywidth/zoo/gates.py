"""Gated networks: gated linear units and highway networks."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from anywidth import Network, Normal

__all__ = ["glu_mlp", "highway"]


def glu_mlp(
    d: int,
    depth: int = 1,
    gate: Callable[[Array], Array] = jax.nn.silu,
    *,
    varw: float = 2.0,
    varv: float = 1.0,
    classes: int | None = None,
) -> Network:
    """`depth` gated linear units `h = (A h / sqrt(fan_in)) * gate(B h / sqrt(fan_in))` and a readout `v h / sqrt(n)`.

    The gate `jax.nn.silu` is SwiGLU, `jax.nn.sigmoid` the original unit, `jax.nn.gelu` GEGLU (Shazeer, GLU Variants
    Improve Transformer, 2020).

    Args:
        d: number of input features.
        depth: number of hidden layers, at least 1.
        gate: a coordinatewise function.
        varw: variance of the weights.
        varv: variance of the readout.
        classes: None for one output; k for k outputs with i.i.d. readouts (their kernel is returned once).

    Returns:
        A network from an example of shape (d,) to an output of shape () or (classes,).

    Raises:
        ValueError: if d or depth is less than 1.
    """
    if d < 1 or depth < 1:
        raise ValueError(f"glu_mlp needs d >= 1 and depth >= 1, and got d={d}, depth={depth}")

    def init(n):
        fan_in = [d] + [n] * (depth - 1)
        return {
            "A": [Normal((n, m), var=varw) for m in fan_in],
            "B": [Normal((n, m), var=varw) for m in fan_in],
            "v": Normal((n,) if classes is None else (classes, n), var=varv),
        }

    def apply(params, x):
        h = x
        for a, b in zip(params["A"], params["B"], strict=True):
            scale = jnp.sqrt(a.shape[1])
            h = (a @ h / scale) * gate(b @ h / scale)
        return params["v"] @ h / jnp.sqrt(h.size)

    return Network(init, apply)


def highway(
    d: int,
    depth: int = 2,
    nonlinearity: Callable[[Array], Array] = jax.nn.relu,
    *,
    varw: float = 2.0,
    carry: float = 1.0,
    varv: float = 1.0,
    classes: int | None = None,
) -> Network:
    """A highway network: `h = (1 - t) * h + t * nonlinearity(H h / sqrt(n))`, `t = sigmoid(T h / sqrt(n) - carry)`.

    A dense layer takes the input to the width first (Srivastava, Greff & Schmidhuber, Highway Networks, 2015).

    Args:
        d: number of input features.
        depth: number of highway layers, at least 1.
        nonlinearity: a coordinatewise function.
        varw: variance of the weights.
        carry: how far the gates are biased towards carrying at initialisation.
        varv: variance of the readout.
        classes: None for one output; k for k outputs with i.i.d. readouts (their kernel is returned once).

    Returns:
        A network from an example of shape (d,) to an output of shape () or (classes,).

    Raises:
        ValueError: if d or depth is less than 1.
    """
    if d < 1 or depth < 1:
        raise ValueError(f"highway needs d >= 1 and depth >= 1, and got d={d}, depth={depth}")

    def init(n):
        return {
            "U": Normal((n, d), var=varw),
            "T": [Normal((n, n), var=varw) for _ in range(depth)],
            "b": [Normal((n,), var=0.0, mean=-carry) for _ in range(depth)],
            "H": [Normal((n, n), var=varw) for _ in range(depth)],
            "v": Normal((n,) if classes is None else (classes, n), var=varv),
        }

    def apply(params, x):
        h = nonlinearity(params["U"] @ x / jnp.sqrt(d))
        for t, b, w in zip(params["T"], params["b"], params["H"], strict=True):
            gate = jax.nn.sigmoid(t @ h / jnp.sqrt(h.size) + b)
            h = (1 - gate) * h + gate * nonlinearity(w @ h / jnp.sqrt(h.size))
        return params["v"] @ h / jnp.sqrt(h.size)

    return Network(init, apply)
