"""Convolutional networks: plain, and with residual branches."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from anywidth import Network, Normal

__all__ = ["cnn", "resnet"]

_NUMBERS = ("NHWC", "HWIO", "NHWC")


def _conv(x, kernel, stride=1, padding="SAME"):
    fan_in = kernel.shape[0] * kernel.shape[1] * kernel.shape[2]
    y = jax.lax.conv_general_dilated(x[None], kernel, (stride, stride), padding, dimension_numbers=_NUMBERS)[0]
    return y / jnp.sqrt(fan_in)


def cnn(
    d: int,
    depth: int = 3,
    nonlinearity: Callable[[Array], Array] = jax.nn.relu,
    *,
    window: int = 3,
    strides: int = 1,
    padding: Literal["SAME", "VALID"] = "SAME",
    size: tuple[int, int] | None = None,
    varw: float = 2.0,
    varb: float | None = None,
    varv: float = 1.0,
) -> Network:
    """`depth` layers of `nonlinearity(conv(x, W) / sqrt(window^2 fan_in) + b)` and a readout of all positions.

    Args:
        d: number of channels of an image.
        depth: number of convolutions, at least 1.
        nonlinearity: a coordinatewise function.
        window: height and width of the window of a convolution.
        strides: the step of the window, in every layer.
        padding: "SAME" or "VALID".
        size: None for global average pooling before the readout, for images of any size; the (height, width) of the
            images for a readout of the flattened last layer. Its kernel costs time linear in the number of
            positions, that of pooling quadratic.
        varw, varb, varv: variances of weights, biases and readout. `varb=None` for no biases, 0.0 for biases that
            start at zero and are trained.

    Returns:
        A network from an image of shape (height, width, d) to an output of shape ().

    Raises:
        ValueError: if d, depth, window or strides is less than 1, or nothing is left of an image of that size.
    """
    if min(d, depth, window, strides) < 1:
        raise ValueError(f"cnn needs numbers of at least 1, and got {d=}, {depth=}, {window=}, {strides=}")
    positions = 1
    if size is not None:
        for side in size:
            for _ in range(depth):
                side = -(-(side if padding == "SAME" else side - window + 1) // strides)
            positions *= side
            if side < 1:
                raise ValueError(f"nothing is left of images of size {size} after {depth} convolutions")

    def init(n):
        params = {
            "W": [Normal((window, window, d if layer == 0 else n, n), var=varw) for layer in range(depth)],
            "v": Normal((positions * n,), var=varv),
        }
        if varb is not None:
            params["b"] = [Normal((n,), var=varb) for _ in range(depth)]
        return params

    def apply(params, x):
        for layer, kernel in enumerate(params["W"]):
            x = _conv(x, kernel, strides, padding)
            if varb is not None:
                x = x + params["b"][layer]
            x = nonlinearity(x)
        h = x.mean((0, 1)) if size is None else x.reshape(-1)
        return params["v"] @ h / jnp.sqrt(h.size)

    return Network(init, apply)


def resnet(
    d: int,
    stages: int = 2,
    blocks: int = 1,
    nonlinearity: Callable[[Array], Array] = jax.nn.relu,
    *,
    varw: float = 2.0,
    varv: float = 1.0,
) -> Network:
    """A residual network: `x + conv(phi(conv(phi(x))))`, in stages of falling resolution, then global average pooling.

    All windows are 3 x 3. The first block of every stage but the first halves height and width in its branch, and in
    its shortcut, a 1 x 1 convolution. Pre-activation, as in He et al. (2016), without normalisation.

    Args:
        d: number of channels of an image.
        stages: number of resolutions.
        blocks: number of blocks of a stage.
        nonlinearity: a coordinatewise function.
        varw, varv: variances of the weights and of the readout.

    Returns:
        A network from an image of shape (height, width, d) to an output of shape ().

    Raises:
        ValueError: if d, stages or blocks is less than 1.
    """
    if min(d, stages, blocks) < 1:
        raise ValueError(f"resnet needs numbers of at least 1, and got {d=}, {stages=}, {blocks=}")

    def init(n):
        def block(shortcut):
            params = {"W1": Normal((3, 3, n, n), var=varw), "W2": Normal((3, 3, n, n), var=varw)}
            return params | ({"shortcut": Normal((1, 1, n, n))} if shortcut else {})

        return {
            "first": Normal((3, 3, d, n)),
            "blocks": [[block(stage > 0 and i == 0) for i in range(blocks)] for stage in range(stages)],
            "v": Normal((n,), var=varv),
        }

    def apply(params, x):
        x = _conv(x, params["first"])
        for stage in params["blocks"]:
            for block in stage:
                stride = 2 if "shortcut" in block else 1
                branch = _conv(nonlinearity(x), block["W1"], stride)
                branch = _conv(nonlinearity(branch), block["W2"])
                x = (_conv(x, block["shortcut"], stride) if "shortcut" in block else x) + branch
        h = nonlinearity(x).mean((0, 1))
        return params["v"] @ h / jnp.sqrt(h.size)

    return Network(init, apply)
