"""The transformer of Tensor Programs I and II: one head, keys as queries and values, attention scores over n."""

from typing import Literal

import jax
import jax.numpy as jnp

from anywidth import Network, Normal

__all__ = ["transformer"]


def transformer(
    d: int,
    depth: int = 1,
    *,
    pool: Literal["mean", "last", "none"] = "mean",
    causal: bool = False,
    varu: float = 1.0,
    varw: float = 1.0,
    varb: float | None = None,
    varv: float = 1.0,
) -> Network:
    """`depth` layers of self-attention and a two-layer relu block, both with residuals and layer norm.

    A layer maps tokens x to y:
    `k = x U / sqrt(fan_in)`, `z = norm(k + softmax(k k^T / n) k)`,
    `y = norm(z + relu(z W1 / sqrt(n) + b1) W2 / sqrt(n) + b2)`.
    Layer norm is over the width, with neither gain and bias nor epsilon.

    Args:
        d: number of features of a token.
        depth: number of layers, at least 1.
        pool: what is read by `y v / sqrt(n)`: "mean" the average over tokens, "last" the last token, "none"
            every token (one output per token).
        causal: if True, a token attends only to itself and to the tokens before it.
        varu, varw, varb, varv: variances of the entries of U, of W1 and W2, of b1 and b2, of v. `varb=None` for
            no biases, 0.0 for biases that start at zero and are trained.

    Returns:
        A network from a sequence of shape (T, d), T free, to an output of shape () or, for "none", (T,).

    Raises:
        ValueError: if d or depth is less than 1 or `pool` is not one of the three.
    """
    if d < 1 or depth < 1:
        raise ValueError(f"transformer needs d >= 1 and depth >= 1, and got d={d}, depth={depth}")
    if pool not in ("mean", "last", "none"):
        raise ValueError(f'pool is "mean", "last" or "none", and it is {pool!r}')

    def init(n):
        def layer(fan_in):
            params = {
                "U": Normal((fan_in, n), var=varu),
                "W1": Normal((n, n), var=varw),
                "W2": Normal((n, n), var=varw),
            }
            if varb is not None:
                params |= {"b1": Normal((n,), var=varb), "b2": Normal((n,), var=varb)}
            return params

        return {"layers": [layer(d if i == 0 else n) for i in range(depth)], "v": Normal((n,), var=varv)}

    def norm(x):
        x = x - x.mean(-1, keepdims=True)
        return x / jnp.sqrt((x**2).mean(-1, keepdims=True))

    def attend(k):
        scores = k @ k.T / k.shape[1]
        if causal:
            scores = jnp.where(jnp.tri(len(k), dtype=bool), scores, -jnp.inf)
        return jax.nn.softmax(scores) @ k

    def block(params, z):
        b1, b2 = (params["b1"], params["b2"]) if varb is not None else (0.0, 0.0)
        n = z.shape[1]
        h = jax.nn.relu(z @ params["W1"] / jnp.sqrt(n) + b1)
        return h @ params["W2"] / jnp.sqrt(n) + b2

    def apply(params, x):
        for layer in params["layers"]:
            k = x @ layer["U"] / jnp.sqrt(x.shape[1])
            z = norm(k + attend(k))
            x = norm(z + block(layer, z))
        read = {"mean": x.mean(0), "last": x[-1], "none": x}[pool]
        return read @ params["v"] / jnp.sqrt(x.shape[1])

    return Network(init, apply)
