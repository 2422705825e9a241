r"""The symmetric square root of a covariance, singular ones included, and its derivatives.

A = S^(1/2) depends continuously on S, commutes with permutations (so that exchanging the two examples of a pair
exchanges the roles of the points and nothing else) and needs no inverse. Its derivative solves Lyapunov's equation
A dA + dA A = dS, in the eigenbasis of S a division by a_i + a_j. Where both roots vanish the quotient is taken to be
zero: along a path of covariances dS has no part there. Nothing is differentiated through eigenvectors, so derivatives
of any order are right at repeated and at zero eigenvalues.

>>> import jax.numpy as jnp
>>> S = jnp.array([[1.0, 1.0], [1.0, 1.0]])           # the same input twice
>>> A = root(S)
>>> bool(jnp.allclose(A @ A, S, atol=1e-6))
True
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["root"]


def _spectrum(S: Array) -> tuple[Array, Array, Array]:
    """Eigenvectors, square roots of the eigenvalues, and below what size those are rounding."""
    lam, U = jnp.linalg.eigh((S + jnp.swapaxes(S, -1, -2)) / 2)
    noise = 4 * S.shape[-1] * jnp.finfo(S.dtype).eps * jnp.max(jnp.abs(lam), -1, keepdims=True)
    return U, jnp.sqrt(jnp.where(lam > noise, lam, 0)), jnp.sqrt(noise)


@jax.custom_jvp
def root(S: Float[Array, "*b d d"]) -> Float[Array, "*b d d"]:
    """The symmetric positive semidefinite square root; negative eigenvalues count as zeros."""
    U, a, _ = _spectrum(S)
    return (U * a[..., None, :]) @ jnp.swapaxes(U, -1, -2)


@root.defjvp
def _(primals, tangents):
    (S,), (dS,) = primals, tangents
    return root(S), _lyapunov(S, (dS + jnp.swapaxes(dS, -1, -2)) / 2)


@jax.custom_jvp
def _lyapunov(S: Array, X: Array) -> Array:
    """Y with A Y + Y A = X, A the root of S."""
    U, a, _ = _spectrum(S)
    total = a[..., :, None] + a[..., None, :]
    inverse = 1 / jnp.where(total > 0, total, jnp.inf)
    Ut = jnp.swapaxes(U, -1, -2)
    return U @ ((Ut @ X @ U) * inverse) @ Ut


@_lyapunov.defjvp
def _(primals, tangents):
    (S, X), (dS, dX) = primals, tangents
    Y = _lyapunov(S, X)
    dA = _lyapunov(S, (dS + jnp.swapaxes(dS, -1, -2)) / 2)
    return Y, _lyapunov(S, dX - dA @ Y - Y @ dA)
