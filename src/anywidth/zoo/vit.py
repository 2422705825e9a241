"""A vision transformer, with attention scores over n."""

import jax
import jax.numpy as jnp

from anywidth import Network, Normal

__all__ = ["vit"]


def vit(
    d: int,
    size: tuple[int, int],
    patch: int = 4,
    depth: int = 1,
    heads: int = 2,
    *,
    varw: float = 1.0,
    varp: float = 1.0,
    varv: float = 1.0,
) -> Network:
    """Patches as tokens, `depth` pre-norm blocks of self-attention and a gelu layer, and the mean over the tokens.

    `x = conv(image) + positions`, then `x = x + attention(norm(x))` and `x = x + gelu(norm(x) W1) W2`. A head of size
    m = n / heads attends with scores `k k^T / m`, its keys as queries: independent queries would have scores of zero
    in the limit, and every token would attend to all alike. Layer norm has neither gain nor bias.

    Args:
        d: number of channels of an image.
        size: (height, width) of the images, multiples of `patch`; the positional embeddings depend on it.
        patch: side of a patch.
        depth: number of blocks.
        heads: number of heads; the width must be a multiple of it.
        varw, varp, varv: variances of the weights, of the learned positional embeddings and of the readout.

    Returns:
        A network from an image of shape (height, width, d) to an output of shape ().

    Raises:
        ValueError: if a number is less than 1 or the size is not a multiple of `patch`.
    """
    if min(d, patch, depth, heads) < 1:
        raise ValueError(f"vit needs numbers of at least 1, and got {d=}, {patch=}, {depth=}, {heads=}")
    if size[0] % patch or size[1] % patch:
        raise ValueError(f"images of size {size} are not cut evenly into patches of {patch} x {patch}")
    tokens = (size[0] // patch) * (size[1] // patch)

    def init(n):
        names = ("keys", "values", "out", "W1", "W2")
        return {
            "embed": Normal((patch, patch, d, n), var=varw),
            "positions": Normal((tokens, n), var=varp),
            "blocks": [{name: Normal((n, n), var=varw) for name in names} for _ in range(depth)],
            "v": Normal((n,), var=varv),
        }

    def norm(x):
        x = x - x.mean(-1, keepdims=True)
        return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)

    def dense(x, w):
        return x @ w / jnp.sqrt(x.shape[-1])

    def attention(p, x):
        k, v = (dense(x, p[name]).reshape(len(x), heads, -1) for name in ("keys", "values"))
        weights = jax.nn.softmax(jnp.einsum("qhc,khc->hqk", k, k) / k.shape[-1])
        return dense(jnp.einsum("hqk,khc->qhc", weights, v).reshape(len(x), -1), p["out"])

    def apply(params, image):
        kernel = params["embed"]
        x = jax.lax.conv_general_dilated(
            image[None], kernel, (patch, patch), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = x.reshape(tokens, -1) / jnp.sqrt(kernel[..., 0].size) + params["positions"]
        for block in params["blocks"]:
            x = x + attention(block, norm(x))
            x = x + dense(jax.nn.gelu(dense(norm(x), block["W1"]), approximate=False), block["W2"])
        return params["v"] @ x.mean(0) / jnp.sqrt(x.shape[-1])

    return Network(init, apply)
