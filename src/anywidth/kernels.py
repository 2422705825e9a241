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
>>> print(aw.nngp(net)(x, x).round(4), aw.ntk(net)(x, x).round(4))
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
from anywidth.errors import InputError, NeedsUnroll, NoLimitError, Resized, UnsupportedError
from anywidth.expect.choose import SeveralError
from anywidth.expect.sampler import Sampler
from anywidth.inner import ZERO, Gram
from anywidth.interpret import Interpreter, located
from anywidth.kets import Const, Contract, Graph, Index, Leaf, Node, Product, Sum, View, ViewMap, is_zero
from anywidth.network import Network, Normal
from anywidth.parameters import Parameters, read_parameters, read_program, run
from anywidth.rates import Rates, suggestion
from anywidth.rules.elementwise import outermost
from anywidth.trace import WIDTHS, Program
from anywidth.values import Ax, Cat, Det, Ket, Mat, Value

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
    net: Network,
    *,
    lr: Rates = None,
    tol: float = 1e-4,
    seed: int = 0,
    points: int = 2**14,
    budget: int = 2**22,
) -> Callable[[Any, Any], PyTree[Array]]:
    """The neural tangent kernel of the network in the infinite-width limit.

    The limit of the sum over all parameters of lr <df(x)/dtheta, df(y)/dtheta>, in the parametrization that the code
    of the network is. Result and errors as of `nngp`; the NTK may have a limit where the NNGP kernel has none (in
    maximal-update parametrization the output vanishes at initialisation).

    Args:
        net: the network.
        tol, seed, points, budget: as for `nngp`.
        lr: learning-rate multipliers, nonnegative numbers: one for all parameters, or a pytree with the structure of
            `init(n)`, of which a number may stand for everything below it and a dictionary may leave parameters out,
            which then have rate one; or a function of n that returns them, for powers of n: in standard
            parametrization `lr=lambda n: {"W": 1 / n}`. Zero freezes. They may be traced.

    References: Yang, Tensor Programs II (2020); Yang and Hu, Tensor Programs IV (2021) for parametrizations.
    """
    return _kernel(net, "ntk", Accuracy(tol, seed, points, budget), lr)


def kernels(
    net: Network,
    *,
    lr: Rates = None,
    tol: float = 1e-4,
    seed: int = 0,
    points: int = 2**14,
    budget: int = 2**22,
) -> Callable[[Any, Any], Kernels]:
    """Both kernels from one pass: a function of a pair of examples that returns `Kernels(nngp, ntk, error)`.

    Arguments and errors as of `nngp` and `ntk`.
    """
    return _kernel(net, "both", Accuracy(tol, seed, points, budget), lr)


def _kernel(net: Network, which: str, accuracy: Accuracy, lr: Rates = None) -> Callable[[Any, Any], Any]:
    if not isinstance(net, Network):
        raise TypeError(f"a Network(init, apply) is wanted, not a {type(net).__name__}")
    estimate = controlled(lambda x, y, s: pair(net, which, x, y, s, lr), accuracy, lambda: _traced(net, lr))

    def kernel(x: Any, y: Any) -> Any:
        x, y = _checked(x, "x"), _checked(y, "y")
        if jax.tree.structure(x) != jax.tree.structure(y):
            raise InputError(
                f"the two examples have different structures: {jax.tree.structure(x)} and {jax.tree.structure(y)}"
            )
        value, error = estimate(x, y)
        return Kernels(*value, Errors(*error)) if which == "both" else value

    def values(x: Any, y: Any) -> Any:
        out = kernel(x, y)
        return Kernels(out.nngp, out.ntk, None) if which == "both" else out  # type: ignore[arg-type]

    values.__name__ = kernel.__name__ = "kernels" if which == "both" else which
    kernel.__doc__ = f"The {kernel.__name__} of a network on one pair of examples."
    # For `gram`: the network, the kernel without its errors, and whether they are zero for a pair of such shapes.
    kernel.network = values.network = net  # type: ignore[attr-defined]
    kernel.values = values  # type: ignore[attr-defined]
    kernel.exact = estimate.exact  # type: ignore[attr-defined]
    return kernel


def _traced(net: Network, lr: Rates) -> bool:
    """Whether a variance, a mean or a learning rate is a number that is being transformed."""
    if any(_compat.is_tracer(v) for v in jax.tree.leaves(lr(WIDTHS[0]) if callable(lr) else lr)):
        return True
    drawn = jax.tree.leaves(net.init(WIDTHS[0]), is_leaf=lambda p: isinstance(p, Normal))
    return any(_compat.is_tracer(v) for p in drawn if isinstance(p, Normal) for v in (p.var, p.mean))


def _checked(x: Any, name: str) -> Any:
    """Inputs as arrays; NaN and infinity are refused before any work."""

    def leaf(path: Any, a: Any) -> Any:
        where = f"{name}{jax.tree_util.keystr(path)}"
        if _compat.is_key(a):
            raise InputError(f"the example {where} is a random key: a network at initialisation draws nothing in apply")
        if not _compat.is_tracer(a):
            values = np.asarray(a)
            if values.dtype == object:
                raise InputError(f"the example {where} is not an array of numbers")
            if values.dtype.kind in "fc" and not np.isfinite(values).all():
                bad = "NaN" if np.isnan(values).any() else "infinite"
                raise InputError(f"the example {where} has {bad} entries; remove or impute them first")
        return jnp.asarray(a)

    return jax.tree_util.tree_map_with_path(leaf, x)


def pair(net: Network, which: str, x: Any, y: Any, sampler: Sampler | None = None, lr: Rates = None) -> Any:
    """The kernels of one pair; loops stay loops where their recursion closes, and are unrolled otherwise.

    The NNGP kernel, or the NTK, or ("both") the two.
    """
    sampler = sampler or Sampler()
    unrolled, sizes = False, dict[Any, Fraction | None]()
    while True:
        try:
            return _pair(net, which, x, y, sampler, lr, sizes, unrolled)
        except NeedsUnroll:
            if unrolled:
                raise
            unrolled = True
        except Resized as e:
            sizes[e.leaf.path] = e.size


def _pair(
    net: Network, which: str, x: Any, y: Any, sampler: Sampler, lr: Rates, sizes: dict[Any, Any], unrolled: bool
) -> Any:
    """The two interpretations, and the derivative in epsilon."""
    dtype = jnp.result_type(
        *(a.dtype for a in jax.tree.leaves((x, y)) if jnp.issubdtype(a.dtype, jnp.floating)), jnp.float32
    )
    if not any(jnp.issubdtype(a.dtype, jnp.floating) for a in jax.tree.leaves((x, y))):
        dtype = jnp.dtype(jnp.result_type(float))
    sampler.dtype, sampler.used = dtype, False
    graph = Graph(sampler=sampler)
    gram = Gram(graph)
    parameters = read_parameters(net, dtype, lr, sizes)
    outputs, tree = [], None
    for copy, example in ((1, x), (2, y)):
        program, tree = read_program(net, parameters, example, dtype)
        it = Interpreter(graph, gram, copy, unrolled=unrolled)
        values = run(it, program, parameters, example)
        _only_added(graph, values, parameters)
        try:
            outputs.append([check_output(v, program, it.dropped, which, parameters, lr) for v in values])
        except NoLimitError as e:
            raise NoLimitError(f"{e}{it.first_unscaled()}") from None

    def at(epsilon: Any) -> list[Any]:
        def crossed(speed: Fraction) -> Gram:
            # the memo of epsilon-free products is shared; what depends on epsilon is computed anew
            if speed not in grams:
                solved = {k: dict(v) for k, v in gram.solved.items()}
                grams[speed] = Gram(graph, epsilon, memo=dict(gram.memo), solved=solved, speed=speed)
            return grams[speed]

        grams: dict[Fraction, Gram] = {}
        try:
            return [kernel_of(crossed, a, b, epsilon is not None, dtype) for a, b in zip(*outputs, strict=True)]
        except SeveralError as e:
            raise located(graph, e, program.eqns[-1]) from None

    if which == "nngp":
        return jax.tree.unflatten(tree, at(None))
    zero = jnp.zeros((), dtype)
    value, slope = jax.jvp(at, (zero,), (jnp.ones((), dtype),))
    value, slope = jax.tree.unflatten(tree, value), jax.tree.unflatten(tree, slope)
    return slope if which == "ntk" else (value, slope)


def _only_added(graph: Graph, outputs: Sequence[Value], parameters: Parameters) -> None:
    """Takes back that a parameter is nothing, where it is not always added to what is greater."""
    lesser = {p.leaf for p in parameters.items if p.leaf.lesser}
    if not lesser:
        return

    def alone(x: Node) -> Leaf | None:
        leaf = outermost(x)
        return leaf if leaf in lesser and x.leaves == {leaf} else None

    for value in outputs:
        if isinstance(value, Ket) and alone(value.node):
            raise Resized(alone(value.node), None)
    for node in [x for x in graph.table.values() if isinstance(x, Node) and not alone(x)]:
        if isinstance(node, Sum) and any(outermost(t) not in lesser for _, t in node.terms):
            continue
        children = [
            getattr(node, "operand", None),
            *getattr(node, "args", ()),
            *(t for _, t in getattr(node, "terms", ())),
        ]
        for child in children:
            if child is not None and (leaf := alone(child)) is not None:
                raise Resized(leaf, None)


# --- the output -------------------------------------------------------------------------------------------


def check_output(
    value: Value, program: Program, dropped: Sequence[Any], which: str, parameters: Parameters, lr: Rates
) -> Value:
    """The value itself, if its kernels have a limit.

    Raises: NoLimitError, with the line at fault and the scaling or the learning rates that would mend it.
    """
    line = program.eqns[-1].line if program.eqns else "the return value"
    if isinstance(value, Cat):
        for p in value.parts:
            check_output(p, program, dropped, which, parameters, lr)
        return value
    if isinstance(value, Mat):
        raise UnsupportedError("the network returns a parameter matrix")
    if isinstance(value, Det):
        reason = "is zero" if value.zero else "is not random"
        raise NoLimitError(
            f"the output {reason} in the limit (an average over the width is a fixed number): there is no kernel. End "
            f"the network in a readout, v @ h / sqrt(n) with v a parameter.\n  at {line}"
        )
    if value.wides():
        raise NoLimitError(
            f"the output has an axis of size {value.wides()[0].size} that grows with the width. Return a readout, "
            f"v @ h / sqrt(n) with v a parameter.\n  at {line}"
        )
    where = _line_of(value.node) or line
    if is_zero(value.node):
        raise NoLimitError(f"the output is zero in the limit.\n  at {where}")
    learning = sorted((p for p in value.node.leaves if not p.frozen), key=lambda p: (-p.speed, p.name))
    share = learning[0].share(value.power) if learning else None
    if value.power != 0 and not (which == "ntk" and (share == 0 or lr is not None)):
        grows = value.power > 0
        raise NoLimitError(
            f"the output {'diverges' if grows else 'vanishes'} like n^{value.power} as the width grows. "
            f"{'Divide' if grows else 'Multiply'} it by n^{abs(value.power)}"
            + (" (its NTK has a limit: ask for ntk alone)" if share == 0 and which == "both" else "")
            + f".\n  at {where}"
        )
    if which == "nngp":
        return value
    if share is None:
        raise NoLimitError(f"the NTK is zero: lr freezes every parameter that the output depends on.\n  at {where}")
    if share != 0:
        raise NoLimitError(_wrong_rates(learning, value.power, share, parameters, lr) + f"\n  at {where}")
    for leaf, behind, eqn in dropped:
        if not leaf.frozen and leaf.share(value.power + behind) >= 0:
            raise UnsupportedError(
                f"the parameter '{leaf.name}' adds nothing to the output in the limit but its learning adds to the "
                f"NTK: such parametrizations are not supported.\n  at {eqn.line}"
            )
    return value


def _wrong_rates(learning: Sequence[Leaf], output: Fraction, share: Fraction, parameters: Parameters, lr: Rates) -> str:
    """What is wrong with the learning rates, and which would do."""
    wrong = [p for p in learning if p.share(output) > 0] if share > 0 else list(learning)
    powers = {p.leaf.path: Fraction(0) for p in parameters.items} | {p.path: -p.share(output) for p in wrong}
    names = ", ".join(f"'{p.name}'" for p in wrong)
    does = f"{'diverges' if share > 0 else 'vanishes'} like n^{share}"
    one = len(wrong) == 1
    advice = (
        f"Multiply the learning {'rate' if one else 'rates'} of {names} by a power of n: {suggestion(powers)}"
        if lr is None
        else f"Multiply the learning rates that you gave by those of {suggestion(powers)}"
    )
    sizes = sorted({p.size for p in wrong})
    scale = f"entries of order n^{sizes[0]} and " if share > 0 and len(sizes) == 1 and sizes[0] != 0 else ""
    return (
        f"the NTK {does} as the width grows: {names} {'has' if one else 'have'} {scale}"
        f"a learning rate that is too {'high' if share > 0 else 'low'}. {advice}"
        + (", or write the scaling of the entries in apply (NTK parametrization)." if scale else ".")
    )


def _line_of(node: Node) -> str | None:
    while not isinstance(node, Product):
        if isinstance(node, Sum):
            node = node.terms[0][1]
        elif isinstance(node, Contract | View):
            node = node.operand
        else:
            return None
    return node.line


def kernel_of(grams: Callable[[Fraction], Gram], a: Value, b: Value, eps: bool, dtype: Any) -> Any:
    """The covariance of two outputs, of shape S + S'; an axis of independent copies is left out."""
    if isinstance(a, Cat) or isinstance(b, Cat):
        first = a if isinstance(a, Cat) else b
        assert isinstance(first, Cat)
        pa = a.parts if isinstance(a, Cat) else None
        if pa is not None:
            blocks = [kernel_of(grams, p, b, eps, dtype) for p in pa]
            return jnp.concatenate(blocks, a.axis)  # type: ignore[union-attr]
        assert isinstance(b, Cat)
        blocks = [kernel_of(grams, a, p, eps, dtype) for p in b.parts]
        return jnp.concatenate(blocks, len(a.shape) + b.axis)
    if not isinstance(a, Ket) or not isinstance(b, Ket):  # a constant part of a concatenation
        return jnp.zeros((*map(int, a.shape), *map(int, b.shape)), dtype)  # type: ignore[arg-type]
    gram = grams(-a.power - b.power)
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
