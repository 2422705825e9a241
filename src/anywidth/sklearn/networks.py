"""How an estimator is told its network."""

import inspect
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

import numpy as np

from anywidth import _compat
from anywidth.errors import InputError
from anywidth.kernels import nngp, ntk
from anywidth.network import Network
from anywidth.zoo import mlp

__all__ = ["Factory", "as_examples", "check_pickles", "computing", "kernel_of", "network_of"]


class Factory:
    """A constructor of networks and its options, for the number of features of the data that will come.

    Args:
        make: `make(d, **options)` returns the `Network` for examples whose last axis has size d, such as `zoo.mlp`.
        options: keyword arguments of `make`.

    The options are parameters in scikit-learn's sense: `GridSearchCV(InfiniteWidthRegressor(Factory(zoo.mlp)),
    {"network__depth": [1, 2, 4]})`. It is pickled by the name of `make`, which must be a function of a module.

    Raises:
        TypeError: `make` takes no such option.
    """

    def __init__(self, make: Callable[..., Network], **options: Any) -> None:
        self.make, self.options = make, options
        self._check(options)

    def __call__(self, d: int) -> Network:
        """The network for d features."""
        return _made(self.make, _Options(self.options), d)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor and its options; if `deep`, those left at their defaults too."""
        defaults = {name: p.default for name, p in _keywords(self.make).items() if p.default is not p.empty}
        return {"make": self.make, **(defaults if deep else {}), **self.options}

    def set_params(self, **params: Any) -> "Factory":
        """Change options, in place."""
        params = dict(params)
        make = params.pop("make", self.make)
        if make is not self.make:
            self.make, self.options = make, {}
        self._check(params)
        self.options = {**self.options, **params}
        return self

    def _check(self, options: dict[str, Any]) -> None:
        known = _keywords(self.make)
        free = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(self.make).parameters.values())
        for name in options:
            if name not in known and not free:
                raise TypeError(f"{self.make.__name__} has no option {name!r}; it has {', '.join(known)}")

    def __repr__(self) -> str:
        options = "".join(f", {name}={_shown(value)}" for name, value in self.options.items())
        return f"Factory({_shown(self.make)}{options})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Factory) and (self.make, self.options) == (other.make, other.options)

    def __hash__(self) -> int:
        return hash((self.make, tuple(self.options)))


def _keywords(make: Callable[..., Network]) -> dict[str, inspect.Parameter]:
    parameters = list(inspect.signature(make).parameters.items())[1:]  # the first is the number of features
    return {name: p for name, p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def _shown(value: Any) -> str:
    return getattr(value, "__name__", None) or repr(value)


class _Options:
    """Options as part of a key; those that cannot be hashed are told apart by identity."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = dict(options)

    def __hash__(self) -> int:
        return hash(tuple(self.options))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Options) or list(self.options) != list(other.options):
            return False
        return all(a is b or (type(a) is type(b) and a == b) for a, b in zip(*self._values(other), strict=True))

    def _values(self, other: "_Options") -> tuple[Any, Any]:
        return self.options.values(), other.options.values()


@lru_cache(maxsize=128)
def _made(make: Callable[..., Network], options: _Options, d: int) -> Network:
    """The same network for the same options, so that what is compiled for it is used again."""
    net = make(d, **options.options)
    if not isinstance(net, Network):
        raise TypeError(f"{make.__name__}({d}, ...) must return a Network, and it returns a {type(net).__name__}")
    return net


def network_of(network: Any, features: int) -> Network:
    """The network meant by what an estimator was given, for examples whose last axis has size `features`."""
    if isinstance(network, Network):
        return network
    if network is None:
        network = mlp
    if isinstance(network, Factory):
        return network(features)
    if callable(network):
        return Factory(network)(features)
    raise TypeError(f"network is a Network, a Factory or a constructor such as zoo.mlp, not a {type(network).__name__}")


@lru_cache(maxsize=64)
def kernel_of(net: Network, which: str) -> Callable[[Any, Any], Any]:
    """Its NTK or NNGP kernel."""
    if which not in ("ntk", "nngp"):
        raise InputError(f'kernel is "ntk" or "nngp", and it is {which!r}')
    return ntk(net) if which == "ntk" else nngp(net)


def as_examples(X: np.ndarray, input_shape: tuple[int, ...] | None) -> np.ndarray:
    """Rows of a table as examples of the network."""
    if input_shape is None:
        return X
    if X.shape[1] != np.prod(input_shape):
        raise InputError(f"X has {X.shape[1]} features, which are not examples of shape {tuple(input_shape)}")
    return X.reshape(len(X), *input_shape)


def computing(dtype: str) -> AbstractContextManager[None]:
    """Where numbers have this precision, without a change of JAX's settings elsewhere."""
    if dtype not in ("float32", "float64"):
        raise InputError(f'dtype is "float64" or "float32", and it is {dtype!r}')
    return _compat.under(_compat.settings()._replace(x64=dtype == "float64"))


def check_pickles(network: Any) -> None:
    """Say what to do about a network that cannot be pickled.

    Raises:
        TypeError: it cannot.
    """
    try:
        pickle.dumps(network)
    except Exception as error:
        raise TypeError(
            f"the network cannot be pickled ({error}). A Network of functions defined at the top of a module can, and "
            "so can a constructor with its options: Factory(zoo.mlp, depth=2) in place of zoo.mlp(d, depth=2)."
        ) from None
