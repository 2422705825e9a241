r"""How terms are printed: as LaTeX, or as text for a terminal.

>>> from anywidth.derivation.terms import Sym, div, fn, index, mul, number
>>> t = div(mul(Sym("W"), Sym("x", (), (index("i"),))), fn("sqrt", number(1.0, 1)))
>>> print(text(t))
W x_i / √n
>>> print(latex(t))
\frac{1}{\sqrt{n}} W x_{i}
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any

from anywidth.derivation.terms import Index, Num, Op, Sym, Term, neg, negative, power
from anywidth.trace import powers


def _fraction(value: float) -> Fraction | None:
    f = Fraction(value).limit_denominator(1000)
    return f if math.isclose(float(f), value, rel_tol=3e-7) else None


def _plain(value: float) -> str:
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e6 else f"{value:.4g}"


def _numeral(value: float, tex: bool) -> tuple[str, str]:
    """|value| as numerator and denominator: rational, the root of a rational, or decimal."""
    value = abs(value)
    if not 1e-9 < value < 1e9:  # the tiny epsilon of a norm, the most negative number of a mask
        return _scientific(value, tex), "1"
    f, root = _fraction(value), _fraction(value * value)
    if f is not None and (root is None or _length(f) <= _length(root)):
        return str(f.numerator), str(f.denominator)
    if root is not None and root.numerator <= 1000:
        return _root(root.numerator, tex), _root(root.denominator, tex)
    return _plain(value), "1"


def _scientific(value: float, tex: bool) -> str:
    if value == 0 or not tex:
        return _plain(value)
    digits, exponent = f"{value:.3e}".split("e")
    power = rf"10^{{{int(exponent)}}}"
    digits = digits.rstrip("0").rstrip(".")
    return power if digits == "1" else rf"{digits} \cdot {power}"


def _length(f: Fraction) -> int:
    return f.numerator + f.denominator


def _root(k: int, tex: bool) -> str:
    r = math.isqrt(k)
    if r * r == k:
        return str(r)
    return rf"\sqrt{{{k}}}" if tex else f"√{k}"


def _n(order: Fraction, tex: bool) -> str:
    """A power of n, or of both widths."""
    p, q = powers(order)
    heads = r"\mathrm{heads}" if tex else "heads"
    if p == q == Fraction(1, 2):
        return rf"\sqrt{{n\, {heads}}}" if tex else f"√(n {heads})"
    return " ".join(_power_of(name, k, tex) for name, k in (("n", p), (heads, q)) if k)


def _power_of(name: str, p: Fraction, tex: bool) -> str:
    if p == 1:
        return name
    if p == Fraction(1, 2):
        return rf"\sqrt{{{name}}}" if tex else f"√{name}"
    return f"{name}^{{{p}}}" if tex else f"{name}^{p}" if p.denominator == 1 else f"{name}^({p})"


def _coefficient(t: Num, tex: bool) -> tuple[str, str]:
    """Numerator and denominator of a number, "" for one."""
    top, bottom = _numeral(t.value, tex)
    top, bottom = ("" if top == "1" else top), ("" if bottom == "1" else bottom)
    if t.power > 0:
        top = " ".join(s for s in (top, _n(t.power, tex)) if s)
    if t.power < 0:
        bottom = " ".join(s for s in (bottom, _n(-t.power, tex)) if s)
    return top, bottom


_NAMES = {"relu": r"\mathrm{relu}", "softmax": r"\mathrm{softmax}"}
_COMPARE = {
    "gt": (">", ">"),
    "ge": (r"\ge", "≥"),
    "lt": ("<", "<"),
    "le": (r"\le", "≤"),
    "eq": ("=", "="),
    "ne": (r"\ne", "≠"),
}
_WRITTEN: dict[str, tuple[Any, Any]] = {
    "dot": (lambda a, b: rf"{a} \cdot {b}", lambda a, b: f"{a}·{b}"),
    "over": (
        lambda n, *a: r" \cdot ".join(a) if len(a) > 1 else rf"\textstyle\sum_{{{n}}} {a[0]}",
        lambda n, *a: "·".join(a) if len(a) > 1 else f"(sum over {n} of {a[0]})",
    ),
    "var": (lambda a: rf"\sigma^2_{{{a}}}", lambda a: f"var({a})"),
    "rate": (lambda a: rf"\eta_{{{a}}}", lambda a: f"η({a})"),
    "same": (lambda a, b: rf"1_{{{a} = {b}}}", lambda a, b: f"1[{a} = {b}]"),
    "softmax": (lambda j, a: rf"\operatorname{{softmax}}_{{{j}}}\left({a}\right)", lambda j, a: f"softmax_{j}({a})"),
    "where": (
        lambda w, a, b: rf"\begin{{cases}} {a} & {w} \\ {b} & \text{{else}} \end{{cases}}",
        lambda w, a, b: f"{a} if {w} else {b}",
    ),
} | {
    name: (lambda a, b, s=tex: f"{a} {s} {b}", lambda a, b, s=plain: f"{a} {s} {b}")
    for name, (tex, plain) in _COMPARE.items()
}
_TEX = {"sin", "cos", "tan", "exp", "log", "max", "min", "tanh", "sinh", "cosh"}
BAR = "\u0304"  # the mean of what it stands over
_GREEK = {"phi", "sigma", "mu", "nu", "epsilon", "theta", "alpha", "beta", "gamma", "rho", "kappa", "tau", "Theta"}


def _name(name: str, tex: bool) -> tuple[str, str]:
    """A name, and what of it is a subscript: of W1 or W_in all but the letter."""
    if not tex:
        return name, ""
    if name.endswith(BAR):
        return rf"\bar{{{_name(name.removesuffix(BAR), True)[0]}}}", ""
    if name in _GREEK:
        return "\\" + name, ""
    numbered = re.fullmatch(r"([A-Za-z]+)(?:(\d+)|_(\w+))", name)
    if numbered and (len(numbered[1]) == 1 or numbered[1] in _GREEK):
        word = numbered[3].replace("_", r"\_") if numbered[3] else ""
        return _name(numbered[1], True)[0], numbered[2] or (word if len(word) == 1 else rf"\mathrm{{{word}}}")
    return (name if len(name) == 1 else rf"\mathrm{{{name}}}".replace("_", r"\_")), ""


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
    name, below = _name(t.name, tex)
    if tex:
        subs = [_write(s, tex) for s in t.sub]
        sub = ("" if all(len(s) <= 2 for s in subs) else ",").join(subs)
        sub = ",".join(s for s in (below, sub) if s)
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
        above, below = _coefficient(args[0], tex)
        if tex and below:
            head = rf"\frac{{{above or '1'}}}{{{below}}} "
        else:
            top += [above] if above else []
            bottom += [below] if below else []
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
