r"""The kernels of an infinitely wide network.

The network is run twice, on x with parameters theta and on y with theta'; the entries of each parameter and its
twin have covariance var + epsilon. The covariance of the two outputs at epsilon = 0 is the NNGP kernel, and its
derivative is the neural tangent kernel (Price's theorem: d/d eps E[F(theta) G(theta')] = sum_i E[d_i F d_i G]).

>>> import jax, jax.numpy as jnp
>>> import anywidth as aw
>>> net = aw.Network(
...     lambda n: {"u": aw.Normal((n, 2)), "v": aw.Normal((n,))},
...     lambda p, x: p["v"] @ jax.nn.relu(p["u"] @ x) / jnp.sqrt(2 * p["v"].size),
... )
>>> x = jnp.array([1.0, 1.0])
>>> print(aw.nngp(net)(x, x), aw.ntk(net)(x, x))
0.5 1.0
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from anywidth import _compat, rules
from anywidth.accuracy import Accuracy, controlled
from anywidth.errors import InputError, NeedsUnroll, NoLimitError, UnsupportedError
from anywidth.expect.choose import SeveralError
from anywidth.expect.sampler import Sampler
from anywidth.inner import ZERO, Gram
from anywidth.interpret import Interpreter, located
from anywidth.kets import Const, Contract, Graph, Index, Leaf, Node, Product, Rows, Sum, View, ViewMap, is_zero
from anywidth.network import Network, Normal
from anywidth.trace import WIDTHS, Program, fit_dim, fit_number, is_wide, trace
from anywidth.values import Ax, Cat, Det, Ket, Mat, Value, Wide

assert rules is not None  # fills the table of rules


class Errors(NamedTuple):
    """Standard errors of the two kernels, of their shapes; exactly zero where everything was integrated."""

    nngp: PyTree[Array]
    ntk: PyTree[Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Kernels:
    """Both kernels of a pair of examples, from one pass, and their standard errors.

    It unpacks into the two kernels: `nngp, ntk = kernels(net)(x, y)`. `error` is exactly zero where every expectation
    had a closed form or was integrated by quadrature, and otherwise the standard error of the sampled estimate.
    """

    nngp: PyTree[Array]
    ntk: PyTree[Array]
    error: Errors

    def __iter__(self) -> Iterator[PyTree[Array]]:
        return iter((self.nngp, self.ntk))


def nngp(
    net: Network, *, tol: float = 1e-4, seed: int = 0, points: int = 2**14, budget: int = 2**22
) -> Callable[[Any, Any], PyTree[Array]]:
    """The NNGP kernel of the network in the infinite-width limit.

    Args:
        net: the network.
        tol: the standard error that is wanted, relative to the scale of the kernel, of expectations that have to be
            sampled because neither a closed form nor quadrature applies (gates, maxima: functions of several
            correlated Gaussians). It plays no part in any other kernel.
        seed: of the points of such samples. The same seed gives the same numbers.
        points: how many samples are taken inside a transformation (jit, vmap, grad, `gram`), where their number cannot
            adapt to the tolerance.
        budget: how many are taken at most. If that is not enough an `AccuracyWarning` says what was achieved.

    Returns:
        A pure function of one pair of examples: for an output of shape S the covariance E[f(x) f(y)] of the
        Gaussian process that the output becomes, of shape S + S'. A trailing axis of independent copies (the
        classes of a readout `(n, k)`) is left out. For a pytree of outputs, the kernel of each.

    Raises:
        NoLimitError: the network has no limit; says which line is at fault.
        UnsupportedError: the limit is not within reach of the rules there are.
        InputError: an input is not finite, or does not fit the network.

    Reference: Yang, Tensor Programs I (2019).
    """
    return _kernel(net, "nngp", Accuracy(tol, seed, points, budget))


def ntk(
    net: Network, *, tol: float = 1e-4, seed: int = 0, points: int = 2**14, budget: int = 2**22
) -> Callable[[Any, Any], PyTree[Array]]:
    """The neural tangent kernel of the network in the infinite-width limit.

    The limit of the sum over all trained parameters of <df(x)/dtheta, df(y)/dtheta>, in the parametrization that
    the code of the network is. Arguments, result and errors as of `nngp`.

    Reference: Yang, Tensor Programs II (2020).
    """
    return _kernel(net, "ntk", Accuracy(tol, seed, points, budget))


def kernels(
    net: Network, *, tol: float = 1e-4, seed: int = 0, points: int = 2**14, budget: int = 2**22
) -> Callable[[Any, Any], Kernels]:
    """Both kernels from one pass: a function of a pair of examples that returns `Kernels(nngp, ntk, error)`.

    Arguments and errors as of `nngp`.
    """
    return _kernel(net, "both", Accuracy(tol, seed, points, budget))


def _kernel(net: Network, which: str, accuracy: Accuracy) -> Callable[[Any, Any], Any]:
    if not isinstance(net, Network):
        raise TypeError(f"a Network(init, apply) is wanted, not a {type(net).__name__}")
    estimate = controlled(lambda x, y, sampler: pair(net, which, x, y, sampler), accuracy, lambda: _traced(net))

    def kernel(x: Any, y: Any) -> Any:
        value, error = estimate(_checked(x, "x"), _checked(y, "y"))
        return Kernels(*value, Errors(*error)) if which == "both" else value

    kernel.__name__ = which
    kernel.__doc__ = f"The {which} of a network on one pair of examples."
    return kernel


def _traced(net: Network) -> bool:
    """Whether a variance or a mean is a number that is being transformed."""
    drawn = jax.tree.leaves(net.init(WIDTHS[0]), is_leaf=lambda p: isinstance(p, Normal))
    return any(_compat.is_tracer(v) for p in drawn if isinstance(p, Normal) for v in (p.var, p.mean))


def _checked(x: Any, name: str) -> Any:
    """Inputs as arrays; NaN and infinity are refused before any work."""

    def leaf(path: Any, a: Any) -> Any:
        if not _compat.is_tracer(a):
            values = np.asarray(a)
            where = f"{name}{jax.tree_util.keystr(path)}"
            if values.dtype == object:
                raise InputError(f"the example {where} is not an array of numbers")
            if values.dtype.kind in "fc" and not np.isfinite(values).all():
                bad = "NaN" if np.isnan(values).any() else "infinite"
                raise InputError(f"the example {where} has {bad} entries; remove or impute them first")
        return jnp.asarray(a)

    return jax.tree_util.tree_map_with_path(leaf, x)


def pair(net: Network, which: str, x: Any, y: Any, sampler: Sampler | None = None) -> Any:
    """The kernels of one pair; loops stay loops where their recursion closes, and are unrolled otherwise.

    The NNGP kernel, or the NTK, or ("both") the two.
    """
    sampler = sampler or Sampler()
    try:
        return _pair(net, which, x, y, sampler, False)
    except NeedsUnroll:
        return _pair(net, which, x, y, sampler, True)


def _pair(net: Network, which: str, x: Any, y: Any, sampler: Sampler, unrolled: bool) -> Any:
    """The two interpretations, and the derivative in epsilon."""
    dtype = jnp.result_type(
        *(a.dtype for a in jax.tree.leaves((x, y)) if jnp.issubdtype(a.dtype, jnp.floating)), jnp.float32
    )
    if not any(jnp.issubdtype(a.dtype, jnp.floating) for a in jax.tree.leaves((x, y))):
        dtype = jnp.dtype(jnp.result_type(float))
    sampler.dtype, sampler.used = dtype, False
    graph = Graph(sampler=sampler)
    gram = Gram(graph)
    parameters = read_parameters(net, dtype)
    outputs, tree = [], None
    for copy, example in ((1, x), (2, y)):
        program, tree = read_program(net, parameters, example, dtype)
        outputs.append(run(Interpreter(graph, gram, copy, unrolled=unrolled), program, parameters, example))
    learn = which != "nngp"
    sides = [[check_output(v, program, learn) for v in vs] for vs in outputs]

    def at(epsilon: Any) -> list[Any]:
        # the memo of epsilon-free products is shared; what depends on epsilon is computed anew
        crossed = Gram(graph, epsilon, memo=dict(gram.memo), solved={k: dict(v) for k, v in gram.solved.items()})
        try:
            return [kernel_of(crossed, a, b, epsilon is not None, dtype) for a, b in zip(*sides, strict=True)]
        except SeveralError as e:
            raise located(graph, e, program.eqns[-1]) from None

    if which == "nngp":
        return jax.tree.unflatten(tree, at(None))
    zero = jnp.zeros((), dtype)
    value, slope = jax.jvp(at, (zero,), (jnp.ones((), dtype),))
    value, slope = jax.tree.unflatten(tree, value), jax.tree.unflatten(tree, slope)
    return slope if which == "ntk" else (value, slope)


# --- reading the network ---------------------------------------------------------------------------------


class Parameter(NamedTuple):
    leaf: Leaf
    wides: tuple[int, ...]  # its width axes
    mean: tuple[Any, Fraction] | None


class Parameters(NamedTuple):
    items: tuple[Parameter, ...]
    tree: Any
    shapes: tuple[Any, ...]  # at the three widths


def read_parameters(net: Network, dtype: Any) -> Parameters:
    drawn = [jax.tree_util.tree_flatten_with_path(net.init(n)) for n in WIDTHS]
    trees = [tree for _, tree in drawn]
    if trees[0] != trees[1] or trees[0] != trees[2]:
        raise NoLimitError("init(n) returns other parameters at other widths: there is no limit")
    items = []
    for group in zip(*(leaves for leaves, _ in drawn), strict=True):
        name = jax.tree_util.keystr(group[0][0]) or "parameter"
        normals = [leaf for _, leaf in group]
        for leaf in normals:
            if not isinstance(leaf, Normal):
                raise TypeError(
                    f"init(n){name} is a {type(leaf).__name__}; every leaf must be a Normal(shape, var, mean). A number "
                    "that is not random belongs in apply"
                )
        items.append(_parameter(name, normals, dtype))
    shapes = tuple(
        jax.tree.unflatten(trees[0], [jax.ShapeDtypeStruct(leaf.shape, dtype) for _, leaf in leaves])
        for leaves, _ in drawn
    )
    return Parameters(tuple(items), trees[0], shapes)


def _parameter(name: str, normals: Sequence[Normal], dtype: Any) -> Parameter:
    try:
        if len({len(p.shape) for p in normals}) > 1:
            raise ValueError("its rank depends on n")
        shape = tuple(fit_dim(sizes) for sizes in zip(*(p.shape for p in normals), strict=True))
        var, power = _scalar_of_width([p.var for p in normals])
        mean, mean_power = _scalar_of_width([p.mean for p in normals])
    except ValueError as e:
        raise NoLimitError(f"the parameter init(n){name}: {e}") from None
    wides = tuple(i for i, s in enumerate(shape) if is_wide(s))
    if len(wides) > 2:
        raise UnsupportedError(
            f"the parameter init(n){name} has {len(wides)} width axes; a product over two of them has no rule"
        )
    zero = not _compat.is_tracer(var) and float(var) == 0
    leaf = Leaf(name, shape, jnp.asarray(var, dtype), zero, Fraction(0) if zero else -power)
    no_mean = not _compat.is_tracer(mean) and float(mean) == 0
    return Parameter(
        leaf,
        wides,
        None
        if no_mean
        else (jnp.asarray(mean, dtype) if _compat.is_tracer(mean) else np.asarray(mean, dtype), mean_power),
    )


def _scalar_of_width(values: Sequence[Any]) -> tuple[Any, Fraction]:
    """c and p of a number c n^p, which may be traced."""
    if not any(_compat.is_tracer(v) for v in values):
        return fit_number(values)
    widths = iter(values)
    jaxpr_values = [next(widths) for _ in values]
    if jaxpr_values[0] is jaxpr_values[1] is jaxpr_values[2]:
        return jaxpr_values[0], Fraction(0)
    return None, Fraction(0)


def read_program(net: Network, parameters: Parameters, example: Any, dtype: Any) -> tuple[Program, Any]:
    shapes = dict(zip(WIDTHS, parameters.shapes, strict=True))
    spec = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), example)
    try:
        return trace(lambda n: lambda p, e: net.apply(p, e), lambda n: (shapes[n], spec))
    except (TypeError, ValueError) as e:
        if isinstance(e, NoLimitError):
            raise
        raise InputError(
            f"apply(params, x) fails on an example of shape {jax.tree.map(lambda a: tuple(a.shape), example)}: {e}"
        ) from e


def run(it: Interpreter, program: Program, parameters: Parameters, example: Any) -> list[Value]:
    inputs: list[Value] = [entering(it.graph, p, it.copy) for p in parameters.items]
    inputs += [Det(a, Fraction(0), tuple(a.shape)) for a in jax.tree.leaves(example)]
    return it.run(program, inputs)


def entering(g: Graph, p: Parameter, copy: int) -> Value:
    """A parameter as a value: a matrix, or kets where it has one width axis, or random numbers where it has none."""
    leaf = p.leaf
    power = -leaf.rate / 2
    finite = [i for i in range(len(leaf.shape)) if i not in p.wides]
    rank = len(finite)
    layout = tuple(
        (Wide(i if len(p.wides) == 2 else 0, s),) if i in p.wides else () if s == 1 else (Ax(finite.index(i), int(s)),)  # type: ignore[arg-type]
        for i, s in enumerate(leaf.shape)
    )
    indices = tuple(
        (("axis", i), np.arange(leaf.shape[i]).reshape([leaf.shape[i] if j == k else 1 for j in range(rank)]))
        for k, i in enumerate(finite)
    )
    if len(p.wides) == 2:
        rows = tuple(Rows(i, 0, leaf.shape[i]) for i in p.wides)
        return Mat(leaf, rows, indices, None, rank, layout, power, p.mean)
    row = Rows(p.wides[0], 0, leaf.shape[p.wides[0]]) if p.wides else None
    one = g.const(np.ones((1,) * rank))
    node = g.product(leaf, copy, one, 0, row, None, indices, f"init(n){leaf.name}")
    if p.mean is None:
        return Ket(node, layout, power)
    value, mean_power = p.mean
    constant = g.const(value.reshape((1,) * rank))
    if leaf.zero_var:
        return Ket(g.sum([(None, constant), (None, node)]), layout, mean_power)
    top = max(power, mean_power)
    terms = [(None, x) for x, q in ((constant, mean_power), (node, power)) if q == top]
    return Ket(g.sum(terms), layout, top)


# --- the output -------------------------------------------------------------------------------------------


def check_output(value: Value, program: Program, learn: bool) -> Value:
    line = program.eqns[-1].line if program.eqns else "the return value"
    if isinstance(value, Cat):
        for p in value.parts:
            check_output(p, program, learn)
        return value
    if isinstance(value, Mat):
        raise UnsupportedError("the network returns a parameter matrix")
    if isinstance(value, Det):
        reason = "is zero" if value.zero else "is not random"
        raise NoLimitError(
            f"the output {reason} in the limit (an average over the width is a fixed number): there is no kernel. End the "
            f"network in a readout, v @ h / sqrt(n) with v a parameter.\n  at {line}"
        )
    if value.wides():
        raise NoLimitError(
            f"the output has an axis of size {value.wides()[0].size} that grows with the width. Return a readout, "
            f"v @ h / sqrt(n) with v a parameter.\n  at {line}"
        )
    where = _line_of(value.node) or line
    if is_zero(value.node):
        raise NoLimitError(f"the output is zero in the limit.\n  at {where}")
    if value.power != 0:
        grows = value.power > 0
        raise NoLimitError(
            f"the output {'diverges' if grows else 'vanishes'} like n^{value.power} as the width grows. "
            f"{'Divide' if grows else 'Multiply'} it by n^{abs(value.power)}.\n  at {where}"
        )
    if learn:
        fast = sorted((p for p in value.node.leaves if p.rate > 0), key=lambda p: -p.rate)
        if fast:
            raise NoLimitError(
                f"the NTK diverges like n^{fast[0].rate}: the entries of '{fast[0].name}' have variance of order "
                f"n^-{fast[0].rate} and learn at rate one. Give it a variance of order one and write the scaling "
                f"n^(-{fast[0].rate}/2) in apply (NTK parametrization).\n  at {where}"
            )
        if not any(p.learns for p in value.node.leaves):
            slow = max(p.rate for p in value.node.leaves)
            raise NoLimitError(f"the NTK vanishes like n^{slow} as the width grows.\n  at {where}")
    return value


def _line_of(node: Node) -> str | None:
    while not isinstance(node, Product):
        if isinstance(node, Sum):
            node = node.terms[0][1]
        elif isinstance(node, Contract | View):
            node = node.operand
        else:
            return None
    return node.line


def kernel_of(gram: Gram, a: Value, b: Value, eps: bool, dtype: Any) -> Any:
    """The covariance of two outputs, of shape S + S'; an axis of independent copies is left out."""
    if isinstance(a, Cat) or isinstance(b, Cat):
        first = a if isinstance(a, Cat) else b
        assert isinstance(first, Cat)
        pa = a.parts if isinstance(a, Cat) else None
        if pa is not None:
            blocks = [kernel_of(gram, p, b, eps, dtype) for p in pa]
            return jnp.concatenate(blocks, a.axis)  # type: ignore[union-attr]
        assert isinstance(b, Cat)
        blocks = [kernel_of(gram, a, p, eps, dtype) for p in b.parts]
        return jnp.concatenate(blocks, len(a.shape) + b.axis)
    if not isinstance(a, Ket) or not isinstance(b, Ket):  # a constant part of a concatenation
        return jnp.zeros((*map(int, a.shape), *map(int, b.shape)), dtype)  # type: ignore[arg-type]
    g = gram.graph
    a, b = _one_class(g, a), _one_class(g, b)
    ra, rb = a.node.rank, b.node.rank
    x = g.view(a.node, ViewMap(ra + rb, tuple(range(ra))))
    y = g.view(b.node, ViewMap(ra + rb, tuple(range(ra, ra + rb))))
    value = gram(x, y, eps)
    atoms = [atom for axis in a.layout for atom in axis], [atom for axis in b.layout for atom in axis]
    order = [atom.axis for atom in atoms[0]] + [ra + atom.axis for atom in atoms[1]]
    sizes = [atom.size for atom in (*atoms[0], *atoms[1])]
    shape = [int(s) for s in (*a.shape, *b.shape)]
    if value is ZERO:
        return jnp.zeros(shape, dtype)
    value = jnp.asarray(value)
    rest = [i for i in range(ra + rb) if i not in order]
    value = jnp.transpose(value, order + rest).reshape([value.shape[i] for i in order])
    return jnp.broadcast_to(value, sizes).reshape(shape).astype(dtype)


def _one_class(g: Graph, x: Ket) -> Ket:
    """The first of the independent copies along the last axis, if it is an axis of such copies."""
    if not x.layout:
        return x
    atoms = x.layout[-1]
    if len(atoms) != 1 or not isinstance(atoms[0], Ax) or not _copies(x.node, atoms[0].axis):
        return x
    entries: list[Any] = [i if i < atoms[0].axis else i - 1 for i in range(x.node.rank)]
    entries[atoms[0].axis] = Index(np.zeros((1,) * (x.node.rank - 1), np.int64))
    node = g.view(x.node, ViewMap(x.node.rank - 1, tuple(entries)))
    layout = tuple(
        tuple(Ax(a.axis - (a.axis > atoms[0].axis), a.size) if isinstance(a, Ax) else a for a in axis)
        for axis in x.layout[:-1]
    )
    return Ket(node, layout, x.power)


def _copies(node: Node, axis: int) -> bool:
    """Whether the entries along the axis are independent and of one distribution."""
    if isinstance(node, Sum):
        return all(_copies(t, axis) and (c is None or np.ndim(c) == 0 or np.shape(c)[axis] == 1) for c, t in node.terms)
    if isinstance(node, View):
        entries = [i for i, e in enumerate(node.view.entries) if e == axis]
        arrays = [e for e in node.view.entries if isinstance(e, Index) and np.shape(e.array)[axis] > 1]
        return len(entries) == 1 and not arrays and _copies(node.operand, entries[0])
    if isinstance(node, Contract):
        return (node.coef is None or np.shape(node.coef)[axis] == 1) and _copies(node.operand, axis)
    if not isinstance(node, Product) or node.operand.shape[axis] != 1:
        return False
    moving = [a for _, a in node.indices if np.shape(a)[axis] > 1]
    return len(moving) == 1 and isinstance(moving[0], np.ndarray) and len(np.unique(moving[0])) == moving[0].shape[axis]


__all__ = ["Const", "Errors", "Kernels", "kernels", "nngp", "ntk"]
