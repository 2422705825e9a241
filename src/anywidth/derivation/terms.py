"""The mathematics a derivation is written in: small terms.

A term is one number of an array, or one coordinate of a random vector, as a function of index letters:
`h_i` rather than `h`. What is written down once and referred to by name is a symbol with its indices.

>>> from anywidth.derivation.printing import text
>>> i, n = index("i"), number(1.0, 1)
>>> print(text(div(mul(Sym("W"), Sym("x", (), (i,))), fn("sqrt", n))))
W x_i / √n
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction


@dataclass(frozen=True)
class Num:
    """`value * n^power`."""

    value: float
    power: Fraction = Fraction(0)


@dataclass(frozen=True)
class Index:
    """A letter that runs over a finite axis, or a position of one, shifted by a whole number."""

    letter: str
    shift: int = 0
    primed: bool = False


@dataclass(frozen=True)
class Sym:
    """A name with a superscript (which of several) and subscripts; `primed`: of the second example."""

    name: str
    sup: tuple[object, ...] = ()
    sub: tuple[Term, ...] = ()
    primed: bool = False
    leaf: str = ""  # the parameter it is, if it is one
    rate: str = "1"  # how fast the parameter learns: 1, 0, or η for any other number
    width: Num = field(default=Num(1.0, Fraction(1)), compare=False)  # of the axes along which it is multiplied

    @property
    def parameter(self) -> bool:
        return bool(self.leaf)


@dataclass(frozen=True)
class Op:
    """An operation on terms. `head`: add, mul, pow, fn:NAME, sum, mean, E, theta, cases."""

    head: str
    args: tuple[Term, ...]


Term = Num | Index | Sym | Op

ONE, ZERO = Num(1.0), Num(0.0)


def index(letter: str) -> Index:
    return Index(letter)


def number(value: float, power: Fraction | int = 0) -> Num:
    return Num(float(value), Fraction(power))


def is_number(t: Term, value: float) -> bool:
    return isinstance(t, Num) and t.value == value and (t.power == 0 or value == 0)


def fn(name: str, *args: Term) -> Term:
    (x, *_) = args or (ZERO,)
    if name == "sqrt":
        return power(x, Fraction(1, 2))
    if name == "rsqrt":
        return power(x, Fraction(-1, 2))
    return Op(f"fn:{name}", args)


def add(*terms: Term) -> Term:
    flat: list[Term] = []
    for t in terms:
        flat += list(t.args) if isinstance(t, Op) and t.head == "add" else [t]
    flat = [t for t in flat if not is_number(t, 0.0)]
    numbers = [t for t in flat if isinstance(t, Num) and t.power == 0]
    if len(numbers) > 1:
        flat = [t for t in flat if t not in numbers] + [Num(sum(t.value for t in numbers))]
    if not flat:
        return ZERO
    return flat[0] if len(flat) == 1 else Op("add", tuple(flat))


def neg(t: Term) -> Term:
    if isinstance(t, Op) and t.head == "add":
        return add(*(neg(a) for a in t.args))
    return mul(Num(-1.0), t)


def mul(*terms: Term) -> Term:
    value, n_power = 1.0, Fraction(0)
    rest: list[Term] = []
    for t in terms:
        for f in t.args if isinstance(t, Op) and t.head == "mul" else (t,):
            if isinstance(f, Num):
                value, n_power = value * f.value, n_power + f.power
            else:
                rest.append(f)
    if value == 0:
        return ZERO
    head = [] if value == 1.0 and n_power == 0 else [Num(value, n_power)]
    factors = [*head, *rest]
    if not factors:
        return ONE
    return factors[0] if len(factors) == 1 else Op("mul", tuple(factors))


def power(x: Term, exponent: Fraction | float) -> Term:
    exponent = Fraction(exponent).limit_denominator(64)
    if exponent == 1:
        return x
    if exponent == 0:
        return ONE
    if isinstance(x, Num):
        return Num(x.value ** float(exponent), x.power * exponent)
    if isinstance(x, Op) and x.head == "pow":
        inner = x.args[1]
        if isinstance(inner, Num) and Fraction(inner.value).limit_denominator(64).numerator % 2:
            return power(x.args[0], Fraction(inner.value).limit_denominator(64) * exponent)
    if isinstance(x, Op) and x.head == "mul" and isinstance(x.args[0], Num) and x.args[0].value > 0:
        return mul(power(x.args[0], exponent), power(mul(*x.args[1:]), exponent))
    return Op("pow", (x, Num(float(exponent))))


def div(x: Term, y: Term) -> Term:
    return mul(x, power(y, -1))


def total(i: Index, body: Term, size: Term | None = None) -> Term:
    """The sum over a finite index; what does not depend on it is taken out, and 1[i = j] takes the sum away.

    A constant is summed to its multiple, if the `size` of the axis is given.
    """
    if isinstance(body, Op) and body.head == "add":
        return add(*(total(i, t, size) for t in body.args))
    if size is not None and i not in indices_of(body):
        return mul(size, body)
    factors = body.args if isinstance(body, Op) and body.head == "mul" else (body,)
    for f in factors:
        if isinstance(f, Op) and f.head == "fn:same" and i in f.args:
            j = f.args[0] if f.args[1] == i else f.args[1]
            return substituted(mul(*(g for g in factors if g is not f)), {i: j})
    outside = [f for f in factors if i not in indices_of(f)]
    inside = [f for f in factors if i in indices_of(f)]
    sums = [f for f in inside if isinstance(f, Op) and f.head == "sum"]
    if len(sums) == 1 and len(inside) > 1:  # one fraction rather than one within another
        j, inner = sums[0].args
        inside = [Op("sum", (j, mul(*(f for f in inside if f is not sums[0]), inner)))]
    return mul(*outside, Op("sum", (i, mul(*inside))))


def expectation(*factors: Term) -> Term:
    return Op("E", tuple(factors))


def theta(*factors: Term) -> Term:
    return Op("theta", tuple(factors))


# --- structure -----------------------------------------------------------------------------------------


def parts(t: Term) -> tuple[Term, ...]:
    return t.args if isinstance(t, Op) else t.sub if isinstance(t, Sym) else ()


def walk(t: Term) -> Iterable[Term]:
    yield t
    for a in parts(t):
        yield from walk(a)


def indices_of(t: Term) -> tuple[Index, ...]:
    """The free index letters of a term, unshifted, in order of appearance."""
    if isinstance(t, Index):
        return (replace(t, shift=0),)
    bound = {t.args[0]} if isinstance(t, Op) and t.head == "sum" else set()
    found: list[Index] = []
    for a in parts(t):
        found += [i for i in indices_of(a) if i not in found and i not in bound]
    return tuple(found)


def rebuilt(t: Term, args: tuple[Term, ...]) -> Term:
    if isinstance(t, Sym):
        return replace(t, sub=args)
    assert isinstance(t, Op)
    if t.head == "add":
        return add(*args)
    if t.head == "mul":
        return mul(*args)
    if t.head == "pow" and isinstance(args[1], Num):
        return power(args[0], args[1].value)
    return Op(t.head, args)


def substituted(t: Term, table: Mapping[Index, Term]) -> Term:
    """The term with index letters replaced."""
    if isinstance(t, Index):
        new = table.get(replace(t, shift=0))
        if new is None:
            return t
        return (
            replace(new, shift=new.shift + t.shift)
            if isinstance(new, Index)
            else new
            if t.shift == 0
            else add(new, Num(t.shift))
        )
    if not parts(t):
        return t
    return rebuilt(t, tuple(substituted(a, table) for a in parts(t)))


def mapped(t: Term, f: Callable[[Term], Term | None]) -> Term:
    """The term with every subterm for which f gives another one replaced by it."""
    new = f(t)
    if new is not None:
        return new
    return rebuilt(t, tuple(mapped(a, f) for a in parts(t))) if parts(t) else t


def primed(t: Term) -> Term:
    """The same term of the second copy of the network, its indices with a prime."""

    def f(u: Term) -> Term | None:
        if isinstance(u, Index):
            return replace(u, primed=True)
        if isinstance(u, Sym):
            return replace(u, primed=True, sub=tuple(primed(s) for s in u.sub))
        return None

    return mapped(t, f)


def negative(t: Term) -> bool:
    if isinstance(t, Num):
        return t.value < 0
    return isinstance(t, Op) and t.head == "mul" and isinstance(t.args[0], Num) and t.args[0].value < 0
