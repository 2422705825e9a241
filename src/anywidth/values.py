"""What the interpreter computes with: deterministic arrays, ket arrays, parameter matrices.

Every value has the shape its JAX array has, with widths left open, and a power of n: its entries are n^power
times the numbers it holds.

- `Det`: a deterministic array; its width axes (it is constant along them) have size one.
- `Ket`: random vectors. `layout` says how each axis of the JAX array is made of the finite axes of the node and
  of its width: reshaping, merging and splitting axes is a matter of layout.
- `Mat`: a parameter with two width axes, waiting for an operand.
- `Cat`: a concatenation, along a finite axis or along the width; operations are applied part by part.
- `Operator`: an array with two width axes that is made of others: products that wait for a vector (`operators.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from anywidth.errors import UnsupportedError
from anywidth.kets import Array, Graph, Leaf, Node
from anywidth.rows import Rows
from anywidth.trace import Dim, Size, add_sizes, affine, kind_of, make_size
from anywidth.views import ViewMap, expand

ZERO_POWER = Fraction(0)


@dataclass(frozen=True)
class Ax:
    """A finite axis of the node; where the node has size one the value is broadcast along it."""

    axis: int
    size: int


@dataclass(frozen=True)
class Wide:
    """The width axis of a ket (number 0), or one of the width axes of a parameter (their axis numbers)."""

    number: int
    size: Size


Layout = tuple[tuple[Ax | Wide, ...], ...]


class Sized(Protocol):
    """What an axis is made of, as far as its size goes."""

    @property
    def size(self) -> Size:
        """How many entries it has."""


def product_of(sizes: Sequence[Size]) -> Size:
    out: Size = 1
    for s in sizes:
        (a, b), (c, d) = affine(out), affine(s)
        if a and c:
            if kind_of(out) & kind_of(s):
                raise UnsupportedError("an axis of size n^2 is made by merging two width axes")
            if b or d:
                raise UnsupportedError(f"axes of the sizes {out} and {s} are merged")
            out = make_size(a * c, Fraction(0), kind_of(out) | kind_of(s))
        else:
            out = make_size(a * d + b * c, b * d, kind_of(out) or kind_of(s) or frozenset({"n"}))
    return out


def ratio(x: Size, y: Size) -> Fraction | None:
    """X / y where it is a number."""
    (a, b), (c, d) = affine(x), affine(y)
    if a and c and kind_of(x) != kind_of(y):
        return None
    if c == 0:
        return Fraction(b) / d if a == 0 and d else None
    return a / c if a * d == b * c else None


@dataclass(frozen=True, eq=False)
class Det:
    """A deterministic array: n^power times `val`, of which width axes have size one."""

    val: Array
    power: Fraction
    shape: tuple[Size, ...]
    zero: bool = False  # zero by structure
    noise: Fraction | None = None  # it is random of order n^noise besides
    line: Any = None  # where the randomness comes from

    @property
    def known(self) -> bool:
        """Whether its numbers are known while the network is being traced."""
        return isinstance(self.val, np.ndarray)


class Laid:
    """What kets and parameters have in common: finite axes behind a layout."""

    layout: Layout
    power: Fraction

    @property
    def shape(self) -> tuple[Size, ...]:
        return tuple(product_of([a.size for a in atoms]) for atoms in self.layout)

    @property
    def rank(self) -> int:
        raise NotImplementedError

    def with_view(self, g: Graph, view: ViewMap, layout: Layout) -> Any:
        raise NotImplementedError

    def split_wide(self, g: Graph, wide: Wide, blocks: int) -> Any:
        """(value with one more finite axis, its last); the layout is left to the caller."""
        raise NotImplementedError

    def relaid(self, layout: Layout) -> Any:
        return replace(self, layout=layout)  # type: ignore[type-var]

    def added_axis(self, g: Graph, layout: Layout) -> Any:
        return self.with_view(g, expand(self.rank, 1), layout)

    def wides(self) -> list[Wide]:
        return [a for atoms in self.layout for a in atoms if isinstance(a, Wide)]


@dataclass(frozen=True, eq=False)
class Ket(Laid):
    """Random vectors: n^power times the kets of a node."""

    node: Node
    layout: Layout
    power: Fraction = ZERO_POWER

    @property
    def rank(self) -> int:
        """The number of finite axes behind the layout."""
        return self.node.rank

    def with_view(self, g: Graph, view: ViewMap, layout: Layout) -> Ket:
        """The value, its finite axes read through a view, with the layout that it then has."""
        return Ket(g.view(self.node, view), layout, self.power)

    def split_wide(self, g: Graph, wide: Wide, blocks: int) -> Ket:
        """The kets with the block that a coordinate is in as one more finite axis, the last."""
        return Ket(g.split(self.node, blocks), self.layout, self.power)


@dataclass(frozen=True, eq=False)
class Mat(Laid):
    """A parameter with two width axes, times `coef`, waiting for an operand."""

    leaf: Leaf
    rows: tuple[Rows, ...]  # of each width axis of the parameter
    indices: tuple[tuple[Any, Array], ...]
    coef: Array | None
    axes: int
    layout: Layout
    power: Fraction
    mean: tuple[Array, Fraction] | None = None

    @property
    def rank(self) -> int:
        """The number of finite axes behind the layout."""
        return self.axes

    def with_view(self, g: Graph, view: ViewMap, layout: Layout) -> Mat:
        """The value, its finite axes read through a view, with the layout that it then has."""
        mask: Array | None = None
        if view.fills:
            mask, view = g.mask_of(view)
        indices = tuple((k, g.viewed(a, view)) for k, a in self.indices)
        coef = None if self.coef is None else g.viewed(self.coef, view)
        if mask is not None:
            coef = mask if coef is None else coef * mask
        return replace(self, indices=indices, coef=coef, axes=view.rank, layout=layout)

    def split_wide(self, g: Graph, wide: Wide, blocks: int) -> Mat:
        """The parameter with the block that a coordinate is in as one more finite axis, the last."""
        out = self.with_view(g, expand(self.rank, 1), self.layout)
        rows = list(out.rows)
        i = next(i for i, r in enumerate(rows) if r.axis == wide.number)
        rows[i] = replace(rows[i], splits=(*rows[i].splits, blocks))
        count = np.arange(abs(blocks)).reshape((1,) * self.rank + (abs(blocks),))
        block = (("block", wide.number, len(rows[i].splits) - 1), count)
        return replace(out, rows=tuple(rows), indices=(*out.indices, block))

    def row(self, number: int) -> Rows:
        """Which coordinates of a width axis of the parameter are its own."""
        return next(r for r in self.rows if r.axis == number)


@dataclass(frozen=True, eq=False)
class Cat:
    """Values one after the other along an axis."""

    parts: tuple[Any, ...]
    axis: int

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The sizes of the parts along the axis."""
        return tuple(p.shape[self.axis] for p in self.parts)

    @property
    def shape(self) -> tuple[Size, ...]:
        """The shape of the array in the user's code."""
        total: Size = 0
        for s in self.sizes:
            total = add_sizes(total, s)
        shape = list(self.parts[0].shape)
        shape[self.axis] = total
        return tuple(shape)


@dataclass(frozen=True, eq=False)
class Term:
    """A product of values over common axes, those of the array and then those that are summed.

    An axis along which a factor does not vary is of size one in it.
    """

    factors: tuple[Any, ...]
    summed: tuple[Size, ...] = ()


@dataclass(frozen=True, eq=False)
class Operator:
    """A sum of products that is not formed, as its entries have no limit of their own: it waits for a vector."""

    terms: tuple[Term, ...]
    shape: tuple[Size, ...]
    line: str


Part = Det | Ket | Mat  # what a rule gets and, mostly, returns: concatenations are taken apart before (`pieces.py`)
Value = Part | Cat | Operator


# --- layouts --------------------------------------------------------------------------------------------


def refined(g: Graph, x: Any, wanted: Sequence[Sequence[Size]]) -> Any:
    """The same value with its axes made of atoms of the wanted sizes."""
    for axis, sizes in enumerate(wanted):
        k = 0
        while k < len(sizes):
            atom = x.layout[axis][k]
            if atom.size != sizes[k]:
                x = split_atom(g, x, axis, k, sizes[k])
            k += 1
    return x


def split_atom(g: Graph, x: Any, axis: int, k: int, first: Size) -> Any:
    """Splits an atom in two, the first (major) one of the given size."""
    atom = x.layout[axis][k]
    y, pair = _split_wide(g, x, atom, first) if isinstance(atom, Wide) else _split_finite(g, x, atom, first)
    layout = list(y.layout)
    layout[axis] = (*layout[axis][:k], *pair, *layout[axis][k + 1 :])
    return y.relaid(tuple(layout))


def _split_wide(g: Graph, x: Any, atom: Wide, first: Size) -> tuple[Any, tuple[Ax | Wide, Ax | Wide]]:
    """A width in blocks: `first` blocks, or blocks of which the entry is the minor index."""
    if isinstance(first, Dim) and first.kind < kind_of(atom.size):
        # the coordinates of a merged axis, by both of their numbers: the same kets
        rest = divided_wide(atom.size, first)
        return x, (Wide(atom.number, first), Wide(atom.number, rest))
    if isinstance(first, Dim):
        count = ratio(atom.size, first)
        if count is None or count.denominator != 1:
            raise UnsupportedError(f"an axis of size {atom.size} is reshaped to blocks of size {first}")
        y = x.split_wide(g, atom, -int(count))
        return y, (Wide(atom.number, first), Ax(y.rank - 1, int(count)))
    a, b = affine(atom.size)
    if b % first:
        raise UnsupportedError(f"an axis of size {atom.size} is reshaped to blocks of size {first}")
    y = x.split_wide(g, atom, first)
    return y, (Ax(y.rank - 1, first), Wide(atom.number, make_size(a / first, b / first, kind_of(atom.size))))


def divided_wide(x: Size, y: Size) -> Size:
    """A size that grows with both widths divided by one that grows with one of them."""
    (a, b), (c, d) = affine(x), affine(y)
    if b or d or not kind_of(y) < kind_of(x):
        raise UnsupportedError(f"an axis of size {x} is reshaped to blocks of size {y}")
    return make_size(a / c, Fraction(0), kind_of(x) - kind_of(y))


def _split_finite(g: Graph, x: Any, atom: Ax, first: Size) -> tuple[Any, tuple[Ax | Wide, Ax | Wide]]:
    if isinstance(first, Dim) or atom.size % first:
        raise UnsupportedError(f"an axis of size {atom.size} is reshaped to blocks of size {first}")
    rest, rank = atom.size // first, x.rank
    index = (np.arange(first)[:, None] * rest + np.arange(rest)).reshape((1,) * rank + (first, rest))
    entries: list[Any] = list(range(rank))
    entries[atom.axis] = g.index(index)
    return x.with_view(g, ViewMap(rank + 2, tuple(entries)), x.layout), (Ax(rank, first), Ax(rank + 1, rest))


def _node_shape(x: Any) -> tuple[int, ...]:
    if isinstance(x, Ket):
        return x.node.shape
    shapes = [np.shape(a) for _, a in x.indices] + ([np.shape(x.coef)] if x.coef is not None else [])
    return tuple(np.broadcast_shapes((1,) * x.rank, *shapes))


def node_size(x: Any, atom: Ax) -> int:
    return _node_shape(x)[atom.axis]


def common_sizes(layouts: Sequence[Sequence[Sequence[Sized]]], rank: int) -> list[list[Size]]:
    """For every axis the sizes of the atoms of the coarsest layout that refines all."""
    out: list[list[Size]] = []
    for axis in range(rank):
        queues = [[a.size for a in layout[axis]] for layout in layouts if layout[axis]]
        sizes: list[Size] = []
        while any(queues):
            heads = [q[0] for q in queues if q]
            finite = [h for h in heads if isinstance(h, int)]
            wide = [h for h in heads if not isinstance(h, int)]
            smallest: Size = min(finite) if finite else min(wide, key=lambda h: (len(kind_of(h)), affine(h)))
            sizes.append(smallest)
            for q in queues:
                if not q:
                    raise UnsupportedError("two arrays whose axes were reshaped differently are combined")
                if q[0] == smallest:
                    q.pop(0)
                else:
                    q[0] = _divided(q[0], smallest)
        out.append(sizes)
    return out


def _divided(x: Size, y: Size) -> Size:
    if isinstance(y, int):
        a, b = affine(x)
        if isinstance(x, int) and x % y:
            raise UnsupportedError("two arrays whose axes were reshaped differently are combined")
        return make_size(a / y, b / y, kind_of(x) or frozenset({"n"}))
    if kind_of(y) < kind_of(x):
        return divided_wide(x, y)
    r = ratio(x, y)
    if r is None or r.denominator != 1:
        raise UnsupportedError("two arrays whose axes were reshaped differently are combined")
    return int(r)


def det_array(x: Det, sizes: Sequence[Sequence[Size]]) -> Array:
    """The array of a Det over the finite atoms, in order, that its axes are made of."""
    if len(x.shape) == 0:
        return x.val
    shape: list[int] = []
    for n, atoms in zip(np.shape(x.val), sizes, strict=True):
        finite = [s for s in atoms if isinstance(s, int)]
        shape += finite if n > 1 else [1] * len(finite)
    return x.val.reshape(shape)


def standard(g: Graph, x: Any, sizes: Sequence[Sequence[Size]]) -> Any:
    """The value with the finite atoms of the given layout as the axes of its node, in order.

    An axis of size one is broadcast, as in NumPy.
    """
    sizes_of_x = [s if atoms else [] for s, atoms in zip(sizes, x.layout, strict=True)]
    x = refined(g, x, sizes_of_x)
    layout = layout_of(sizes)
    place = {
        a.axis: b.axis
        for own, new in zip(x.layout, layout, strict=True)
        for a, b in zip(own, new, strict=False)
        if isinstance(a, Ax) and isinstance(b, Ax)
    }
    rank = sum(isinstance(a, Ax) for atoms in layout for a in atoms)
    zero = g.index(np.zeros((1,) * rank, np.int64))
    view = ViewMap(rank, tuple(place.get(i, zero) for i in range(x.rank)))
    # a parameter knows its width axes by their numbers
    same = tuple(
        tuple(own[k] if k < len(own) and isinstance(a, Wide) else a for k, a in enumerate(atoms))
        for own, atoms in zip(x.layout, layout, strict=True)
    )
    return x.with_view(g, view, same)


def layout_of(sizes: Sequence[Sequence[Size]], number: int = 0) -> Layout:
    count = 0
    out = []
    for axis in sizes:
        atoms: list[Ax | Wide] = []
        for s in axis:
            if isinstance(s, int):
                atoms.append(Ax(count, s))
                count += 1
            else:
                atoms.append(Wide(number, s))
        out.append(tuple(atoms))
    return tuple(out)


def trivial_sizes(shape: Sequence[Size]) -> list[list[Size]]:
    return [[] if s == 1 else [s] for s in shape]


def to_ket(g: Graph, x: Det) -> Ket:
    """A deterministic array with a width axis as constant kets."""
    sizes = trivial_sizes(x.shape)
    val = det_array(x, sizes)
    kinds = [name for s in x.shape for name in kind_of(s)]
    if len(set(kinds)) < len(kinds):
        raise UnsupportedError("a deterministic array has two width axes (ones((n, n)), say)")
    return Ket(g.const(val if not x.zero else np.zeros(np.shape(val))), layout_of(sizes), x.power)


def det(val: Any, shape: Sequence[Size] | None = None, power: Fraction = ZERO_POWER, **more: Any) -> Det:
    return Det(val, power, tuple(np.shape(val)) if shape is None else tuple(shape), **more)


def crowded(shape: Sequence[Size]) -> bool:
    """Whether two axes grow with one width: such an array has no limit, but as a parameter or an operator."""
    names = [name for s in shape for name in kind_of(s)]
    return len(set(names)) < len(names)


def spelled_out(array: Array, layout: Layout) -> Array | None:
    """An array over the finite axes of a layout as one over its axes, those of the width being of size one.

    None if it varies along a finite axis that is merged with the width.
    """
    order = [a.axis for atoms in layout for a in atoms if isinstance(a, Ax)]
    rest = [i for i in range(np.ndim(array)) if i not in order]
    array = array.transpose([*order, *rest]).reshape([np.shape(array)[i] for i in order])
    shape, whole, k = [], [], 0
    for atoms in layout:
        sizes = [a.size for a in atoms if isinstance(a, Ax)]
        own, k = array.shape[k : k + len(sizes)], k + len(sizes)
        if len(sizes) < len(atoms):
            if any(n > 1 for n in own):
                return None
            whole += own
            shape.append(1)
        elif all(n == 1 for n in own):
            whole += own
            shape.append(1)
        else:
            whole += sizes
            shape.append(int(np.prod(sizes)))
    xp = np if isinstance(array, np.ndarray) else jnp
    return xp.broadcast_to(array, tuple(whole)).reshape(shape)


def as_coef(x: Array) -> Array:
    """A known scalar as a Python number, so that structure stays visible."""
    if isinstance(x, np.ndarray | np.generic) and np.ndim(x) == 0:
        return float(x)
    return x


__all__ = ["Cat", "Det", "Dim", "Ket", "Mat", "Operator", "Part", "Term", "Value", "jnp"]
