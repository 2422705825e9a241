r"""The log marginal likelihood, and what is chosen by it.

log p(y) = -y^T A^-1 y / 2 - log det A / 2 - N log(2 pi) / 2 with A = K + noise I (Rasmussen and Williams, eq. 2.30).
For A = scale (K + noise I) the best scale is y^T (K + noise I)^-1 y / N, and with K = Q diag(l) Q^T what is left is a
function of the noise alone that costs N operations to evaluate.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float
from scipy.optimize import minimize_scalar

from anywidth.errors import InputError
from anywidth.predict.gp import posterior
from anywidth.predict.matrices import Matrix, Targets

__all__ = ["NoiseFit", "fit_noise", "log_marginal_likelihood"]


def log_marginal_likelihood(
    K: Any, y: Float[Any, "N *outputs_and_columns"], noise: Any = 0.0
) -> Float[Array, "*columns"]:
    """The log of p(y) of a Gaussian process of mean zero, for each right-hand side.

    It is differentiable in all arguments, and so in the hyperparameters of a network: compute K inside with
    `jax.vmap(jax.vmap(kernel, (None, 0)), (0, None))(X, X)`, where the kernel is that of a network whose `var`s, or
    numbers in `apply`, are traced.

    Args:
        K: a Gram matrix (N, N) + S + S.
        y: targets, (N,) + S + R.
        noise: variance of their noise, or one for each example.

    Raises:
        InputError: shapes do not fit, a number is not finite, or K is not positive semidefinite.
    """
    return posterior(K, y, noise, solver="cholesky").log_marginal_likelihood()


class NoiseFit(NamedTuple):
    """The covariance scale (K + noise I) that makes data likeliest: `noise`, and `scale` and `log_marginal_likelihood`
    of every column of targets.
    """

    noise: float
    scale: Float[np.ndarray, "*columns"]
    log_marginal_likelihood: Float[np.ndarray, "*columns"]


def fit_noise(
    K: Any,
    y: Float[Any, "N *outputs_and_columns"],
    bounds: tuple[float, float] = (1e-6, 1e2),
    *,
    shared: bool = False,
) -> NoiseFit:
    """The noise, and the scale of the kernel, of largest marginal likelihood; for one eigendecomposition of K.

    Args:
        K: a Gram matrix (N, N) + S + S.
        y: targets, (N,) + S + R. All right-hand sides share the noise relative to the kernel; each has its scale.
        bounds: of the noise, relative to the mean of the diagonal of K.
        shared: whether all right-hand sides share the scale too.

    Returns:
        `NoiseFit(noise, scale, log_marginal_likelihood)`: the likeliest covariance is scale (K + noise I), so the
        posterior mean is that of `posterior(K, y, noise)` and covariances are its covariances times the scale.

    Raises:
        InputError: shapes do not fit, a number is not finite, or y is zero.
    """
    matrix = Matrix(K, "K", square=True)
    targets = Targets(y, matrix)
    dense = np.asarray(matrix.dense())
    values, vectors = np.linalg.eigh(dense)
    values = np.maximum(values.astype(np.float64), 0)
    squares = np.asarray(vectors.T @ np.asarray(targets.flat), np.float64) ** 2
    if not (squares.sum(0) > 0).all():
        raise InputError("y is zero: there is no likeliest scale")
    n, unit = len(values), float(np.trace(dense)) / len(values)

    def likelihood(log_noise: float) -> tuple[np.ndarray, np.ndarray]:
        total = values + np.exp(log_noise) * unit
        fit = (squares / total[:, None]).mean(0)
        scale = np.full_like(fit, fit.mean()) if shared else fit
        return -n / 2 * (np.log(2 * np.pi * scale) + fit / scale) - np.log(total).sum() / 2, scale

    grid = np.linspace(np.log(bounds[0]), np.log(bounds[1]), 40)
    best = int(np.argmax([likelihood(g)[0].sum() for g in grid]))
    around = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    found = float(minimize_scalar(lambda g: -likelihood(g)[0].sum(), bounds=around, method="bounded").x)
    evidence, scale = likelihood(found)
    shape = targets.columns
    return NoiseFit(float(np.exp(found)) * unit, scale.reshape(shape), evidence.reshape(shape))
