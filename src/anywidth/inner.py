"""The inner product of two kets: facts 1 and 2 as one memoised recursion.

    gram(a, b) = lim  a.b / n = E[Z^a Z^b],

an array over the finite axes of a and b, aligned by position (so a[:, None] against b[None, :] gives all pairs,
and a against a the diagonal only: cost follows the question). Linear maps act on each side; two products with
one parameter give its variance times the inner product of their operands; products with different parameters
give a structural zero, `ZERO`; coordinatewise functions go to `expect/choose.py`.

With `eps=True` the entries of the two copies of every parameter that learns have covariance var + lr epsilon
(fact 4); the derivative in epsilon at zero is the neural tangent kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np

from anywidth import aligned, tables
from anywidth.errors import NeedsUnroll, NoLimitError, UnsupportedError
from anywidth.expect import choose
from anywidth.kets import (
    Array,
    Carry,
    Const,
    Contract,
    Fluctuation,
    Graph,
    Node,
    Pointwise,
    Product,
    Rows,
    Sum,
    View,
    is_zero,
)
from anywidth.trace import add_sizes, affine
from anywidth.views import Dyn, Index, ViewMap, expand


class _Zero:
    """Zero by independence: not just small, and of order sqrt(n) before it is divided by n."""

    def __repr__(self) -> str:
        return "ZERO"


ZERO = _Zero()


def add(x: Any, y: Any) -> Any:
    """The sum of two inner products, either of which may be zero by structure."""
    return y if x is ZERO else x if y is ZERO else x + y


def scaled(coef: Any, x: Any) -> Any:
    """A number (None: one) times an inner product, which may be zero by structure."""
    return x if x is ZERO or coef is None else coef * x


@dataclass(eq=False)
class Gram:
    """Computes inner products. A child is opened inside a loop being solved; see `loops.py`."""

    graph: Graph
    epsilon: Any = None
    parent: Gram | None = None
    frames: tuple[Any, ...] = ()  # the loops being solved, innermost last
    sealed: bool = False  # while set, nothing new is remembered (another trace is running)
    memo: dict[Any, Any] = field(default_factory=dict)
    solved: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    speed: Fraction = Fraction(0)  # of the parameters that learn: neither faster nor slower ones have a limit

    def __post_init__(self) -> None:
        if self.parent is not None:
            self.speed = self.parent.speed

    def __call__(self, a: Node, b: Node, eps: bool = False) -> Any:
        """The inner product of two nodes of one rank, or `ZERO`; with `eps`, as a function of epsilon."""
        if is_zero(a) or is_zero(b):
            return ZERO
        if self.parent is not None:
            hoisted = self.frames[-1].hoist(self, a, b, eps)
            if hoisted is not None:
                return hoisted
        eps = eps and self.epsilon is not None
        if self.parent is None and self.graph.gated and not self.graph.gated.keys().isdisjoint(a.loops | b.loops):
            from anywidth import gated

            sampled = gated.answer(self, a, b, eps)
            if sampled is not None:
                return sampled
        key = (a, b, eps)
        if key in self.memo:
            return self.memo[key]
        if (b, a, eps) in self.memo:
            return self.memo[b, a, eps]
        asked, swapped = aligned.request(a, b, eps), aligned.request(b, a, eps)
        for one in (asked, swapped):
            if one is not None and one.key in self.memo:
                known = self.memo[one.key]
                return ZERO if known is ZERO else aligned.along(known, one.axes, a.rank)
        value = self.compute(a, b, eps)
        if value is not ZERO and np.ndim(value) != a.rank:
            value = jnp.reshape(value, (1,) * a.rank)
        if not self.sealed:
            self.memo[key] = value
            if asked is not None:
                self.memo[asked.key] = value if value is ZERO else aligned.stored(jnp.asarray(value), asked.axes)
        return value

    def compute(self, a: Node, b: Node, eps: bool) -> Any:
        """The inner product, which is not in the memory yet."""
        if self.parent is None and self.graph.stepped:
            from anywidth import loops

            carried = loops.outputs(self, a, b, eps)
            if carried is not None:
                return carried
        pair = ((a, b), (b, a))
        if self.parent is not None:  # a view of the other side can still be taken out of the loop
            for x, y in pair:
                if isinstance(x, Sum):
                    return self.terms(x, y, eps)
        for x, y in pair:
            if isinstance(x, View) and not isinstance(x.operand, Carry):
                read = self.read(x, y, eps, 0, ())
                return self(self.graph.push(x), y, eps) if read is None else read
        for x, y in pair:
            if isinstance(x, Sum):
                return self.terms(x, y, eps)
        for x, y in pair:
            if isinstance(x, Contract):
                return self.contracted(x, y, eps)
        for x, y in pair:
            if isinstance(x, Product) and x.leaf not in y.leaves:
                return ZERO
            if isinstance(x, Fluctuation) and isinstance(y, Fluctuation | Product):
                return self.fluctuations(x, y, eps)
        if isinstance(a, Product) and isinstance(b, Product):
            return self.products(a, b, eps)
        for x, y in pair:
            if isinstance(x, Const) and y.gaussian:
                return ZERO
        if isinstance(a, Const) and isinstance(b, Const):
            return a.array * b.array
        for x, y in pair:
            if _carry(x) is not None and (not x.gaussian or y.gaussian or isinstance(y, Const)):
                from anywidth import loops

                return loops.lookup(self, x, y, eps)
        return choose.expectation(self, a, b, eps)

    def terms(self, x: Sum, y: Node, eps: bool) -> Any:
        """The inner product with a sum."""
        total: Any = ZERO
        for coef, term in x.terms:
            total = add(total, scaled(coef, self(term, y, eps)))
        return total

    def mean(self, a: Node) -> Any:
        """E[Z^a], of the shape of a."""
        one = self.graph.const(np.ones((1,) * a.rank))
        return self(a, one)

    def contracted(self, x: Contract, y: Node, eps: bool) -> Any:
        """The inner product with a contraction: it is taken over more axes, and summed over them."""
        k = x.contracted
        full = np.broadcast_shapes(x.operand.shape, np.shape(x.coef) if x.coef is not None else ())
        return self.summed(x.operand, self.graph.view(y, expand(y.rank, k)), eps, x.coef, k, full[len(full) - k :])

    def summed(self, x: Node, y: Node, eps: bool, coef: Any, k: int, lengths: Sequence[int]) -> Any:
        """The sum over the last k axes, of the given lengths, of coef times the inner product."""
        if coef is None and k:
            read = self.read(x, y, eps, k, lengths)
            if read is not None:
                return read
        return weighted_sum(coef, self(x, y, eps), k, lengths)

    def read(self, x: Node, y: Node, eps: bool, k: int, lengths: Sequence[int]) -> Any:
        """The same from a table, where that is what costs least (`tables.py`); else None."""
        plan = tables.plan(self.graph, x, y)
        if plan is None:
            return None
        table = self(plan.x, plan.y, eps)
        return ZERO if table is ZERO else tables.summed(table, plan, k, lengths)

    def fluctuations(self, x: Fluctuation, y: Fluctuation | Product, eps: bool) -> Any:
        """The central limit theorem: sums over one width of what has mean zero have the covariance of their terms."""
        if isinstance(y, Fluctuation):
            return self(x.operand, y.operand, eps) if x.level == y.level else ZERO
        for below in below_fluctuation(x.operand):
            if below.leaf is y.leaf and below.row != y.row:
                raise _mixed(y, below, "in a sum over one of two widths written in two ways")
        return ZERO  # one term of the sum is nothing against the sum

    # --- fact 2 ---

    def products(self, a: Product, b: Product, eps: bool) -> Any:
        """Fact 2, for two products: the variance of the parameter times the inner product of the operands."""
        if a.leaf is not b.leaf or apart(a, b):
            return ZERO
        if (a.row is None) != (b.row is None) or (a.col is None) != (b.col is None):
            raise _mixed(a, b, "as a hidden layer and as a readout")
        if a.row is not None and b.row is not None:
            if a.row.axis != b.row.axis:
                raise _mixed(a, b, "as it is and transposed")
            overlap = _overlap(a.row, b.row)
            if overlap is None:
                return ZERO
            if overlap != (b.row.offset, b.row.size) or overlap != (a.row.offset, a.row.size):
                raise _mixed(a, b, "with different, overlapping parts of its rows")
            if a.row.also != b.row.also:
                raise _mixed(a, b, "with its axes used in different ways")
            if a.row.splits != b.row.splits:
                raise _mixed(a, b, "with its rows split into blocks in different ways")
        size = 1.0
        if a.col is not None and b.col is not None:
            if a.col.axis != b.col.axis:
                raise _mixed(a, b, "as it is and transposed")
            if a.col.also != b.col.also:
                raise _mixed(a, b, "with its axes used in different ways")
            col, overlap = a.col, _overlap(a.col, b.col)
            if overlap is None:
                return ZERO
            a, b = self._narrowed(a, *overlap), self._narrowed(b, *overlap)
            a, b = self._split_like(a, b), self._split_like(b, a)
            if a.col.splits != b.col.splits:  # type: ignore[union-attr]
                raise _mixed(a, b, "with its columns split into blocks in different ways")
            also = math.prod([float(affine(s)[0]) for _, s in col.also])
            size = also * float(affine(overlap[1])[0]) / float(np.prod([abs(s) for s in a.col.splits]))  # type: ignore[union-attr]
        value = self._summed(a, b, eps)
        if value is ZERO:
            return ZERO
        cross = eps and a.copy != b.copy and not a.leaf.frozen and a.leaf.speed == self.speed
        epsilon = self.epsilon if a.leaf.lr is None or not cross else a.leaf.lr * self.epsilon
        if a.leaf.zero_var:
            return value * (size * epsilon) if cross else ZERO
        var = a.leaf.var + epsilon if cross else a.leaf.var
        return value * (size * var)

    def _narrowed(self, x: Product, offset: Any, size: Any) -> Product:
        col = x.col
        assert col is not None
        if (offset, size) == (col.offset, col.size):
            return x
        if col.splits:
            raise UnsupportedError(f"a part of the blocks of '{x.leaf.name}' is used.\n  at {x.line}")
        if col.also:
            raise UnsupportedError(f"a part of the columns of '{x.leaf.name}' is used.\n  at {x.line}")
        operand = self.graph.cut(x.operand, add_sizes(offset, col.offset, -1), size)
        return self._with(x, operand, x.contracted, Rows(col.axis, offset, size), x.indices)

    def _split_like(self, x: Product, other: Product) -> Product:
        """The columns of x split into the blocks of the other's, the block index being contracted."""
        assert x.col is not None
        assert other.col is not None
        while len(x.col.splits) < len(other.col.splits):
            blocks = other.col.splits[len(x.col.splits)]
            operand = self.graph.split(x.operand, blocks)
            more = expand(x.rank + x.contracted, 1)
            indices = tuple((k, self.graph.viewed(v, more)) for k, v in x.indices)
            count = np.arange(abs(blocks)).reshape((1,) * (x.rank + x.contracted) + (abs(blocks),))
            block = (("block", x.col.axis, len(x.col.splits)), count)
            col = Rows(x.col.axis, x.col.offset, x.col.size, (*x.col.splits, blocks))
            x = self._with(x, operand, x.contracted + 1, col, (*indices, block))
        return x

    def _with(self, x: Product, operand: Node, contracted: int, col: Rows, indices: Any) -> Product:
        return self.graph.product(x.leaf, x.copy, operand, contracted, x.row, col, indices, x.line)  # type: ignore[return-value]

    def _summed(self, a: Product, b: Product, eps: bool) -> Any:
        """Sum over the contracted axes of both sides of [same entry of the parameter] * gram(operands)."""
        rank = a.rank
        ia, ib = dict(a.indices), dict(b.indices)
        if ia.keys() != ib.keys():
            raise _mixed(a, b, "with its axes used in different ways")
        where = {}  # contracted axis of b -> the contracted axis of a that it runs along with
        matched = set()
        for k in ia:
            own, its = _running_axis(ia[k], rank), _running_axis(ib[k], rank)
            if own is not None and its is not None and np.array_equal(np.ravel(ia[k]), np.ravel(ib[k])):
                where[its] = own
                matched.add(k)
        free = [c for c in range(rank, rank + b.contracted) if c not in where]
        total = rank + a.contracted + len(free)
        place = {c: rank + a.contracted + i for i, c in enumerate(free)} | where
        view_a = expand(rank + a.contracted, len(free))
        view_b = ViewMap(total, (*range(rank), *(place[c] for c in range(rank, rank + b.contracted))))
        mask: Any = None
        full = np.broadcast_shapes(_placed_shape(a, view_a), _placed_shape(b, view_b))
        for k in ia:
            if k in matched:
                continue
            same = self.graph.viewed(ia[k], view_a) == self.graph.viewed(ib[k], view_b)
            if isinstance(same, np.ndarray | np.bool_):
                if not same.any():
                    return ZERO
                if same.all():
                    continue
            mask = same if mask is None else mask & same
        x, y = self.graph.view(a.operand, view_a), self.graph.view(b.operand, view_b)
        k = total - rank
        if isinstance(x, Const) and isinstance(y, Const) and mask is None:
            return ZERO if is_zero(x) or is_zero(y) else weighted_sum(x.array, y.array, k, full[rank:])
        if mask is None:
            return self.summed(x, y, eps, None, k, full[rank:])
        value = self(x, y, eps)
        if value is ZERO:
            return ZERO
        value = jnp.where(mask, value, jnp.zeros((), jnp.asarray(value).dtype))
        return weighted_sum(None, value, k, full[rank:])


def apart(a: Product, b: Product) -> bool:
    """Whether they have no entry of the parameter in common, as one is made of a few rows that the other lacks."""
    for x, y in ((a, b), (b, a)):
        for key, index in x.indices:
            if not (isinstance(key, tuple) and key[0] == "part"):
                continue
            _, axis, at = key
            if any(k != key and isinstance(k, tuple) and k[:2] == key[:2] for k, _ in y.indices):
                return True
            for other in (y.row, y.col):
                if other is not None and other.axis == axis:
                    start, end = affine(other.offset), affine(add_sizes(other.offset, other.size))
                    first, last = (at, int(np.min(index))), (at, int(np.max(index)))
                    if last < start or first >= end:
                        return True
    return False


def below_fluctuation(x: Node) -> list[Product]:
    """The products that a node is a function of."""
    if isinstance(x, Product):
        return [x]
    children = x.args if isinstance(x, Pointwise) else [t for _, t in x.terms] if isinstance(x, Sum) else (
        [x.operand] if isinstance(x, View | Contract | Fluctuation) else []
    )  # fmt: skip
    return [p for c in children for p in below_fluctuation(c)]


def _carry(x: Node) -> Carry | None:
    x = x.operand if isinstance(x, View) else x
    return x if isinstance(x, Carry) else None


def _placed_shape(x: Product, view: ViewMap) -> tuple[int, ...]:
    shape = [1] * view.rank
    inner = np.broadcast_shapes(x.operand.shape, *(np.shape(v) for _, v in x.indices))
    for size, axis in zip(inner, view.entries, strict=True):
        shape[axis] = max(shape[axis], size)
    return tuple(shape)


def _running_axis(index: Array, rank: int) -> int | None:
    """The one contracted axis along which a known index runs through distinct values."""
    if not isinstance(index, np.ndarray):
        return None
    axes = [i for i, n in enumerate(index.shape) if n > 1]
    if not axes:
        return None
    (axis, *others) = axes
    distinct = not others and axis >= rank and len(np.unique(index)) == index.size
    return axis if distinct else None


def _overlap(x: Rows, y: Rows) -> Any:
    if (x.offset, x.size) == (y.offset, y.size):
        return x.offset, x.size
    # finite offsets are nothing against the width
    at = lambda s: tuple(affine(s))  # noqa: E731
    lo = max(x.offset, y.offset, key=at)
    hi = min(add_sizes(x.offset, x.size), add_sizes(y.offset, y.size), key=at)
    return (lo, add_sizes(hi, lo, -1)) if at(hi) > at(lo) else None


def _mixed(a: Product, b: Product, how: str) -> UnsupportedError:
    return UnsupportedError(
        f"the parameter '{a.leaf.name}' is used {how}; the limit of a network with such tied weights needs the "
        f"correction terms of Tensor Programs III, which anywidth does not have. Use two parameters.\n"
        f"  at {a.line}\n  and {b.line}"
    )


def weighted_sum(coef: Any, value: Any, k: int, lengths: Sequence[int]) -> Any:
    """Sum over the last k axes, of the given lengths, of coef * value; without ever building the product."""
    if value is ZERO:
        return ZERO
    if k == 0:
        return value if coef is None else coef * value
    operands = [jnp.asarray(x) for x in (coef, value) if x is not None]
    rank = operands[0].ndim
    batch = np.broadcast_shapes(*(x.shape for x in operands))[: rank - k]
    factor = 1
    for axis, n in enumerate(lengths, rank - k):
        if all(x.shape[axis] == 1 for x in operands):
            factor *= n
    terms: list[Any] = []
    for x in operands:
        kept = [i for i in range(rank) if x.shape[i] > 1]
        terms += [x.reshape([x.shape[i] for i in kept]), kept]
    out = [i for i in range(rank - k) if batch[i] > 1]
    wanted = jnp.result_type(*(x.dtype for x in operands))
    terms[0::2] = [t.astype(wanted) for t in terms[0::2]]
    total = jnp.einsum(*terms, out, precision="highest").reshape(batch)
    return total * factor if factor != 1 else total


__all__ = ["ZERO", "Dyn", "Gram", "Index", "NeedsUnroll", "NoLimitError", "add", "scaled", "weighted_sum"]
