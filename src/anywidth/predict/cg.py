"""Linear systems too large to factorise: preconditioned conjugate gradients, reading the matrix block by block.

(K + noise I) X = B is solved for all columns of B at once, so that an iteration reads the matrix once, and only one
triangle of it. The preconditioner is a randomised Nystrom approximation U diag(l) U^T of K, which costs one reading
(Frangella, Tropp, Udell, Randomized Nystrom preconditioning, SIAM J. Matrix Anal. Appl. 2023, algorithms 2.1 and 5.1):
P^-1 = (l_r + noise) U (diag(l) + noise)^-1 U^T + (I - U U^T). With a rank of twice the number of eigenvalues above the
noise, the number of iterations does not depend on the matrix.

Vectors are float64, whatever the dtype of the store.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from anywidth.errors import AnywidthError
from anywidth.predict.matrices import Matrix, Targets, noise_diagonal

__all__ = ["NotConvergedError", "Solution", "Streamed", "conjugate_gradients"]


class NotConvergedError(AnywidthError, RuntimeError):
    """Conjugate gradients did not reach the tolerance in the iterations allowed."""


class Solution(NamedTuple):
    """What conjugate gradients found: the solution `x`, after how many `iterations`, and its `residual`.

    The residual is the largest of the columns' ||b - (K + noise I) x|| / ||b||, computed anew from x.
    """

    x: Float[np.ndarray, "N *outputs_and_columns"]
    iterations: int
    residual: float


def conjugate_gradients(
    K: Any,
    b: Float[Any, "N *outputs_and_columns"],
    noise: Any = 0.0,
    *,
    tolerance: float = 1e-8,
    iterations: int = 1000,
    rank: int = 200,
    seed: int = 0,
) -> Solution:
    """Solve (K + noise I) x = b without holding K in memory.

    Args:
        K: a Gram matrix (N, N) + S + S: an array, or a store, which is read once for each iteration.
        b: right-hand sides, (N,) + S + R.
        noise: a variance, or one for each example.
        tolerance: of ||b - (K + noise I) x|| / ||b||, for each column.
        iterations: at most so many.
        rank: of the preconditioner; its memory is N * rank numbers. 0 for none.
        seed: of the preconditioner's random sketch.

    Raises:
        InputError: shapes do not fit, or a number is not finite.
        NotConvergedError: the tolerance is not reached.
    """
    matrix = Matrix(K, "K", square=True)
    system = Streamed(matrix, noise, tolerance=tolerance, iterations=iterations, rank=rank, seed=seed)
    x, count, residual = system.run(np.asarray(Targets(b, matrix).flat, np.float64))
    return Solution(x.reshape(np.shape(b)), count, residual)


class Streamed:
    """The system (K + noise I), to be solved for many right-hand sides."""

    def __init__(self, K: Matrix, noise: Any, *, tolerance: float, iterations: int, rank: int, seed: int = 0) -> None:
        self.K, self.tolerance, self.iterations = K, tolerance, iterations
        self.noise = np.broadcast_to(np.asarray(noise_diagonal(noise, K), np.float64), K.shape[:1])[:, None]
        self.basis, self.values = _nystrom(K, min(rank, K.shape[0]), seed)
        self.floor = max(float(self.noise.mean()), np.finfo(K.dtype).eps * float(self.values.max(initial=0.0)))

    def solve(self, b: np.ndarray) -> np.ndarray:
        """(K + noise I)^-1 b for b of shape (rows, columns)."""
        return self.run(np.asarray(b, np.float64))[0]

    def times(self, x: np.ndarray) -> np.ndarray:
        """(K + noise I) x."""
        return self.K.streamed_symmetric(x) + self.noise * x

    def precondition(self, r: np.ndarray) -> np.ndarray:
        """P^-1 r."""
        if not len(self.values):
            return r
        inside = self.basis.T @ r
        weights = (self.values[-1] + self.floor) / (self.values + self.floor) - 1
        return r + self.basis @ (weights[:, None] * inside)

    def run(self, b: np.ndarray) -> tuple[np.ndarray, int, float]:
        """The solution, the iterations it took, and the largest relative residual."""
        size = np.linalg.norm(b, axis=0)
        size = np.where(size > 0, size, 1.0)
        x, r = np.zeros_like(b), b.copy()
        z = self.precondition(r)
        p, rz = z.copy(), np.sum(r * z, 0)
        count, checked = 0, np.linalg.norm(r, axis=0) / size
        while checked.max(initial=0.0) > self.tolerance and count < self.iterations:
            # columns that are done stand still
            active = np.linalg.norm(r, axis=0) > self.tolerance * size
            Ap = self.times(p)
            curvature = np.sum(p * Ap, 0)
            step = np.where(active & (curvature > 0), rz / np.where(curvature > 0, curvature, 1.0), 0.0)
            x += step * p
            r -= step * Ap
            count += 1
            z = self.precondition(r)
            previous, rz = rz, np.sum(r * z, 0)
            p = z + np.where(previous > 0, rz / np.where(previous > 0, previous, 1.0), 0.0) * p
            checked = np.linalg.norm(r, axis=0) / size
            if checked.max(initial=0.0) <= self.tolerance:
                # rounding makes the updated residual drift from the true one: restart from the latter if it has
                r = b - self.times(x)
                checked = np.linalg.norm(r, axis=0) / size
                p = z = self.precondition(r)
                rz = np.sum(r * z, 0)
            if not step.any():
                break
        worst = float(checked.max(initial=0.0))
        if worst > self.tolerance:
            raise NotConvergedError(
                f"conjugate gradients stopped after {count} iterations at a relative residual of {worst:.2g}, and "
                f"{self.tolerance:.2g} is wanted. A larger noise, a preconditioner of rank above {len(self.values)}, "
                "more iterations or a larger tolerance help."
            )
        return x, count, worst


def _nystrom(K: Matrix, rank: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormal U (rows, rank) and values, decreasing, of an approximation of K from below."""
    if rank == 0:
        return np.zeros((K.shape[0], 0)), np.zeros(0)
    sketch, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(K.shape[0], rank)))
    Y = K.streamed_symmetric(sketch)
    shift = np.finfo(K.dtype).eps * np.linalg.norm(Y)
    Y += shift * sketch
    core = sketch.T @ Y
    values, vectors = np.linalg.eigh((core + core.T) / 2)
    keep = values > max(shift, np.finfo(np.float64).tiny) / 2
    if not keep.any():
        return np.zeros((K.shape[0], 0)), np.zeros(0)
    U, singular, _ = np.linalg.svd(Y @ (vectors[:, keep] / np.sqrt(values[keep])), full_matrices=False)
    return U, np.maximum(singular**2 - shift, 0)
