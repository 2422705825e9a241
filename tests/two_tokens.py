"""The kernels of `zoo.attention` on sequences of two tokens, by integrals that need no engine.

The softmax of two scores is the sigmoid of their difference d. In the limit of many heads the differences of two
queries s, s' are Gaussian with Cov(d, d') = w^2 K(s, s') (K(1, 1') - K(1, 2') - K(2, 1') + K(2, 2')), where K is the
kernel of the stream and w the covariance of the weights of the two networks, one but for the derivative. Every
expectation is of one function of each of two Gaussians, by a product of Gauss-Hermite rules; the NTK is the derivative
in w, which moves only what is across the two networks.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

POINTS, WEIGHTS = np.polynomial.hermite_e.hermegauss(64)
ONE, TWO = (np.ravel(a) for a in np.meshgrid(POINTS, POINTS))
BOTH = np.outer(WEIGHTS, WEIGHTS).ravel() / WEIGHTS.sum() ** 2


def product(f, a, c, b):
    r = c / jnp.sqrt(a)
    return (BOTH * f(jnp.sqrt(a) * ONE) * f(r * ONE + jnp.sqrt(jnp.maximum(b - r * r, 0)) * TWO)).sum()


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def expected(f, a, c, b):
    """E f(u) f(v) of variances a and b and covariance c."""
    return product(f, a, c, b)


@expected.defjvp
def _(f, at, moved):  # Price's theorem: in c alone
    return product(f, *at), product(jax.vmap(jax.grad(f)), *at) * moved[1]


def attended(K, A, B, w, causal):
    """The covariance K of two streams, A and B their own, after the heads are merged."""
    across, left, right = (k[0, 0] - k[0, 1] - k[1, 0] + k[1, 1] for k in (K, A, B))

    def one(s, u):
        if causal and 0 in (s, u):  # the first token attends to itself; the second to each by 1/2 in the mean
            weights = jnp.outer(*(jnp.array([[1.0, 0.0], [0.5, 0.5]])[t] for t in (s, u)))
        else:
            p = expected(jax.nn.sigmoid, A[s, s] * left, w**2 * K[s, u] * across, B[u, u] * right)
            weights = jnp.array([[p, 0.5 - p], [0.5 - p, p]])
        return w**2 * (weights * K).sum()

    return jnp.array([[one(s, u) for u in range(2)] for s in range(2)])


def gelu_layer(K, A, B, w):
    gelu = functools.partial(jax.nn.gelu, approximate=False)
    return w * jnp.array([[expected(gelu, A[s, s], w * K[s, u], B[u, u]) for u in range(2)] for s in range(2)])


def normalised(K, A, B):
    left, right = (jnp.sqrt(jnp.diag(k) + 1e-5) for k in (A, B))
    return K / jnp.outer(left, right)


def across_and_own(layer, streams, w):
    """A layer applied to the kernel of two streams and to their own, which are (K, A, B)."""
    K, A, B = streams
    return layer(K, A, B, w), layer(A, A, A, 1.0), layer(B, B, B, 1.0)


def kernels(x, y, depth, block, causal):
    """NNGP and NTK of `zoo.attention(d, depth, block=block, causal=causal)` with unit variances, on x and y (2, d)."""

    def block_of(streams, w):
        def add(layer, *more):
            normal = streams
            if block == "transformer":
                normal = across_and_own(lambda K, A, B, _: normalised(K, A, B), streams, w)
            new = across_and_own(lambda K, A, B, w: layer(K, A, B, w, *more), normal, w)
            return tuple(old + k for old, k in zip(streams, new, strict=True))

        streams = add(attended, causal)
        return add(gelu_layer) if block == "transformer" else streams

    def nngp(epsilon):
        w, d = 1 + epsilon, x.shape[1]
        streams = (w * x @ y.T / d, x @ x.T / d, y @ y.T / d)
        for _ in range(depth):
            streams = block_of(streams, w)
        return w * streams[0].mean()

    return jax.jvp(nngp, (0.0,), (1.0,))
