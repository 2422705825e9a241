"""The resolvents (I + x2 S)^-1 of a covariance S for many weights x2 at once.

They come from one eigendecomposition, but are differentiated as resolvents, ``dR = -x2 R dS R``, which knows nothing of
eigenvectors: derivatives of any order are right at repeated and at zero eigenvalues. Eigenvalues up to `floor` count as
zeros. `centred` matrices, whose rows and columns have sum zero, are treated in the B - 1 dimensions they live in.

>>> import jax.numpy as jnp
>>> logdet, R, SR = resolvents(jnp.eye(2), 0.0, jnp.array([3.0]), False)
>>> print(f"{jnp.exp(logdet[0]):.3f} {R[0, 0, 0]:.3f} {SR[0, 0, 0]:.3f}")
16.000 0.250 0.250
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["noise", "relative_noise", "resolvents", "resolvents_diag"]


def _spectrum(S, floor, centred):
    """Eigenvalues and -vectors; if `centred`, of the B - 1 dimensions orthogonal to (1, ..., 1) alone."""
    if not centred:
        lam, U = jnp.linalg.eigh((S + S.T) / 2)
    else:
        Q = _helmert(S.shape[-1], S.dtype)
        S = Q.T @ S @ Q
        lam, U = jnp.linalg.eigh((S + S.T) / 2)
        U = Q @ U
    return jnp.where(lam > floor, lam, 0), U


def _helmert(n, dtype):
    """Orthonormal columns, n - 1 of them, each of sum zero."""
    k = jnp.arange(1, n, dtype=dtype)
    i = jnp.arange(n, dtype=dtype)[:, None]
    return jnp.where(i < k, 1, jnp.where(i == k, -k, 0)) * lax.rsqrt(k * (k + 1))


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def resolvents(S, floor, x2, centred):
    """log det(I + x2 S), R = (I + x2 S)^-1 and S R for every x2; eigenvalues up to `floor` are zeros."""
    lam, U = _spectrum(S, floor, centred)
    d = 1 / (1 + x2[:, None] * lam)
    return jnp.log1p(x2[:, None] * lam).sum(1), (U * d[:, None]) @ U.T, (U * (lam * d)[:, None]) @ U.T


@resolvents.defjvp
def _(centred, primals, tangents):
    x2 = primals[2]
    out = _, R, _ = resolvents(*primals, centred)
    dS = (tangents[0] + tangents[0].T) / 2
    X = R @ dS
    dSR = X @ R
    return out, (x2 * jnp.trace(X, axis1=-2, axis2=-1), -x2[:, None, None] * dSR, dSR)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def resolvents_diag(S, floor, x2, centred):
    """As `resolvents`, but of S R only the diagonal."""
    lam, U = _spectrum(S, floor, centred)
    d = 1 / (1 + x2[:, None] * lam)
    return jnp.log1p(x2[:, None] * lam).sum(1), (U * d[:, None]) @ U.T, (lam * d) @ (U * U).T


@resolvents_diag.defjvp
def _(centred, primals, tangents):
    x2 = primals[2]
    out = _, R, _ = resolvents_diag(*primals, centred)
    dS = (tangents[0] + tangents[0].T) / 2
    X = R @ dS
    return out, (x2 * jnp.trace(X, axis1=-2, axis2=-1), -x2[:, None, None] * (X @ R), (X * R).sum(-1))


def relative_noise(S):
    """Of eigenvalues, relative to the largest entry."""
    return 4 * S.shape[-1] * float(jnp.finfo(S.dtype).eps)


def noise(S):
    """Eigenvalues up to here are rounding."""
    return lax.stop_gradient(relative_noise(S) * jnp.max(jnp.abs(S)))
