"""`dot_general`: facts 1 and 2. A parameter times a vector is Gaussian, two vectors give a number (`readouts.py`).

A product is one sum over the last axes of two operands that are spread over common ones: first those of the result,
then those that are summed. What the operands are decides what it is: W x with W a parameter, of order sqrt(n) more than
x, is a vector of Gaussian coordinates with covariance n var(W) E[X X'] between them and those of W x'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np

from anywidth.errors import NoLimitError, UnsupportedError
from anywidth.expect import methods
from anywidth.inner import ZERO, weighted_sum
from anywidth.interpret import Interpreter, evaluated, register
from anywidth.kets import Const, Node, is_zero
from anywidth.rows import Rows, rows_of
from anywidth.rules.levels import level_of, widths
from anywidth.rules.readouts import aligned, inner_product, is_one, lengths_of, raw_parameter
from anywidth.trace import Size, affine, finite, is_wide, kind_of, order
from anywidth.values import Ax, Det, Ket, Mat, Part, Wide, common_sizes, refined, standard, to_ket
from anywidth.views import ViewMap


@dataclass(frozen=True)
class Plan:
    """The axes of a product: first those of the result, then those that are summed."""

    lhs: tuple[int, ...]  # for each axis of an operand, its place
    rhs: tuple[int, ...]
    outer: int
    summed: int


def plan(dimension_numbers: Any, lhs_rank: int, rhs_rank: int) -> Plan:
    (lc, rc), (lb, rb) = dimension_numbers
    lhs, rhs = [-1] * lhs_rank, [-1] * rhs_rank
    place = 0
    for i, j in zip(lb, rb, strict=True):
        lhs[i] = rhs[j] = place
        place += 1
    for axes, contracted in ((lhs, lc), (rhs, rc)):
        for i in range(len(axes)):
            if axes[i] < 0 and i not in contracted:
                axes[i] = place
                place += 1
    outer = place
    for i, j in zip(lc, rc, strict=True):
        lhs[i] = rhs[j] = place
        place += 1
    return Plan(tuple(lhs), tuple(rhs), outer, place - outer)


def spread(x: Any, places: Sequence[int], rank: int) -> Any:
    """An operand over all axes of the plan; those that it does not have are of size one."""
    if isinstance(x, Det):
        order = sorted(range(len(places)), key=lambda i: places[i])
        shape: list[Size] = [1] * rank
        middle = [1] * rank
        for i, p in enumerate(places):
            shape[p] = x.shape[i]
            middle[p] = np.shape(x.val)[i]
        val = evaluated(lambda v: jnp.transpose(v, order).reshape(middle), x.val)
        return replace(x, val=val, shape=tuple(shape))
    layout: list[tuple[Any, ...]] = [()] * rank
    for i, p in enumerate(places):
        layout[p] = x.layout[i]
    return x.relaid(tuple(layout))


@register("dot_general")
def dot_general(it: Interpreter, x: Part, y: Part, dimension_numbers: Any, **params: Any) -> Part:
    p = plan(dimension_numbers, len(x.shape), len(y.shape))
    if isinstance(x, Det) and isinstance(y, Det):
        return _numbers(it, x, y, p)
    for v in (x, y):
        if isinstance(v, Det):
            it.settled(v)
    rank = p.outer + p.summed
    a, b = spread(x, p.lhs, rank), spread(y, p.rhs, rank)
    return contraction(it, a, b, p.outer)


def _numbers(it: Interpreter, x: Det, y: Det, p: Plan) -> Part:
    rank = p.outer + p.summed
    return numbers(it, spread(x, p.lhs, rank), spread(y, p.rhs, rank), p.outer)


def numbers(it: Interpreter, x: Det, y: Det, outer: int) -> Det:
    """The sum over the axes from `outer` on of the product of two deterministic arrays of one rank."""
    shape = tuple(s if s != 1 else t for s, t in zip(x.shape, y.shape, strict=True))
    power, factor = x.power + y.power, 1.0
    for s in shape[outer:]:
        if is_wide(s):
            power, factor = power + order(s), factor * float(affine(s)[0])
    lengths = [1 if is_wide(s) else finite(s) for s in shape[outer:]]
    val = evaluated(lambda u, v: weighted_sum(u, v, len(lengths), lengths) * factor, x.val, y.val)
    noises = [n + o.power for n, o in ((x.noise, y), (y.noise, x)) if n is not None]
    return Det(val, power, shape[:outer], zero=x.zero or y.zero, noise=max(noises, default=None), line=x.line or y.line)


def contraction(it: Interpreter, a: Any, b: Any, outer: int) -> Part:
    """The sum over the axes from `outer` on of a * b, both of one rank."""
    wide_sum = any(is_wide(s) for s in (*a.shape[outer:], *b.shape[outer:]))
    if isinstance(a, Mat) or isinstance(b, Mat):
        mat, other = (a, b) if isinstance(a, Mat) else (b, a)
        if isinstance(other, Mat):
            raise UnsupportedError(
                "two parameter matrices are multiplied with each other: apply them to the vector one after the other"
            )
        return _matrix(it, mat, other, outer)
    if isinstance(a, Det) and any(map(is_wide, a.shape)):
        a = to_ket(it.graph, a)
    if isinstance(b, Det) and any(map(is_wide, b.shape)):
        b = to_ket(it.graph, b)
    if wide_sum:
        if not (isinstance(a, Ket) and isinstance(b, Ket)):
            raise UnsupportedError("a sum over the width of this kind is not supported")
        return inner_product(it, a, b, outer)
    if isinstance(a, Ket) and isinstance(b, Ket):
        return _coordinatewise(it, a, b, outer)
    return _mixed(it, a, b, outer)


def _coordinatewise(it: Interpreter, a: Ket, b: Ket, outer: int) -> Ket:
    """Two kets multiplied coordinate by coordinate and summed over finite axes."""
    if any(x.wides() for x in (a, b)) and not all(x.wides() for x in (a, b)):
        raise NoLimitError(
            "a random scalar shared by all channels multiplies a hidden layer: the limit stays random. Weights that "
            "mix tokens, as those of an MLP-mixer, are such numbers: give each channel its own, of shape (.., n), or "
            "fixed numbers in apply"
        )
    product = it.pointwise("mul", {}, [a, b], a.power + b.power)
    sizes = [[x.size for x in axis] for axis in product.layout]
    product = standard(it.graph, product, sizes)
    summed = sum(isinstance(x, Ax) for axis in product.layout[outer:] for x in axis)
    node = summed_node(it, product.node, None, summed, lengths_of(product.layout, outer))
    return Ket(node, product.layout[:outer], product.power)


def _mixed(it: Interpreter, a: Any, b: Any, outer: int) -> Ket:
    """A deterministic array times kets, over finite axes: a raw parameter gives a product, others a linear map."""
    ket, coef = (a, b) if isinstance(a, Ket) else (b, a)
    power = ket.power + coef.power
    (k, c), layout, summed = aligned(it, [ket, coef], outer)
    node = k.node
    c = c if np.ndim(c) == node.rank else jnp.reshape(c, (1,) * node.rank)
    if coef.zero:
        out: Node = it.graph.const(np.zeros((1,) * (node.rank - summed)))
        return Ket(out, layout[:outer], ket.power)
    raw = raw_parameter(it, node)
    if raw is not None and raw.contracted == 0 and isinstance(raw.operand, Const):
        operand = raw.operand.array if not is_one(raw.operand.array) else None
        weight = it.graph.const(c if operand is None else c * operand)
        out = it.graph.product(raw.leaf, raw.copy, weight, summed, raw.row, raw.col, raw.indices, raw.line)
        full = np.broadcast_shapes(weight.shape, *(np.shape(v) for _, v in raw.indices))
        node_lengths = lengths_of(layout, outer)
        factor = np.prod(
            [n for n, m in zip(node_lengths, full[len(full) - summed :], strict=True) if m == 1], initial=1
        )
        return Ket(out if factor == 1 else it.graph.scale(float(factor), out), layout[:outer], power)
    return Ket(summed_node(it, node, c, summed, lengths_of(layout, outer)), layout[:outer], power)


def summed_node(it: Interpreter, node: Node, coef: Any, summed: int, lengths: Sequence[int]) -> Node:
    """The sum over the last axes; those along which nothing varies are a factor."""
    full = np.broadcast_shapes(node.shape, np.shape(coef) if coef is not None else ())
    factor = float(np.prod([n for n, m in zip(lengths, full[len(full) - summed :], strict=True) if m == 1], initial=1))
    out = it.graph.contract(coef, node, summed)
    return out if factor == 1.0 else it.graph.scale(factor, out)


def _matrix(it: Interpreter, mat: Mat, other: Any, outer: int) -> Ket:
    """W x: the operand carries the contracted width axis, if any, and the finite axes that are summed."""
    g = it.graph
    wide_sum = any(is_wide(s) for s in mat.shape[outer:])
    if isinstance(other, Det) and any(map(is_wide, other.shape)):
        other = to_ket(g, other)
    if not wide_sum:
        if isinstance(other, Ket):
            raise UnsupportedError("a parameter matrix meets a random vector along a finite axis")
        return _mixed_matrix(it, mat, other, outer)
    if not isinstance(other, Ket):
        raise UnsupportedError("a parameter matrix is contracted over its width with an array that has no width")
    sizes = common_sizes([((),) * outer + x.layout[outer:] for x in (mat, other)], len(mat.layout))
    # an operand may have no atoms along a summed axis: it is of size one, or does not change along it
    mat, other = (
        refined(
            g,
            x,
            [[a.size for a in axis] for axis in x.layout[:outer]]
            + [own if axis else [] for own, axis in zip(sizes[outer:], x.layout[outer:], strict=True)],
        )
        for x in (mat, other)
    )
    for axis in range(outer):
        mine, its = (frozenset(n for a in x.layout[axis] for n in kind_of(a.size)) for x in (mat, other))
        if its - mine:
            raise UnsupportedError("a random vector with a second width axis is multiplied by a parameter matrix")
    numbers = {a.number for a in widths(mat.layout[outer:])}
    if level_of(mat.layout[outer:]) != level_of(other.layout[outer:]):
        raise UnsupportedError("a parameter matrix is summed over a width along which what it multiplies is constant")
    kept = [r for r in mat.rows if r.axis not in numbers]
    cols = [r for r in mat.rows if r.axis in numbers]
    names = [name for r in cols for name in r.level]
    others = [name for r in kept for name in r.level]
    if numbers & {a.number for a in widths(mat.layout[:outer])} or len(names) != len(set(names)):
        raise UnsupportedError("a parameter matrix is contracted over both of its width axes")
    if len(others) != len(set(others)):
        raise UnsupportedError("a product with a parameter has two axes of the same width (n x n)")
    row, col = rows_of(kept), rows_of(cols)
    assert col is not None
    _remember(it, mat, col)
    gain = sum((order(r.size) for r in cols), Fraction(0)) / 2
    # places: the finite atoms of the result, then the summed ones
    free: list[tuple[int, int]] = []
    summed: list[tuple[int, int]] = []
    for axis in range(len(mat.layout)):
        size = mat.layout[axis] or other.layout[axis]
        finite = [a for a in size if isinstance(a, Ax)]
        (free if axis < outer else summed).extend([(axis, j) for j in range(len(finite))])
    place = {key: i for i, key in enumerate([*free, *summed])}
    rank = len(place)

    def viewed(x: Any) -> Any:
        zero = g.index(np.zeros((1,) * rank, np.int64))
        entries: list[Any] = [zero] * x.rank
        for axis, atoms in enumerate(x.layout):
            for j, a in enumerate([a for a in atoms if isinstance(a, Ax)]):
                entries[a.axis] = place[axis, j]
        return x.with_view(g, ViewMap(rank, tuple(entries)), x.layout)

    m, k = viewed(mat), viewed(other)
    layout: list[tuple[Any, ...]] = []
    for axis in range(outer):
        atoms = mat.layout[axis] or other.layout[axis]
        places = iter([place[axis, j] for j in range(sum(isinstance(a, Ax) for a in atoms))])
        layout.append(tuple(Ax(next(places), a.size) if isinstance(a, Ax) else Wide(0, a.size) for a in atoms))
    operand = k.node if m.coef is None else g.scale(m.coef, k.node)
    if is_zero(operand):
        node: Node = g.const(np.zeros((1,) * len(free)))
        return Ket(node, tuple(layout), k.power + mat.power + gain)
    node = g.product(mat.leaf, it.copy, operand, len(summed), row, col, m.indices, it.eqn.line)
    if not node.gaussian:
        methods.mixes(it.eqn.place)
    both = zip(mat.layout[outer:], other.layout[outer:], strict=True)
    lengths = [a.size for own, others in both for a in own or others if isinstance(a, Ax)]
    full = np.broadcast_shapes(operand.shape, *(np.shape(v) for _, v in m.indices))
    factor = float(np.prod([n for n, f in zip(lengths, full[len(free) :], strict=True) if f == 1], initial=1))
    if factor != 1.0:
        node = g.scale(factor, node)
    power = k.power + mat.power + gain
    out = Ket(node, tuple(layout), power)
    if mat.mean is not None:
        return _with_mean(it, mat, k, len(summed), out, lengths)
    return out


def _with_mean(it: Interpreter, mat: Mat, k: Ket, summed: int, out: Ket, lengths: Sequence[int]) -> Ket:
    """A matrix with mean m adds m times the sum over the width of the operand, the same in every row."""
    from anywidth.rules.elementwise import total

    assert mat.mean is not None
    value, mean_power = mat.mean
    if "heads" in row_levels(mat):
        raise UnsupportedError("a parameter with a mean and an axis that grows with heads is multiplied by a vector")
    average = it.mean(k.node)
    if average is ZERO:
        return out
    size = next(
        a.size for axis in mat.layout for a in axis if isinstance(a, Wide) and a.number in [r.axis for r in mat.rows]
    )
    constant = weighted_sum(None, average, summed, lengths) * (value * float(affine(size)[0]))
    shift = Ket(it.graph.const(constant), out.layout, k.power + mean_power + 1)
    return total(it, [(1.0, out), (1.0, shift)])


def row_levels(mat: Mat) -> frozenset[str]:
    """Which widths the axes of a parameter grow with."""
    return frozenset().union(*(r.level for r in mat.rows))


def _mixed_matrix(it: Interpreter, mat: Mat, coef: Det, outer: int) -> Ket:
    raise UnsupportedError(
        "parameter matrices are combined with each other over a finite axis before they meet a vector: multiply "
        "each by its vector and combine the results"
    )


def _remember(it: Interpreter, mat: Mat, col: Rows) -> None:
    """Refuses W and its transpose in one forward pass."""
    line = it.eqn.line
    axis = tuple(sorted((col.axis, *(i for i, _ in col.also))))
    other = it.used.setdefault(mat.leaf, (axis, line))
    if other[0] != axis:
        raise UnsupportedError(
            f"the parameter '{mat.leaf.name}' is multiplied from both sides (W and its transpose in one forward pass). "
            "The limit of tied transposed weights needs the correction terms of Tensor Programs III, which anywidth "
            f"does not have: use two parameters.\n  at {line}"
            + (f"\n  and {other[1]}" if other[1] != line else " (a derivative taken inside the network uses both)")
        )
