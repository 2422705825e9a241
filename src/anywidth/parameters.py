"""The parameters of a network as the engine sees them: variances, means and learning rates with their powers of n.

The entries of a parameter are n^a times numbers of order one, a its *size*: half the power of its variance. Its
epsilon is lr n^r, which is n^(r - 2a) in these units, its *speed*: where the output is of order n^p, its share of the
NTK is of order n^(2p + speed), however it enters. A parameter with no variance is zero and has no size of its own:
it gets that of what it is added to (`Resized`). So does one that is of lower order than what it is added to, as a bias
of variance 1/n: in the limit it is zero, and it is learning all the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from anywidth import _compat
from anywidth.errors import AnywidthError, InputError, NoLimitError, UnsupportedError
from anywidth.interpret import Interpreter
from anywidth.kets import Graph, Leaf
from anywidth.network import Network, Normal
from anywidth.rates import Rates, at_widths, is_frozen, numbers_of_width, path_of, rates_of
from anywidth.rows import Rows, rows_of
from anywidth.trace import WIDTHS, Program, fit_dim, fit_number, is_wide, kind_of, trace
from anywidth.values import Ax, Det, Ket, Mat, Value, Wide

__all__ = ["Parameter", "Parameters", "entering", "read_parameters", "read_program", "run"]


class Parameter(NamedTuple):
    """A parameter: its leaf in the graph, its width axes, and its mean (c, p) if it has one."""

    leaf: Leaf
    wides: tuple[int, ...]
    mean: tuple[Any, Fraction] | None


class Parameters(NamedTuple):
    """All parameters, and their shapes at the three widths."""

    items: tuple[Parameter, ...]
    tree: Any
    shapes: tuple[Any, ...]


def read_parameters(
    net: Network, dtype: Any, lr: Rates = None, sizes: Mapping[tuple[Any, ...], Fraction | None] | None = None
) -> Parameters:
    """What `init` says at three widths. `sizes` are those found for parameters that are zero in the limit;
    None for one that keeps its own.

    Raises:
        TypeError: a leaf of init(n) is not a Normal.
        NoLimitError: a shape, variance, mean or rate has no power of n.
        InputError: a learning rate is wrong.
    """
    drawn = [jax.tree_util.tree_flatten_with_path(p) for p in at_widths(net)]
    trees: list[Any] = [tree for _, tree in drawn]
    if trees[0] != trees[1] or trees[0] != trees[2]:
        raise NoLimitError("init(n) returns other parameters at other widths: there is no limit")
    for leaves, _ in drawn:
        for path, leaf in leaves:
            if not isinstance(leaf, Normal):
                what = f"an array of shape {leaf.shape}" if hasattr(leaf, "shape") else repr(leaf)
                raise TypeError(
                    f"init(n){jax.tree_util.keystr(path)} is {what}; every leaf must be a Normal(shape, var, mean), "
                    "which says how a parameter is drawn and draws nothing. A number that is not random belongs in "
                    "apply"
                )
    if drawn[0][0] and all(a.shape == b.shape for (_, a), (_, b) in zip(drawn[0][0], drawn[1][0], strict=True)):
        raise NoLimitError(
            "no parameter of init(n) has an axis that grows with n: there is no width to take to infinity. Give the "
            "hidden layers the size n, as in Normal((n, 3)), in place of a fixed number"
        )
    rates = rates_of(net, lr)
    groups = [
        (group[0][0], [leaf for _, leaf in group]) for group in zip(*(leaves for leaves, _ in drawn), strict=True)
    ]
    numbers = _numbers(net, groups)
    items = [
        _parameter(path, normals, number, rate, dtype, sizes or {})
        for (path, normals), number, rate in zip(groups, numbers, rates, strict=True)
    ]
    shapes = tuple(
        jax.tree.unflatten(trees[0], [jax.ShapeDtypeStruct(leaf.shape, dtype) for _, leaf in leaves])
        for leaves, _ in drawn
    )
    return Parameters(tuple(items), trees[0], shapes)


def _numbers(net: Network, groups: Sequence[Any]) -> list[tuple[tuple[Any, Fraction], tuple[Any, Fraction]]]:
    """Variance and mean of each parameter, as c n^p."""
    if any(_compat.is_tracer(v) for _, normals in groups for p in normals for v in (p.var, p.mean)):
        flat = numbers_of_width(
            lambda *n: [v for p in jax.tree.leaves(net.init(*n)) for v in (p.var, p.mean)], net.second_width
        )
        return list(zip(flat[::2], flat[1::2], strict=True))
    out = []
    for path, normals in groups:
        try:
            var, mean = fit_number([p.var for p in normals]), fit_number([p.mean for p in normals])
        except ValueError as e:
            raise NoLimitError(f"the parameter init(n){jax.tree_util.keystr(path)}: {e}") from None
        out.append((var, mean))
    return out


def _parameter(
    keys: Any,
    normals: Sequence[Normal],
    numbers: tuple[tuple[Any, Fraction], tuple[Any, Fraction]],
    rate: tuple[Any, Fraction],
    dtype: Any,
    sizes: Mapping[tuple[Any, ...], Fraction | None],
) -> Parameter:
    name = jax.tree_util.keystr(keys) or "parameter"
    path = path_of(keys)
    try:
        if len({len(p.shape) for p in normals}) > 1:
            raise ValueError("its rank depends on n")
        shape = tuple(fit_dim(sizes) for sizes in zip(*(p.shape for p in normals), strict=True))
    except ValueError as e:
        raise NoLimitError(f"the parameter init(n){name}: {e}") from None
    wides = tuple(i for i, s in enumerate(shape) if is_wide(s))
    for width in ("n", "heads"):
        if sum(width in kind_of(shape[i]) for i in wides) > 2:
            raise UnsupportedError(
                f"the parameter init(n){name} has more than two axes that grow with {width}; a product over two of "
                "them has no rule"
            )
    (var, power), (mean, mean_power) = numbers
    has_mean = _compat.is_tracer(mean) or float(mean) != 0
    still = not _compat.is_tracer(var) and float(var) == 0
    # randomness of lower order than the mean is nothing, but it is learning all the same
    still = still or (has_mean and not _is_matrix(shape) and mean_power > power / 2)
    moved = sizes.get(path)
    lesser = moved is not None and not still
    still = still or lesser
    size = mean_power if still and has_mean else moved if moved is not None else Fraction(0) if still else power / 2
    factor, rate_power = rate
    leaf = Leaf(
        name, shape, jnp.asarray(0.0 if still else var, dtype), still,
        size=size,
        speed=rate_power - 2 * size,
        lr=None if not _compat.is_tracer(factor) and float(factor) == 1 else jnp.asarray(factor, dtype),
        frozen=is_frozen(factor),
        movable=not has_mean and path not in sizes,
        lesser=lesser,
        path=path,
    )  # fmt: skip
    number = jnp.asarray(mean, dtype) if _compat.is_tracer(mean) else np.asarray(mean, dtype)
    return Parameter(leaf, wides, (number, mean_power) if has_mean else None)


def read_program(net: Network, parameters: Parameters, example: Any, dtype: Any) -> tuple[Program, Any]:
    """The program of `apply` on an example of this shape, and the structure of its output.

    Raises: InputError if `apply` fails on it; NoLimitError if its structure depends on the width.
    """
    shapes = dict(zip(WIDTHS, parameters.shapes, strict=True))
    spec = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), example)
    try:
        program, tree = trace(lambda n: lambda p, e: net.apply(p, e), lambda n: (shapes[n], spec))
    except (TypeError, ValueError) as e:
        if isinstance(e, AnywidthError):
            raise
        raise InputError(_failed(e, example)) from e
    if not program.outputs:
        raise InputError(f"apply(params, x) returns no array but {tree.unflatten([])!r}: is its `return` missing?")
    return program, tree


def _failed(error: Exception, example: Any) -> str:
    """What the user's own code raised while it was traced, with its line."""
    shape = jax.tree.map(lambda a: tuple(a.shape), example)
    if isinstance(error, jax.errors.ConcretizationTypeError | jax.errors.TracerArrayConversionError):
        why = (
            "it needs the value of an array, and the network is read without values, as under jax.jit: write jnp for "
            "numpy, jnp.where or jax.lax.cond for an `if` on a value"
        )
    else:
        why = f"{error} (x is one example; aw.gram takes the examples of a data set)"
    line = _compat.failing_line(error)
    return f"apply(params, x) fails on an example of shape {shape}: {why}." + (f"\n  at {line}" if line else "")


def run(it: Interpreter, program: Program, parameters: Parameters, example: Any) -> list[Value]:
    """The outputs of the program for one copy of the parameters."""
    inputs: list[Value] = [entering(it.graph, p, it.copy) for p in parameters.items]
    inputs += [Det(a, Fraction(0), tuple(a.shape)) for a in jax.tree.leaves(example)]
    return it.run(program, inputs)


def _is_matrix(shape: Sequence[Any]) -> bool:
    """Whether a width occurs twice among the axes, so that the parameter maps kets to kets."""
    widths = [name for s in shape for name in kind_of(s)]
    return len(set(widths)) < len(widths)


def entering(g: Graph, p: Parameter, copy: int) -> Value:
    """A parameter as a value: a matrix, or kets where it has one width axis, or random numbers where it has none."""
    leaf = p.leaf
    finite = [i for i in range(len(leaf.shape)) if i not in p.wides]
    lengths = [int(leaf.shape[i]) for i in finite]  # type: ignore[arg-type]
    rank = len(finite)
    matrix = _is_matrix(leaf.shape)
    layout = tuple(
        (Wide(i if matrix else 0, s),) if i in p.wides else () if s == 1 else (Ax(finite.index(i), int(s)),)  # type: ignore[arg-type]
        for i, s in enumerate(leaf.shape)
    )
    indices = tuple(
        (("axis", i), np.arange(lengths[k]).reshape([lengths[k] if j == k else 1 for j in range(rank)]))
        for k, i in enumerate(finite)
    )
    if matrix:
        rows = tuple(Rows(i, 0, leaf.shape[i]) for i in p.wides)
        return Mat(leaf, rows, indices, None, rank, layout, leaf.size, p.mean)
    row = rows_of([Rows(i, 0, leaf.shape[i]) for i in p.wides])
    one = g.const(np.ones((1,) * rank))
    node = g.product(leaf, copy, one, 0, row, None, indices, f"init(n){leaf.name}")
    if p.mean is None:
        return Ket(node, layout, leaf.size)
    value, mean_power = p.mean
    constant = g.const(value.reshape((1,) * rank))
    # a mean of lower order than the randomness is nothing against it; see `_parameter` for the other way round
    terms = [(None, constant), (None, node)] if mean_power == leaf.size else [(None, node)]
    return Ket(g.sum(terms), layout, leaf.size)
