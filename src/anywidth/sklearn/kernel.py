"""The kernel of an infinitely wide network for `sklearn.gaussian_process`, with gradients in its hyperparameters."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.gaussian_process.kernels import Hyperparameter, Kernel

from anywidth import predict
from anywidth.errors import InputError
from anywidth.grams import gram
from anywidth.sklearn.networks import (
    Factory,
    _Options,
    _shown,
    as_examples,
    check_pickles,
    computing,
    kernel_of,
    network_of,
)

__all__ = ["InfiniteWidthKernel"]

_ROWS = 64  # at a time, where the kernel is differentiated


class InfiniteWidthKernel(Kernel):
    """The NNGP kernel or NTK of a network, to be combined with scikit-learn's own kernels.

    Args:
        network: a `Network`, a `Factory`, or a constructor `make(d)` of networks; None for `zoo.mlp`.
        kernel: "nngp" or "ntk".
        tune: positive options of the `Factory` that `GaussianProcessRegressor` is to learn, with their bounds:
            `{"varb": (1e-3, 10)}`. Each needs a value in the factory to start from (or a default there).
        input_shape: the shape of an example, into which rows are folded; None for the row itself.
        dtype: "float64" or "float32".

    Example:
        >>> from sklearn.gaussian_process import GaussianProcessRegressor
        >>> from sklearn.gaussian_process.kernels import WhiteKernel
        >>> from anywidth import zoo
        >>> kernel = InfiniteWidthKernel(Factory(zoo.mlp, varb=0.1), tune={"varb": (1e-3, 10), "varw": (0.1, 10)})
        >>> regressor = GaussianProcessRegressor(kernel + WhiteKernel(0.1))
    """

    def __init__(
        self,
        network: Any = None,
        kernel: str = "nngp",
        tune: Mapping[str, tuple[float, float]] | None = None,
        input_shape: tuple[int, ...] | None = None,
        dtype: str = "float64",
    ) -> None:
        self.network = network
        self.kernel = kernel
        self.tune = tune
        self.input_shape = input_shape
        self.dtype = dtype

    def __call__(self, X: Any, Y: Any = None, eval_gradient: bool = False) -> Any:
        """K(X, Y), of shape (N, M); with `eval_gradient` also its derivative in `theta`, (N, N, len(theta))."""
        if eval_gradient and Y is not None:
            raise ValueError("the gradient is that of K(X, X): it can only be evaluated when Y is None")
        theta = self.theta
        with computing(self.dtype):
            x = self._examples(X)
            if self.tune:
                y = x if Y is None else self._examples(Y)
                matrix, gradient = self._traced(x)
                K = np.array(matrix(jnp.asarray(theta), x, y))
                return (K, np.array(gradient(jnp.asarray(theta), x, y))) if eval_gradient else K
            net_kernel = kernel_of(network_of(self.network, x.shape[-1]), self.kernel)
            K = np.array(gram(net_kernel, x, None if Y is None else self._examples(Y), progress=False))
        return (K, np.empty((*K.shape, 0))) if eval_gradient else K

    def diag(self, X: Any) -> np.ndarray:
        """K(x, x) for each row x of X."""
        with computing(self.dtype):
            x = self._examples(X)
            return np.array(predict.diagonal(kernel_of(network_of(self.network, x.shape[-1]), self.kernel), x))

    def is_stationary(self) -> bool:
        """No: it depends on more than the difference of two inputs."""
        return False

    @property
    def hyperparameters(self) -> list[Hyperparameter]:
        """Those to be tuned."""
        return [Hyperparameter(name, "numeric", np.array(bounds)) for name, bounds in (self.tune or {}).items()]

    @property
    def theta(self) -> np.ndarray:
        """The logarithms of the options to be tuned."""
        if not self.tune:
            return np.empty(0)
        if not isinstance(self.network, Factory):
            raise InputError("tune needs the network as a Factory, whose options it changes")
        options = self.network.get_params()
        for name in self.tune:
            if not (isinstance(options.get(name), int | float) and options[name] > 0):
                raise InputError(
                    f"tune needs a positive number to start {name!r} from, and it is {options.get(name)!r}"
                )
        return np.log([options[name] for name in self.tune])

    @theta.setter
    def theta(self, theta: np.ndarray) -> None:
        if self.tune:
            self.network = Factory(self.network.make, **self.network.options)
            self.network.set_params(**dict(zip(self.tune, map(float, np.exp(theta)), strict=True)))

    def _examples(self, X: Any) -> np.ndarray:
        return as_examples(np.atleast_2d(X), self.input_shape).astype(self.dtype)

    def _traced(self, x: np.ndarray) -> tuple[Callable[..., Any], Callable[..., Any]]:
        fixed = {k: v for k, v in self.network.options.items() if k not in (self.tune or {})}
        return _matrices(self.network.make, _Options(fixed), tuple(self.tune or ()), self.kernel, x.shape[-1])

    def __getstate__(self) -> dict[str, Any]:
        check_pickles(self.network)
        return self.__dict__

    def __repr__(self) -> str:
        return f"InfiniteWidthKernel({_shown(self.network)}, kernel={self.kernel!r})"


@lru_cache(maxsize=32)
def _matrices(make: Any, options: _Options, names: tuple[str, ...], which: str, d: int) -> tuple[Any, Any]:
    """The kernel matrix as a function of the logarithms of some options, and its derivative; compiled once."""

    def matrix(theta: Any, x: Any, y: Any) -> Any:
        net = make(d, **options.options, **dict(zip(names, jnp.exp(theta), strict=True)))
        kernel = kernel_of.__wrapped__(net, which)
        return jax.lax.map(lambda one: jax.vmap(lambda other: kernel(one, other))(y), x, batch_size=_ROWS)

    return jax.jit(matrix), jax.jit(jax.jacfwd(matrix))
