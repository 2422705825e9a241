"""How a Gram matrix is cut into tiles: geometry alone, no kernel and no numbers.

The examples of a data set fall into groups of one shape. A piece is a range of a group, and a tile is pieces against
pieces. In memory a tile lies in the rows and columns of two groups, wherever they are; in a store it is a square of
the matrix as the user ordered it, and holds a piece of every group that has examples there.

>>> from anywidth.examples import dataset
>>> data = dataset([np.ones(2), np.ones(3), np.ones(2), np.ones(3), np.ones(2)])
>>> [[(p.group, p.start, p.stop) for p in panel.pieces] for panel in panels(data, 3)]
[[(0, 0, 2), (1, 0, 1)], [(0, 2, 3), (1, 1, 2)]]
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from anywidth.examples import Dataset, Group

__all__ = ["Block", "Panel", "Piece", "Tile", "Where", "at", "between_groups", "even", "panels", "squares"]

Where = slice | np.ndarray


@dataclass(frozen=True, eq=False)
class Piece:
    """The examples start..stop of a group, padded to a length that is compiled once; `where` they are in a tile."""

    group: int
    start: int
    stop: int
    padded: int
    where: Where

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, eq=False)
class Panel:
    """A set of rows (or columns) of the matrix: which, and the pieces that fill them."""

    rows: Where
    size: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Block:
    """A piece against a piece: the positions of the two in a tile, and how the kernel between them is had."""

    row: int
    col: int
    swapped: bool  # computed with the sides exchanged, so that a pair of shapes is compiled once
    diagonal: bool  # of the same piece with itself: one triangle counts
    mirrored: bool  # fills its place and the transposed one of the same tile


@dataclass(frozen=True, eq=False)
class Tile:
    """A panel against a panel."""

    index: tuple[int, int]
    rows: Panel
    cols: Panel
    symmetric: bool  # of a symmetric matrix, of which one triangle of tiles is computed

    @property
    def shape(self) -> tuple[int, int]:
        """Examples on each side."""
        return self.rows.size, self.cols.size

    @property
    def diagonal(self) -> bool:
        """Whether it lies on the diagonal of a symmetric matrix."""
        return self.symmetric and self.rows is self.cols

    @property
    def mirrored(self) -> bool:
        """Whether it fills two places of the matrix."""
        return self.symmetric and not self.diagonal

    @property
    def pairs(self) -> int:
        """Entries of the matrix that it fills."""
        return self.shape[0] * self.shape[1] * (2 if self.mirrored else 1)

    def blocks(self) -> Iterator[Block]:
        """What there is to compute."""
        for i, p in enumerate(self.rows.pieces):
            for j, q in enumerate(self.cols.pieces):
                if not self.diagonal:
                    yield Block(i, j, self.symmetric and p.group > q.group, False, False)
                elif i <= j:
                    yield Block(i, j, False, i == j, i < j)


def even(n: int, most: int) -> int:
    """The side of the tiles that cut n evenly into pieces of at most `most`, so that little is padded."""
    return -(-n // -(-n // most))


def at(rows: Where, cols: Where) -> tuple:
    """An index of an array for these rows and columns."""
    if isinstance(rows, slice) and isinstance(cols, slice):
        return rows, cols
    return np.ix_(*(np.arange(w.start, w.stop) if isinstance(w, slice) else w for w in (rows, cols)))


def between_groups(
    rows: tuple[int, Group], cols: tuple[int, Group], side: tuple[int, int], symmetric: bool
) -> Iterator[Tile]:
    """The tiles between two groups, given as (number, group); by one triangle if they are one group."""
    left = _cut(*rows, side[0])
    right = left if symmetric and rows[0] == cols[0] else _cut(*cols, side[1])
    for i, p in enumerate(left):
        for j, q in enumerate(right):
            if right is not left or i <= j:
                yield Tile((i, j), p, q, symmetric)


def _cut(number: int, group: Group, side: int) -> list[Panel]:
    out = []
    for start in range(0, len(group), side):
        stop = min(start + side, len(group))
        piece = Piece(number, start, stop, side, slice(0, stop - start))
        out.append(Panel(_where(group.positions[start:stop]), stop - start, (piece,)))
    return out


def panels(data: Dataset, side: int) -> list[Panel]:
    """The data set cut into `side` consecutive examples at a time, each cut with the pieces of the groups in it."""
    positions = [np.asarray(group.positions) for group in data.groups]
    edges = np.append(np.arange(0, len(data), side), len(data))
    cuts = [np.searchsorted(p, edges) for p in positions]
    padded = [int(np.diff(c).max()) for c in cuts]
    out = []
    for k, (a, b) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
        pieces = tuple(
            Piece(g, int(c[k]), int(c[k + 1]), padded[g], _where(p[c[k] : c[k + 1]] - a))
            for g, (p, c) in enumerate(zip(positions, cuts, strict=True))
            if c[k] < c[k + 1]
        )
        out.append(Panel(slice(a, b), b - a, pieces))
    return out


def squares(rows: Sequence[Panel], cols: Sequence[Panel], symmetric: bool) -> Iterator[Tile]:
    """The tiles of panels against panels; of one triangle if the matrix is symmetric (`rows is cols`)."""
    for i, p in enumerate(rows):
        for j, q in enumerate(cols):
            if not symmetric or i <= j:
                yield Tile((i, j), p, q, symmetric)


def _where(positions: Sequence[int] | np.ndarray) -> Where:
    if isinstance(positions, range):
        return slice(positions.start, positions.stop)
    array = np.asarray(positions)
    first, last = int(array[0]), int(array[-1])
    return slice(first, last + 1) if last - first + 1 == len(array) else array
