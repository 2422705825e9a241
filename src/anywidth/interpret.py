"""The walk over a program: reads each equation, applies the rule of its primitive, writes the result.

>>> @register("double")                                                      # doctest: +SKIP
... def double(it, x): return it.scale(2.0, x)

A rule gets the interpreter, the operands as values (`values.py`) and the parameters as keywords. A primitive
without a rule is evaluated as it is where all its operands are deterministic, and refused otherwise, with the
user's line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from anywidth import _compat, expr
from anywidth.errors import AnywidthError, NeedsUnroll, NoLimitError, UnsupportedError
from anywidth.expect.choose import SeveralError
from anywidth.inner import ZERO, Gram
from anywidth.kets import Const as ConstNode
from anywidth.kets import Contract, Graph, Node, Pointwise, Product, Sum, View, is_zero
from anywidth.trace import Const, Eqn, Program, Size, Var, is_wide, kind_of
from anywidth.values import ZERO_POWER, Cat, Det, Ket, Mat, Value, as_coef, common_sizes, det_array, standard, to_ket

RULES: dict[str, Callable[..., Any]] = {}
NO_DRAWS = (
    "apply draws random numbers along the width (dropout, noise), which have no rule. What is drawn once belongs in "
    "init, as a Normal; dropout is left out of a network at initialisation"
)


def register(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a function the rule of the primitives of these names."""

    def add(rule: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            RULES[name] = rule
        return rule

    return add


@dataclass(eq=False)
class Interpreter:
    """One copy of the network: its graph is shared with the other copy, its parameters are its own."""

    graph: Graph
    gram: Gram
    copy: int
    running: Eqn | None = None
    used: dict[Any, Any] = field(default_factory=dict)  # leaf -> (contracted width axis, line)
    unrolled: bool = False
    dropped: list[Any] = field(default_factory=list)  # (leaf, power of n relative to what was kept, equation)
    unscaled: tuple[Fraction, str] | None = None  # the first nonlinear function of a power of n, and its line

    @property
    def eqn(self) -> Eqn:
        """The equation that is being interpreted."""
        assert self.running is not None
        return self.running

    @eqn.setter
    def eqn(self, eqn: Eqn) -> None:
        self.running = eqn

    # --- the loop ---

    def run(self, program: Program, inputs: Sequence[Value]) -> list[Value]:
        """The outputs of a program at these inputs."""
        env: dict[Any, Value] = dict(zip(program.inputs, inputs, strict=True))

        def read(v: Var | Const) -> Value:
            if isinstance(v, Var):
                return env[v]
            zero = isinstance(v.value, np.ndarray) and not v.value.any() and v.value.dtype.kind in "fiu"
            return Det(v.value, v.power, v.shape, zero=zero)

        for eqn in program.eqns:
            self.eqn, self.graph.current = eqn, eqn
            expr.PRIMITIVES.setdefault(eqn.name, eqn.primitive)
            outputs = self.step(eqn, [read(v) for v in eqn.inputs])
            env.update(zip(eqn.outputs, outputs, strict=True))
        return [read(v) for v in program.outputs]

    def step(self, eqn: Eqn, inputs: list[Value]) -> list[Value]:
        """The outputs of one equation; an error that knows no line gets the equation's."""
        try:
            out = self.apply(eqn, inputs)
        except SeveralError as e:
            raise located(self.graph, e, eqn) from None
        except (AnywidthError, NeedsUnroll) as e:
            if isinstance(e, NeedsUnroll) or "\n  " in str(e):
                raise
            raise type(e)(f"{e} (primitive '{eqn.name}').\n  at {eqn.line}") from None
        return list(out) if isinstance(out, tuple | list) else [out]

    def apply(self, eqn: Eqn, inputs: list[Value]) -> Any:
        """The outputs of one equation, by whichever of the ways there are."""
        self.eqn = eqn
        call = _compat.CALLS.get(eqn.name)
        if call is not None:
            return self.run(eqn.params[call], inputs)
        if eqn.outputs and all(v is not None and 0 in v.shape for v in eqn.outputs):
            return [nothing(v) for v in eqn.outputs]
        if any(isinstance(x, Cat) for x in inputs):
            from anywidth.rules import pieces

            return pieces.distribute(self, eqn, inputs)
        from anywidth.rules import operators

        if operators.handles(eqn, inputs):
            return operators.apply(self, eqn, inputs)
        if eqn.name in RULES:
            return RULES[eqn.name](self, *inputs, **eqn.params)
        if all(isinstance(x, Det) for x in inputs):
            return self.evaluate(eqn, inputs)
        if eqn.name.startswith("random_"):
            raise UnsupportedError(NO_DRAWS)
        raise UnsupportedError(
            f"anywidth has no rule for the primitive '{eqn.name}' on random vectors of width n. Write this step with "
            "other operations, or open an issue with this network"
        )

    def evaluate(self, eqn: Eqn, inputs: Sequence[Value]) -> list[Det]:
        """Deterministic arrays without width axes: the primitive itself."""
        for x in inputs:
            assert isinstance(x, Det)
            if any(is_wide(s) for s in x.shape) or any(any(map(is_wide, v.shape)) for v in eqn.outputs):
                if eqn.name.startswith("random_"):
                    raise UnsupportedError(NO_DRAWS)
                raise UnsupportedError(f"anywidth has no rule for '{eqn.name}' along a width axis")
            self.settled(x)
            if x.power != 0 and not x.zero:
                raise NoLimitError(f"'{eqn.name}' is applied to an array that grows like n^{x.power}")
        vals = [x.val for x in inputs]  # type: ignore[union-attr]
        out = evaluated(lambda *v: eqn.primitive.bind(*v, **eqn.raw), *vals)
        outs = out if isinstance(out, tuple | list) else [out]
        return [Det(v, ZERO_POWER, np.shape(v)) for v in outs]

    # --- what rules use ---

    def settled(self, x: Det) -> Det:
        """Refuses an array that stays random as n grows."""
        if x.noise is not None and x.noise >= 0:
            where = f"\n  at {x.line.line}" if x.line is not None else ""
            user, line = (self.running.name, self.running.line) if self.running else ("", "")
            raise NoLimitError(
                "an inner product of independent vectors over the width is divided by less than its width (attention "
                f"scores q.k/sqrt(n), say): it stays random, of order n^{x.noise}, and has no deterministic limit. "
                f"Divide by n, or use the same weights for both sides (primitive '{user}' "
                f"uses it at {line}).{where}"
            )
        return x

    def ket(self, x: Value) -> Ket:
        """The value as a ket; a parameter matrix is none."""
        if isinstance(x, Ket):
            return x
        if isinstance(x, Det):
            return to_ket(self.graph, x)
        raise UnsupportedError("a parameter matrix is used other than in a product with a vector")

    def aligned(self, values: Sequence[Value]) -> tuple[list[Any], list[list[Size]]]:
        """Operands of one shape over common finite axes: nodes for kets, arrays for deterministic ones."""
        # a scalar goes with any shape: to JAX's elementwise primitives too
        rank = max((len(x.layout) for x in values if isinstance(x, Ket | Mat)), default=0)
        values = [replace(x, layout=((),) * rank) if isinstance(x, Ket) and not x.layout else x for x in values]
        laid = [x.layout for x in values if isinstance(x, Ket | Mat)]
        dets = [x for x in values if isinstance(x, Det) and x.shape]
        rank = rank if laid else len(dets[0].shape)
        shapes = [tuple((_Size(s),) if s != 1 else () for s in x.shape) for x in dets]
        sizes = common_sizes([*laid, *shapes], rank)
        kinds = [name for axis in sizes for s in axis for name in kind_of(s)]
        if len(set(kinds)) < len(kinds) and not any(isinstance(x, Mat) for x in values):
            raise UnsupportedError("an outer product of two random vectors (n x n) is formed")
        out: list[Any] = []
        wide = any(is_wide(s) for axis in sizes for s in axis)
        for x in values:
            if wide and isinstance(x, Ket) and not x.wides():
                raise NoLimitError(
                    "a random scalar shared by all channels meets a hidden layer: the limit stays random"
                )
            out.append(det_array(x, sizes) if isinstance(x, Det) else standard(self.graph, x, sizes))
        return out, sizes

    def first_unscaled(self) -> str:
        """Where a hidden layer already diverges or vanishes, if one does."""
        if self.unscaled is None:
            return ""
        power, line = self.unscaled
        return f"\n  a hidden layer already {'diverges' if power > 0 else 'vanishes'}, like n^{power}, at {line}"

    def mean(self, node: Node) -> Any:
        """E[Z] of each ket of the node, or `ZERO`."""
        return self.gram.mean(node)

    def expression(self, nodes: Sequence[Any]) -> tuple[list[Any], list[Node], list[Any]]:
        """Each operand (a node, or an array or number) as an expression of common Gaussian arguments."""
        args: list[Node] = []
        coefs: list[Any] = []

        def coefficient(a: Any) -> Any:
            a = as_coef(a)
            if isinstance(a, float | int):
                return ("n", float(a))
            for j, other in enumerate(coefs):
                if other is a:
                    return ("c", j)
            coefs.append(a)
            return ("c", len(coefs) - 1)

        def variable(x: Node) -> Any:
            if x not in args:
                args.append(x)
            return ("v", args.index(x))

        def of(x: Any) -> Any:
            if not isinstance(x, Node):
                return coefficient(x)
            if isinstance(x, ConstNode):
                return coefficient(x.array)
            if isinstance(x, Sum) and len(x.terms) == 1:
                coef, inner = x.terms[0]
                return of(inner) if coef is None else ("mul", (), coefficient(coef), of(inner))
            if x.gaussian:
                return variable(x)
            if isinstance(x, View):
                pushed = self.graph.push(x)
                return variable(x) if pushed is x else of(pushed)
            if isinstance(x, Sum):
                # everything Gaussian in it is one Gaussian
                terms = flat_terms(self.graph, x)
                gaussian = [(c, t) for c, t in terms if t.gaussian]
                rest = [(c, t) for c, t in terms if not t.gaussian]
                pieces = [of(self.graph.sum(gaussian))] if gaussian else []
                pieces += [of(t) if c is None else ("mul", (), coefficient(c), of(t)) for c, t in rest]
                total = pieces[0]
                for p in pieces[1:]:
                    total = ("add", (), total, p)
                return total
            if isinstance(x, Pointwise):
                vs = [variable(a) for a in x.args]
                cs = [coefficient(c) for c in x.coefs]
                return expr.substituted(x.expr, vs, cs)
            if isinstance(x, Contract):
                return variable(x)
            if isinstance(x, Product):
                raise UnsupportedError(
                    "a parameter of every head multiplies what its head attends to, and the product enters a nonlinear "
                    "function: given the head's attention it is Gaussian, and over the heads a mixture of Gaussians, "
                    "which anywidth does not integrate. Sum over the heads first"
                )
            raise NeedsUnroll("a loop's carry that is not Gaussian goes into a nonlinear function")

        return [of(x) for x in nodes], args, coefs

    def pointwise(
        self, name: str, params: dict[str, Any], values: Sequence[Value], power: Fraction = ZERO_POWER
    ) -> Ket:
        """A primitive applied coordinate by coordinate."""
        kets = [x for x in values if isinstance(x, Ket)]
        for x in values:
            if isinstance(x, Mat):
                raise UnsupportedError(
                    "a parameter matrix goes through a nonlinear function; it has to be multiplied by a vector first"
                )
        if any(not k.wides() for k in kets):
            if any(k.wides() for k in kets):
                raise NoLimitError(
                    "a random scalar shared by all channels (a readout, or a trained number) enters a function of a "
                    "hidden layer: the limit stays random. Give each channel a number of its own, of shape (n,)"
                )
            if name in ("mul", "div"):
                raise NoLimitError(
                    "a readout (a sum over the width) or a parameter with no axis of size n is multiplied by another "
                    "random number: the output is then no Gaussian process. A gain that is not random belongs in "
                    "apply as an ordinary number; products of channels come before the readout"
                )
            raise NoLimitError(
                "a nonlinear function is applied to a readout (a sum over the width): the output is then no Gaussian "
                "process. Return the readout itself"
            )
        if power != 0 and self.unscaled is None:
            self.unscaled = power, self.eqn.line
        operands, _ = self.aligned(values)
        nodes = [x.node if isinstance(x, Ket) else x for x in operands]
        expressions, args, coefs = self.expression(nodes)
        key = tuple(sorted(((k, v) for k, v in params.items() if _hashable(v)), key=lambda kv: kv[0]))
        ket = next(x for x in operands if isinstance(x, Ket))
        rank = ket.node.rank
        coefs = [c if np.ndim(c) == rank else jnp.reshape(c, (1,) * rank) for c in coefs]
        node = (
            self.graph.pointwise((name, key, *expressions), args, coefs)
            if args
            else self.graph.const(self._folded((name, key, *expressions), coefs, rank))
        )
        return Ket(node, ket.layout, power)

    def _folded(self, e: Any, coefs: Sequence[Any], rank: int) -> Any:
        value = evaluated(lambda: expr_value(e, coefs))
        return value if np.ndim(value) == rank else value.reshape((1,) * rank)

    def scale(self, coef: Det, x: Any) -> Any:
        """A ket or a parameter times a deterministic array of its shape, or a scalar."""
        self.settled(coef)
        power = x.power + coef.power
        if coef.zero:
            if isinstance(x, Mat):
                raise UnsupportedError("a parameter is multiplied by zero")
            return Ket(self.graph.const(np.zeros((1,) * x.node.rank)), x.layout, x.power)
        if all(s == 1 for s in coef.shape):
            c = as_coef(coef.val.reshape(()))
            if not isinstance(c, float):
                c = jnp.reshape(c, (1,) * x.rank)
            y = x
        else:
            (y, c), _ = self.aligned([x, coef])
        if isinstance(y, Mat):
            old = y.coef
            new = c if old is None else old * c
            mean = y.mean if y.mean is None else (y.mean[0] * c, y.mean[1] + coef.power)
            return Mat(y.leaf, y.rows, y.indices, _ranked(new, y.axes), y.axes, y.layout, power, mean)
        if isinstance(c, float) and c == 1.0:
            return Ket(y.node, y.layout, power)
        return Ket(self.graph.scale(c, y.node), y.layout, power)


def flat_terms(graph: Graph, x: Node) -> list[tuple[Any, Node]]:
    """The terms of a sum, with the terms of those that are sums themselves; what is Gaussian is left whole."""
    if x.gaussian:
        return [(None, x)]
    if isinstance(x, View) and isinstance(x.operand, Sum | View):
        pushed = graph.push(x)
        return [(None, x)] if pushed is x else flat_terms(graph, pushed)
    if not isinstance(x, Sum):
        return [(None, x)]
    out = []
    for c, t in x.terms:
        out += [
            (d if c is None else c if d is None else evaluated(lambda a, b: a * b, c, d), u)
            for d, u in flat_terms(graph, t)
        ]
    return out


def located(graph: Graph, e: SeveralError, eqn: Eqn) -> UnsupportedError:
    """The error with the user's line that made the function of several Gaussians."""
    origin = graph.origin.get(e.node) or eqn
    return UnsupportedError(f"{e} (primitive '{origin.name}').\n  at {origin.line}")


def _ranked(c: Any, rank: int) -> Any:
    return c if np.ndim(c) == rank else jnp.reshape(jnp.asarray(c), (1,) * rank)


@dataclass(frozen=True)
class _Size:
    size: Size


def _hashable(v: Any) -> bool:
    try:
        hash(v)
    except TypeError:
        return False
    return True


def expr_value(e: Any, coefs: Sequence[Any]) -> Any:
    if e[0] == "c":
        return coefs[e[1]]
    if e[0] == "n":
        return e[1]
    return expr.bind(e[0], e[1], [expr_value(a, coefs) for a in e[2:]])


def nothing(v: Var) -> Det:
    """An array without entries: of random vectors or not, it is the same."""
    return Det(np.zeros([1 if is_wide(s) else int(s) for s in v.shape], v.dtype), ZERO_POWER, v.shape, zero=True)


def evaluated(function: Callable[..., Any], *vals: Any) -> Any:
    """The result as NumPy arrays where the operands are known, so that structure stays known."""
    if any(_compat.is_tracer(v) for v in vals):
        return function(*vals)
    with jax.ensure_compile_time_eval():
        out = function(*vals)
    if _compat.is_tracer(out) or isinstance(out, tuple | list) or _compat.is_key(out):
        return out
    return np.asarray(out) if all(isinstance(v, np.ndarray | np.generic) for v in vals) else out


__all__ = ["RULES", "ZERO", "Interpreter", "evaluated", "is_zero", "register"]
