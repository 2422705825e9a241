"""Networks from Flax and Equinox modules.

A module that can be built at any width is a network: its parameters and their shapes are those it makes, their
distributions are read off its own initialisers (`laws.py`), and it is called as it is. Nothing is sampled to find
them, and nothing of the module's arithmetic is changed: what it divides by, and what it does not, decides the limit.

The limit is that of Gaussian parameters. For a parameter that is contracted over the width it is the same for any
law of i.i.d. entries of this mean and variance (a central limit). For others, the weights of a few inputs or a bias
that is not zero, the law matters: where it is not Gaussian, the user says so.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from anywidth import _compat
from anywidth.errors import AnywidthError, InputError, NoLimitError, Resized
from anywidth.laws import Law, laws_of, rounded
from anywidth.network import Network, Normal
from anywidth.rates import path_of, shown
from anywidth.trace import WIDTHS, fit_dim, fit_number, is_wide

__all__ = ["from_equinox", "from_flax"]

NonGaussian = Literal["refuse", "gaussian"]
Path = tuple[Any, ...]


@dataclass(frozen=True)
class _Library:
    """How to use the modules of a library at width n.

    `draw(n)` is a function of a key that returns the parameters, and `apply(n)` one of parameters and an example;
    parameters are nested dictionaries.
    """

    draw: Callable[[int], Callable[[Any], Any]]
    apply: Callable[[int], Callable[[Any, Any], Any]]


def from_flax(
    build: Callable[..., Any],
    example: Any,
    *,
    method: str | Callable[..., Any] | None = None,
    params: Any = None,
    laws: NonGaussian = "refuse",
) -> Network:
    """See `Network.from_flax`."""
    try:
        import flax.linen as nn
        from flax import nnx
    except ImportError as error:
        raise ImportError('Network.from_flax needs flax: pip install "anywidth[flax]"') from error
    spec = _spec(example)
    makes_linen = len(inspect.signature(build).parameters) == 1
    if not makes_linen:
        return _network(_nnx(nnx, build, method), spec, params, laws)
    module = build(WIDTHS[0])
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"build(n) is a linen module, or build(n, rngs) an nnx module, and build(n) is a {type(module).__name__}"
        )
    return _network(_linen(nn, build, method, spec), spec, params, laws)


def from_equinox(
    build: Callable[..., Any],
    example: Any,
    *,
    method: str | Callable[..., Any] | None = None,
    params: Any = None,
    laws: NonGaussian = "refuse",
) -> Network:
    """See `Network.from_equinox`."""
    try:
        import equinox as eqx
    except ImportError as error:
        raise ImportError('Network.from_equinox needs equinox: pip install "anywidth[equinox]"') from error
    return _network(_equinox(eqx, build, method), _spec(example), params, laws)


def _spec(example: Any) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), jnp.result_type(a)), example)


# --- the libraries ------------------------------------------------------------------------------------------


def _linen(nn: Any, build: Callable[[int], Any], method: Any, spec: Any) -> _Library:
    from flax.errors import InvalidRngError

    def draw(n: int) -> Callable[[Any], Any]:
        def parameters(key: Any) -> Any:
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), spec)
            variables = dict(nn.meta.unbox(build(n).init(key, zeros, method=method)))
            own = variables.pop("params", {})
            if jax.tree.leaves(variables):
                raise InputError(
                    f"the module keeps state besides its parameters ({', '.join(variables)}), and a network is a "
                    "function of its parameters and one example. Write this layer without state"
                )
            return _plain(own)

        return parameters

    def apply(n: int) -> Callable[[Any, Any], Any]:
        def call(p: Any, x: Any) -> Any:
            try:
                return build(n).apply({"params": p}, x, method=method)
            except InvalidRngError as e:
                raise InputError(
                    f"the module draws random numbers when it is called (dropout, noise): {e}. A network is a function "
                    "of its parameters and one example: build it deterministic, or call it so, "
                    "method=lambda m, x: m(x, deterministic=True)"
                ) from e

        return call

    return _Library(draw, apply)


def _nnx(nnx: Any, build: Callable[..., Any], method: Any) -> _Library:
    def split(module: Any) -> Any:
        graph, own, rngs, rest = nnx.split(module, nnx.Param, nnx.RngState, ...)
        if jax.tree.leaves(rest):
            kinds = {type(v).__name__ for v in jax.tree.leaves(rest, is_leaf=lambda v: isinstance(v, nnx.Variable))}
            raise InputError(
                f"the module keeps state besides its parameters ({', '.join(sorted(kinds))}), and a network is a "
                "function of its parameters and one example. Write this layer without state"
            )
        return graph, own, rngs, rest

    def draw(n: int) -> Callable[[Any], Any]:
        return lambda key: _plain(nnx.to_pure_dict(split(build(n, nnx.Rngs(key)))[1]))

    @lru_cache(maxsize=16)
    def abstract(n: int) -> Any:
        return split(nnx.eval_shape(lambda: build(n, nnx.Rngs(0))))

    def apply(n: int) -> Callable[[Any, Any], Any]:
        def call(p: Any, x: Any) -> Any:
            graph, own, rngs, rest = abstract(n)
            filled = jax.tree.map(lambda _: None, own)
            filled = jax.tree.unflatten(jax.tree.structure(own), jax.tree.leaves(p))
            keys = jax.tree.map(
                lambda s: (
                    jax.random.key(0) if jnp.issubdtype(s.dtype, jax.dtypes.prng_key) else jnp.zeros(s.shape, s.dtype)
                ),
                rngs,
            )
            return _called(nnx.merge(graph, filled, keys, rest), method, x)

        return call

    return _Library(draw, apply)


def _equinox(eqx: Any, build: Callable[..., Any], method: Any) -> _Library:
    def draw(n: int) -> Callable[[Any], Any]:
        def parameters(key: Any) -> Any:
            leaves, _ = jax.tree_util.tree_flatten_with_path(eqx.filter(build(n, key), eqx.is_inexact_array))
            return _nested({path_of(path): leaf for path, leaf in leaves})

        return parameters

    @lru_cache(maxsize=16)
    def abstract(n: int) -> Any:
        return eqx.filter_eval_shape(build, n, jax.random.key(0))

    def apply(n: int) -> Callable[[Any, Any], Any]:
        def call(p: Any, x: Any) -> Any:
            module = abstract(n)
            held, tree = jax.tree_util.tree_flatten_with_path(module)
            given = {path_of(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(p)[0]}
            missing = [shown(path_of(path)) for path, leaf in held if _is_array(leaf) and path_of(path) not in given]
            if missing:
                raise InputError(
                    f"the module holds arrays that are not floating-point parameters ({', '.join(missing)}): make them "
                    "static fields, or compute them in __call__"
                )
            leaves = [given.get(path_of(path), leaf) for path, leaf in held]
            return _called(jax.tree.unflatten(tree, leaves), method, x)

        return call

    return _Library(draw, apply)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct | jax.Array | np.ndarray)


def _called(module: Any, method: Any, x: Any) -> Any:
    if callable(method):
        return method(module, x)
    return (module if method is None else getattr(module, method))(x)


def _plain(tree: Any) -> Any:
    """Nested dictionaries, whatever mapping the library uses."""
    return {k: _plain(v) for k, v in tree.items()} if isinstance(tree, Mapping) else tree


def _nested(flat: Mapping[Path, Any]) -> Any:
    out: dict[Any, Any] = {}
    for path, value in flat.items():
        at = out
        for key in path[:-1]:
            at = at.setdefault(key, {})
        at[path[-1]] = value
    return out


# --- the network --------------------------------------------------------------------------------------------


def _network(library: _Library, example: Any, params: Any, laws: NonGaussian) -> Network:
    """The network of a library's modules, its distributions read at three widths."""
    if laws not in ("refuse", "gaussian"):
        raise ValueError(f'laws is "refuse" or "gaussian", and it is {laws!r}')
    overrides = {} if params is None else _overrides(params)
    drawn = {n: _read(library, n) for n in WIDTHS}
    paths = list(drawn[WIDTHS[0]])
    if any(list(drawn[n]) != paths for n in WIDTHS):
        raise NoLimitError("the module has other parameters at other widths: there is no limit")
    unknown = [shown(name) for name in overrides if not any(path[: len(name)] == name for path in paths)]
    if unknown:
        known = ", ".join(shown(p) for p in paths)
        raise InputError(f"params names {', '.join(unknown)}, and the module has no such parameter. It has {known}")
    given = {path: value for path in paths for name, value in overrides.items() if path[: len(name)] == name}
    fitted = {path: _fitted(path, [drawn[n][path][1] for n in WIDTHS]) for path in paths if path not in given}

    def init(n: int) -> Any:
        shapes = {path: shape for path, (shape, _) in _at(library, drawn, n).items()}
        return _nested({path: _normal(shapes[path], given.get(path), fitted.get(path), n) for path in paths})

    width = _width(paths, drawn)

    def apply(p: Any, x: Any) -> Any:
        return library.apply(width(p))(p, x)

    net = Network(init, apply)
    if laws == "refuse":
        _check_laws(net, example, {path: law for path, (law, _) in fitted.items() if law.family not in _GAUSSIAN})
    return net


_GAUSSIAN = ("normal", "constant")


def _overrides(params: Any) -> dict[Path, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: isinstance(x, Normal) or callable(x))[0]
    for path, leaf in leaves:
        if not isinstance(leaf, Normal) and not callable(leaf):
            raise InputError(
                f"params{jax.tree_util.keystr(path)} is a Normal, or a function of n that returns one, and it is a "
                f"{type(leaf).__name__}"
            )
    return {path_of(path): leaf for path, leaf in leaves}


def _read(library: _Library, n: int) -> dict[Path, tuple[tuple[int, ...], Law]]:
    """The shape and law of each parameter at width n."""
    try:
        jaxpr, tree = jax.make_jaxpr(library.draw(n), return_shape=True)(jax.random.key(0))
    except (TypeError, ValueError) as e:
        if isinstance(e, AnywidthError):
            raise
        line = _compat.failing_line(e)
        raise InputError(
            f"the module cannot be made at width {n}, for this example: {str(e).strip()}\n"
            "Where it is about dtypes, the module has a precision of its own: give it that of the example (the cells "
            "of flax.linen take param_dtype=), or an example of its precision." + (f"\n  at {line}" if line else "")
        ) from e
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_of(path): (tuple(leaf.shape), law) for (path, leaf), law in zip(leaves, laws_of(jaxpr), strict=True)}


def _at(library: _Library, drawn: Any, n: int) -> Any:
    if n not in drawn:
        drawn[n] = _read(library, n)
    return drawn[n]


def _fitted(path: Path, laws: Sequence[Law]) -> tuple[Law, Any]:
    """A law and its mean and standard deviation as numbers c n^p."""
    unread = [law for law in laws if law.family is None]
    if unread or len({law.family for law in laws}) > 1:
        reason = unread[0].reason if unread else "its family changes with the width"
        orthogonal = " (a square orthogonal matrix has the limit of var=1/n)" if "'qr'" in str(reason) else ""
        raise InputError(
            f"the distribution of {shown(path)} cannot be read off its initialiser ({reason}): it is not i.i.d. "
            f"normal, truncated normal, uniform or constant. Say what it is: params={_example(path)}{orthogonal}"
        )
    try:
        numbers = []
        for values in ([law.mean for law in laws], [law.std**2 for law in laws]):
            c, p = fit_number([np.float32(v) for v in values]) if any(values) else (0.0, 0)
            numbers.append((rounded(float(c)), p))
    except ValueError as e:
        raise NoLimitError(f"the initial scale of {shown(path)}: {e}") from None
    return laws[0], numbers


def _example(path: Path) -> str:
    text = "Normal(shape, var=...)"
    for key in reversed(path):
        text = f"{{{key!r}: {text}}}"
    return text


def _normal(shape: tuple[int, ...], given: Any, fitted: Any, n: int) -> Normal:
    if given is not None:
        normal = given if isinstance(given, Normal) else given(n)
        return Normal(shape, normal.var, normal.mean)
    (mean, p), (var, q) = fitted[1]
    return Normal(shape, var * n ** float(q), mean * n ** float(p))


def _width(paths: Sequence[Path], drawn: Any) -> Callable[[Any], int]:
    """The width of parameters, from the first axis of theirs that grows."""
    for path in paths:
        for axis, sizes in enumerate(zip(*(drawn[n][path][0] for n in WIDTHS), strict=True)):
            dim = fit_dim(sizes)
            if is_wide(dim):
                return partial(_width_at, path, axis, dim)
    raise NoLimitError("no parameter of the module grows with n: does build use its width?")


def _width_at(path: Path, axis: int, dim: Any, params: Any) -> int:
    for key in path:
        params = params[key]
    return int((params.shape[axis] - dim.b) / dim.a)


def _check_laws(net: Network, example: Any, suspects: Mapping[Path, Law]) -> None:
    """Refuses parameters that are not Gaussian and are not contracted over the width: there their law matters."""
    if not suspects:
        return
    from anywidth.inner import Gram
    from anywidth.interpret import Interpreter
    from anywidth.kets import Graph, Product
    from anywidth.parameters import read_parameters, read_program, run

    dtype, sizes, whole = jnp.result_type(float), dict[Any, Any](), True
    ones = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), example)
    while True:
        graph = Graph()
        try:
            parameters = read_parameters(net, dtype, None, sizes)
            program, _ = read_program(net, parameters, example, dtype)
            run(Interpreter(graph, Gram(graph), 1, unrolled=True), program, parameters, ones)
        except Resized as e:
            sizes[e.leaf.path] = e.size
            continue
        except AnywidthError:
            whole = False  # the kernels say why; what was met so far is looked at all the same
        break
    products = [node for node in graph.table.values() if isinstance(node, Product) and node.col is None]
    met = {node.leaf.path for node in products if not node.leaf.zero_var and _used(node, graph, whole)}
    for path in suspects:
        if path in met:
            raise InputError(
                f"the entries of {shown(path)} are {suspects[path].family}, and it is not contracted over the width "
                "(the weights of a few inputs, a bias), so that the limit depends on more of it than the variance. "
                'Give it Gaussian entries: params=... to say which, or laws="gaussian" for Gaussians '
                "of the same mean and variance everywhere"
            )


def _used(node: Any, graph: Any, whole: bool) -> bool:
    """Whether a raw parameter stands for itself, and not only for the readout that was made of it.

    It is not known of a network that was not read as a `whole`: a matrix may have been met only before its product.
    """
    from anywidth.kets import Const, Node, Product

    raw = isinstance(node.operand, Const) and node.contracted == 0
    if not raw or not whole:
        return not raw
    others = [x for x in graph.table.values() if isinstance(x, Node) and x is not node and node.leaf in x.leaves]
    return not any(isinstance(x, Product) and x.leaf is node.leaf and x.col is not None for x in others)
