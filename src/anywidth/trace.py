"""Code to program: what a network does, with its width left open.

`apply` is traced with `jax.make_jaxpr`, on shapes only, at three large concrete widths n, 2n, 4n. The three
jaxprs are lined up equation by equation. A dimension that differs is a width, fitted as `a n + b`; a number
that differs is fitted as `c n^p`. If the three do not line up, the structure of the network depends on its
width, and it has no limit.

>>> fit_dim([n // 4 + 1 for n in WIDTHS])
Dim(a=Fraction(1, 4), b=Fraction(1, 1))
>>> fit_number([3 * n**-0.5 for n in WIDTHS])
(3.0, Fraction(-1, 2))
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from anywidth import _compat
from anywidth.errors import NoLimitError, UnsupportedError

if TYPE_CHECKING:
    from typing_extensions import TypeIs

WIDTHS = (11520, 23040, 46080)  # multiples of 256, 9 and 5; 46080**2 still is an int32
HEADS = (240, 720, 2160)  # the second width at each of them, if there is one: it grows like another power of n
HEADS_ORDER = Fraction(1580, 997)  # which stands for log2(3); of a denominator that no power of n has


@dataclass(frozen=True)
class Dim:
    """A size that grows with the width: `a n + b`, with a > 0; or `a heads + b`, or `a n heads`, by its `kind`."""

    a: Fraction
    b: Fraction = Fraction(0)
    kind: frozenset[str] = field(default=frozenset({"n"}), repr=False)

    def __str__(self) -> str:
        top, bottom = self.a.numerator, self.a.denominator
        name = " ".join(sorted(self.kind, reverse=True))
        head = (name if top == 1 else f"{top}{name}") + ("" if bottom == 1 else f"/{bottom}")
        return head if self.b == 0 else f"{head}{'+' if self.b > 0 else '-'}{abs(self.b)}"


Size = int | Dim


def affine(size: Size) -> tuple[Fraction, Fraction]:
    """(a, b) of a size a n + b."""
    return (size.a, size.b) if isinstance(size, Dim) else (Fraction(0), Fraction(size))


def make_size(a: Fraction, b: Fraction, kind: frozenset[str] = frozenset({"n"})) -> Size:
    """The size a n + b, a whole number where a is zero."""
    return Dim(a, b, kind) if a != 0 else int(b)


def kind_of(size: Size) -> frozenset[str]:
    """Which widths the size grows with."""
    return size.kind if isinstance(size, Dim) else frozenset()


def order(size: Size) -> Fraction:
    """The power of n of a size."""
    return sum((HEADS_ORDER if name == "heads" else Fraction(1) for name in kind_of(size)), Fraction(0))


def powers(order: Fraction) -> tuple[Fraction, Fraction]:
    """(p, q) of a power of n that stands for n^p heads^q."""
    k = int(order * HEADS_ORDER.denominator * 12) * pow(HEADS_ORDER.numerator, -1, HEADS_ORDER.denominator)
    k = (k + HEADS_ORDER.denominator // 2) % HEADS_ORDER.denominator - HEADS_ORDER.denominator // 2
    return order - Fraction(k, 12) * HEADS_ORDER, Fraction(k, 12)


def readable(message: str) -> str:
    """A message with its powers of n written as powers of n and of heads."""

    def rewritten(found: Any) -> str:
        p, q = powers(Fraction(found.group(1)))
        return " ".join([*([f"n^{p}"] if p else []), *([f"heads^{q}"] if q else [])]) or "n^0"

    return re.sub(r"n\^(-?\d+(?:/\d+)?)", rewritten, message)


def add_sizes(x: Size, y: Size, sign: int = 1) -> Size:
    """X + y, or x - y with sign -1."""
    (a, b), (c, d) = affine(x), affine(y)
    if a and c and kind_of(x) != kind_of(y):
        raise UnsupportedError(f"axes of the sizes {x} and {y}, which grow independently, are joined")
    return make_size(a + sign * c, b + sign * d, kind_of(x) or kind_of(y) or frozenset({"n"}))


def is_wide(size: Any) -> TypeIs[Dim]:
    """Whether the size grows with the width."""
    return isinstance(size, Dim)


def finite(size: Size) -> int:
    """The size as a whole number, which it is as it has been seen not to grow with the width."""
    assert not isinstance(size, Dim), size
    return int(size)


_KINDS = {
    frozenset({"n"}): WIDTHS,
    frozenset({"heads"}): HEADS,
    frozenset({"n", "heads"}): tuple(n * h for n, h in zip(WIDTHS, HEADS, strict=True)),
}


def fit_dim(sizes: Sequence[int]) -> Size:
    """The size `a n + b` with these values at the three widths; ValueError where there is none."""
    x, y, z = sizes
    if x == y == z:
        return int(x)
    for kind, points in _KINDS.items():
        a = Fraction(y - x, points[1] - points[0])
        if Fraction(z - y, points[2] - points[1]) == a and a > 0:
            return Dim(a, x - a * points[0], kind)
    raise ValueError(f"a size takes the values {tuple(sizes)} at the widths {WIDTHS}, not a n + b")


def fit_number(values: Sequence[Any]) -> tuple[Any, Fraction]:
    """(c, p) with value = c n^p to leading order; ValueError where there is none."""
    v = [np.asarray(value) for value in values]
    if all(np.array_equal(v[0], w, equal_nan=v[0].dtype.kind == "f") for w in v[1:]):
        return values[0], Fraction(0)
    x, y, z = (w.astype(np.float64) for w in v)
    support = (x != 0) & np.isfinite(x)
    if not support.any() or (((y != 0) & np.isfinite(y)) != support).any():
        raise ValueError(_number_message(values))
    with np.errstate(all="ignore"):
        p12 = np.log2(np.where(support, y / x, 1.0))[support]
        p23 = np.log2(np.where(support, z / y, 1.0))[support]
    power = Fraction(float(p23.flat[0])).limit_denominator(12)
    both = None if abs(float(p23.flat[0]) - power) < 1e-5 else _power_of_both(float(p23.flat[0]))
    if both is not None and np.allclose(p12, p23, atol=1e-5) and np.allclose(p23, p23.flat[0], atol=1e-5):
        scale = float(WIDTHS[2]) ** float(both[0]) * float(HEADS[2]) ** float(both[1])
        leading = _snapped(z / scale, 2e-7 if v[0].dtype in (np.float32, np.float16) else 1e-14)
        return (float(leading) if leading.ndim == 0 else leading), both[0] + both[1] * HEADS_ORDER
    if not np.allclose(p23, float(power), atol=2e-3) or not np.allclose(p12, float(power), atol=4e-3):
        raise ValueError(_number_message(values))
    c = [w / float(n) ** float(power) for w, n in zip((x, y, z), WIDTHS, strict=True)]
    exact = np.allclose(c[0], c[2], rtol=3e-7, atol=0)
    # a lower-order part, as in n - 1, dies out like 1/n: extrapolate it away
    leading = c[2] if exact else 2 * c[2] - c[1]
    single = v[0].dtype in (np.float32, np.float16)
    tol = 2e-7 if single else 1e-14 if np.allclose(c[0], c[2], rtol=1e-13, atol=0) else 1e-8
    leading = _snapped(leading, tol)
    return (float(leading) if leading.ndim == 0 else leading), power


def _snapped(c: Any, tol: float) -> Any:
    snapped = np.round(c, 6)
    return np.where(np.abs(c - snapped) <= tol * np.abs(c), snapped, c)


def _power_of_both(exponent: float) -> tuple[Fraction, Fraction] | None:
    """(p, q) of a number n^p heads^q that grows like 2^exponent while n doubles and heads triples."""
    for k in sorted((k for k in range(-12, 13) if k), key=abs):
        q = Fraction(k, 4)
        rest = exponent - float(q) * math.log2(3)
        p = Fraction(round(4 * rest), 4)
        if abs(rest - p) < 1e-5:
            return p, q
    return None


def _number_message(values: Sequence[Any]) -> str:
    shown = ", ".join(str(np.asarray(v).ravel()[:1]) for v in values)
    return f"a number takes the values {shown} at the widths {WIDTHS}: no constant times a power of n"


# --- the program ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Var:
    """A variable of a program; its shape has widths left open."""

    shape: tuple[Size, ...]
    dtype: Any


@dataclass(frozen=True, eq=False)
class Const:
    """A literal or a captured array: value times n^power; width axes of the value have size one."""

    value: Any
    power: Fraction
    shape: tuple[Size, ...]
    dtype: Any


@dataclass(frozen=True, eq=False)
class Eqn:
    """One operation of a program."""

    name: str
    primitive: Any
    inputs: tuple[Var | Const, ...]
    outputs: tuple[Var, ...]
    params: dict[str, Any]
    raw: dict[str, Any]  # the parameters at the first width
    line: str  # of the user's code
    place: int  # its number in the whole program: the same whenever the same code is traced


@dataclass(frozen=True, eq=False)
class Program:
    """What `apply` does: equations in order, from the inputs to the outputs."""

    inputs: tuple[Var, ...]
    outputs: tuple[Var | Const, ...]
    eqns: tuple[Eqn, ...]


def trace(function: Callable[[int], Callable[..., Any]], arguments: Callable[[int], Any]) -> tuple[Program, Any]:
    """The program of `function(n)(*arguments(n))`, and the pytree structure of its output.

    `arguments(n)` are shapes and dtypes. A fresh closure is traced at every width, so that nothing is cached
    across widths.

    Raises: NoLimitError if the three traces do not line up.
    """
    jaxprs: list[Any] = []
    trees: list[Any] = []
    for n in WIDTHS:
        call = function(n)
        jaxpr, out = jax.make_jaxpr(lambda *a, call=call: call(*a), return_shape=True)(*arguments(n))
        jaxprs.append(jaxpr)
        trees.append(jax.tree.structure(out))
    if trees[0] != trees[1] or trees[0] != trees[2]:
        raise NoLimitError("the structure of the network's output depends on its width")
    return _lined_up(jaxprs, itertools.count()), trees[0]


def _lined_up(closed: Sequence[Any], places: Iterator[int], called_at: str | None = None) -> Program:
    opened = [_compat.open_jaxpr(j) for j in closed]
    jaxprs = [j for j, _ in opened]
    env: dict[Any, Var | Const] = {}
    last_line = called_at or "its first line"

    def differs(what: str) -> NoLimitError:
        return NoLimitError(
            f"the structure of this network depends on its width: {what} (traced at the widths {WIDTHS}). An "
            f"infinite-width limit needs the same code at every width.\n  near {last_line}"
        )

    def size(sizes: Sequence[int], line: str) -> Size:
        try:
            return fit_dim(sizes)
        except ValueError as e:
            raise NoLimitError(f"the structure of this network depends on its width: {e}.\n  at {line}") from None

    def variable(vs: Sequence[Any]) -> Var:
        shapes = [v.aval.shape for v in vs]
        if len({len(s) for s in shapes}) > 1 or len({v.aval.dtype for v in vs}) > 1:
            raise differs("an array has another rank or dtype")
        return Var(tuple(size(d, last_line) for d in zip(*shapes, strict=True)), vs[0].aval.dtype)

    def bind(vs: Sequence[Any]) -> Var:
        env[vs[0]] = var = variable(vs)
        return var

    def constant(values: Sequence[Any], vs: Sequence[Any]) -> Const:
        var = variable(vs)
        if any(_compat.is_tracer(v) for v in values):
            if any(v is not values[0] for v in values):
                raise differs("it captures a traced number that is computed anew at every width")
            return Const(values[0], Fraction(0), var.shape, var.dtype)
        if _compat.is_key(vs[0].aval):
            if any((jax.random.key_data(v) != jax.random.key_data(values[0])).any() for v in values):
                raise differs("a random key is another one")
            return Const(values[0], Fraction(0), var.shape, var.dtype)
        arrays = [np.asarray(v) for v in values]
        for axis, d in enumerate(var.shape):
            if is_wide(d):
                firsts = [a.take([0], axis) for a in arrays]
                if not all((a == f).all() for a, f in zip(arrays, firsts, strict=True)):
                    raise UnsupportedError(
                        "the network captures a fixed array that varies along the width; its entries have no "
                        f"limit. Draw it in `init` with Normal, or keep it constant along the width.\n  at {last_line}"
                    )
                arrays = firsts
        try:
            value, power = fit_number(arrays)
        except ValueError as e:
            raise NoLimitError(f"{e}.\n  at {last_line}") from None
        return Const(np.asarray(value).astype(var.dtype), power, var.shape, var.dtype)

    def read(vs: Sequence[Any]) -> Var | Const:
        if isinstance(vs[0], _compat.Literal):
            if not all(isinstance(v, _compat.Literal) for v in vs):
                raise differs("a number is computed at one width and given at another")
            return constant([v.val for v in vs], vs)
        if any(isinstance(v, _compat.Literal) for v in vs) or vs[0] not in env:
            raise differs("an operand is another one")
        return env[vs[0]]

    if len({len(j.invars) for j in jaxprs}) > 1 or len({len(j.constvars) for j in jaxprs}) > 1:
        raise differs("another number of arrays is captured")
    inputs = tuple(bind(v) for v in zip(*(j.invars for j in jaxprs), strict=True))
    for i, vs in enumerate(zip(*(j.constvars for j in jaxprs), strict=True)):
        env[vs[0]] = constant([consts[i] for _, consts in opened], vs)
    eqns = []
    for eqn_group in _zip_eqns(jaxprs, differs):
        first = eqn_group[0]
        # inside a library function there is no line of the user's: then it is the line of the call
        last_line = _compat.user_line(first) or called_at or "an unknown line"
        if any(e.primitive.name != first.primitive.name for e in eqn_group) or any(
            len(e.invars) != len(first.invars) for e in eqn_group
        ):
            names = ", ".join(e.primitive.name for e in eqn_group)
            raise differs(f"the operations differ ({names})")
        operands = tuple(read(vs) for vs in zip(*(e.invars for e in eqn_group), strict=True))
        outputs = tuple(bind(vs) for vs in zip(*(e.outvars for e in eqn_group), strict=True))
        name, place = first.primitive.name, next(places)
        params = _params([e.params for e in eqn_group], places, last_line, differs)
        eqns.append(Eqn(name, first.primitive, operands, outputs, params, first.params, last_line, place))
    results = tuple(read(vs) for vs in zip(*(j.outvars for j in jaxprs), strict=True))
    return _without_dead_code(Program(inputs, results, tuple(eqns)))


def _zip_eqns(jaxprs: Sequence[Any], differs: Callable[[str], NoLimitError]) -> Any:
    count = min(len(j.eqns) for j in jaxprs)
    yield from zip(*(j.eqns[:count] for j in jaxprs), strict=True)
    if any(len(j.eqns) != count for j in jaxprs):
        raise differs("it has " + ", ".join(str(len(j.eqns)) for j in jaxprs) + " operations")


def _params(group: Sequence[Any], places: Iterator[int], line: str, differs: Callable[[str], NoLimitError]) -> Any:
    first = group[0]
    if isinstance(first, _compat.ClosedJaxpr | _compat.Jaxpr):
        return _lined_up(group, places, line)
    if isinstance(first, dict):
        return {k: _params([g[k] for g in group], places, line, differs) for k in first}
    if isinstance(first, tuple | list):
        if len({len(g) for g in group}) > 1:
            raise differs("a parameter of an operation has another length")
        return tuple(_params(g, places, line, differs) for g in zip(*group, strict=True))
    if isinstance(first, bool | str) or first is None:
        return first
    if isinstance(first, int | np.integer):
        try:
            return fit_dim([int(g) for g in group])
        except ValueError:
            return _fit_integer_offset(group, line)
    if isinstance(first, float | np.floating):
        return fit_number(group)[0] if len(set(group)) == 1 else fit_number(group)
    return first


def _fit_integer_offset(group: Sequence[Any], line: str) -> Size:
    x, y, z = (int(g) for g in group)
    a = Fraction(y - x, WIDTHS[1] - WIDTHS[0])
    if Fraction(z - y, WIDTHS[2] - WIDTHS[1]) == a:
        return Dim(a, x - a * WIDTHS[0])
    raise NoLimitError(
        f"the structure of this network depends on its width: a size takes the values {(x, y, z)} at the widths "
        f"{WIDTHS}, not a n + b.\n  at {line}"
    )


def _without_dead_code(program: Program) -> Program:
    live = {id(v) for v in program.outputs}
    kept = []
    for eqn in reversed(program.eqns):
        if any(id(v) in live for v in eqn.outputs):
            live.update(id(v) for v in eqn.inputs)
            kept.append(eqn)
    return Program(program.inputs, program.outputs, tuple(reversed(kept)))


def number(value: Any) -> float | None:
    """The Python number a constant stands for, if it is one and known."""
    if isinstance(value, Const):
        value = value.value
    if _compat.is_tracer(value) or np.ndim(value) != 0:
        return None
    out = float(value)
    return out if math.isfinite(out) else None
