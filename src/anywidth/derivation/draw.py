"""The program as a picture: what is drawn from what, from the inputs and parameters at the top to the output."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from anywidth.derivation import terms as tm
from anywidth.derivation.layers import bare
from anywidth.derivation.printing import BAR, text
from anywidth.derivation.read import Definition
from anywidth.derivation.reading import Reading, reading
from anywidth.derivation.terms import Index, Op, Sym, Term
from anywidth.network import Network

_CHAR, _HEIGHT, _GAP, _ROW = 7.2, 30.0, 18.0, 62.0
_SMALL = 0.78  # of indices
_MARKED = re.compile(r"([_^])(\([^()]*\)|\{[^{}]*\}|[^\W_]+)")
_FILL = {
    "input": "#e8e8e8",
    "parameter": "#fdf3d0",
    "gaussian": "#d6e6f7",
    "activation": "#dcf0d8",
    "number": "#f6dce4",
    "output": "#d6e6f7",
}


@dataclass(frozen=True)
class Node:
    label: str
    kind: str
    sources: tuple[int, ...]
    group: str = ""


@dataclass(frozen=True)
class Drawing:
    """An SVG picture, shown in a notebook; `save(path)` writes it."""

    svg: str

    def _repr_svg_(self) -> str:
        return self.svg

    def save(self, path: str | Path) -> Path:
        """Write the picture to a file ending in .svg."""
        path = Path(path)
        path.write_text(self.svg, encoding="utf-8")
        return path


def draw(net: Network, x: Any) -> Drawing:
    """The program of a network on an example as a graph.

    Parameters are yellow, Gaussians (products with parameters and their sums) blue, coordinatewise functions green,
    numbers that were averages over the width red. A layer that repeats is drawn once, with the range of its number; the
    arrow back into a loop is dashed.

    Raises:
        NoLimitError: the program is another one at every width; any other may be drawn, whether it has a limit or not.
    """
    return Drawing(_svg(_nodes(reading(net, jax.tree.map(jnp.asarray, x), methods=False))))


def _nodes(read: Reading) -> list[Node]:
    nodes: list[tuple[str, str, Term | None, str, int]] = []
    place: dict[Sym, int] = {}

    def node(key: Sym, label: str, kind: str, body: Term | None = None, group: str = "", first: int = 0) -> None:
        for t in tm.walk(body) if body is not None else ():
            if isinstance(t, Sym) and t.parameter and bare(t) not in place:
                place[bare(t)] = len(nodes)
                nodes.append((text(bare(t)), "parameter", None, group, 0))
        place[key] = len(nodes)
        nodes.append((label, kind, body, group, first))

    for s in read.inputs:
        node(s, text(s), "input")
    for item in read.items:
        if isinstance(item, Definition):
            if item.kind != "start":
                node(bare(item.symbol), _label(item), _kind(item), item.body)
            continue
        for d in item.template:
            node(bare(d.symbol), _label(d), _kind(d), d.body, f"{item.first} ≤ ℓ ≤ {item.last}", item.first)
            place[_layer(bare(d.symbol), item.last)] = place[bare(d.symbol)]  # what follows speaks of the last layer

    def sources(body: Term | None, first: int) -> tuple[int, ...]:
        found: list[int] = []
        for t in tm.walk(body) if body is not None else ():
            if isinstance(t, Sym):
                wanted = [bare(t), _layer(bare(t), first)]  # of the layer before: also what the first layer starts from
                wanted += [
                    replace(bare(t), sup=tuple(replace(i, shift=0) if isinstance(i, Index) else i for i in t.sup))
                ]
                found += [place[w] for w in wanted if w in place and place[w] not in found]
        return tuple(dict.fromkeys(found))

    return [Node(label, kind, sources(body, first), group) for label, kind, body, group, first in nodes]


def _layer(s: Sym, layer: int) -> Sym:
    return replace(s, sup=tuple(layer + i.shift if isinstance(i, Index) else i for i in s.sup))


def _kind(d: Definition) -> str:
    if d.kind in ("number", "output"):
        return d.kind
    return "gaussian" if d.gaussian else "activation"


def _label(d: Definition) -> str:
    left = text(Sym(d.symbol.name, d.symbol.sup, d.symbol.sub or d.indices))
    body = d.body
    what = f" = {text(body)}"
    if isinstance(body, Op) and body.head.startswith("fn:") and len(what) > 44:
        what = f" = {body.head.removeprefix('fn:')}(…)"
    if len(what) > 44:
        what = what[:43]
        while what.count("{") > what.count("}"):  # not within an index
            what = what[: what.rindex("{")]
        what = what.rsplit(" ", 1)[0] + " …"
    return left + what


def _pieces(label: str) -> list[tuple[str, str]]:
    """A label as what stands on the line (""), above it ("^") and below it ("_")."""
    out, end = [], 0
    for m in _MARKED.finditer(label):
        out += [("", label[end : m.start()]), (m[1], m[2].strip("{}"))]
        end = m.end()
    return [(where, piece) for where, piece in (*out, ("", label[end:])) if piece]


def _width(label: str) -> float:
    return sum(len(piece.replace(BAR, "")) * (_SMALL if where else 1.0) for where, piece in _pieces(label)) * _CHAR + 16


def _written(label: str) -> str:
    out, level = [], 0.0
    for where, piece in _pieces(label):
        wanted = {"": 0.0, "^": -4.0, "_": 3.0}[where]
        small = f' font-size="{12 * _SMALL:.1f}"' if where else ""
        out.append(f'<tspan dy="{wanted - level:g}"{small}>{escape(piece)}</tspan>')
        level = wanted
    return "".join(out)


def _curve(*points: tuple[float, float]) -> str:
    start, *others = (f"{x:.1f},{y:.1f}" for x, y in points)
    return f"M{start} C{' '.join(others)}"


def _free_side(rows: Mapping[int, Sequence[int]], level: Sequence[int], j: int, i: int) -> int:
    """-1 or 1: on the left or on the right nothing stands beside either of two nodes with others between; else 0."""
    if level[i] - level[j] > 1:
        for side, end in ((-1, 0), (1, -1)):
            if rows[level[j]][end] == j and rows[level[i]][end] == i:
                return side
    return 0


def _svg(nodes: Sequence[Node]) -> str:
    level = [0] * len(nodes)
    for i, n in enumerate(nodes):
        level[i] = max((level[j] + 1 for j in n.sources if j < i), default=0)
    for i in reversed(range(len(nodes))):  # parameters and inputs stand right above what uses them
        users = [level[k] for k, m in enumerate(nodes) if i in m.sources and k > i]
        if not nodes[i].sources and users:
            level[i] = min(users) - 1
    rows: dict[int, list[int]] = {}
    shown_groups: set[str] = set()
    for i in range(len(nodes)):
        rows.setdefault(level[i], []).append(i)
    width = [_width(n.label) for n in nodes]
    margin = (90.0 if any(n.group for n in nodes) else 20.0) + 24.0
    inner = max(sum(width[i] + _GAP for i in row) for row in rows.values())
    total = margin + inner + 60
    x: dict[int, float] = {}
    for key in sorted(rows):
        row = rows[key]
        wish = {
            i: sum(x[j] for j in nodes[i].sources if j in x) / max(1, sum(j in x for j in nodes[i].sources))
            for i in row
        }
        row.sort(key=lambda i: (wish[i] or margin + inner / 2, i))
        left = margin + (inner - sum(width[i] + _GAP for i in row)) / 2
        for i in row:
            x[i] = left + width[i] / 2
            left += width[i] + _GAP
    y = {i: 30 + level[i] * _ROW for i in range(len(nodes))}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total:.0f} {max(y.values()) + 50:.0f}" '
        f'width="{total:.0f}" font-family="DejaVu Sans, sans-serif" font-size="12" role="img">',
        '<defs><marker id="aw-arrow" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" fill="#808080"/></marker></defs>',
    ]
    for i, n in enumerate(nodes):
        for j in n.sources:
            back = j >= i
            x1, y1, x2, y2 = x[j], y[j] + _HEIGHT / 2, x[i], y[i] - _HEIGHT / 2
            bend = (y2 - y1) / 2
            path = _curve((x1, y1), (x1, y1 + bend), (x2, y2 - bend), (x2, y2))
            side = _free_side(rows, level, j, i) if nodes[j].sources else 0
            if back:
                start, end = x[j] + width[j] / 2, x[i] + width[i] / 2
                out, open_ = (start + 50, 25.0) if i == j else (total - 6, 0.0)
                path = _curve((start, y[j]), (out, y[j] + open_), (out, y[i] - open_), (end, y[i]))
            elif side:  # past what stands between
                passed = [k for u in range(level[j], level[i] + 1) for k in rows[u]]
                out = side * (max(side * x[k] + width[k] / 2 for k in passed) + 8)
                start, end = (x[k] + side * width[k] / 2 for k in (j, i))
                out = (out - (start + end) / 8) / 0.75  # where a curve with these ends turns
                path = _curve((start, y[j]), (out, y[j]), (out, y[i]), (end, y[i]))
            dash = ' stroke-dasharray="5 4"' if back else ""
            parts.append(f'<path d="{path}" fill="none" stroke="#808080"{dash} marker-end="url(#aw-arrow)"/>')
    for i, n in enumerate(nodes):
        fill = _FILL[n.kind]
        parts.append(
            f'<rect x="{x[i] - width[i] / 2:.1f}" y="{y[i] - _HEIGHT / 2:.1f}" width="{width[i]:.1f}" '
            f'height="{_HEIGHT:.0f}" rx="6" fill="{fill}" stroke="#999"/>'
            f'<text x="{x[i]:.1f}" y="{y[i] + 4:.1f}" text-anchor="middle" fill="#111">{_written(n.label)}</text>'
        )
        if n.group and n.group not in shown_groups and n.kind != "parameter":
            shown_groups.add(n.group)
            parts.append(f'<text x="8" y="{y[i] + 4:.1f}" fill="#808080" font-size="11">{escape(n.group)}</text>')
    return "\n".join([*parts, "</svg>"])


__all__ = ["Drawing", "draw"]
