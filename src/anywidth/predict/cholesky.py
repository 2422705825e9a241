"""Cholesky factors of matrices that are positive semidefinite up to rounding.

A Gram matrix with duplicates, or computed in float32, can have eigenvalues a little below zero. The factor is that of
A + jitter I, with the smallest jitter of 0, u, 4u, 16u, ... that works, u = eps mean(diag A). The jitter is a constant
to derivatives; that of the factor is dL = L P(L^-1 dA L^-T), where P takes the lower triangle and half of the diagonal
(Murray, Differentiation of the Cholesky decomposition, 2016, eq. 8).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import linalg
from jaxtyping import Array, Float

from anywidth import _compat
from anywidth.errors import InputError

__all__ = ["factorise", "solve", "solve_lower"]

_GROWTH = 4.0
_MOST = 1e-2  # of the mean of the diagonal: beyond it the matrix is not a kernel's


def factorise(A: Float[Array, "N N"], name: str = "K") -> tuple[Float[Array, "N N"], Float[Array, ""]]:
    """The lower factor L of A + jitter I, and the jitter.

    Raises:
        InputError: A has eigenvalues so far below zero that rounding does not explain them. (Under `jit` the factor
            is NaN instead.)
    """
    L, jitter = _factorise(A)
    if not _compat.is_tracer(jitter) and bool(jnp.isnan(jitter)):
        low = float(jnp.linalg.eigvalsh(A)[0])
        raise InputError(
            f"{name} is not positive semidefinite: its smallest eigenvalue is {low:.3g}, with a diagonal of "
            f"{float(jnp.diagonal(A).mean()):.3g} on average. It is not a kernel of examples with themselves."
        )
    return L, jitter


@jax.custom_jvp
@jax.jit
def _factorise(A: Array) -> tuple[Array, Array]:
    scale = jnp.abs(jnp.diagonal(A)).mean()
    first = jnp.finfo(A.dtype).eps * scale
    eye = jnp.arange(len(A))

    def factor(jitter: Array) -> Array:
        return linalg.cholesky(A.at[eye, eye].add(jitter), symmetrize_input=False)

    def failed(state: tuple[Array, Array]) -> Array:
        return ~jnp.isfinite(state[0][-1, -1]) & (state[1] <= _MOST * scale)

    def again(state: tuple[Array, Array]) -> tuple[Array, Array]:
        jitter = jnp.where(state[1] == 0, first, _GROWTH * state[1])
        return factor(jitter), jitter

    zero = jnp.zeros((), A.dtype)
    L, jitter = jax.lax.while_loop(failed, again, (factor(zero), zero))
    return L, jnp.where(jnp.isfinite(L[-1, -1]), jitter, jnp.nan)


@_factorise.defjvp
def _factorise_jvp(primals: Any, tangents: Any) -> Any:
    (A,), (dA,) = primals, tangents
    L, jitter = _factorise(A)
    inner = linalg.triangular_solve(L, dA, left_side=False, lower=True, transpose_a=True)
    inner = linalg.triangular_solve(L, inner, left_side=True, lower=True)
    lower = jnp.tril(inner) - jnp.diag(jnp.diagonal(inner)) / 2
    return (L, jitter), (L @ lower, jnp.zeros_like(jitter))


@jax.jit
def solve_lower(L: Float[Array, "N N"], b: Float[Array, "N r"]) -> Float[Array, "N r"]:
    """L^-1 b."""
    return linalg.triangular_solve(L, b, left_side=True, lower=True)


@jax.jit
def solve(L: Float[Array, "N N"], b: Float[Array, "N r"]) -> Float[Array, "N r"]:
    """(L L^T)^-1 b."""
    return linalg.triangular_solve(L, solve_lower(L, b), left_side=True, lower=True, transpose_a=True)
