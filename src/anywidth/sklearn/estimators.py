r"""Regression and classification with the kernel of an infinitely wide network.

Both are Gaussian processes (`anywidth.predict`) with covariance scale (K + noise I). Classification is regression on
centred one-hot labels, as in the papers on the NTK; with means m_c and one variance s^2 for all classes, the
probability of class c is that its value is the largest: the integral over z of
N(z; 0, 1) prod_{j != c} Phi((m_c - m_j) / s + z).
"""

from numbers import Real
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
from scipy.special import ndtr
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.preprocessing import LabelBinarizer
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from anywidth import predict
from anywidth.errors import InputError
from anywidth.grams import gram
from anywidth.predict.cholesky import factorise, solve, solve_lower
from anywidth.sklearn.networks import as_examples, check_pickles, computing, kernel_of, network_of

__all__ = ["InfiniteWidthClassifier", "InfiniteWidthRegressor"]


class _GaussianProcess(BaseEstimator):
    """What both have in common: kernels of tables, a fit to normalised columns, means and variances."""

    def __init__(
        self,
        network: Any = None,
        *,
        kernel: str = "ntk",
        noise: Any = "auto",
        input_shape: tuple[int, ...] | None = None,
        dtype: str = "float64",
        memory: Any = None,
    ) -> None:
        self.network = network
        self.kernel = kernel
        self.noise = noise
        self.input_shape = input_shape
        self.dtype = dtype
        self.memory = memory

    def _kernel(self) -> Any:
        features = self.n_features_in_ if self.input_shape is None else self.input_shape[-1]
        return kernel_of(network_of(self.network, features), self.kernel)

    def _examples(self, X: np.ndarray) -> np.ndarray:
        return as_examples(X, self.input_shape).astype(self.dtype)

    def _fit(self, X: np.ndarray, targets: np.ndarray, *, shared: bool) -> None:
        """Fit columns of targets of mean zero; `shared` is for one scale for all columns."""
        if self.noise != "auto" and not (isinstance(self.noise, Real) and float(self.noise) >= 0):
            raise InputError(f'noise is a variance or "auto", and it is {self.noise!r}')
        with computing(self.dtype):
            self.X_fit_ = self._examples(X)
            K = gram(self._kernel(), self.X_fit_, memory=self.memory, progress=False)
            if K.ndim != 2:
                raise InputError(
                    f"the network has an output of shape {K.shape[2 : 1 + K.ndim // 2]}: an estimator needs one number "
                    "for each example (or i.i.d. ones)"
                )
            moving = targets.any(0)
            self.scale_ = np.zeros(targets.shape[1])
            if self.noise != "auto":
                self.noise_, self.scale_ = float(self.noise), np.ones(targets.shape[1])
            elif not moving.any():
                self.noise_ = 1.0
            else:
                found = predict.fit_noise(K, targets[:, moving], shared=shared)
                self.noise_, self.scale_[moving] = found.noise, found.scale
            diagonal = jnp.arange(len(K))
            factor, jitter = factorise(K.at[diagonal, diagonal].add(self.noise_), "the kernel matrix of X")
            self.jitter_ = float(jitter)
            self.factor_ = np.asarray(factor)
            self.weights_ = np.asarray(solve(factor, jnp.asarray(targets, factor.dtype)))
        scale = np.where(moving, self.scale_, 1.0)
        fit = np.where(moving, (targets * self.weights_).sum(0) / scale, 0)
        n = len(X)
        determinant = np.log(np.diagonal(self.factor_)).sum()
        evidence = -(fit + n * np.log(2 * np.pi * scale)) / 2 - determinant
        self._evidence = float(evidence[moving].sum())

    def _predict(self, X: np.ndarray, *, spread: bool) -> tuple[np.ndarray, np.ndarray | None]:
        """Means (M, columns), and variances (M,) of a function of scale one."""
        kernel = self._kernel()
        with computing(self.dtype):
            examples = self._examples(X)
            cross = gram(kernel, examples, self.X_fit_, memory=self.memory, progress=False)
            mean = np.asarray(cross) @ self.weights_
            if not spread:
                return mean, None
            half = solve_lower(jnp.asarray(self.factor_), cross.T)
            prior = predict.diagonal(kernel, examples)
            return mean, np.maximum(np.asarray(prior - jnp.sum(half**2, 0), np.float64), 0)

    def __getstate__(self) -> Any:
        check_pickles(self.network)
        return super().__getstate__()


class InfiniteWidthRegressor(RegressorMixin, _GaussianProcess):
    """Gaussian-process regression with the kernel of an infinitely wide network.

    With kernel="ntk" its mean is where training the network by gradient flow on the squared loss ends (with noise: with
    that much decay towards the initial parameters); with kernel="nngp" it is the Bayesian posterior.

    Args:
        network: a `Network`, a `Factory`, or a constructor `make(d)` of networks; None for `zoo.mlp`.
        kernel: "ntk" or "nngp".
        noise: variance of the noise, in units of the kernel and of targets of variance one; "auto" for that of
            largest marginal likelihood, together with a scale of the kernel for each column of targets.
        normalize_y: whether to fit targets shifted and scaled to mean zero and variance one.
        input_shape: the shape of an example, into which rows of X are folded; None for the row itself.
        dtype: "float64" or "float32".
        memory: as in `anywidth.gram`.

    Attributes:
        noise_, scale_: the fitted covariance of (normalised) targets is `scale_ (K + noise_ I)`.
        noise_variance_: the variance of the noise, for each column, in units of y squared.
        log_marginal_likelihood_: log p(y), summed over columns.
        jitter_: what had to be added to the diagonal beyond the noise; zero unless it had to be.
        X_fit_, weights_, factor_, n_features_in_, feature_names_in_: what the fit keeps.
    """

    def __init__(
        self,
        network: Any = None,
        *,
        kernel: str = "ntk",
        noise: Any = "auto",
        normalize_y: bool = True,
        input_shape: tuple[int, ...] | None = None,
        dtype: str = "float64",
        memory: Any = None,
    ) -> None:
        super().__init__(network, kernel=kernel, noise=noise, input_shape=input_shape, dtype=dtype, memory=memory)
        self.normalize_y = normalize_y

    def fit(self, X: Any, y: Any) -> Self:
        """Fit to X of shape (N, features) and y of shape (N,) or (N, columns)."""
        X, y = validate_data(self, X, y, multi_output=True, y_numeric=True, dtype=np.float64)
        self._columns = y.shape[1:]
        targets = np.asarray(y, np.float64).reshape(len(y), -1)
        self._shift, self._unit = np.zeros(targets.shape[1]), np.ones(targets.shape[1])
        if self.normalize_y:
            self._shift, spread = targets.mean(0), targets.std(0)
            self._unit = np.where(spread > 1e-12 * np.abs(self._shift), spread, 1.0)
            targets = np.where(self._unit == spread, targets - self._shift, 0.0) / self._unit
        self._fit(X, targets, shared=False)
        self.noise_variance_ = (self.noise_ * self.scale_ * self._unit**2).reshape(self._columns)
        self.log_marginal_likelihood_ = self._evidence - len(y) * float(np.log(self._unit).sum())
        return self

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """The mean at X; with `return_std` also the standard deviation of the function there.

        For the spread of observations add `noise_variance_` to its square.
        """
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64)
        mean, variance = self._predict(X, spread=return_std)
        shape = (len(X), *self._columns)
        mean = (mean * self._unit + self._shift).reshape(shape)
        if variance is None:
            return mean
        return mean, (np.sqrt(variance[:, None] * self.scale_) * self._unit).reshape(shape)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


class InfiniteWidthClassifier(ClassifierMixin, _GaussianProcess):
    """Classification by regression on labels, with the kernel of an infinitely wide network.

    Args:
        network, kernel, noise, input_shape, dtype, memory: as for `InfiniteWidthRegressor`.

    Attributes:
        classes_: the labels.
        noise_, scale_: the fitted covariance of the centred labels is `scale_ (K + noise_ I)`, for every class.
        log_marginal_likelihood_: that of the label regression, summed over classes.
        jitter_, X_fit_, weights_, factor_, n_features_in_, feature_names_in_: what the fit keeps.
    """

    def fit(self, X: Any, y: Any) -> Self:
        """Fit to X of shape (N, features) and labels y of shape (N,)."""
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        coder = LabelBinarizer(neg_label=0, pos_label=1).fit(y)
        self.classes_ = coder.classes_
        if len(self.classes_) < 2:
            raise ValueError(
                f"a classifier needs at least two classes, and y has one class: {self.classes_.tolist()[0]!r}"
            )
        targets = coder.transform(y).astype(np.float64)
        self._shift = targets.mean(0)
        self._fit(X, targets - self._shift, shared=True)
        self.log_marginal_likelihood_ = self._evidence
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """The mean of the label regression over its standard deviation.

        Of shape (M,), above zero for the second of two classes, or (M, classes).
        """
        values, spread = self._decide(X, spread=True)
        return values / (spread if values.ndim == 1 else spread[:, None])

    def predict(self, X: Any) -> np.ndarray:
        """The likeliest class of each row of X."""
        values, _ = self._decide(X, spread=False)
        return self.classes_[(values > 0).astype(int) if values.ndim == 1 else values.argmax(1)]

    def predict_proba(self, X: Any) -> np.ndarray:
        """The probability of each class, of shape (M, classes)."""
        values = self.decision_function(X)
        return np.stack([ndtr(-values), ndtr(values)], 1) if values.ndim == 1 else _largest(values)

    def _decide(self, X: Any, *, spread: bool) -> tuple[np.ndarray, np.ndarray]:
        """Means (above zero for the second of two classes) and, if they are wanted, standard deviations (M,)."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64)
        mean, variance = self._predict(X, spread=spread)
        mean = mean + self._shift
        if variance is None:
            deviation = np.ones(len(mean))
        else:
            deviation = np.sqrt(np.maximum((variance + self.noise_) * self.scale_[0], np.finfo(np.float64).tiny))
        return (mean[:, 0] - 0.5 if len(self.classes_) == 2 else mean), deviation


def _largest(means: np.ndarray) -> np.ndarray:
    """The probability of each of several independent Gaussians of variance one to be the largest, row by row."""
    points, weights = np.polynomial.hermite_e.hermegauss(64)
    out = np.empty_like(means)
    for c in range(means.shape[1]):
        others = means[:, [c]] - np.delete(means, c, 1)
        out[:, c] = ndtr(others[:, :, None] + points).prod(1) @ weights
    return out / out.sum(1, keepdims=True)
