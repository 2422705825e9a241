"""Attention as it is used: many heads, queries and keys of their own, scores over the root of the head size."""

from typing import Literal

import jax
import jax.numpy as jnp

from anywidth import Network, Normal

__all__ = ["attention"]


def attention(
    d: int,
    depth: int = 1,
    *,
    block: Literal["attention", "transformer"] = "attention",
    pool: Literal["mean", "last", "none"] = "mean",
    causal: bool = False,
    varw: float = 1.0,
    varv: float = 1.0,
) -> Network:
    """`depth` residual blocks of multi-head self-attention, with two widths: heads of size n, and the number of heads.

    A head computes `q, k, v = x Q, x K, x V` (over the root of their fan-in), attends with
    `softmax(q k^T / sqrt(n))`, and the heads are merged by a matrix O: `x = x + merge(heads)`. The stream has n heads
    coordinates. A "transformer" block is pre-norm, and has a gelu layer: `x = x + merge(heads(norm(x)))`, then
    `x = x + gelu(norm(x) W1) W2`. Layer norm has neither gain nor bias.

    The limit is that of n and the number of heads both to infinity, in which the scores of a head are Gaussian and
    the heads independent. Expectations over the scores are sampled: see `tol` of `kernels`.

    Args:
        d: number of features of a token.
        depth: number of blocks.
        block: "attention" or "transformer".
        pool: what is read by `x v / sqrt(n heads)`: "mean" the average over tokens, "last" the last token, "none"
            every token (one output per token).
        causal: if True, a token attends only to itself and to the tokens before it.
        varw, varv: variances of the weights and of the readout.

    Returns:
        A network `init(n, heads)` from a sequence of shape (T, d), T free, to an output of shape () or, for "none",
        (T,).

    Raises:
        ValueError: if d or depth is less than 1, or `block` or `pool` is not one of those.

    Reference: Hron, Bahri, Sohl-Dickstein and Novak, Infinite attention (2020), theorem 3.
    """
    if d < 1 or depth < 1:
        raise ValueError(f"attention needs d >= 1 and depth >= 1, and got d={d}, depth={depth}")
    if block not in ("attention", "transformer"):
        raise ValueError(f'block is "attention" or "transformer", and it is {block!r}')
    if pool not in ("mean", "last", "none"):
        raise ValueError(f'pool is "mean", "last" or "none", and it is {pool!r}')

    def init(n, heads):
        wide = n * heads
        params = {name: Normal((wide, heads, n), var=varw) for name in "QKV"}
        params["O"] = Normal((heads, n, wide), var=varw)
        if block == "transformer":
            params |= {name: Normal((wide, wide), var=varw) for name in ("W1", "W2")}
        return {"embed": Normal((d, wide), var=varw), "blocks": [params] * depth, "v": Normal((wide,), var=varv)}

    def norm(x):
        x = x - x.mean(-1, keepdims=True)
        return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)

    def attend(p, x):
        q, k, v = (jnp.einsum("tc,chd->htd", x, p[name]) / jnp.sqrt(x.shape[-1]) for name in "QKV")
        scores = jnp.einsum("hsd,htd->hst", q, k) / jnp.sqrt(q.shape[-1])
        if causal:
            scores = jnp.where(jnp.tri(len(x), dtype=bool), scores, -jnp.inf)
        o = jnp.einsum("hst,htd->shd", jax.nn.softmax(scores), v)
        return jnp.einsum("shd,hdc->sc", o, p["O"]) / jnp.sqrt(x.shape[-1])

    def dense(x, w):
        return x @ w / jnp.sqrt(x.shape[-1])

    def apply(params, x):
        x = x @ params["embed"] / jnp.sqrt(x.shape[-1])
        for p in params["blocks"]:
            if block == "attention":
                x = x + attend(p, x)
            else:
                x = x + attend(p, norm(x))
                x = x + dense(jax.nn.gelu(dense(norm(x), p["W1"]), approximate=False), p["W2"])
        read = {"mean": x.mean(0), "last": x[-1], "none": x}[pool]
        return dense(read, params["v"])

    return Network(init, apply)
