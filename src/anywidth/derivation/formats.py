"""Sections of a derivation as Markdown, LaTeX or plain text.

What is too long for a line is broken where a sum's terms are added.

>>> from anywidth.derivation.terms import Sym, add
>>> print(markdown(Section("Sum", ("n is the width:",), (Line(Sym("a"), add(Sym("b"), Sym("c"))),))))
### Sum
<BLANKLINE>
n is the width:
<BLANKLINE>
$$ a = b + c $$
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from anywidth.derivation.printing import BAR, latex, text
from anywidth.derivation.terms import Op, Term, neg, negative

# Words and formulas: a formula is a term, or its LaTeX and its text.
Formula = Term | tuple[str, str]
Words = tuple[str | Formula, ...]

PLAIN_ROW = 100  # characters of a line in a terminal
TEX_ROW = 96  # of an equation as it would be in a terminal: more does not fit a column of a page


@dataclass(frozen=True)
class Line:
    """A formula, and what is said of it."""

    left: Term
    right: Formula
    remark: Words = ()


@dataclass(frozen=True)
class Values:
    """The numbers of a kernel: of each of its outputs an array."""

    arrays: tuple[np.ndarray, ...]


Cell = str | Term | Values


@dataclass(frozen=True)
class Section:
    title: str
    prose: Words
    lines: tuple[Line, ...] = ()
    table: tuple[tuple[Cell, ...], ...] = ()  # its first row is the head


def values(kernel: Any) -> Values:
    return Values(tuple(np.asarray(a) for a in jax.tree.leaves(kernel)))


def plain(s: Section) -> str:
    out = [s.title, *textwrap.wrap(_text_words(s.prose), 100)]
    for line in s.lines:
        formula = f"  {text(line.left)} = {_formula(line.right, False)}"
        remark = _text_words(line.remark)
        if len(formula) <= 44 and len(remark) <= 40:
            out.append((formula + " " * (46 - len(formula.replace(BAR, ""))) + remark).rstrip())
        else:
            left = f"  {text(line.left)} ="
            first, *more = _rows(line.right, False, PLAIN_ROW - len(left) - 1, PLAIN_ROW - 6)
            if len(left) + 1 + len(first) <= PLAIN_ROW:
                left, first = f"{left} {first}", ""
            out.append(left)
            for row in (first, *more):
                out += textwrap.wrap(
                    row,
                    PLAIN_ROW,
                    initial_indent=" " * 6,
                    subsequent_indent=" " * 10,
                    break_on_hyphens=False,
                    break_long_words=False,
                )
            out += textwrap.wrap(remark, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    if s.table:
        table = [[_cell(c, False).split("\n") for c in row] for row in s.table]
        widths = [max(len(part) for c in column for part in c) for column in zip(*table, strict=True)]
        for cells in table:
            for k in range(max(map(len, cells))):
                parts = [c[k] if k < len(c) else "" for c in cells]
                out.append("  " + "  ".join(c.ljust(w) for c, w in zip(parts, widths, strict=True)).rstrip())
    return "\n".join(out)


def markdown(s: Section) -> str:
    out = [f"### {s.title}", *([_tex_words(s.prose, str)] if s.prose else [])]
    for line in s.lines:
        remark, short = _tex_words(line.remark, str), _beside(line)
        first, *more = _tex_rows(line)
        formula = f"{latex(line.left)} = {first}"
        if more:
            rows = r" \\ ".join([f"{latex(line.left)} &= {first}", *(rf"&\quad {{}} {row}" for row in more)])
            formula = rf"\begin{{aligned}} {rows} \end{{aligned}}"
        elif remark and short:
            formula, remark = rf"{formula} \qquad \text{{{remark}}}", ""
        out += [f"$$ {formula} $$", *([remark] if remark else [])]
    if s.table:
        head, *body = ["| " + " | ".join(_cell(c, True) for c in row) + " |" for row in s.table]
        out.append("\n".join([head, "|" + " --- |" * len(s.table[0]), *body]))
    return "\n\n".join(out)


def tex(s: Section) -> str:
    out = [rf"\subsection*{{{s.title}}}", *([_tex_words(s.prose, _escaped)] if s.prose else [])]
    rows: list[str] = []

    def aligned() -> Iterable[str]:
        if rows:
            yield "\\begin{align*}\n" + " \\\\\n".join(rows) + "\n\\end{align*}"
        rows.clear()

    for line in s.lines:
        remark = _tex_words(line.remark, _escaped)
        first, *more = _tex_rows(line)
        rows += [f"{latex(line.left)} &= {first}", *(rf"&\quad {{}} {row}" for row in more)]
        if remark and _beside(line) and not more:
            rows[-1] += rf" && \text{{{remark}}}"
        elif remark:  # a paragraph, since an equation is not broken by itself
            out += [*aligned(), rf"\noindent {remark}."]
    out += aligned()
    if s.table:
        body = " \\\\\n".join(" & ".join(_tex_cell(c) for c in row) for row in s.table)
        out.append(rf"\begin{{tabular}}{{{'l' * len(s.table[0])}}}" + "\n" + body + "\n\\end{tabular}")
    return "\n\n".join(out)


def _beside(line: Line) -> bool:
    """Whether what is said of a formula has room beside it."""
    remark = len(_text_words(line.remark))
    return remark <= 40 and len(text(line.left)) + len(_formula(line.right, False)) + remark <= TEX_ROW


def _tex_rows(line: Line) -> list[str]:
    room = TEX_ROW - 3 - len(text(line.left))
    return _rows(line.right, True, room, room)


def _rows(f: Formula, tex: bool, first_row: int, row: int) -> list[str]:
    """A formula, in rows if it is a sum that is too long for one."""
    if not (isinstance(f, Op) and f.head == "add") or len(text(f)) <= first_row:
        return [_formula(f, tex)]
    rows: list[list[Term]] = [[]]
    for t in f.args:
        if rows[-1] and sum(len(text(u)) + 3 for u in (*rows[-1], t)) > (row if len(rows) > 1 else first_row):
            rows.append([])
        rows[-1].append(t)
    write = latex if tex else text
    signed = [[("- " if negative(t) else "+ ") + write(neg(t) if negative(t) else t) for t in row] for row in rows]
    first, *others = (" ".join(row) for row in signed)
    return [first.removeprefix("+ ").replace("- ", "-", 1) if first[0] == "-" else first.removeprefix("+ "), *others]


# --- words and numbers ---------------------------------------------------------------------------------


def _formula(f: Formula, tex: bool) -> str:
    if isinstance(f, tuple):
        return f[0 if tex else 1]
    return latex(f) if tex else text(f)


def _text_words(words: Words) -> str:
    return "".join(w if isinstance(w, str) else _formula(w, False) for w in words)


def _tex_words(words: Words, escape: Callable[[str], str]) -> str:
    return "".join(escape(w) if isinstance(w, str) else f"${_formula(w, True)}$" for w in words)


def _cell(c: Cell, marked: bool) -> str:
    if isinstance(c, Values):
        return ("; " if marked else "\n").join(_array(a, marked) for a in c.arrays)
    if isinstance(c, str):
        return f"`{c}`" if marked and c.startswith("[") else c
    return f"${latex(c)}$" if marked else text(c)


def _tex_cell(c: Cell) -> str:
    return _escaped(c) if isinstance(c, str) else _cell(c, True)


def _array(a: np.ndarray, tex: bool) -> str:
    """A number with six digits, an array with four; the middle of a long axis is left out."""
    if a.size == 1:
        return f"{float(a.reshape(())):.6g}"
    if not tex or a.ndim > 2:
        shown = np.array2string(a, precision=4, threshold=64, suppress_small=True)
        return f"`{' '.join(shown.split())}`" if tex else shown
    return _matrix(np.atleast_2d(a))


def _matrix(a: np.ndarray) -> str:
    def shown(size: int) -> Sequence[int | None]:
        return [0, 1, 2, None, size - 2, size - 1] if size > 8 else range(size)

    columns = shown(a.shape[1])
    rows = [
        " & ".join(r"\cdots" if j is None or i is None else f"{a[i, j]:.4f}" for j in columns)
        for i in shown(a.shape[0])
    ]
    return r"$\begin{bmatrix} " + r" \\ ".join(rows) + r" \end{bmatrix}$"


_ESCAPES = {
    "_": r"\_", "^": r"\^{}", "&": r"\&", "#": r"\#", "%": r"\%", "ε": r"$\varepsilon$", "∂": r"$\partial$",
    "≤": r"$\le$", "×": r"$\times$", "·": r"$\cdot$", "∫": r"$\int$", "√": r"$\surd$", "π": r"$\pi$", "²": "$^2$",
}  # fmt: skip


def _escaped(s: str) -> str:
    return "".join(_ESCAPES.get(c, c) for c in s)
