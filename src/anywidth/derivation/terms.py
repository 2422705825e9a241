r"""The mathematics a derivation is written in: small terms, printed as LaTeX or as text.

A term is one number of an array, or one coordinate of a random vector, as a function of index letters:
`h_i` rather than `h`. What is written down once and referred to by name is a symbol with its indices.

>>> i, n = index("i"), number(1.0, 1)
>>> x = Sym("x", (), (i,))
>>> t = div(mul(Sym("W"), x), fn("sqrt", n))
>>> print(text(t)), print(latex(t))
W x_i / √n
\frac{1}{\sqrt{n}} W x_{i}
(None, None)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
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


def total(i: Index, body: Term) -> Term:
    """The sum over a finite index; what does not depend on it is taken out."""
    if isinstance(body, Op) and body.head == "add":
        return add(*(total(i, t) for t in body.args))
    factors = body.args if isinstance(body, Op) and body.head == "mul" else (body,)
    outside = [f for f in factors if i not in indices_of(f)]
    inside = [f for f in factors if i in indices_of(f)]
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
    bound = {replace(t.args[0], shift=0)} if isinstance(t, Op) and t.head == "sum" else set()  # type: ignore[type-var]
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


# --- printing ------------------------------------------------------------------------------------------


def _fraction(value: float) -> Fraction | None:
    f = Fraction(value).limit_denominator(1000)
    return f if math.isclose(float(f), value, rel_tol=3e-7) else None


def _plain(value: float) -> str:
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e6 else f"{value:.4g}"


def _numeral(value: float, tex: bool) -> tuple[str, str]:
    """|value| as numerator and denominator: rational, the root of a rational, or decimal."""
    value = abs(value)
    f = _fraction(value)
    if f is not None:
        return str(f.numerator), str(f.denominator)
    root = _fraction(value * value)
    if root is not None and root.numerator <= 1000:
        write = lambda k: _root(k, tex)
        return write(root.numerator), write(root.denominator)
    return _plain(value), "1"


def _root(k: int, tex: bool) -> str:
    r = math.isqrt(k)
    if r * r == k:
        return str(r)
    return rf"\sqrt{{{k}}}" if tex else f"√{k}"


def _n(p: Fraction, tex: bool) -> str:
    if p == 1:
        return "n"
    if p == Fraction(1, 2):
        return r"\sqrt{n}" if tex else "√n"
    return f"n^{{{p}}}" if tex else f"n^{p}" if p.denominator == 1 else f"n^({p})"


def _coefficient(t: Num, tex: bool) -> tuple[str, str]:
    """Numerator and denominator of a number, "" for one."""
    top, bottom = _numeral(t.value, tex)
    top, bottom = ("" if top == "1" else top), ("" if bottom == "1" else bottom)
    if t.power > 0:
        top = " ".join(s for s in (top, _n(t.power, tex)) if s)
    if t.power < 0:
        bottom = " ".join(s for s in (bottom, _n(-t.power, tex)) if s)
    return top, bottom


def negative(t: Term) -> bool:
    if isinstance(t, Num):
        return t.value < 0
    return isinstance(t, Op) and t.head == "mul" and isinstance(t.args[0], Num) and t.args[0].value < 0


_NAMES = {"relu": r"\mathrm{relu}", "softmax": r"\mathrm{softmax}"}
_COMPARE = {
    "gt": (">", ">"),
    "ge": (r"\ge", "≥"),
    "lt": ("<", "<"),
    "le": (r"\le", "≤"),
    "eq": ("=", "="),
    "ne": (r"\ne", "≠"),
}
_WRITTEN: dict[str, tuple[Callable[..., str], Callable[..., str]]] = {
    "dot": (lambda a, b: rf"{a} \cdot {b}", lambda a, b: f"{a}·{b}"),
    "var": (lambda a: rf"\sigma^2_{{{a}}}", lambda a: f"var({a})"),
    "same": (lambda a, b: rf"1_{{{a} = {b}}}", lambda a, b: f"1[{a} = {b}]"),
    "softmax": (lambda j, a: rf"\operatorname{{softmax}}_{{{j}}}\left({a}\right)", lambda j, a: f"softmax_{j}({a})"),
    "where": (
        lambda w, a, b: rf"\begin{{cases}} {a} & {w} \\ {b} & \text{{else}} \end{{cases}}",
        lambda w, a, b: f"{a} if {w} else {b}",
    ),
} | {
    name: (lambda a, b, s=tex: f"{a} {s} {b}", lambda a, b, s=plain: f"{a} {s} {b}") for name, (tex, plain) in _COMPARE.items()
}  # fmt: skip
_TEX = {"sin", "cos", "tan", "exp", "log", "max", "min", "tanh", "sinh", "cosh"}
_GREEK = {"phi", "sigma", "mu", "nu", "epsilon", "theta", "alpha", "beta", "gamma", "rho", "kappa", "tau", "Theta"}


def _name(name: str, tex: bool) -> str:
    if not tex:
        return name
    if name in _GREEK:
        return "\\" + name
    return name if len(name) == 1 else rf"\mathrm{{{name}}}".replace("_", r"\_")


def latex(t: Term) -> str:
    return _write(t, True)


def text(t: Term) -> str:
    return _write(t, False)


def _write(t: Term, tex: bool) -> str:
    if isinstance(t, Num):
        sign = "-" if t.value < 0 else ""
        if math.isinf(t.value):
            return sign + (r"\infty" if tex else "∞")
        top, bottom = _coefficient(t, tex)
        if not bottom:
            return sign + (top or "1")
        return sign + (rf"\frac{{{top or '1'}}}{{{bottom}}}" if tex else f"{top or '1'}/{_grouped(bottom)}")
    if isinstance(t, Index):
        shift = f"{t.shift:+d}" if t.shift else ""
        letter = r"\ell" if tex and t.letter == "ℓ" else t.letter
        return letter + ("'" if t.primed else "") + shift
    if isinstance(t, Sym):
        return _symbol(t, tex)
    return _operation(t, tex)


def _grouped(s: str) -> str:
    return f"({s})" if " " in s else s


def _symbol(t: Sym, tex: bool) -> str:
    sup = ",".join(_write(s, tex) if isinstance(s, Num | Index | Sym | Op) else str(s) for s in t.sup)
    prime = "'" if t.primed else ""
    name = _name(t.name, tex)
    if tex:
        sub = (
            ",".join(_write(s, tex) for s in t.sub)
            if all(len(_write(s, tex)) <= 2 for s in t.sub) is False
            else "".join(_write(s, tex) for s in t.sub)
        )
        out = name
        if sup:
            out += rf"^{{({sup}){prime}}}" if prime else rf"^{{({sup})}}"
        elif prime:
            out += prime
        return out + (f"_{{{sub}}}" if sub else "")
    if sup:
        sup = f"({sup})" if "," in sup or not sup.isalnum() else sup
    parts_ = [_write(s, tex) for s in t.sub]
    sub = ",".join(parts_)
    sub = f"_{sub}" if len(parts_) == 1 and len(sub) <= 2 else f"_{{{sub}}}" if sub else ""
    return name + (f"^{sup}" if sup else "") + prime + sub


def _operation(t: Op, tex: bool) -> str:
    head, args = t.head, t.args
    if head == "add":
        out = _write(args[0], tex)
        for a in args[1:]:
            out += (" - " + _write(neg(a), tex)) if negative(a) else (" + " + _write(a, tex))
        return out
    if head == "mul":
        return _product(t, tex)
    if head == "pow":
        return _power(args[0], Fraction(args[1].value).limit_denominator(64), tex)  # type: ignore[union-attr]
    if head == "sum":
        body = _factor(args[1], tex)
        return rf"\sum_{{{_write(args[0], tex)}}} {body}" if tex else f"Σ_{_write(args[0], tex)} {body}"
    if head in ("E", "theta"):
        comma = (r",\, " if tex else ", ") if head == "theta" else " "
        inside = comma.join(_factor(a, tex) for a in args) if len(args) > 1 else _write(args[0], tex)
        if head == "E":
            return rf"\mathbb{{E}}\left[{inside}\right]" if tex else f"E[{inside}]"
        return rf"\Theta\left[{inside}\right]" if tex else f"Θ[{inside}]"
    name = head.removeprefix("fn:")
    if name in _WRITTEN:
        return _WRITTEN[name][0 if tex else 1](*(_write(a, tex) for a in args))
    inside = (", " if not tex else r",\, ").join(_write(a, tex) for a in args)
    if tex:
        shown = _NAMES.get(name) or (f"\\{name}" if name in _TEX else _operator(name))
        return rf"{shown}\left({inside}\right)"
    return f"{name}({inside})"


def _operator(name: str) -> str:
    return rf"\{name}" if name in _GREEK else rf"\mathrm{{{name}}}".replace("_", r"\_")


def _power(x: Term, p: Fraction, tex: bool) -> str:
    if p < 0:
        below = _write(power(x, -p), tex)
        return rf"\frac{{1}}{{{below}}}" if tex else f"1/{_grouped(below)}"
    if p == Fraction(1, 2):
        return rf"\sqrt{{{_write(x, tex)}}}" if tex else f"√({_write(x, tex)})"
    base = _factor(x, tex)
    if not tex and isinstance(x, Sym) and x.sup:
        base = f"({base})"
    return rf"{{{base}}}^{{{p}}}" if tex else f"{base}^{p}" if p.denominator == 1 else f"{base}^({p})"


def _factor(t: Term, tex: bool) -> str:
    s = _write(t, tex)
    if (isinstance(t, Op) and t.head == "add") or negative(t):
        return rf"\left({s}\right)" if tex else f"({s})"
    return s


def _product(t: Op, tex: bool) -> str:
    sign, head = "", ""
    args = list(t.args)
    top: list[str] = []
    bottom: list[str] = []
    if isinstance(args[0], Num):
        sign = "-" if args[0].value < 0 else ""
        a, b = _coefficient(args[0], tex)
        if tex and b:
            head = rf"\frac{{{a or '1'}}}{{{b}}} "
        else:
            top += [a] if a else []
            bottom += [b] if b else []
        args = args[1:]
    sums = [a for a in args if isinstance(a, Op) and a.head == "sum"]
    for a in [a for a in args if a not in sums] + sums:
        if isinstance(a, Op) and a.head == "pow" and a.args[1].value < 0:  # type: ignore[union-attr]
            inverse = power(a.args[0], -a.args[1].value)  # type: ignore[union-attr]
            bottom.append(_write(inverse, tex))
        else:
            top.append(_factor(a, tex))
    above, below = " ".join(top) or "1", " ".join(bottom)
    if not bottom:
        return sign + head + above
    if tex:
        return sign + head + rf"\frac{{{above}}}{{{below}}}"
    return sign + f"{above} / {_grouped(below)}"
