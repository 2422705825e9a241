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
from anywidth.covariance import kernel_of
from anywidth.errors import InputError, NeedsUnroll, NoLimitError, Resized, UnsupportedError
from anywidth.expect.choose import SeveralError
from anywidth.expect.sampler import Sampler
from anywidth.inner import Gram
from anywidth.interpret import Interpreter, located
from anywidth.kets import Graph, Leaf, Node, Sum
from anywidth.network import Network, Normal
from anywidth.output import check_output
from anywidth.parameters import Parameters, read_parameters, read_program, run
from anywidth.rates import Rates
from anywidth.rules.elementwise import outermost
from anywidth.trace import HEADS, WIDTHS, readable
from anywidth.values import Ket, Value

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
        structures: list[Any] = [jax.tree.structure(x), jax.tree.structure(y)]
        if structures[0] != structures[1]:
            raise InputError(f"the two examples have different structures: {structures[0]} and {structures[1]}")
        try:
            value, error = estimate(x, y)
        except (NoLimitError, UnsupportedError) as e:
            if not net.second_width:
                raise
            kind = NoLimitError if isinstance(e, NoLimitError) else UnsupportedError
            raise kind(readable(str(e))) from None
        if which != "both":
            return value
        nngp, ntk = value
        return Kernels(nngp, ntk, Errors(*error))

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
    at = (WIDTHS[0], HEADS[0]) if net.second_width else (WIDTHS[0],)
    if any(_compat.is_tracer(v) for v in jax.tree.leaves(lr(*at) if callable(lr) else lr)):
        return True
    drawn = jax.tree.leaves(net.init(*at), is_leaf=lambda p: isinstance(p, Normal))
    return any(_compat.is_tracer(v) for p in drawn if isinstance(p, Normal) for v in (p.var, p.mean))


def _checked(x: Any, name: str) -> Any:
    """Inputs as arrays; NaN and infinity are refused before any work."""

    def leaf(path: Any, a: Any) -> Any:
        where = f"{name}{jax.tree_util.keystr(path)}"
        if _compat.is_key(a):
            raise InputError(f"the example {where} is a random key: a network at initialisation draws nothing in apply")
        if not _compat.is_tracer(a):
            values = np.asarray(a)
            if values.dtype.kind not in "biufcV":
                raise InputError(
                    f"the example {where} is not an array of numbers but {a!r:.60}: encode it as numbers, and leave "
                    "out of the example what apply does not need"
                )
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
    sampler.dtype, sampler.used, sampler.ordered = dtype, False, False
    sampler.found.clear()
    sampler.held = 0
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
