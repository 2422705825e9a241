"""Which coordinates of its width axes a parameter is used with: all of them, a part, blocks.

A parameter of a network with two widths may have coordinates that are numbered by both of them, along one axis or two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from anywidth.errors import UnsupportedError
from anywidth.trace import Size, add_sizes, kind_of


@dataclass(frozen=True)
class Rows:
    """Which coordinates of a width axis of a parameter: `size` from `offset` on, split into blocks."""

    axis: int
    offset: Size
    size: Size
    splits: tuple[int, ...] = ()  # +H: the block index is the major one, -H: the minor one
    also: tuple[tuple[int, Size], ...] = ()  # (axis, size) of an axis of the other width, taken whole

    @property
    def level(self) -> frozenset[str]:
        """Which widths the coordinates are numbered by."""
        return frozenset().union(kind_of(self.size), *(kind_of(s) for _, s in self.also))

    @property
    def wide(self) -> bool:
        """Whether their number grows with the width."""
        return not isinstance(self.size, int)


def rows_of(axes: Sequence[Rows]) -> Rows | None:
    """The rows that are numbered by all of these axes, at most one for each width; None for none."""
    if not axes:
        return None
    first, *others = sorted(axes, key=lambda r: ("n" not in r.level, r.axis))
    if any(r.splits or r.offset != 0 for r in others):
        raise UnsupportedError("a part or blocks of the second width are used: take the width whole")
    return replace(first, also=(*first.also, *((r.axis, r.size) for r in others)))


def new_rows(row: Rows, what: tuple[Any, ...]) -> Rows:
    """The rows of a part of a width, ("cut", offset, size), or of its blocks, ("split", blocks)."""
    if what[0] == "split":
        return replace(row, splits=(*row.splits, what[1]))
    if row.also or len(kind_of(row.size)) > 1:
        raise UnsupportedError("a part of the width is taken of coordinates that are numbered by two widths")
    if row.splits:
        raise UnsupportedError("a part of the width is taken after the width was split into blocks")
    return Rows(row.axis, add_sizes(row.offset, what[1]), what[2])


__all__ = ["Rows", "new_rows", "rows_of"]
