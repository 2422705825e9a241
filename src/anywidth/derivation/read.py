"""A program as definitions: the walk of the engine with mathematics in place of numbers.

The traced program of a network is interpreted once more, on values that know how to write their own entry at given
indices. What deserves a name gets one: the argument of a nonlinearity (a Gaussian h), what a parameter is
multiplied by (an activation s), what a loop carries, a number that was an average over the width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from anywidth import _compat
from anywidth.derivation import terms as tm
from anywidth.derivation.printing import text
from anywidth.derivation.terms import Index, Num, Op, Sym, Term
from anywidth.expect.methods import Ways
from anywidth.trace import Const, Eqn, Program, Size, Var, affine, is_wide, order

Indices = tuple[Term | None, ...]

ACTIVATIONS = {
    "relu", "relu6", "gelu", "silu", "sigmoid", "softplus", "elu", "celu", "selu", "leaky_relu", "hard_tanh", "mish",
    "soft_sign", "log_sigmoid", "hard_sigmoid", "hard_silu", "squareplus",
}  # fmt: skip
SAME = {
    "copy",
    "convert_element_type",
    "reduce_precision",
    "stop_gradient",
    "optimization_barrier",
    "name",
    "real",
    "device_put",
}
FREE, BOUND = "ijpqrcd", "klmuvab"  # letters of what is defined, and of sums


@dataclass(frozen=True, eq=False)
class Val:
    """An array: `at` writes one entry; the indices of width axes and of axes of size one are None."""

    shape: tuple[Size, ...]
    at: Callable[[Indices], Term]
    ket: bool = False
    gaussian: bool = False
    leaves: frozenset[str] = frozenset()
    raw: str | None = None  # the parameter it is, if it is one
    base: Sym | None = None  # the symbol it is, if it is one
    places: frozenset[int] = frozenset()  # of the equations that made it

    @property
    def wides(self) -> int:
        return sum(is_wide(s) for s in self.shape)


@dataclass(frozen=True, eq=False)
class Definition:
    """`symbol_indices = body`. `kind`: gaussian, activation, carry, start, number, output."""

    symbol: Sym
    indices: tuple[Index, ...]
    body: Term
    kind: str
    leaves: frozenset[str]
    gaussian: bool
    over: str = ""  # the loop it belongs to
    places: frozenset[int] = frozenset()  # of the equations it stands for, those of other definitions in it included


@dataclass(eq=False)
class Reader:
    """Interprets a program; `definitions` is what it has written down."""

    sizes: dict[str, int] = field(default_factory=dict)  # of index letters of loops
    definitions: list[Definition] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    loops: list[Index] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    padded: bool = False  # whether windows reach over an edge
    shifted: frozenset[str] = frozenset()  # parameters whose mean is not zero
    ways: Ways = field(default_factory=Ways)

    # --- names ---

    def fresh(self, avoid: Sequence[Term | None], letters: str = BOUND) -> Index:
        used = {i.letter for a in avoid if a is not None for i in tm.indices_of(a)} | {i.letter for i in self.loops}
        return Index(next(c for c in letters if c not in used))

    def letters(self, shape: Sequence[Size], avoid: Sequence[Term] = ()) -> Indices:
        out: list[Term | None] = []
        for s in shape:
            out.append(None if is_wide(s) or s == 1 else self.fresh([*avoid, *out], FREE))
        return tuple(out)

    def named(self, x: Val, letter: str, kind: str) -> Val:
        """The value under a name of its own, unless it has one already."""
        at = self.letters(x.shape)
        body = x.at(at)
        if isinstance(body, Sym | Num) or x.raw is not None:
            return x
        loops = [i for i in self.loops if i in tm.indices_of(body)]
        own = tuple(i for i in at if i is not None)
        if x.ket:
            body = self.summand_named(body, x)
        self.counts[letter] += 1
        base = Sym(letter, (self.counts[letter],))
        free = (*loops, *(i for i in own if isinstance(i, Index)))
        self.definitions.append(
            Definition(base, free, body, kind, x.leaves, x.gaussian, loops[-1].letter if loops else "", x.places)
        )

        def entry(idx: Indices) -> Term:
            return replace(base, sub=(*loops, *(i for i in idx if i is not None)))

        return replace(x, at=entry, base=base)

    def summand_named(self, t: Term, x: Val, under: bool = False) -> Term:
        """In a sum of a nonlinear function, the function under a name of its own."""
        if isinstance(t, Op) and t.head == "sum":
            return Op("sum", (t.args[0], self.summand_named(t.args[1], x, True)))
        if isinstance(t, Op) and t.head == "mul":
            others = [a for a in t.args if not isinstance(a, Num)]
            if len(others) == 1:
                numbers = [a for a in t.args if isinstance(a, Num)]
                return tm.mul(*numbers, self.summand_named(others[0], x, under))
        if not (under and isinstance(t, Op) and t.head.startswith("fn:")):
            return t
        self.counts["s"] += 1
        free = tm.indices_of(t)
        base = Sym("s", (self.counts["s"],))
        self.definitions.append(Definition(base, free, t, "activation", x.leaves, False, "", x.places))
        return replace(base, sub=free)

    def argument(self, x: Val) -> Val:
        """What a nonlinear function is applied to."""
        if x.ket and x.gaussian:
            return self.named(x, "h", "gaussian")
        return x

    def operand(self, x: Val) -> Val:
        """What a parameter is multiplied by, or averaged."""
        return self.named(x, "h" if x.gaussian else "s", "gaussian" if x.gaussian else "activation") if x.ket else x

    def written(self, t: Term) -> Term:
        """An exponential that has a name, or a sum of such, written out."""
        if isinstance(t, Op) and t.head == "sum":
            return Op("sum", (t.args[0], self.written(t.args[1])))
        found = next((d for d in self.definitions if isinstance(t, Sym) and replace(t, sub=()) == d.symbol), None)
        if found is None or not isinstance(found.body, Op) or found.body.head != "fn:exp":
            return t
        assert isinstance(t, Sym)
        return tm.substituted(found.body, dict(zip(found.indices, t.sub, strict=True)))

    def coefficient(self, x: Val) -> Val:
        """A deterministic array that multiplies a ket."""
        if x.ket or x.shape == ():
            return x
        body = x.at(self.letters(x.shape))
        long = sum(1 for _ in tm.walk(body)) > 14 or any(
            isinstance(t, Op) and t.head == "fn:softmax" for t in tm.walk(body)
        )
        return self.named(x, "a", "number") if long else x

    # --- the walk ---

    def run(self, program: Program, inputs: Sequence[Val]) -> list[Val]:
        env: dict[Any, Val] = dict(zip(program.inputs, inputs, strict=True))
        uses = Counter(id(v) for e in program.eqns for v in e.inputs) + Counter(id(v) for v in program.outputs)

        def read(v: Var | Const) -> Val:
            return env[v] if isinstance(v, Var) else self.constant(v)

        for eqn in program.eqns:
            operands = [read(v) for v in eqn.inputs]
            outputs = self.step(eqn, operands)
            places = frozenset({eqn.place}).union(*(x.places for x in operands))
            for v, x in zip(eqn.outputs, outputs, strict=True):
                if v is None:
                    continue
                x = replace(x, places=x.places | places)
                if uses[id(v)] > 1 and x.ket and x.raw is None and x.wides and eqn.name not in _MOVES:
                    x = self.named(x, "h" if x.gaussian else "s", "gaussian" if x.gaussian else "activation")
                env[v] = x
        return [read(v) for v in program.outputs]

    def constant(self, c: Const) -> Val:
        value = None if _compat.is_tracer(c.value) else np.asarray(c.value)
        if value is not None and value.size and value.dtype.kind in "biuf" and (value == value.flat[0]).all():
            number = Num(float(value.flat[0]), c.power)
            return Val(c.shape, lambda idx: number)
        base = Sym("A", (len(self.notes) + 1,)) if np.ndim(c.value) else Sym("c")
        self.notes.append(text(base))
        return Val(c.shape, lambda idx: replace(base, sub=tuple(i for i in idx if i is not None)))

    def step(self, eqn: Eqn, inputs: list[Val]) -> list[Val]:
        call = _compat.CALLS.get(eqn.name)
        if call is not None:
            label = eqn.params.get("name")
            if label in ACTIVATIONS and len(eqn.outputs) == 1 and inputs and inputs[0].shape == eqn.outputs[0].shape:
                named = self.pointwise(lambda a, *_: tm.fn(label, a), inputs[:1], inputs[0].shape)
                return [replace(named, places=_places(eqn.params[call]))]
            return self.run(eqn.params[call], inputs)
        from anywidth.derivation import loops, windows  # noqa: F401
        from anywidth.derivation.rules import RULES

        rule = RULES.get(eqn.name)
        if rule is not None:
            out = rule(self, eqn, inputs)
            return out if isinstance(out, list) else [out]
        return self.unknown(eqn, inputs)

    def unknown(self, eqn: Eqn, inputs: list[Val]) -> list[Val]:
        """A function of its own name; entrywise if the shapes say so."""
        out = []
        for k, v in enumerate(eqn.outputs):
            if v is None:
                out.append(Val((), lambda idx: Num(0.0)))
                continue
            label = _LABELS.get(eqn.name, eqn.name) if len(eqn.outputs) == 1 else f"{eqn.name}_{k + 1}"
            if all(x.shape in ((), v.shape) for x in inputs):
                out.append(self.pointwise(lambda *a, label=label: tm.fn(label, *a), inputs, v.shape))
                continue
            named = [self.operand(x) for x in inputs]

            def entry(idx: Indices, label: str = label, named: list[Val] = named) -> Term:
                args = [x.at(tuple(None for _ in x.shape)) for x in named]
                return Op(f"fn:{label}", (*args, *(i for i in idx if i is not None)))

            leaves = frozenset().union(*(x.leaves for x in inputs)) if inputs else frozenset()
            out.append(Val(v.shape, entry, any(x.ket for x in inputs), False, leaves))
        return out

    # --- what rules use ---

    def mean(self, x: Val, entry: Term) -> Term:
        """E of an entry; a centred Gaussian has none."""
        return Num(0.0) if x.gaussian and not self.shifted & x.leaves else tm.expectation(entry)

    def pointwise(
        self, f: Callable[..., Term], values: Sequence[Val], shape: tuple[Size, ...], linear: bool = False
    ) -> Val:
        """F entry by entry; `linear` keeps Gaussians Gaussian."""
        kets = [x for x in values if x.ket]
        values = [x if linear else self.argument(x) for x in values]

        def entry(idx: Indices) -> Term:
            return f(*(x.at(idx if x.shape else ()) for x in values))

        leaves = frozenset().union(*(x.leaves for x in values)) if values else frozenset()
        return Val(shape, entry, bool(kets), bool(kets) and linear and all(x.gaussian for x in kets), leaves)

    def moved(self, x: Val, shape: tuple[Size, ...], where: Callable[[Indices], Indices]) -> Val:
        """The entries of x read elsewhere."""
        return replace(x, shape=shape, at=lambda idx: x.at(where(idx)), base=None)


_LABELS = {"logistic": "sigmoid"}
_MOVES = {"transpose", "broadcast_in_dim", "reshape", "squeeze", "slice", "rev", "expand_dims", *SAME}


def width(size: Size) -> Num:
    """A width as a number: its leading power of n."""
    a, b = affine(size)
    return Num(float(a), order(size)) if a else Num(float(b))


def widths(sizes: Sequence[Size]) -> Num | None:
    """The product of those that are widths, if there are any."""
    found = [width(s) for s in sizes if is_wide(s)]
    out = tm.mul(*found)
    assert isinstance(out, Num)
    return out if found else None


def _places(program: Program) -> frozenset[int]:
    """Of all equations of a program, those of the functions that it calls included."""
    inner = (_places(eqn.params[_compat.CALLS[eqn.name]]) for eqn in program.eqns if eqn.name in _compat.CALLS)
    return frozenset(eqn.place for eqn in program.eqns).union(*inner)
