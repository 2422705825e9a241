"""A U-net: down, up, and across."""

import jax
import jax.numpy as jnp

from anywidth import Network, Normal

__all__ = ["unet"]

_NUMBERS = ("NHWC", "HWIO", "NHWC")


def unet(d: int, depth: int = 2, *, varw: float = 2.0, varv: float = 1.0) -> Network:
    """Convolutions at `depth + 1` resolutions, with skips across: an output for every pixel.

    On the way down `relu(conv(x))` and average pooling by two; on the way up each pixel is repeated two by two, the
    channels of the same resolution on the way down are put beside it, and `relu(conv(x))` follows. Windows are 3 x 3.

    Args:
        d: number of channels of an image.
        depth: how often the resolution is halved.
        varw, varv: variances of the weights and of the readout.

    Returns:
        A network from an image of shape (height, width, d), both divisible by 2**depth, to an output (height, width).

    Raises:
        ValueError: if d or depth is less than 1.
    """
    if d < 1 or depth < 1:
        raise ValueError(f"unet needs d >= 1 and depth >= 1, and got {d=}, {depth=}")

    def init(n):
        return {
            "down": [Normal((3, 3, d if i == 0 else n, n), var=varw) for i in range(depth)],
            "bottom": Normal((3, 3, n, n), var=varw),
            "up": [Normal((3, 3, 2 * n, n), var=varw) for _ in range(depth)],
            "v": Normal((n,), var=varv),
        }

    def layer(x, kernel):
        y = jax.lax.conv_general_dilated(x[None], kernel, (1, 1), "SAME", dimension_numbers=_NUMBERS)[0]
        return jax.nn.relu(y / jnp.sqrt(9 * kernel.shape[2]))

    def apply(params, x):
        across = []
        for kernel in params["down"]:
            x = layer(x, kernel)
            across.append(x)
            x = jax.lax.reduce_window(x, 0.0, jax.lax.add, (2, 2, 1), (2, 2, 1), "VALID") / 4
        x = layer(x, params["bottom"])
        for kernel in params["up"]:
            x = jnp.repeat(jnp.repeat(x, 2, axis=0), 2, axis=1)
            x = layer(jnp.concatenate([x, across.pop()], axis=-1), kernel)
        return x @ params["v"] / jnp.sqrt(x.shape[-1])

    return Network(init, apply)
