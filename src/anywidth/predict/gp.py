r"""Gaussian-process regression (Rasmussen and Williams, 2006, chapters 2 and 5).

With A = K + noise I and new examples x*, the posterior of the function has
mean K(x*, X) A^-1 y and covariance K(x*, x*) - K(x*, X) A^-1 K(X, x*).
With the NNGP kernel it is the Bayesian posterior of the infinitely wide network; with the NTK the mean is where
training by gradient flow ends (see `flow`, which has its covariance too).
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from anywidth import _compat
from anywidth.errors import InputError
from anywidth.memory import free_memory, readable
from anywidth.predict.cg import Streamed
from anywidth.predict.cholesky import factorise, solve, solve_lower
from anywidth.predict.matrices import Matrix, Targets, check_cross, noise_diagonal

__all__ = ["LeaveOneOut", "Posterior", "leave_one_out", "posterior"]

_COPIES = 3  # of the matrix, that a Cholesky factorisation holds at a time
_SOLVED_AT_ONCE = 256  # right-hand sides, when they are solved for by conjugate gradients


class LeaveOneOut(NamedTuple):
    """Predictions of each example from all others, without noise taken off: of observations.

    `mean` has the shape of y, `variance` that of the outputs, and `log_density` is of each example's targets, jointly
    over its outputs, for each column.
    """

    mean: Float[Array, "N *outputs_and_columns"]
    variance: Float[Array, "N *outputs"]
    log_density: Float[Array, "N *columns"]


class _Factored:
    def __init__(self, K: Matrix, noise: Any) -> None:
        dense = K.dense()
        eye = jnp.arange(len(dense))
        self.factor, self.jitter = factorise(dense.at[eye, eye].add(noise_diagonal(noise, K)), K.name)

    def solve(self, b: Any) -> Array:
        return solve(self.factor, jnp.asarray(b, self.factor.dtype))


class Posterior:
    """A Gaussian process given data, as `posterior` returns it.

    Attributes:
        weights: A^-1 y, of the shape of y.
        jitter: what was added to the diagonal beyond the noise so that A could be factorised; zero unless it had to be.
        solver: "cholesky" or "cg".
    """

    def __init__(self, K: Matrix, y: Targets, noise: Any, system: _Factored | Streamed) -> None:
        self._K, self._y, self._system = K, y, system
        self.noise = noise
        self.solver = "cg" if isinstance(system, Streamed) else "cholesky"
        self.jitter = 0.0 if isinstance(system, Streamed) else system.jitter
        self._weights = system.solve(y.flat)
        self.weights = self._weights.reshape(K.examples[0], *K.outputs[0], *y.columns)

    def __repr__(self) -> str:
        how = "" if _compat.is_tracer(self.jitter) or self.solver == "cg" else f", jitter={float(self.jitter):.3g}"
        return f"<Posterior of {self._K.examples[0]} examples by {self.solver}{how}>"

    def mean(self, cross: Any) -> Float[Array, "M *outputs_and_columns"]:
        """The posterior mean at M new examples.

        Args:
            cross: `gram(kernel, new, X)`, of shape (M, N) + S + S, or a store of it.
        """
        C = check_cross(cross, self._K)
        if C.lazy:
            found = jnp.asarray(C.streamed(np.asarray(self._weights, np.float64)))
        else:
            found = C.dense() @ jnp.asarray(self._weights)
        return found.reshape(C.examples[0], *C.outputs[0], *self._y.columns)

    def variance(self, cross: Any, prior: Any) -> Float[Array, "M *outputs"]:
        """The posterior variance of the function at M new examples; add the noise for that of an observation.

        Args:
            cross: as for `mean`.
            prior: `diagonal(kernel, new)`, of shape (M,) + S.
        """
        C = check_cross(cross, self._K)
        shape = (C.examples[0], *C.outputs[0])
        if tuple(np.shape(prior)) != shape:
            raise InputError(f"prior must be diagonal(kernel, new), of shape {shape}; it has shape {np.shape(prior)}")
        if C.lazy:
            explained = jnp.concatenate([self._explained(jnp.asarray(rows)) for _, rows in C.row_blocks()])
        else:
            explained = self._explained(C.dense())
        return jnp.maximum(jnp.asarray(prior) - explained.reshape(shape), 0)

    def covariance(self, cross: Any, prior: Any) -> Float[Array, "M M *outputs_outputs"]:
        """The posterior covariance of the function at M new examples.

        Args:
            cross: as for `mean`.
            prior: `gram(kernel, new)`, of shape (M, M) + S + S.
        """
        C, P = check_cross(cross, self._K), Matrix(prior, "prior", square=True)
        if P.examples[0] != C.examples[0] or P.outputs[0] != C.outputs[0]:
            raise InputError(f"prior must be gram(kernel, new) of the {C.examples[0]} new examples of cross")
        dense = C.dense()
        if isinstance(self._system, Streamed):
            explained = dense @ jnp.asarray(self._system.solve(np.asarray(dense).T))
        else:
            half = solve_lower(self._system.factor, dense.T)
            explained = half.T @ half
        return unflatten(P.dense() - explained, P)

    def log_marginal_likelihood(self) -> Float[Array, "*columns"]:
        """The log of p(y), for each right-hand side."""
        L = self._factor("the log marginal likelihood")
        fit = jnp.sum(jnp.asarray(self._y.flat) * self._weights, 0)
        n = self._K.shape[0]
        found = -fit / 2 - jnp.log(jnp.diagonal(L)).sum() - n / 2 * jnp.log(2 * jnp.pi)
        return found.reshape(self._y.columns)

    def leave_one_out(self) -> LeaveOneOut:
        """Every example predicted from all others, in closed form (Rasmussen and Williams, eqs 5.10 to 5.12).

        An example is left out with all its outputs: for B the example's block of A^-1 and a its weights, the mean is
        y - B^-1 a and the covariance of the observation B^-1.
        """
        L = self._factor("leave-one-out")
        (n, _), s = self._K.examples, self._K.sizes[0]
        columns = solve_lower(L, jnp.eye(len(L), dtype=L.dtype)).reshape(len(L), n, s)
        B = jnp.einsum("kni,knj->nij", columns, columns)
        a = self._weights.reshape(n, s, -1)
        y = jnp.asarray(self._y.flat).reshape(n, s, -1)
        covariance = jnp.linalg.inv(B)
        wrong = covariance @ a
        squares = jnp.einsum("nic,nic->nc", wrong, a)
        density = -squares / 2 + jnp.linalg.slogdet(B)[1][:, None] / 2 - s / 2 * jnp.log(2 * jnp.pi)
        return LeaveOneOut(
            (y - wrong).reshape(self.weights.shape),
            jnp.diagonal(covariance, axis1=1, axis2=2).reshape(n, *self._K.outputs[0]),
            density.reshape(n, *self._y.columns),
        )

    def _explained(self, rows: Array) -> Array:
        """The diagonal of rows A^-1 rows^T."""
        if not isinstance(self._system, Streamed):
            return jnp.sum(solve_lower(self._system.factor, rows.T) ** 2, 0)
        host = np.asarray(rows, np.float64)
        pieces = [host[i : i + _SOLVED_AT_ONCE] for i in range(0, len(host), _SOLVED_AT_ONCE)]
        return jnp.asarray(np.concatenate([np.sum(self._system.solve(p.T) * p.T, 0) for p in pieces]))

    def _factor(self, what: str) -> Array:
        if isinstance(self._system, Streamed):
            raise InputError(
                f'{what} needs a Cholesky factor, and this posterior is by conjugate gradients (solver="cg")'
            )
        return self._system.factor


def posterior(
    K: Any,
    y: Float[Any, "N *outputs_and_columns"],
    noise: Any = 0.0,
    *,
    solver: str = "auto",
    tolerance: float = 1e-8,
    iterations: int = 1000,
    rank: int = 200,
) -> Posterior:
    """Condition a Gaussian process of mean zero on data.

    Args:
        K: `gram(kernel, X)` for the NNGP kernel or the NTK, of shape (N, N) + S + S: an array, or a store.
        y: targets, (N,) + S + R. Every right-hand side is a process of its own with the same kernel.
        noise: variance of the noise of the targets, or one for each of the N examples.
        solver: "cholesky"; "cg" for conjugate gradients, which read a store block by block and never hold it; "auto"
            for Cholesky where it fits into free memory.
        tolerance, iterations, rank: of conjugate gradients; see `conjugate_gradients`.

    Returns:
        A `Posterior`, with methods for means, variances and covariances at new examples, the log marginal likelihood
        and leave-one-out predictions. With Cholesky all of it can be traced: it works under `jit` and `grad`.

    Raises:
        InputError: shapes do not fit, a number is not finite, or K is not positive semidefinite.
        NotConvergedError: conjugate gradients do not reach the tolerance.
        MemoryError: solver="cholesky" and K is too large.
    """
    matrix = Matrix(K, "K", square=True)
    targets = Targets(y, matrix)
    noise_diagonal(noise, matrix)
    if solver not in ("auto", "cholesky", "cg"):
        raise InputError(f'solver is "auto", "cholesky" or "cg", and it is {solver!r}')
    traced = any(map(_compat.is_tracer, (K, y, noise)))
    fits = traced or _COPIES * matrix.nbytes <= free_memory()
    if solver == "cholesky" and not fits:
        raise MemoryError(
            f"factorising K takes {readable(_COPIES * matrix.nbytes)} and {readable(free_memory())} is free: use "
            'solver="cg", and a store for K'
        )
    if solver == "cg" or not fits:
        if traced:
            raise InputError('solver="cg" runs outside jit and grad')
        system: Any = Streamed(matrix, noise, tolerance=tolerance, iterations=iterations, rank=rank)
    else:
        system = _Factored(matrix, noise)
    return Posterior(matrix, targets, noise, system)


def leave_one_out(K: Any, y: Float[Any, "N *outputs_and_columns"], noise: Any = 0.0) -> LeaveOneOut:
    """Every example predicted from all others, in closed form: `posterior(K, y, noise).leave_one_out()`."""
    return posterior(K, y, noise, solver="cholesky").leave_one_out()


def unflatten(values: Array, K: Matrix) -> Array:
    """A flattened matrix back to (N, M) + S + S'."""
    (n, m), (s, t) = K.examples, K.outputs
    if not s and not t:
        return values
    values = values.reshape(n, *s, m, *t)
    return jnp.moveaxis(values, 1 + len(s), 1)
