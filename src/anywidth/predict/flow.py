r"""Training an infinitely wide network by gradient flow on the squared loss (Lee et al., 2019, eqs 8 to 16).

With kernels T (NTK) and K (NNGP), the parameters follow dtheta/dt = -grad of
1/2 sum (f(x_i) - y_i)^2 + noise/2 |theta - theta_0|^2 from a random theta_0. With c_t(T) the matrix function
c_t(l) = (1 - exp(-t (l + noise))) / (l + noise), at time t the outputs are Gaussian over initialisations:

    mean        T(x*, X) c_t(T) y
    covariance  K(x*, x*) + B K(X, X) B^T - B K(X, x*) - K(x*, X) B^T     with B = T(x*, X) c_t(T)

At the end, t = inf, the mean is the posterior mean of the Gaussian process with kernel T and that noise. Gradient
descent with learning rate r follows the flow (k steps are time k r) while r < 2 / (largest eigenvalue + noise), and
diverges beyond. For the mean of the loss over examples instead of the sum, time and learning rate are N times larger.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.sparse.linalg import LinearOperator, eigsh

from anywidth import _compat
from anywidth.errors import InputError
from anywidth.kernels import Kernels
from anywidth.memory import free_memory, readable
from anywidth.predict.gp import unflatten
from anywidth.predict.matrices import Matrix, Targets, check_cross, noise_diagonal

__all__ = ["GradientFlow", "gradient_flow", "max_learning_rate"]

_COPIES = 4  # of the matrix, that an eigendecomposition holds at a time


class GradientFlow:
    """A network in training, as `gradient_flow` returns it: at any time, without repeating the work.

    Attributes:
        eigenvalues: of the NTK on the training examples, increasing.
        max_learning_rate: gradient descent is stable below it.
    """

    def __init__(self, ntk: Matrix, nngp: Matrix | None, y: Targets, noise: Any) -> None:
        self._ntk, self._nngp, self._y, self._noise = ntk, nngp, y, noise
        self.eigenvalues, self._vectors = jnp.linalg.eigh(ntk.dense())
        self._initial = self._vectors.T @ jnp.asarray(y.flat)
        self.max_learning_rate = 2 / (self.eigenvalues[-1] + noise)

    def __repr__(self) -> str:
        return f"<GradientFlow of {self._ntk.examples[0]} examples>"

    def mean(self, cross: Any, time: Any = jnp.inf) -> Float[Array, "M *outputs_and_columns"]:
        """The mean over initialisations of the outputs at M new examples.

        Args:
            cross: `gram(ntk, new, X)`, of shape (M, N) + S + S (or `Kernels`, of which the NTK is taken).
            time: of training; infinite for its end.
        """
        C = check_cross(_part(cross, "ntk"), self._ntk)
        weights = self._vectors @ (self._coefficients(time)[:, None] * self._initial)
        return (C.dense() @ weights).reshape(C.examples[0], *C.outputs[0], *self._y.columns)

    def training_mean(self, time: Any = jnp.inf) -> Float[Array, "N *outputs_and_columns"]:
        """The mean over initialisations of the outputs at the training examples."""
        found = self._vectors @ ((self.eigenvalues * self._coefficients(time))[:, None] * self._initial)
        return found.reshape(self._ntk.examples[0], *self._ntk.outputs[0], *self._y.columns)

    def covariance(self, cross: Any, prior: Any, time: Any = jnp.inf) -> Float[Array, "M M *outputs_outputs"]:
        """The covariance over initialisations of the outputs at M new examples.

        Args:
            cross: `gram(kernels(net), new, X)`: both kernels.
            prior: `gram(nngp(net), new)`, of shape (M, M) + S + S (or `Kernels`, of which the NNGP is taken).
            time: of training; infinite for its end.

        Raises:
            InputError: the flow was made without the NNGP kernel, or shapes do not fit.
        """
        P = Matrix(_part(prior, "nngp"), "prior", square=True)
        B, initial, K = self._spread(cross, time)
        if P.shape[0] != len(B):
            raise InputError(f"prior must be gram(nngp(net), new) of the {len(B)} rows of cross, not of {P.shape[0]}")
        mixed = B @ initial.T
        found = P.dense() + B @ K @ B.T - mixed - mixed.T
        return unflatten(found, P)

    def variance(self, cross: Any, prior: Any, time: Any = jnp.inf) -> Float[Array, "M *outputs"]:
        """The diagonal of `covariance`; `prior` is `diagonal(nngp(net), new)`, of shape (M,) + S."""
        B, initial, K = self._spread(cross, time)
        prior = jnp.asarray(_part(prior, "nngp"))
        if prior.size != len(B):
            raise InputError(f"prior must be diagonal(nngp(net), new), {len(B)} numbers, not of shape {prior.shape}")
        found = jnp.sum((B @ K) * B, 1) - 2 * jnp.sum(B * initial, 1)
        return jnp.maximum(prior + found.reshape(prior.shape), 0)

    def _spread(self, cross: Any, time: Any) -> tuple[Array, Array, Array]:
        if self._nngp is None or not isinstance(cross, Kernels):
            raise InputError(
                "the covariance over initialisations needs both kernels: gradient_flow(gram(kernels(net), X), y) and "
                "cross = gram(kernels(net), new, X)"
            )
        C = check_cross(cross.ntk, self._ntk).dense()
        B = ((C @ self._vectors) * self._coefficients(time)) @ self._vectors.T
        return B, check_cross(cross.nngp, self._ntk).dense(), self._nngp.dense()

    def _coefficients(self, time: Any) -> Array:
        """c_t at the eigenvalues; zero where they are zero up to rounding, as nothing is learned there."""
        if not _compat.is_tracer(time) and not float(time) >= 0:
            raise InputError(f"the time of training must not be negative, and it is {time}")
        values = self.eigenvalues
        learned = values > len(values) * jnp.finfo(values.dtype).eps * values[-1]
        rate = jnp.where(learned, values + self._noise, 1)
        return jnp.where(learned, -jnp.expm1(-jnp.asarray(time, values.dtype) * rate) / rate, 0)


def gradient_flow(K: Any, y: Float[Any, "N *outputs_and_columns"], noise: Any = 0.0) -> GradientFlow:
    """Train an infinitely wide network on the squared loss by gradient flow.

    Args:
        K: `gram(kernels(net), X)`, `Kernels` of arrays or stores of shape (N, N) + S + S; or the NTK alone, which gives
            means and no covariances.
        y: targets, (N,) + S + R.
        noise: strength of the decay towards the initial parameters; 0 for the squared loss alone.

    Returns:
        A `GradientFlow`, with mean, variance and covariance over initialisations at any time.

    Raises:
        InputError: shapes do not fit, or a number is not finite.
        MemoryError: the eigendecomposition does not fit into memory. (To the end of training, `posterior` with the
            NTK by conjugate gradients has the same mean.)

    Reference: Lee et al., Wide neural networks of any depth evolve as linear models under gradient descent (2019).
    """
    ntk = Matrix(_part(K, "ntk"), "K", square=True)
    nngp = Matrix(K.nngp, "K.nngp", square=True) if isinstance(K, Kernels) else None
    if nngp is not None and (nngp.examples != ntk.examples or nngp.outputs != ntk.outputs):
        raise InputError("K.nngp and K.ntk are of different shapes")
    if np.shape(noise) != ():
        raise InputError(f"noise is one number in a gradient flow, not of shape {np.shape(noise)}")
    noise_diagonal(noise, ntk)
    if not _compat.is_tracer(ntk.source) and _COPIES * ntk.nbytes > free_memory():
        raise MemoryError(
            f"the eigendecomposition of the NTK takes {readable(_COPIES * ntk.nbytes)} and {readable(free_memory())} "
            'is free. To the end of training, posterior(ntk, y, noise, solver="cg") has the same mean.'
        )
    return GradientFlow(ntk, nngp, Targets(y, ntk), noise)


def max_learning_rate(K: Any, noise: float = 0.0) -> float:
    """The learning rate below which gradient descent on the squared loss is stable: 2 / (largest eigenvalue + noise).

    Args:
        K: the NTK (N, N) + S + S (or `Kernels`), an array or a store, which is read a few dozen times.
        noise: strength of the decay towards the initial parameters.
    """
    matrix = Matrix(_part(K, "ntk"), "K", square=True)

    def times(x: np.ndarray) -> np.ndarray:
        return matrix.streamed_symmetric(np.reshape(x, (-1, 1)))[:, 0]

    n = matrix.shape[0]
    if n < 3:  # too small for Lanczos
        return 2 / (float(np.linalg.eigvalsh(np.asarray(matrix.dense(), np.float64))[-1]) + noise)
    operator = LinearOperator((n, n), matvec=times, dtype=np.float64)
    start = np.random.default_rng(0).normal(size=n)
    return 2 / (float(eigsh(operator, k=1, which="LA", v0=start, return_eigenvectors=False)[0]) + noise)


def _part(K: Any, name: str) -> Any:
    return getattr(K, name) if isinstance(K, Kernels) else K
