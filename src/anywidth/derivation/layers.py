"""Layers that repeat are written once: the longest run of equal blocks of definitions, as one block with an index.

Two definitions are equal if one becomes the other when every symbol is replaced by how far back it was defined, and
every number in the name of a parameter by its distance from the block's.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from anywidth.derivation import terms as tm
from anywidth.derivation.read import Definition
from anywidth.derivation.terms import Index, Sym, Term

LAYER = Index("ℓ")


@dataclass(frozen=True)
class Block:
    """`template` holds for `first <= ℓ <= last`."""

    template: tuple[Definition, ...]
    first: int
    last: int

    @property
    def sample(self) -> int:
        """The layer that the template was made of: the first one with another before it."""
        return self.first + 1


Item = Definition | Block


def bare(s: Sym) -> Sym:
    return replace(s, sub=(), primed=False)


def compressed(definitions: Sequence[Definition]) -> tuple[list[Item], list[Definition]]:
    """The definitions with their longest repetition as a block, and all of them under the names used there."""
    found = _longest(definitions)
    if found is None:
        return list(definitions), list(definitions)
    start, period, count = found
    first = _first_number(definitions[start : start + 2 * period], period)
    table: dict[Sym, Sym] = {}
    template = definitions[start : start + period]
    for i in range(max(0, start - period), start + count * period):
        k, position = divmod(i - start, period)
        d, like = definitions[i], template[position]
        if d.symbol.name == like.symbol.name:  # before the first block stands what its layer refers back to
            same = [m for m in template if m.symbol.name == like.symbol.name]
            sup = (k + first,) if len(same) == 1 else (k + first, same.index(like) + 1)
            table[bare(d.symbol)] = replace(bare(d.symbol), sup=sup)
    _out_of_the_way(definitions, table)
    named = [_renamed(d, table) for d in definitions]
    second = named[start + period : start + 2 * period]
    layer = first + 1
    numbers = {n for d in second for n in _numbers(d)} - {n for d in named[start : start + period] for n in _numbers(d)}
    template_ = tuple(_generic(d, layer, numbers) for d in second)
    template_ = tuple(
        replace(d, places=frozenset().union(*(e.places for e in named[start + i : start + period * count : period])))
        for i, d in enumerate(template_)
    )
    items: list[Item] = [*named[:start], Block(template_, first, first + count - 1), *named[start + period * count :]]
    return items, named


def _longest(definitions: Sequence[Definition]) -> tuple[int, int, int] | None:
    keys = [_key(definitions, i) for i in range(len(definitions))]
    best: tuple[int, int, int] | None = None
    for period in range(1, len(keys) // 2 + 1):
        for start in range(len(keys) - 2 * period + 1):
            count = 1
            while (
                start + (count + 1) * period <= len(keys)
                and keys[start + count * period : start + (count + 1) * period] == keys[start : start + period]
                and _steady(definitions, start, period, count)
            ):
                count += 1
            longer = best is None or (count * period, -period, start) > (best[1] * best[2], -best[1], best[0])
            if count > 1 and longer and any(d.kind != "start" for d in definitions[start : start + period]):
                best = (start, period, count)
    return best


def _key(definitions: Sequence[Definition], i: int) -> Term:
    place = {bare(d.symbol): k for k, d in enumerate(definitions[: i + 1])}

    def f(t: Term) -> Term | None:
        if isinstance(t, Sym):
            sub = tuple(tm.mapped(s, f) for s in t.sub)
            if t.parameter:
                return replace(t, sup=(), leaf="any", sub=sub)
            if bare(t) in place:
                return Sym(f"back{i - place[bare(t)]}", (), sub)
        return None

    d = definitions[i]
    alone = (i,) if d.kind == "output" else ()
    return Sym(d.symbol.name, (d.kind, *alone), (tm.mapped(d.body, f), *d.indices, *d.symbol.sub))


def _numbers(d: Definition) -> list[int]:
    return [s for t in tm.walk(d.body) if isinstance(t, Sym) and t.parameter for s in t.sup if isinstance(s, int)]


def _steady(definitions: Sequence[Definition], start: int, period: int, count: int) -> bool:
    """Whether the parameters' numbers go up by one from block to block (weights shared by all layers stay)."""
    first, last = (definitions[start + k * period : start + (k + 1) * period] for k in (0, count))
    a, b = ([n for d in block for n in _numbers(d)] for block in (first, last))
    return len({y - x for x, y in zip(a, b, strict=True)}) <= 1 and all(
        y - x in (0, count) for x, y in zip(a, b, strict=True)
    )


def _first_number(blocks: Sequence[Definition], period: int) -> int:
    """The number of the first layer: that of its parameters, if they are numbered."""
    one, two = ([n for d in block for n in _numbers(d)] for block in (blocks[:period], blocks[period:]))
    return next((a for a, b in zip(one, two, strict=True) if b == a + 1), 1)


def _out_of_the_way(definitions: Sequence[Definition], table: dict[Sym, Sym]) -> None:
    """Symbols outside the blocks must not have the names of those inside."""
    taken = {s.name: {t.sup[0] for t in table.values() if t.name == s.name} for s in table.values()}
    inside = set(table)
    before = True
    for d in definitions:
        s = bare(d.symbol)
        before = before and s not in inside
        if s not in table and s.name in taken:
            free = itertools.count(1 if before else max(taken[s.name]) + 1)  # type: ignore[operator, type-var]
            number = next(k for k in free if k not in taken[s.name])
            taken[s.name].add(number)
            table[s] = replace(s, sup=(number,))


def _renamed(d: Definition, table: Mapping[Sym, Sym]) -> Definition:
    def f(t: Term) -> Term | None:
        if isinstance(t, Sym) and bare(t) in table:
            return replace(t, sup=table[bare(t)].sup, sub=tuple(tm.mapped(s, f) for s in t.sub))
        return None

    symbol = tm.mapped(d.symbol, f)
    assert isinstance(symbol, Sym)
    return replace(d, symbol=symbol, body=tm.mapped(d.body, f))


def _generic(d: Definition, layer: int, numbers: set[int]) -> Definition:
    """A definition of one layer with its number as an index."""

    def f(t: Term) -> Term | None:
        if not isinstance(t, Sym):
            return None
        sub = tuple(tm.mapped(s, f) for s in t.sub)
        if t.parameter:
            sup = tuple(replace(LAYER, shift=n - layer) if n in numbers else n for n in t.sup)
            return replace(t, sup=sup, sub=sub)
        if t.sup and isinstance(t.sup[0], int) and t.sup[0] in (layer, layer - 1):
            return replace(t, sup=(replace(LAYER, shift=t.sup[0] - layer), *t.sup[1:]), sub=sub)
        return replace(t, sub=sub)

    symbol = tm.mapped(d.symbol, f)
    assert isinstance(symbol, Sym)
    return replace(d, symbol=symbol, body=tm.mapped(d.body, f))
