"""How fast each parameter is trained: learning-rate multipliers, with powers of n.

Multipliers follow the structure of `init(n)`, or say only what differs from one: a number holds for everything
below it, and a parameter that a dictionary does not name has rate one. Scaling a parameter's rate scales its own
epsilon (fact 4), so its share of the NTK is multiplied by the rate.

>>> from anywidth import Network, Normal
>>> init = lambda n: {"layers": [Normal((n, 3)), Normal((n, n))], "v": Normal((n,))}
>>> [value for value, power in rates_of(Network(init, None), {"layers": {1: 0.0}, "v": 2.0})]
[1.0, 0.0, 2.0]
>>> rates_of(Network(init, None), lambda n: {"layers": 1 / n})
[(1.0, Fraction(-1, 1)), (1.0, Fraction(-1, 1)), (1.0, Fraction(0, 1))]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from anywidth import _compat
from anywidth.errors import InputError, NoLimitError
from anywidth.network import Network
from anywidth.trace import HEADS, WIDTHS, fit_dim, fit_number, is_wide, trace

__all__ = ["Rates", "numbers_of_width", "path_of", "rates_at", "rates_of", "scaled", "suggestion", "width_of"]

Rates = Any  # a number, a pytree of numbers, or a function of n that returns one; None for one everywhere
Path = tuple[Any, ...]

_ONE = (1.0, Fraction(0))


def path_of(keys: Iterable[Any]) -> Path:
    """A path of JAX as plain names and numbers, the same for a dictionary's key and an attribute."""
    return tuple(
        next(getattr(k, name) for name in ("key", "name", "idx") if hasattr(k, name)) if not isinstance(k, str) else k
        for k in keys
    )


def rates_of(net: Network, lr: Rates) -> list[tuple[Any, Fraction]]:
    """(c, p) of the multiplier c n^p of each parameter, in the order of the leaves of `init(n)`.

    Raises:
        InputError: if `lr` names a parameter that there is not, or a multiplier is not a nonnegative number.
        NoLimitError: if a multiplier is no constant times a power of n.
    """
    paths = [path_of(path) for path, _ in jax.tree_util.tree_flatten_with_path(at_widths(net)[0])[0]]
    if lr is None:
        return [_ONE] * len(paths)
    given = lr if callable(lr) else lambda *n: lr
    names = [path for path, _ in _flat(given(*WIDTHS[:1], *HEADS[: net.second_width]))]
    try:
        numbers = numbers_of_width(lambda *n: [value for _, value in _flat(given(*n))], net.second_width)
    except (ValueError, NoLimitError) as e:
        raise NoLimitError(f"a learning-rate multiplier has no power of n: {e}") from None
    return _spread(names, numbers, paths)


def rates_at(net: Network, lr: Rates, n: int | None, params: Any = None) -> list[Any]:
    """The multiplier of each parameter at width n, or at the width that these parameters have."""
    if not callable(lr):
        at: tuple[int, ...] = (1,) * (1 + net.second_width)
    else:
        at = widths_of(net, params) if n is None else (n,)
    paths = [path_of(path) for path, _ in jax.tree_util.tree_flatten_with_path(net.init(*at))[0]]
    if lr is None:
        return [1.0] * len(paths)
    entries = _flat(lr(*at) if callable(lr) else lr)
    return _spread([path for path, _ in entries], [value for _, value in entries], paths, one=1.0)


def scaled(net: Network, lr: Rates, by: Sequence[Any]) -> Rates:
    """The same rates, that of each parameter times a number of its own; they may be traced."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(at_widths(net)[0])
    paths = [path_of(path) for path, _ in leaves]

    def at(*n: int) -> Any:
        entries = [] if lr is None else _flat(lr(*n) if callable(lr) else lr)
        rates = _spread([path for path, _ in entries], [value for _, value in entries], paths, one=1.0)
        return jax.tree.unflatten(tree, [a * b for a, b in zip(rates, by, strict=True)])

    return at if callable(lr) else at()


def _flat(lr: Any) -> list[tuple[Path, Any]]:
    out = []
    for keys, value in jax.tree_util.tree_flatten_with_path(lr, is_leaf=lambda x: x is None)[0]:
        where = f"lr{jax.tree_util.keystr(keys)}"
        if isinstance(value, str | bytes) or value is None or np.shape(value) != ():
            raise InputError(f"{where} is {value!r}: a learning-rate multiplier is one nonnegative number")
        if not _compat.is_tracer(value) and not (math.isfinite(float(value)) and float(value) >= 0):
            raise InputError(f"{where} is {value}: a learning-rate multiplier is a finite nonnegative number")
        out.append((path_of(keys), value))
    return out


def _spread(names: Sequence[Path], values: Sequence[Any], paths: Sequence[Path], one: Any = _ONE) -> list[Any]:
    """The value of each parameter: that of the name which begins its path."""
    out = [one] * len(paths)
    for name, value in zip(names, values, strict=True):
        found = [i for i, path in enumerate(paths) if path[: len(name)] == name]
        if not found:
            known = ", ".join(shown(path) for path in paths)
            raise InputError(f"lr names {shown(name)}, and init(n) has no such parameter. It has {known}")
        for i in found:
            out[i] = value
    return out


def shown(path: Path) -> str:
    """A path as JAX prints it: ['layers'][0]."""
    return "".join(f"[{key!r}]" for key in path) or "the parameter"


def at_widths(net: Network) -> list[Any]:
    """The parameters at the widths at which programs are read."""
    return [net.at(n, h if net.second_width else None) for n, h in zip(WIDTHS, HEADS, strict=True)]


def numbers_of_width(function: Callable[..., Sequence[Any]], second: bool = False) -> list[tuple[Any, Fraction]]:
    """(c, p) of each of the numbers c n^p that a function of n returns; they may be traced.

    Raises: ValueError or NoLimitError if one of them is not of this form.
    """
    second_of = dict(zip(WIDTHS, HEADS, strict=True))

    def at(n: int) -> Sequence[Any]:
        return function(n, second_of[n]) if second else function(n)

    values = [list(at(n)) for n in WIDTHS]
    if len({len(v) for v in values}) > 1:
        raise ValueError(f"another number of them at each of the widths {WIDTHS}")
    groups = list(zip(*values, strict=True))
    if not any(_compat.is_tracer(v) for group in groups for v in group):
        return [fit_number(group) for group in groups]
    from anywidth.inner import Gram
    from anywidth.interpret import Interpreter
    from anywidth.kets import Graph

    program, _ = trace(lambda n: lambda: [jnp.asarray(v) for v in at(n)], lambda n: ())
    graph = Graph()
    out = Interpreter(graph, Gram(graph), 1).run(program, [])
    return [(det.val, det.power) for det in out]  # type: ignore[union-attr]


def width_of(net: Network, params: Any) -> int:
    """The width n at which `init` has the shapes of these parameters."""
    return widths_of(net, params)[0]


def widths_of(net: Network, params: Any) -> tuple[int, ...]:
    """The width n, and the second one if there is one, at which `init(n)` has the shapes of these parameters.

    Raises: InputError if there is none.
    """
    drawn = [jax.tree.leaves(p) for p in at_widths(net)]
    arrays = jax.tree.leaves(params)
    found: dict[frozenset[str], int] = {}
    if len(arrays) == len(drawn[0]):
        for *normals, array in zip(*drawn, arrays, strict=True):
            for *sizes, size in zip(*(p.shape for p in normals), np.shape(array), strict=True):
                dim = fit_dim(sizes)
                if is_wide(dim):
                    width = (size - dim.b) / dim.a
                    if width.denominator == 1:
                        found.setdefault(dim.kind, int(width))
        n, heads, both = (found.get(frozenset(k)) for k in ({"n"}, {"heads"}, {"n", "heads"}))
        n = both // heads if n is None and both and heads else n
        heads = both // n if heads is None and both and n else heads
        if n is not None and (heads is not None or not net.second_width):
            return (n, heads) if heads is not None else (n,)
    raise InputError("the parameters have the shapes of init(n) for no width n")


def suggestion(powers: Mapping[Path, Fraction]) -> str:
    """The code of a `lr` with these powers of n, as short as its rules allow."""

    def code(paths: Mapping[Path, Fraction]) -> str:
        if len(set(paths.values())) == 1:
            return _power(next(iter(paths.values())))
        heads: dict[Any, dict[Path, Fraction]] = {}
        for path, power in paths.items():
            heads.setdefault(path[0], {})[path[1:]] = power
        return "{" + ", ".join(f"{h!r}: {code(rest)}" for h, rest in heads.items() if any(rest.values())) + "}"

    return f"lr=lambda n: {code(powers)}"


def _power(p: Fraction) -> str:
    if p == 0:
        return "1"
    if p == 1:
        return "n"
    if p == -1:
        return "1 / n"
    return f"n ** {p}" if p.denominator == 1 else f"n ** {float(p):g}" if p > 0 else f"n ** ({p})"


def scaled_by(rates: Sequence[Any], params: PyTree) -> PyTree:
    """A tangent or cotangent of the parameters with each leaf times its rate; leaves with rate zero are zero."""
    leaves, tree = jax.tree.flatten(params)
    assert len(leaves) == len(rates)
    out = [
        leaf if not _compat.is_tracer(r) and float(r) == 1.0 else leaf * jnp.asarray(r, leaf.dtype)
        for leaf, r in zip(leaves, rates, strict=True)
    ]
    return jax.tree.unflatten(tree, out)


def is_frozen(rate: Any) -> bool:
    """Whether a rate is known to be zero."""
    return not _compat.is_tracer(rate) and float(rate) == 0
