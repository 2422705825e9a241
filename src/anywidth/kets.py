"""Kets: random vectors with n coordinates that become i.i.d. as n grows, as nodes of an expression graph.

A node stands for an array of kets over finite axes (time, position, batch, heads), each of order one per
coordinate. There are eight kinds:

- `Product(leaf, operand)`: a parameter times its operand, summed over the contracted axes: Gaussian (fact 2);
- `Carry(loop, i)`: the i-th carry of a loop before step t, its first axis being the time;
- `Const(array)`: the same deterministic number in every coordinate;
- `Sum`, `Contract`, `View`: linear maps of the finite axes (addition and scaling; contraction with a
  deterministic array; indexing, transposition, broadcasting);
- `Pointwise(expr, args)`: a coordinatewise function of other nodes;
- `Fluctuation(operand, level)`: in a network with two widths, the sum over one of them of what has mean zero (an
  attention score q.k / sqrt(n) of every head): Gaussian along the other (`rules/levels.py`).

Axes are aligned by position, as in NumPy broadcasting of equal ranks: `shape` may have ones. Nodes are
interned: equal structure over identical arrays is the same object, which is what makes the recursion of
`inner.py` memoisable. (One made while a loop's step runs is made anew where it is first wanted outside.)
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np

from anywidth.errors import NeedsUnroll, UnsupportedError
from anywidth.rows import Rows, new_rows
from anywidth.trace import Size
from anywidth.views import Dyn, Index, ViewMap, broadcast_shapes, expand, is_traced, view_array

Array = Any


@dataclass(frozen=True, eq=False)
class Leaf:
    """A parameter: its entries are n^size times numbers of variance `var`; in these units its epsilon is lr n^speed.

    Where an output is of order n^p the share of the parameter in its NTK is of order n^(2p + speed).
    """

    name: str
    shape: tuple[Size, ...]
    var: Array
    zero_var: bool
    size: Fraction = Fraction(0)
    speed: Fraction = Fraction(0)
    lr: Array | None = None  # None: one
    frozen: bool = False
    movable: bool = False  # its size may still be chosen, if it is zero or nothing against what it is added to
    lesser: bool = False  # it counts as zero because it is nothing against what it is added to
    path: tuple[Any, ...] = ()

    def share(self, output: Fraction) -> Fraction:
        """The power of n of its share in the NTK of an output of order n^(output)."""
        return 2 * output + self.speed


# --- nodes ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Node:
    """What all kets have in common: the shape of their finite axes, and what they depend on."""

    shape: tuple[int, ...]
    leaves: frozenset[Leaf]  # every parameter it depends on
    loops: frozenset[int]  # every loop whose carry it depends on
    local: bool  # depends on the running step of a loop that is being solved
    gaussian: bool
    levels: frozenset[frozenset[str]]  # by which widths the Gaussians that it is a function of are numbered

    @property
    def rank(self) -> int:
        """The number of finite axes."""
        return len(self.shape)


@dataclass(frozen=True, eq=False)
class Product(Node):
    """A parameter times its operand, summed over the contracted axes."""

    leaf: Leaf
    copy: int
    operand: Node  # its last `contracted` axes are summed
    contracted: int
    row: Rows | None  # None: a single coordinate (a readout, an output bias)
    col: Rows | None  # the contracted width axis
    indices: tuple[tuple[Hashable, Array], ...]  # for each finite axis (or block) of the parameter
    line: str


@dataclass(frozen=True, eq=False)
class Carry(Node):
    """A carry of a loop before each of its steps, which are its first axis."""

    loop: Any
    number: int
    row: Rows | None


@dataclass(frozen=True, eq=False)
class Const(Node):
    """The same deterministic number in every coordinate."""

    array: Array


@dataclass(frozen=True, eq=False)
class Sum(Node):
    """A sum of nodes, each times a deterministic array (None: one)."""

    terms: tuple[tuple[Array | None, Node], ...]


@dataclass(frozen=True, eq=False)
class Contract(Node):
    """The sum over the last `contracted` axes of the operand, times a deterministic array (None: ones)."""

    coef: Array | None
    operand: Node
    contracted: int


@dataclass(frozen=True, eq=False)
class View(Node):
    """The operand, its finite axes read through a view."""

    operand: Node
    view: ViewMap


@dataclass(frozen=True, eq=False)
class Pointwise(Node):
    """A coordinatewise function of the arguments; `expr` refers to them and to the coefficients by number."""

    expr: Any
    args: tuple[Node, ...]
    coefs: tuple[Array, ...]


@dataclass(frozen=True, eq=False)
class Fluctuation(Node):
    """n^(-1/2) times the sum over one of two widths of an operand of mean zero: Gaussian along the other, `level`."""

    operand: Node
    level: frozenset[str]


def is_zero(node: Node) -> bool:
    """Whether the node is zero, and known to be."""
    return isinstance(node, Const) and isinstance(node.array, np.ndarray) and not node.array.any()


@dataclass(eq=False)
class Graph:
    """Builds nodes, each once. `local` is set while the body of a loop is interpreted at its running step."""

    table: dict[Hashable, Any] = field(default_factory=dict)
    keep: list[Any] = field(default_factory=list)
    local: int = 0
    origin: dict[Node, Any] = field(default_factory=dict)  # the equation that made a Pointwise
    stepped: dict[Node, tuple[Any, int]] = field(default_factory=dict)  # what loops carry after every step
    current: Any = None  # the equation being interpreted
    sampler: Any = None  # the settings of what has to be sampled (expect/sampler.py)
    gated: dict[int, Any] = field(default_factory=dict)  # loops whose states are sampled, by identity

    def _make(self, cls: type, key: Hashable, children: Sequence[Node], **fields: Any) -> Any:
        key = (cls, key)
        local = fields.pop("local", any(c.local for c in children) or self.local > 0)
        # made while a step was running, a node counts as that step's until it is made outside
        if key in self.table and (local or not self.table[key].local):
            return self.table[key]
        known = {
            "leaves": frozenset().union(*(c.leaves for c in children)),
            "loops": frozenset().union(*(c.loops for c in children)),
            "levels": frozenset().union(*(c.levels for c in children)),
            "local": local,
            "gaussian": False,
        }
        node = cls(**(known | fields))
        self.table[key] = node
        self.keep.append(fields)  # ids in keys stay valid
        return node

    def product(
        self,
        leaf: Leaf,
        copy: int,
        operand: Node,
        contracted: int,
        row: Rows | None,
        col: Rows | None,
        indices: tuple[tuple[Hashable, Array], ...],
        line: str,
    ) -> Node:
        """The node of a parameter times an operand of which the last `contracted` axes are summed."""
        key = (leaf, copy, operand, contracted, row, col, tuple((k, self.key(a)) for k, a in indices))
        full = broadcast_shapes(operand.shape, *(np.shape(a) for _, a in indices))
        # what is not averaged, as the attention of the very head that a row belongs to, makes a mixture of Gaussians
        mixed = frozenset(level for level in operand.levels if col is not None and not level & col.level)
        return self._make(
            Product, key, (operand,), shape=full[: len(full) - contracted], leaf=leaf, copy=copy, operand=operand,
            contracted=contracted, row=row, col=col, indices=indices, line=line, gaussian=not mixed,
            leaves=operand.leaves | {leaf}, levels=mixed | {row.level if row is not None else frozenset()},
        )  # fmt: skip

    def carry(
        self, loop: Any, number: int, shape: tuple[int, ...], leaves: frozenset[Leaf], gaussian: bool, row: Rows | None
    ) -> Node:
        """The node of a loop's carry; `shape` begins with the number of steps."""
        return self._make(
            Carry, (id(loop), number), (), shape=shape, leaves=leaves, loops=frozenset({id(loop)}), local=False,
            gaussian=gaussian, loop=loop, number=number, row=row, levels=frozenset({frozenset({"n"})}),
        )  # fmt: skip

    def const(self, array: Array) -> Node:
        """The node of an array that is the same in every coordinate."""
        return self._make(Const, self.key(array), (), shape=tuple(np.shape(array)), array=array)

    def sum(self, terms: Sequence[tuple[Array | None, Node]]) -> Node:
        """The node of a sum; terms that are zero are left out."""
        terms = tuple((c, x) for c, x in terms if not is_zero(x)) or tuple(terms[:1])
        if len(terms) == 1 and (terms[0][0] is None or is_zero(terms[0][1])):
            return terms[0][1]
        shape = broadcast_shapes(*(x.shape for _, x in terms), *(np.shape(c) for c, _ in terms if c is not None))
        key = tuple((self.key(c), x) for c, x in terms)
        children = [x for _, x in terms]
        return self._make(Sum, key, children, shape=shape, terms=terms, gaussian=all(x.gaussian for x in children))

    def scale(self, coef: Array, node: Node) -> Node:
        """The node times a deterministic array."""
        return self.sum([(coef, node)])

    def contract(self, coef: Array | None, operand: Node, contracted: int) -> Node:
        """The sum over the last axes of a deterministic array (None: ones) times the operand."""
        if contracted == 0 and coef is None:
            return operand
        if is_zero(operand):
            return self.const(np.zeros((1,) * (operand.rank - contracted)))
        shape = operand.shape if coef is None else broadcast_shapes(operand.shape, np.shape(coef))
        return self._make(
            Contract, (self.key(coef), operand, contracted), (operand,), shape=shape[: len(shape) - contracted],
            coef=coef, operand=operand, contracted=contracted, gaussian=operand.gaussian,
        )  # fmt: skip

    def fluctuation(self, operand: Node, level: frozenset[str]) -> Node:
        """The node of a sum over one width of what has mean zero, divided by the root of its length."""
        return self._make(
            Fluctuation, (operand, level), (operand,), shape=operand.shape, operand=operand, level=level, gaussian=True,
            levels=frozenset({level}),
        )  # fmt: skip

    def pointwise(self, expr: Any, args: Sequence[Node], coefs: Sequence[Array]) -> Node:
        """The node of a coordinatewise function."""
        shape = broadcast_shapes(*(a.shape for a in args), *(np.shape(c) for c in coefs))
        key = (expr, tuple(args), tuple(self.key(c) for c in coefs))
        node = self._make(Pointwise, key, args, shape=shape, expr=expr, args=tuple(args), coefs=tuple(coefs))
        self.origin.setdefault(node, self.current)
        return node

    def view(self, operand: Node, view: ViewMap) -> Node:
        """The node read through a view; views of views are composed."""
        if view.identity and view.rank == operand.rank:
            return operand
        if isinstance(operand, Const):
            return self.const(self.viewed(operand.array, view, aligned=True))
        base = operand.operand if isinstance(operand, View) else operand
        if view.fills and (isinstance(base, Carry) or any(
            n == 1 and isinstance(e, Index) and e.fills for n, e in zip(operand.shape, view.entries, strict=True)
        )):  # fmt: skip
            return self.masked(operand, view)
        if isinstance(operand, View):
            entries = tuple(self._through(e, view) for e in operand.view.entries)
            return self.view(operand.operand, ViewMap(view.rank, entries))
        # an axis of size one reads the same wherever it is read
        entries = tuple(
            self._index(np.zeros((1,) * view.rank, np.int64)) if n == 1 and not isinstance(e, int) else e
            for n, e in zip(operand.shape, view.entries, strict=True)
        )
        view = ViewMap(view.rank, entries)
        shape = [1] * view.rank
        for n, e in zip(operand.shape, entries, strict=True):
            if isinstance(e, int):
                shape[e] = max(shape[e], n)
            elif isinstance(e, Index):
                shape = list(broadcast_shapes(tuple(shape), np.shape(e.array)))
        local = operand.local or any(isinstance(e, Dyn) for e in entries) or self.local > 0
        return self._make(
            View, (operand, view.rank, self._entries_key(entries)), (operand,), shape=tuple(shape), operand=operand,
            view=view, gaussian=operand.gaussian, local=local,
        )  # fmt: skip

    def _through(self, entry: Any, view: ViewMap) -> Any:
        if isinstance(entry, int):
            return view.entries[entry]
        if isinstance(entry, Index):
            # zeros that are read along an axis are marked in the entries that depend on it, and only there
            first = self._index(np.zeros((1,) * view.rank, np.int64))
            own = [e if n > 1 else first for n, e in zip(np.shape(entry.array), view.entries, strict=True)]
            view = ViewMap(view.rank, tuple(own))
            return self._index(self.viewed(entry.array, view, -1, aligned=True), entry.fills or view.fills)
        return entry

    def _index(self, array: Array, fills: bool = False) -> Index:
        fills = bool((array < 0).any()) if isinstance(array, np.ndarray) else fills
        key = (Index, self.key(array), fills)
        if key not in self.table:
            self.table[key] = Index(array, fills)
        return self.table[key]

    def index(self, array: Array, fills: bool = False) -> Index:
        """An entry of a view; `fills` says whether a traced array may hold -1."""
        return self._index(array, fills)

    def masked(self, operand: Node, view: ViewMap) -> Node:
        """A view that reads zeros as a view that does not, times zeros and ones."""
        mask, clipped = self.mask_of(view)
        return self.sum([(mask, self.view(operand, clipped))])

    def mask_of(self, view: ViewMap) -> tuple[Array, ViewMap]:
        """(zeros and ones, the view with nothing to fill)."""
        key = ("mask", view.rank, self._entries_key(view.entries))
        if key not in self.table:
            xp = np if not any(is_traced(e) for e in view.entries) else jnp
            entries, mask = list(view.entries), xp.ones((1,) * view.rank, bool)
            for i, e in enumerate(entries):
                if isinstance(e, Index) and e.fills:
                    mask = mask & (e.array >= 0)
                    entries[i] = self._index(xp.maximum(e.array, 0))
            self.table[key] = mask.astype(np.float32), ViewMap(view.rank, tuple(entries))
            self.keep.append(view)
        return self.table[key]

    def viewed(self, array: Array, view: ViewMap, fill: int = 0, aligned: bool = False) -> Array:
        """`view_array`, once for each array and view, so that the result is the same object again.

        A number stays a number, unless it has to be aligned with the axes of the view.
        """
        if np.ndim(array) == 0 and not aligned:
            return array
        if view.identity and view.rank == np.ndim(array):
            return array
        key = ("viewed", self.key(array), view.rank, self._entries_key(view.entries), fill)
        if key not in self.table:
            self.table[key] = view_array(array, view, fill)
            self.keep.append((array, view))
        return self.table[key]

    def _entries_key(self, entries: Sequence[Any]) -> Hashable:
        return tuple(e if isinstance(e, int) else id(e) for e in entries)

    def key(self, array: Array | None) -> Hashable:
        """Small known arrays are keyed by value, traced ones by identity."""
        if array is None or isinstance(array, float | int):
            return array
        if isinstance(array, np.ndarray | np.generic) and array.size <= 4096:
            return (array.shape, array.dtype.str, array.tobytes())
        self.keep.append(array)
        return id(array)

    # --- pushing a view, or a piece of the width, one level down ---

    def push(self, node: View) -> Node:
        """The same node with its view applied one level further down."""
        self.local += node.local
        try:
            if node.view.fills:
                return self.masked(node.operand, node.view)
            return self._push(node.operand, node.view)
        finally:
            self.local -= node.local

    def _push(self, x: Node, view: ViewMap) -> Node:
        if isinstance(x, Product):
            inner = self.extended(view, x.contracted)
            indices = tuple((k, self.viewed(a, inner)) for k, a in x.indices)
            operand = self.view(x.operand, inner)
            return self.product(x.leaf, x.copy, operand, x.contracted, x.row, x.col, indices, x.line)
        if isinstance(x, Sum):
            return self.sum([(None if c is None else self.viewed(c, view), self.view(t, view)) for c, t in x.terms])
        if isinstance(x, Contract):
            inner = self.extended(view, x.contracted)
            coef = None if x.coef is None else self.viewed(x.coef, inner)
            return self.contract(coef, self.view(x.operand, inner), x.contracted)
        if isinstance(x, Fluctuation):
            return self.fluctuation(self.view(x.operand, view), x.level)
        if isinstance(x, Pointwise):
            out = self.pointwise(x.expr, [self.view(a, view) for a in x.args], [self.viewed(c, view) for c in x.coefs])
            self.origin[out] = self.origin[x]
            return out
        return self.view(x, view)

    def extended(self, view: ViewMap, extra: int) -> ViewMap:
        """The view with `extra` trailing axes that it leaves alone."""
        more = expand(view.rank, extra)
        entries = tuple(
            self._index(self.viewed(e.array, more, aligned=True), e.fills) if isinstance(e, Index) else e
            for e in view.entries
        )
        return ViewMap(view.rank + extra, entries + tuple(range(view.rank, view.rank + extra)))

    def cut(self, node: Node, offset: Size, size: Size) -> Node:
        """The coordinates `offset : offset + size` of every ket."""
        return self._rowwise(node, ("cut", offset, size))

    def split(self, node: Node, blocks: int) -> Node:
        """The width in |blocks| blocks, as a new last axis; blocks > 0: the block index is the major one."""
        return self._rowwise(self.view(node, expand(node.rank, 1)), ("split", blocks, node.rank))

    def _rowwise(self, node: Node, what: tuple[Any, ...]) -> Node:
        key = ("rowwise", node, what)
        if key not in self.table:
            self.local += node.local
            try:
                self.table[key] = self._rowwise_new(node, what)
            finally:
                self.local -= node.local
        return self.table[key]

    def _rowwise_new(self, node: Node, what: tuple[Any, ...]) -> Node:
        def go(x: Node) -> Node:
            return self._rowwise(x, what)

        if isinstance(node, View) and not isinstance(node.operand, Carry):
            return go(self.push(node))
        if isinstance(node, Product):
            if node.row is None:
                raise UnsupportedError("a readout is cut or reshaped as if it were a hidden layer")
            row, indices = new_rows(node.row, what), node.indices
            if what[0] == "split":
                _, blocks, axis = what
                shape = [1] * (node.rank + node.contracted)
                shape[axis] = abs(blocks)
                block = ("block", row.axis, len(row.splits) - 1)
                indices = (*indices, (block, np.arange(abs(blocks)).reshape(shape)))
            return self.product(node.leaf, node.copy, node.operand, node.contracted, row, node.col, indices, node.line)
        if isinstance(node, Sum):
            return self.sum([(c, go(x)) for c, x in node.terms])
        if isinstance(node, Contract):
            return self.contract(node.coef, go(node.operand), node.contracted)
        if isinstance(node, Pointwise):
            return self.pointwise(node.expr, [go(a) for a in node.args], node.coefs)
        if isinstance(node, Const):
            return node
        if isinstance(node, Fluctuation):
            raise UnsupportedError("a part of the second width is taken, or it is split into blocks")
        raise NeedsUnroll("a part of the width of a loop's carry is used")
