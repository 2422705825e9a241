"""What a network is: how its parameters are drawn, and what it does with them.

Nothing here knows about infinite width. A network is a pair of ordinary functions, and its parameters are an
ordinary pytree of arrays; the engine reads the same two functions.
"""

import inspect
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

__all__ = ["Network", "Normal"]


@dataclass(frozen=True)
class Normal:
    """A trainable parameter whose entries are i.i.d. N(mean, var) at initialisation.

    Args:
        shape: a tuple of sizes (an int is read as a one-tuple). Sizes proportional to the width n are the
            network's width axes: `(n,)`, `(n, n)`, `(4 * n, n)`, `(heads, n // heads, n)`.
        var: the initial variance, a nonnegative number. It may depend on n and may be a traced number, so a
            kernel can be differentiated with respect to it. Zero is a constant initialisation that is trained
            all the same: `Normal((n,), var=0.0)` is a zero bias, `Normal((n,), var=0.0, mean=1.0)` a unit gain.
        mean: the initial mean, under the same terms.

    A `Normal` is not a pytree: in the result of `init` it is a leaf.

    Raises:
        TypeError: if a size is not an integer (`n / 4` for `n // 4`), or `var` or `mean` is not a number.
        ValueError: if a size is negative, if a concrete `var` is negative or not finite, if a concrete
            `mean` is not finite, or if either is not a scalar.
    """

    shape: tuple[int, ...]
    var: Any = 1.0
    mean: Any = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", _shape(self.shape))
        _scalar("var", self.var, nonnegative=True)
        _scalar("mean", self.mean, nonnegative=False)


@dataclass(frozen=True)
class Network:
    """A network: a frozen pair of pure functions.

    Args:
        init: `init(n)` says how the parameters of a network of width n are drawn: any pytree of `Normal`. A function of
            two required arguments, `init(n, heads)`, makes a network with two widths that both go to infinity (the
            size and the number of attention heads): sizes are proportional to n, to heads or to n heads.
        apply: `apply(params, x)` is the network, as plain JAX, on one example x (any pytree of arrays). `params`
            has the structure of `init(n)` with an array in place of each `Normal`. The code is the
            parametrisation: every scaling by width is written here.

    Two networks are equal when their functions are the same objects, so a `Network` can be a dictionary key or a
    static argument.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> linear = Network(
        ...     init=lambda n: {"u": Normal((n, 3)), "v": Normal((n,))},
        ...     apply=lambda p, x: p["v"] @ (p["u"] @ x) / jnp.sqrt(3 * p["v"].size),
        ... )
        >>> linear.sample(jax.random.key(0), n=64)["u"].shape
        (64, 3)
    """

    init: Callable[..., PyTree[Normal]]
    apply: Callable[[Any, Any], Array]

    @property
    def second_width(self) -> bool:
        """Whether the network has two widths: `init(n, heads)`."""
        return _arguments(self.init) == 2

    def at(self, n: int, heads: int | None = None) -> PyTree[Normal]:
        """The parameters at width n, and at this second width if the network has two.

        Raises: ValueError if it has one and `heads` is given, or two and `heads` is not.
        """
        if self.second_width != (heads is not None):
            raise ValueError(
                "this network has two widths, init(n, heads): give both"
                if heads is None
                else "this network has one width, init(n): heads is not asked for"
            )
        return self.init(n) if heads is None else self.init(n, heads)

    def along(self, heads: Callable[[int], int]) -> "Network":
        """The network of one width in which the second one is a function of the first: `heads=lambda n: n // 2`.

        It is what the tools for finite networks take. Its infinite-width limit is that of the network itself.
        """
        if not self.second_width:
            raise ValueError("this network has one width, init(n)")
        return Network(lambda n: self.init(n, heads(n)), self.apply)

    @staticmethod
    def from_flax(build: Callable[..., Any], example: Any, **options: Any) -> "Network":
        """The network of a Flax module that can be built at any width.

        The parameters are the module's, as nested dictionaries, and their distributions are read off its own
        initialisers by tracing them at several widths: normal, truncated normal, uniform or constant entries, of any
        scale c n^p. `Network.sample` draws Gaussians of their mean and variance. Flax's default is the standard
        parametrization, whose NTK diverges without learning rates: see `lr` of `ntk`.

        Args:
            build: `build(n)` returns a linen module, or `build(n, rngs)` an nnx module.
            example: one example, without a batch axis (arrays, or anything with a shape and a dtype).
            method: what to call, by default `__call__`: the name of a method, or a function (module, x), such as
                `lambda m, x: m(x, deterministic=True)`.
            params: nested dictionaries of `Normal`, or of functions of n that return one, for the parameters whose
                distribution is not to be read, or cannot be (an orthogonal initialiser, say). Their shape is ignored.
            laws: entries that are not Gaussian have the limit of Gaussian ones where they are contracted over the
                width; elsewhere (the weights of a few inputs) their law matters. "refuse" raises there; "gaussian"
                takes Gaussians of the same mean and variance.

        Raises:
            InputError: if the distribution of a parameter cannot be read, with its name; if it matters and is not
                Gaussian; if the module keeps state (batch statistics), which a network does not.
            NoLimitError: if the module changes with its width in other ways than in its sizes.
            ImportError: if flax is not installed.

        Example:
            >>> import flax.linen as nn, jax.numpy as jnp
            >>> net = Network.from_flax(
            ...     lambda n: nn.Sequential([nn.Dense(n), nn.relu, nn.Dense(1)]), jnp.ones(3), laws="gaussian"
            ... )
            >>> net.init(8)["layers_2"]["kernel"]
            Normal(shape=(8, 1), var=0.125, mean=0.0)
        """
        from anywidth.modules import from_flax

        return from_flax(build, example, **options)

    @staticmethod
    def from_equinox(build: Callable[..., Any], example: Any, **options: Any) -> "Network":
        """The network of an Equinox module that can be built at any width.

        The parameters are the module's floating-point arrays, as nested dictionaries of its fields (indices of
        lists are numbers). Arguments and errors as of `from_flax`.

        Args:
            build: `build(n, key)` returns the module.
            example: one example.
            **options: `method`, `params` and `laws` as of `from_flax`.
        """
        from anywidth.modules import from_equinox

        return from_equinox(build, example, **options)

    def sample(self, key: Key[Array, ""], n: int, dtype: Any = None, *, heads: int | None = None) -> PyTree[Array]:
        """Draw the parameters of the network at width n.

        Args:
            key: a JAX random key. Every leaf is drawn with a key of its own.
            n: the width, a positive integer.
            dtype: floating dtype of every array; JAX's default float if None.
            heads: the second width, a positive integer, of a network that has two.

        Returns:
            A pytree with the structure of `init(n)`; each leaf has the shape of its `Normal`.

        Raises:
            TypeError: if a leaf of `init(n)` is not a `Normal`, with the path of the leaf; if `dtype` is not a
                floating dtype.
            ValueError: if n is not positive, or if `heads` is missing or too much.
        """
        if operator.index(n) < 1:
            raise ValueError(f"the width n must be a positive integer, and it is {n}")
        dtype = jnp.dtype(jnp.result_type(float) if dtype is None else dtype)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"parameters are real numbers: dtype must be a floating dtype, and it is {dtype}")
        paths, treedef = jax.tree.flatten_with_path(self.at(n, heads))
        if not paths:
            return jax.tree.unflatten(treedef, [])
        keys = jax.random.split(key, len(paths))
        leaves = [_draw(k, leaf, path, dtype) for k, (path, leaf) in zip(keys, paths, strict=True)]
        return jax.tree.unflatten(treedef, leaves)


def _arguments(init: Callable[..., Any]) -> int:
    """How many arguments `init` has to be given."""
    try:
        parameters = inspect.signature(init).parameters.values()
    except (TypeError, ValueError):
        return 1
    return sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def _draw(key: Key[Array, ""], leaf: Any, path: Any, dtype: Any) -> Array:
    if not isinstance(leaf, Normal):
        raise TypeError(
            f"init(n) must be a pytree whose leaves are anywidth.Normal, and init(n){jax.tree_util.keystr(path)} is "
            f"a {type(leaf).__name__}. A trainable parameter is a Normal (var=0.0 for a constant one); a number "
            "that is neither random nor trained belongs in apply."
        )
    mean, var = jnp.asarray(leaf.mean, dtype), jnp.asarray(leaf.var, dtype)
    # The same numbers as with all axes at once, and up to seven times faster to compile.
    drawn = jax.random.normal(key, (math.prod(leaf.shape),), dtype).reshape(leaf.shape)
    return mean + jnp.sqrt(var) * drawn


def _shape(shape: Any) -> tuple[int, ...]:
    sizes = shape if isinstance(shape, tuple | list) else (shape,)
    try:
        sizes = tuple(operator.index(size) for size in sizes)
    except TypeError as error:
        raise TypeError(
            f"the shape of a Normal is a tuple of integers, and it is {shape!r}. Use n // 4 rather than n / 4."
        ) from error
    if any(size < 0 for size in sizes):
        raise ValueError(f"the shape of a Normal has no negative sizes, and it is {shape!r}")
    return sizes


def _scalar(name: str, value: Any, *, nonnegative: bool) -> None:
    """Refuse what cannot be a variance or a mean, as far as it is known: a traced number is taken on trust."""
    if jnp.shape(value) != ():
        raise ValueError(
            f"{name} is one number for all entries of a Normal, and it has shape {jnp.shape(value)}. "
            "Entries of different variances are parameters of their own, or a scaling written in apply."
        )
    try:
        number = float(value)
    except jax.errors.ConcretizationTypeError:
        return
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} of a Normal must be a real number, and it is {value!r}") from error
    if not math.isfinite(number) or (nonnegative and number < 0):
        kind = "a finite nonnegative number" if nonnegative else "a finite number"
        raise ValueError(f"{name} of a Normal must be {kind}, and it is {number}")
