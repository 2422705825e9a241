"""The derivation as a document: sections, in Markdown, LaTeX or plain text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from anywidth.derivation import terms as tm
from anywidth.derivation.contributions import contributions
from anywidth.derivation.derive import Rule, rules
from anywidth.derivation.layers import Block, Item
from anywidth.derivation.read import Definition
from anywidth.derivation.reading import Reading, reading
from anywidth.derivation.terms import Op, Sym, Term
from anywidth.network import Network


@dataclass(frozen=True)
class Line:
    """A formula, and what is said of it."""

    left: Term
    right: Term | tuple[str, str]  # a term, or LaTeX and text
    remark: str = ""


@dataclass(frozen=True)
class Section:
    title: str
    prose: str
    lines: tuple[Line, ...] = ()
    table: tuple[tuple[str, ...], ...] = ()  # its first row is the head
    after: str = ""


@dataclass(frozen=True)
class Explanation:
    """The derivation of a network's kernels.

    Shown as Markdown in a notebook and as text by `print`; `latex()` is for a paper. `contributions` is what each
    parameter adds to the NTK at the given examples, by the parameter's path in `init(n)`: they sum to `aw.ntk(net)(x, y)`.
    """

    sections: tuple[Section, ...]
    contributions: Mapping[str, Any]

    def __str__(self) -> str:
        return "\n\n".join(_plain(s) for s in self.sections)

    def __repr__(self) -> str:
        return str(self)

    def _repr_markdown_(self) -> str:
        return "\n\n".join(_markdown(s) for s in self.sections)

    def latex(self) -> str:
        """A LaTeX fragment; needs amsmath and amssymb."""
        return "\n\n".join(_tex(s) for s in self.sections)


def explain(net: Network, x: Any, y: Any = None) -> Explanation:
    """The derivation of the NNGP and the NTK of a network on examples like x.

    Args:
        net: the network.
        x: an example; the derivation is of the program that the network is on its shapes.
        y: another example, perhaps of another shape, for the table of contributions; x if None.

    Returns:
        An `Explanation`: the random vectors under the names of the parameters, what is Gaussian and why, every covariance
        recursion, each expectation with its closed form or method, where averages over the width become numbers,
        the NTK as the derivative in epsilon, and what each parameter contributes to it.

    Raises:
        NoLimitError, UnsupportedError, InputError: as `aw.ntk` does; a network without a limit has no derivation.

    Reference: Yang, Tensor Programs II (2020).
    """
    x = jax.tree.map(jnp.asarray, x)
    y = x if y is None else jax.tree.map(jnp.asarray, y)
    shares, nngp, ntk = contributions(net, x, y)
    sections = _sections(reading(net, x), shares, nngp, ntk)
    return Explanation(tuple(sections), shares)


# --- sections ------------------------------------------------------------------------------------------


def _full(d: Definition) -> Sym:
    return d.symbol if d.symbol.sub else replace(d.symbol, sub=d.indices)


def _each(items: Iterable[Item]) -> Iterable[tuple[Definition, str]]:
    """The definitions with the range of ℓ."""
    for item in items:
        if isinstance(item, Block):
            for d in item.template:
                yield d, f"{item.first} ≤ ℓ ≤ {item.last}"
        else:
            yield item, ""


_KINDS = {
    "gaussian": "Gaussian",
    "number": "a number (fact 1)",
    "start": "before the loop",
    "output": "the output, Gaussian",
}


def _sections(read: Reading, shares: Mapping[str, Any], nngp: Any, ntk: Any) -> Iterable[Section]:
    shown = list(_each(read.items))
    lines = []
    for d, where in shown:
        remark = ", ".join(r for r in (_KINDS.get(d.kind, "Gaussian" if d.gaussian else ""), where) if r)
        lines.append(Line(_full(d), d.body, remark))
    loops = "".join(f" {t} = 1, ..., {size} is the step of a loop." for t, size in read.steps.items())
    yield Section(
        "Random vectors",
        "Each symbol is a vector of n coordinates that become independent and identically distributed as n grows (one for every "
        "value of its indices), or a number. A product with a Gaussian matrix is Gaussian (fact 2), and independent of "
        "the products with every other parameter; sums of Gaussians are Gaussian." + loops,
        tuple(lines),
        _variances(read),
    )
    averages = _averages(shown)
    if averages:
        yield Section(
            "Averages become numbers",
            "An average over the width is the expectation of one coordinate (fact 1).",
            tuple(Line(a, _average(a)) for a in averages),
        )
    sample = next((i.sample for i in read.items if isinstance(i, Block)), 0)
    generic = rules([d for d, _ in shown], read.definitions, sample)
    yield Section(
        "NNGP",
        "Primes mark the network on the other example; E[a b'] is the inner product a·b'/n. Within one example the same holds "
        "without primes.",
        tuple(_covariances(generic)),
    )
    yield Section(
        "NTK",
        "Let each parameter and its twin in the other copy have covariance var + ε. The NTK is the derivative in ε at 0 of the NNGP "
        "(Price's theorem), written Θ[a, b'] = ∂/∂ε E[a b']; each product with a parameter adds the inner product of what it is "
        "multiplied by.",
        tuple(_thetas(generic)),
    )
    rows = [("parameter", "its share of the NTK")]
    rows += [(tm.text(read.names[k]), _value(v)) for k, v in shares.items()]
    rows.append(("sum: the NTK", _value(ntk)))
    yield Section("At the given examples", f"The NNGP is {_value(nngp)}.", (), tuple(rows))


def _variances(read: Reading) -> tuple[tuple[str, ...], ...]:
    rows = [("parameter", "in init(n)", "shape", "variance")]
    for p in read.parameters.items:
        shape = " × ".join(str(s) for s in p.leaf.shape) or "1"
        value = p.leaf.var
        var = "traced" if isinstance(value, jax.core.Tracer) else f"{float(value):.6g}"
        var += f" n^{2 * p.leaf.size}" if p.leaf.size else ""
        var += " (constant, trained)" if p.leaf.zero_var else ""
        rows.append((tm.text(read.names[p.leaf.name]), p.leaf.name, shape, var))
    return tuple(rows)


def _averages(shown: Sequence[tuple[Definition, str]]) -> list[Op]:
    found: list[Op] = []
    for d, _ in shown:
        for t in tm.walk(d.body):
            if isinstance(t, Op) and t.head == "E" and t not in found:
                found.append(t)
    return found


def _average(t: Op) -> tuple[str, str]:
    inside = tm.mul(*t.args)
    return (rf"\lim \frac{{1}}{{n}}\sum_{{\alpha=1}}^n {tm.latex(inside)}", f"lim 1/n Σ_α {tm.text(inside)}")


def _covariances(generic: Sequence[Rule]) -> Iterable[Line]:
    for r in generic:
        s = _full(r.definition)
        left = tm.expectation(s, tm.primed(s))
        if r.covariance is not None:
            yield Line(left, r.covariance)
        elif r.known is not None and r.argument is not None:
            u = r.argument
            q, c = tm.expectation(u, u), tm.expectation(u, tm.primed(u))
            remark = f"q = {tm.text(q)}, q' = {tm.text(tm.expectation(tm.primed(u), tm.primed(u)))}, c = {tm.text(c)}; {r.method}"
            yield Line(left, (r.known.latex, r.known.text), remark)
        else:
            body = tm.expectation(r.definition.body, tm.primed(r.definition.body))
            yield Line(left, body, f"over {', '.join(tm.text(a) for a in r.arguments)}; {r.method}")


def _thetas(generic: Sequence[Rule]) -> Iterable[Line]:
    for r in generic:
        s = _full(r.definition)
        left = tm.theta(s, tm.primed(s))
        if r.theta is not None:
            yield Line(left, r.theta)
        elif r.known is not None and r.argument is not None:
            inner = tm.theta(r.argument, tm.primed(r.argument))
            right = (f"{r.known.slope_latex}\\, {tm.latex(inner)}", f"{r.known.slope_text} {tm.text(inner)}")
            yield Line(left, right, "E[φ'(u) φ'(u')] times the derivative of the covariance of u and u'")
        else:
            phi = tm.text(_full(r.definition))
            tex = tm.latex(_full(r.definition))
            right = (
                rf"\sum_{{a,b}} \mathbb{{E}}\left[\partial_a {tex}\, \partial_{{b}} {tm.latex(tm.primed(_full(r.definition)))}\right]"
                r"\, \Theta\left[a,\, b'\right]",
                f"Σ_ab E[∂_a {phi} ∂_b {tm.text(tm.primed(_full(r.definition)))}] Θ[a b']",
            )
            yield Line(left, right, f"a and b over {', '.join(tm.text(a) for a in r.arguments)} (Price)")


def _value(v: Any) -> str:
    leaves = [np.asarray(a) for a in jax.tree.leaves(v)]
    if len(leaves) == 1 and leaves[0].size == 1:
        return f"{float(leaves[0].reshape(())):.6g}"
    return "; ".join(np.array2string(a, precision=4, threshold=16, separator=", ").replace("\n", " ") for a in leaves)


# --- printing ------------------------------------------------------------------------------------------


def _right(line: Line, tex: bool) -> str:
    if isinstance(line.right, tuple):
        return line.right[0 if tex else 1]
    return tm.latex(line.right) if tex else tm.text(line.right)


def _plain(s: Section) -> str:
    out = [s.title, *textwrap.wrap(s.prose, 100)]
    for line in s.lines:
        formula = f"  {tm.text(line.left)} = {_right(line, False)}"
        out.append(f"{formula:<46}{'' if not line.remark else '  ' + line.remark}".rstrip())
    if s.table:
        widths = [max(len(row[k]) for row in s.table) for k in range(len(s.table[0]))]
        out += ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in s.table]
    return "\n".join(out)


def _markdown(s: Section) -> str:
    out = [f"### {s.title}", s.prose]
    for line in s.lines:
        out.append(
            f"$$ {tm.latex(line.left)} = {_right(line, True)} $$"
            + (f"\n\n<small>{line.remark}</small>" if line.remark else "")
        )
    if s.table:
        head, *rows = s.table
        out.append(
            "\n".join(
                [
                    "| " + " | ".join(head) + " |",
                    "|" + " --- |" * len(head),
                    *("| " + " | ".join(r) + " |" for r in rows),
                ]
            )
        )
    return "\n\n".join(out)


def _tex(s: Section) -> str:
    out = [rf"\subsection*{{{s.title}}}", _escaped(s.prose)]
    if s.lines:
        rows = [
            rf"{tm.latex(line.left)} &= {_right(line, True)}"
            + (rf" && \text{{{_escaped(line.remark)}}}" if line.remark else "")
            for line in s.lines
        ]
        out.append("\\begin{align*}\n" + " \\\\\n".join(rows) + "\n\\end{align*}")
    if s.table:
        body = " \\\\\n".join(" & ".join(_escaped(c) for c in row) for row in s.table)
        out.append(rf"\begin{{tabular}}{{{'l' * len(s.table[0])}}}" + "\n" + body + "\n\\end{tabular}")
    return "\n\n".join(out)


_ESCAPES = {
    "_": r"\_", "^": r"\^{}", "&": r"\&", "#": r"\#", "%": r"\%", "ε": r"$\varepsilon$", "Θ": r"$\Theta$", "∂": r"$\partial$", "Σ": r"$\Sigma$",
    "≤": r"$\le$", "ℓ": r"$\ell$", "φ": r"$\varphi$", "×": r"$\times$", "·": r"$\cdot$", "∫": r"$\int$", "√": r"$\surd$", "π": r"$\pi$", "²": "$^2$",
}  # fmt: skip


def _escaped(s: str) -> str:
    return "".join(_ESCAPES.get(c, c) for c in s)


__all__ = ["Explanation", "explain"]
