"""The derivation as a document: what its sections say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp

from anywidth import _compat
from anywidth.derivation import terms as tm
from anywidth.derivation.contributions import contributions
from anywidth.derivation.derive import OVER, Book, Cross, Rule, crosses, rules
from anywidth.derivation.formats import Cell, Formula, Line, Section, Words, markdown, plain, tex, values
from anywidth.derivation.layers import Block, Item
from anywidth.derivation.printing import latex, text
from anywidth.derivation.read import Definition
from anywidth.derivation.reading import Reading, reading
from anywidth.derivation.terms import Op, Sym
from anywidth.expect.methods import NORMALISED
from anywidth.network import Network
from anywidth.rates import Rates
from anywidth.trace import powers


@dataclass(frozen=True)
class Explanation:
    """The derivation of a network's kernels.

    Shown as Markdown in a notebook and as text by `print`; `latex()` is for a paper. `contributions` is what each
    parameter adds to the NTK at the given examples, by the parameter's path in `init(n)`: they sum to
    `aw.ntk(net, lr=lr)(x, y)`, to rounding, or to the standard error of what had to be sampled.
    """

    sections: tuple[Section, ...]
    contributions: Mapping[str, Any]

    def __str__(self) -> str:
        return "\n\n".join(plain(s) for s in self.sections)

    def __repr__(self) -> str:
        return str(self)

    def _repr_markdown_(self) -> str:
        return "\n\n".join(markdown(s) for s in self.sections)

    def latex(self) -> str:
        """A LaTeX fragment; needs amsmath and amssymb."""
        return "\n\n".join(tex(s) for s in self.sections)


def explain(net: Network, x: Any, y: Any = None, *, lr: Rates = None) -> Explanation:
    """The derivation of the NNGP and the NTK of a network on examples like x.

    Args:
        net: the network.
        x: an example; the derivation is of the program that the network is on its shapes.
        y: another example, perhaps of another shape; x if None.
        lr: learning-rate multipliers as for `aw.ntk`; the NTK and what parameters contribute are at these rates.

    Returns:
        An `Explanation`: the random vectors under the names of the parameters, what is Gaussian and why, every
        covariance recursion, each expectation with its closed form or method, where averages over the width become
        numbers, the NTK as the derivative in epsilon, and what each parameter contributes to it.

    Raises:
        NoLimitError, UnsupportedError, InputError: as `aw.ntk` does; a network without a limit has no derivation.
            That the output vanishes, as in maximal-update parametrization, is said and is no error.

    Reference: Yang, Tensor Programs II (2020).
    """
    x = jax.tree.map(jnp.asarray, x)
    y = x if y is None else jax.tree.map(jnp.asarray, y)
    shares, nngp, ntk = contributions(net, x, y, lr)
    read = reading(net, x, lr)
    shapes = [[jnp.shape(a) for a in jax.tree.leaves(e)] for e in (x, y)]
    other = read if shapes[0] == shapes[1] else reading(net, y, lr)
    return Explanation((*derivation(read, other), _evaluated(read, shares, nngp, ntk)), shares)


# --- sections ------------------------------------------------------------------------------------------


def _full(d: Definition) -> Sym:
    return d.symbol if d.symbol.sub else replace(d.symbol, sub=d.indices)


def _each(items: Iterable[Item]) -> Iterable[tuple[Definition, Words]]:
    """The definitions with the range of ℓ."""
    for item in items:
        if isinstance(item, Block):
            for d in item.template:
                yield d, ((rf"{item.first} \le \ell \le {item.last}", f"{item.first} ≤ ℓ ≤ {item.last}"),)
        else:
            yield item, ()


_KINDS = {
    "gaussian": "Gaussian",
    "number": "a number (fact 1)",
    "start": "before the loop",
    "output": "the output, Gaussian",
}
_FLUCTUATION = "Gaussian of every head: a sum of n independent terms (central limit theorem)"
_TWO_WIDTHS = (
    " This network has two widths: coordinates are numbered by n, by heads, or by both, and averages are over all "
    "of them.",
)
_PAIR = (r"\mathbb{E}[a\, b']", "E[a b']")
_EPSILON = (r"\varepsilon", "ε")


def derivation(read: Reading, other: Reading | None = None) -> Iterable[Section]:
    """The sections without the numbers at the given examples; `other` is of the second one, if its shape differs."""
    shown = list(_each(read.items))
    twins = [d for d, _ in _each(other.items if other is not None else read.items)]
    same = [d.symbol for d, _ in shown] == [d.symbol for d in twins]
    pairs = list(zip((d for d, _ in shown), twins if same else (d for d, _ in shown), strict=True))
    lines = []
    for (d, where), (_, twin) in zip(shown, pairs, strict=True):
        over = any(isinstance(t, Op) and t.head == OVER for t in tm.walk(d.body))
        kind = _FLUCTUATION if over else _KINDS.get(d.kind, "Gaussian" if d.gaussian else "")
        lines.append(Line(_full(d), d.body, (kind, ", ", *where) if kind and where else (kind,) if kind else where))
        if twin.body != d.body:
            lines.append(Line(tm.primed(_full(twin)), tm.primed(twin.body), ("for the other example",)))
    loops: Words = ()
    for t, size in read.steps.items():
        loops += (" ", (rf"{t} = 1, \dots, {size}", f"{t} = 1, ..., {size}"), " is the step of a loop.")
    for t, size in (other.steps if same and other is not None else {}).items():
        if size != read.steps[t]:
            loops += (" For the other example, ", (rf"{t}' = 1, \dots, {size}", f"{t}' = 1, ..., {size}"), ".")
    if not same:
        loops += (" On the other example's shape the network is another program; what follows is of the first one.",)
    if read.padded:
        loops += (" What a window reads outside of the array is zero.",)
    yield Section(
        "Random vectors",
        (
            "Each symbol is a vector of n coordinates that become independent and identically distributed as n grows "
            "(one for every value of its indices), or a number. A product with a Gaussian matrix is Gaussian (fact 2), "
            "and independent of the products with every other parameter; sums of Gaussians are Gaussian.",
            *(_TWO_WIDTHS if read.second_width else ()),
            *loops,
        ),
        tuple(lines),
        _variances(read),
    )
    averages = _averages(shown)
    if averages:
        yield Section(
            "Averages become numbers",
            ("An average over the width is the expectation of one coordinate (fact 1).",),
            tuple(Line(a, _average(a)) for a in averages),
        )
    sample = next((i.sample for i in read.items if isinstance(i, Block)), 0)
    book = Book(read.definitions, sample, read.shifted)
    generic, more = rules(pairs, book, read.ways), crosses(pairs, book)
    yield Section(
        "NNGP",
        (
            "Primes mark the network on the other example; ",
            _PAIR,
            " is the inner product over the width, ",
            (r"a \cdot b' / n", "a·b'/n"),
            " for n coordinates. Within one example the same holds without primes.",
        ),
        (*_covariances(generic), *_crosses(more, False, bool(sample))),
    )
    rated = any(s.rate == "η" for s in read.names.values())
    frozen = any(s.rate == "0" for s in read.names.values())
    yield Section(
        "NTK",
        (
            "Let each parameter and its twin in the other copy have covariance ",
            (r"\sigma^2 + \eta\,\varepsilon", "var + η ε") if rated else (r"\sigma^2 + \varepsilon", "var + ε"),
            *((" with its learning rate ", ("\\eta", "η"), " (1 where none is written)") if rated else ()),
            *((", but for those that are frozen",) if frozen else ()),
            ". The NTK is the derivative in ",
            _EPSILON,
            " at 0 of the NNGP (Price's theorem), written ",
            (r"\Theta[a, b'] = \partial_\varepsilon\, \mathbb{E}[a\, b']", "Θ[a, b'] = ∂/∂ε E[a b']"),
            "; each product with a parameter adds the inner product of what it is multiplied by.",
        ),
        (*_thetas(generic), *_crosses(more, True, bool(sample))),
    )


def _evaluated(read: Reading, shares: Mapping[str, Any], nngp: Any, ntk: Any) -> Section:
    rows: list[tuple[Cell, ...]] = [("parameter", "its share of the NTK")]
    rows += [(read.names[k], values(v)) for k, v in shares.items()]
    rows += [("sum: the NTK", values(ntk))]
    rows += [("the NNGP", "none: the output vanishes as the width grows" if nngp is None else values(nngp))]
    return Section("At the given examples", (), (), tuple(rows))


def _variances(read: Reading) -> tuple[tuple[Cell, ...], ...]:
    rows: list[tuple[Cell, ...]] = [("parameter", "in init(n)", "shape", "variance")]
    if read.rates is not None:
        rows[0] += ("learning rate",)
    for p in read.parameters.items:
        shape = " × ".join(str(s) for s in p.leaf.shape) or "1"
        var = _of_width(p.leaf.var, 2 * p.leaf.size)
        var += " (constant, trained)" if p.leaf.zero_var and read.names[p.leaf.name].rate != "0" else ""
        rates = () if read.rates is None else (_of_width(*read.rates[p.leaf.name]),)
        rows.append((read.names[p.leaf.name], p.leaf.name, shape, var, *rates))
    return tuple(rows)


def _of_width(value: Any, power: Fraction) -> str:
    number = "traced" if _compat.is_tracer(value) else f"{float(value):.6g}"
    if not power or number == "0":
        return number
    if powers(abs(power))[1]:
        size = text(tm.Num(1.0, abs(power)))
    else:
        size = "n" if abs(power) == 1 else f"n^{abs(power)}" if power.denominator == 1 else f"n^({abs(power)})"
    return f"{number}/{size}" if power < 0 else size if number == "1" else f"{number} {size}"


def _averages(shown: Sequence[tuple[Definition, Words]]) -> list[Op]:
    found: list[Op] = []
    for d, _ in shown:
        for t in tm.walk(d.body):
            if isinstance(t, Op) and t.head == "E" and t not in found:
                found.append(t)
    return found


def _average(t: Op) -> tuple[str, str]:
    inside = tm.mul(*t.args)
    return (rf"\lim \frac{{1}}{{n}}\sum_{{\alpha=1}}^n {latex(inside)}", f"lim 1/n Σ_α {text(inside)}")


def _listed(symbols: Sequence[Sym]) -> Words:
    out: list[str | Formula] = []
    for a in symbols:
        out += [", ", a] if out else [a]
    return tuple(out)


def _covariances(generic: Sequence[Rule]) -> Iterable[Line]:
    for r in generic:
        s = _full(r.definition)
        left = tm.expectation(s, tm.primed(s))
        if r.covariance is not None:
            yield Line(left, r.covariance)
        elif r.known is not None and r.argument is not None:
            u, v = r.argument, tm.primed(r.twin.body.args[0])  # type: ignore[union-attr]
            where: list[str | Formula] = []
            for name, term in (("q", tm.expectation(u, u)), ("q'", tm.expectation(v, v)), ("c", tm.expectation(u, v))):
                where += [(f"{name} = {latex(term)}", f"{name} = {text(term)}"), ", "]
            remark = (*where[:-1], *_THETA[r.known.angle], *_method(r))
            yield Line(left, (r.known.latex, r.known.text), remark)
        else:
            body = tm.expectation(r.definition.body, tm.primed(r.twin.body))
            yield Line(left, body, ("over ", *_over(r), *_method(r)))


def _method(r: Rule) -> Words:
    """The engine may not need an expectation, at the shapes it was asked at."""
    gauss: Words = ("; ", _GAUSS) if NORMALISED in r.method else ()
    return (f"; {r.method}", *gauss) if r.method else ()


_GAUSS = (
    r"r^{-1/2} = \frac{2}{\sqrt{\pi}} \int_0^\infty e^{-w^2 r}\, dw",
    "r^(-1/2) = 2/√π ∫ exp(-w² r) dw, w > 0",
)


_THETA: dict[bool, Words] = {True: (", ", (r"\cos\theta = c / \sqrt{q q'}", "cos θ = c/√(q q')")), False: ()}
_SLOPE = (r"\mathbb{E}[\varphi'(u)\,\varphi'(u')]", "E[φ'(u) φ'(u')]")


def _thetas(generic: Sequence[Rule]) -> Iterable[Line]:
    for r in generic:
        s = _full(r.definition)
        left = tm.theta(s, tm.primed(s))
        if r.theta is not None:
            yield Line(left, r.theta)
        elif r.known is not None and r.argument is not None:
            inner = tm.theta(r.argument, tm.primed(r.argument))
            right = (f"{r.known.slope_latex}\\, {latex(inner)}", f"{r.known.slope_text} {text(inner)}")
            yield Line(
                left, right, (_SLOPE, " times the derivative of the covariance of ", ("u", "u"), " and ", _OTHER)
            )
        else:
            a, b = s, tm.primed(s)
            right = (
                rf"\sum_{{a,b}} \mathbb{{E}}\left[\partial_a {latex(a)}\, \partial_{{b}} {latex(b)}\right]"
                r"\, \Theta\left[a,\, b'\right]",
                f"Σ_ab E[∂_a {text(a)} ∂_b {text(b)}] Θ[a, b']",
            )
            yield Line(left, right, ("a and b over ", *_over(r), " (Price)"))


def _over(r: Rule) -> Words:
    if not r.earlier:
        return _listed(r.arguments)
    return (
        *_listed(r.arguments),
        " and the Gaussians of the steps before" if r.arguments else "the Gaussians of all steps",
    )


def _crosses(found: Sequence[Cross], derivative: bool, layers: bool) -> Iterable[Line]:
    """What a parameter that is used again adds."""
    pair = tm.theta if derivative else tm.expectation
    for c in found:
        right = c.theta if derivative else c.covariance
        remark: Words = ("the parameter is used again: the products share it",)
        if layers:
            remark += ("; what holds for two equal layers holds for any two, ", ("\\ell", "ℓ"), " and ", ("m", "m"))
        if right is not None:
            yield Line(pair(c.ket, c.product), right, remark)
            continue
        inner = (f"{latex(pair(Sym('a'), c.product))}", f"{text(pair(Sym('a'), c.product))}")
        stein = (
            rf"\sum_a \mathbb{{E}}\left[\partial_a {latex(c.ket)}\right]\, {inner[0]}",
            f"Σ_a E[∂_a {text(c.ket)}] {inner[1]}",
        )
        yield Line(pair(c.ket, c.product), stein, ("a over ", *_listed(c.arguments), " (Stein's lemma)"))


_OTHER = ("u'", "u'")


__all__ = ["Explanation", "derivation", "explain"]
