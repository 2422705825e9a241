"""Sums over the width: numbers and readouts.

For random vectors x and y of n coordinates that become i.i.d., x.y = n E[X Y] + O(sqrt(n)): a number, with noise of a
smaller order (law of large numbers). For a parameter v of which the coordinates of s are independent,
v.s is Gaussian itself, of order sqrt(n) and variance n var(v) E[S S'] (central limit theorem): a readout. The product
(v W).s is v.(W s) written from the left, and a readout as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np

from anywidth.errors import UnsupportedError
from anywidth.expr import substituted, variables
from anywidth.inner import ZERO, weighted_sum
from anywidth.interpret import Interpreter
from anywidth.kets import (
    Const,
    Contract,
    Fluctuation,
    Leaf,
    Node,
    Pointwise,
    Product,
    Sum,
    View,
    is_zero,
)
from anywidth.rows import Rows, rows_of
from anywidth.rules.levels import level_of, sum_over_one, widths
from anywidth.trace import Size, affine, is_wide, order
from anywidth.values import Ax, Det, Ket, Layout, Mat, Part, Wide
from anywidth.views import expand


def aligned(it: Interpreter, values: Sequence[Any], outer: int) -> tuple[list[Any], Layout, int]:
    """Operands over common axes; the layout of the result and how many trailing finite axes are summed."""
    operands, sizes = it.aligned(values)
    laid = next(x for x in operands if isinstance(x, Ket | Mat))
    summed = sum(isinstance(s, int) for axis in sizes[outer:] for s in axis)
    return operands, laid.layout, summed


def lengths_of(layout: Layout, outer: int) -> list[int]:
    return [a.size for axis in layout[outer:] for a in axis if isinstance(a, Ax)]


def is_one(a: Any) -> bool:
    return isinstance(a, float | np.ndarray) and np.size(a) == 1 and float(np.reshape(a, ())) == 1.0


def raw_parameter(it: Interpreter, node: Node) -> Product | None:
    """The node as a parameter itself, not yet multiplied by anything random."""
    while isinstance(node, View):
        pushed = it.graph.push(node)
        if pushed is node:
            return None
        node = pushed
    raw = isinstance(node, Product) and node.col is None and isinstance(node.operand, Const)
    return node if raw else None  # type: ignore[return-value]


def inner_product(it: Interpreter, a: Ket, b: Ket, outer: int) -> Part:
    """x.y over the width: n times a number, or a readout where one side is a parameter of its own."""
    out = gaussian(it, a, b, outer)
    if out is not None:
        return out
    (x, y), layout, summed = aligned(it, [a, b], outer)
    if level_of(layout[:outer]):
        expressions, args, coefs = it.expression([x.node, y.node])
        both = it.graph.pointwise(("mul", (), *expressions), args, coefs)
        fluctuating = sum_over_one(it, both, x.power + y.power, layout, outer, summed)
        if fluctuating is not None:
            return fluctuating
    shape = Ket(x.node, layout[:outer], x.power).shape
    lengths = lengths_of(layout, outer)
    value = it.gram(x.node, y.node)
    if value is ZERO:
        for one, two in ((x, y), (y, x)):
            summed_up = term_by_term(it, one, two, outer)
            if summed_up is not None:
                return summed_up
    sizes = [a.size for a in widths(layout[outer:])]
    return number(it, value, x.power + y.power, sizes, summed, lengths, layout[:outer], shape)


def gaussian(it: Interpreter, a: Ket, b: Ket, outer: int) -> Part | None:
    """x.y where it is Gaussian: a readout by a parameter on either side."""
    for v, s in ((a, b), (b, a)):
        for of in (readout, bilinear):
            out = of(it, v, s, outer)
            if out is not None:
                return out
    return None


def term_by_term(it: Interpreter, v: Ket, s: Ket, outer: int) -> Part | None:
    """(c v + c' v' ..).s, both over common axes, as a sum of readouts; None if a term is none, or there is no sum."""
    node = v.node
    while isinstance(node, View) and isinstance(node.operand, Sum | View):
        node = it.graph.push(node)
    if not isinstance(node, Sum):
        return None
    outs = []
    for coef, term in node.terms:
        other = s.node if coef is None else it.graph.scale(coef, s.node)
        sides = Ket(term, v.layout, v.power), Ket(other, s.layout, s.power)
        out = gaussian(it, *sides, outer)
        if out is None:
            out = term_by_term(it, *sides, outer)
        if not isinstance(out, Ket):
            return None
        outs.append(out)
    from anywidth.rules.elementwise import total

    return total(it, [(1.0, out) for out in outs])


def number(
    it: Interpreter,
    value: Any,
    power: Fraction,
    sizes: Sequence[Size],
    summed: int,
    lengths: Sequence[int],
    layout: Layout,
    shape: Any,
) -> Det:
    """A sum over the width: n E[...], and noise of order sqrt(n) besides."""
    finite = [a.size for axis in layout for a in axis if isinstance(a, Ax)]
    numeric = tuple(1 if is_wide(s) else int(s) for s in shape)
    grows = sum((order(s) for s in sizes), Fraction(0))
    if value is ZERO:
        dtype = next(v.dtype for v in it.eqn.outputs)
        zeros = np.zeros(numeric, dtype)
        return Det(zeros, power + grows, shape, zero=True, noise=power + grows / 2, line=it.eqn)
    value = weighted_sum(None, value, summed, lengths) * float(np.prod([float(affine(s)[0]) for s in sizes]))
    value = jnp.broadcast_to(value, finite).reshape(numeric)
    return Det(value.astype(next(v.dtype for v in it.eqn.outputs)), power + grows, shape)


def readout(it: Interpreter, v: Ket, s: Ket, outer: int) -> Ket | None:
    """v.s with v a parameter of which the coordinates of s are independent: a Gaussian number of order sqrt(n).

    s may depend on v through products with other parameters (an embedding that is the readout too): its
    coordinates are independent of those of v all the same, and so they are in the other copy.
    """
    raw = raw_parameter(it, v.node)
    if raw is None or not isinstance(raw.operand, Const) or _seen(raw.leaf, s.node):
        return None
    (x, y), layout, summed = aligned(it, [v, s], outer)
    raw = raw_parameter(it, x.node)
    assert raw is not None
    assert raw.row is not None
    kept, over = level_of(layout[:outer]), level_of(layout[outer:])
    # v has the width that is summed, and the other one exactly if the result has
    if raw.row.level != kept | over:
        return None
    axes = [replace(raw.row, also=()), *(Rows(i, 0, size) for i, size in raw.row.also)]
    row, col = (rows_of([r for r in axes if r.level <= level]) for level in (kept, over))
    if any(not (r.level <= kept or r.level <= over) for r in axes) or col is None:
        raise UnsupportedError(
            f"the parameter '{raw.leaf.name}' is summed over one of the widths of an axis: reshape it"
        )
    gain = sum((order(a.size) for a in widths(layout[outer:])), Fraction(0)) / 2
    rank = x.node.rank
    node_rank = rank - summed
    operand = y.node
    if not is_one(raw.operand.array):  # type: ignore[attr-defined]
        if raw.contracted:
            return None
        operand = it.graph.scale(raw.operand.array, operand)  # type: ignore[attr-defined]
    if raw.contracted:
        return None
    if is_zero(operand):
        return Ket(it.graph.const(np.zeros((1,) * node_rank)), layout[:outer], v.power + s.power + gain)
    line = it.eqn.line
    node = it.graph.product(raw.leaf, it.copy, operand, summed, row, col, raw.indices, line)
    full = np.broadcast_shapes(operand.shape, *(np.shape(i) for _, i in raw.indices))
    factor = float(
        np.prod([n for n, f in zip(lengths_of(layout, outer), full[node_rank:], strict=True) if f == 1], initial=1)
    )
    if factor != 1.0:
        node = it.graph.scale(factor, node)
    return Ket(node, layout[:outer], v.power + s.power + gain)


def bilinear(it: Interpreter, g: Ket, s: Ket, outer: int) -> Ket | None:
    """(v W) . s, the product v . (W s) from the left: Gaussian too, if v and s are independent of W and each other.

    As a parameter, W is summed over both of its width axes; v and s live on different ones, so that what it is
    multiplied with has the inner product <v, v'> <s, s'>, which is that of v s coordinate by coordinate.
    """
    node = g.node
    while isinstance(node, View):
        pushed = it.graph.push(node)
        if pushed is node:
            return None
        node = pushed
    if not isinstance(node, Product) or node.col is None or node.row is None or node.leaves & s.node.leaves:
        return None
    if any("heads" in level for level in node.levels | s.node.levels) or "heads" in node.col.level:
        return None
    (x, y), layout, summed = aligned(it, [g, s], outer)
    if any(isinstance(a, Wide) for axis in layout[:outer] for a in axis):
        return None
    inner = x.node
    while isinstance(inner, View):
        inner = it.graph.push(inner)
    if not isinstance(inner, Product) or inner.col is None or inner.row is None or inner.row.splits:
        return None
    # axes: those of the result, the summed finite ones, and those that the product itself contracts
    right = it.graph.view(y.node, expand(y.node.rank, inner.contracted))
    expressions, args, coefs = it.expression([inner.operand, right])
    both = it.graph.pointwise(("mul", (), *expressions), args, coefs)
    rows = float(affine(inner.row.size)[0])
    operand = both if rows == 1.0 else it.graph.scale(rows**0.5, both)
    line = it.eqn.line
    out = it.graph.product(
        inner.leaf, it.copy, operand, summed + inner.contracted, None, inner.col, inner.indices, line
    )
    full = np.broadcast_shapes(operand.shape, *(np.shape(i) for _, i in inner.indices))
    kept = len(full) - summed - inner.contracted
    lengths = lengths_of(layout, outer)
    factor = float(np.prod([n for n, f in zip(lengths, full[kept : kept + summed], strict=True) if f == 1], initial=1))
    return Ket(
        out if factor == 1.0 else it.graph.scale(factor, out), layout[:outer], g.power + s.power + Fraction(1, 2)
    )


def _seen(leaf: Leaf, node: Node) -> bool:
    """Whether the coordinates of a node depend on the same coordinates of a parameter."""
    if leaf not in node.leaves:
        return False
    if isinstance(node, Product):
        return node.col is None or node.leaf is leaf
    if isinstance(node, Sum):
        return any(_seen(leaf, t) for _, t in node.terms)
    if isinstance(node, Pointwise):
        return any(_seen(leaf, a) for a in node.args)
    if isinstance(node, Contract | View | Fluctuation):
        return _seen(leaf, node.operand)
    return True


def readout_of_product(it: Interpreter, x: Ket, outer: int) -> Ket | None:
    """sum(v * h) written as a coordinatewise product and a sum: the same readout."""
    node = x.node
    if not isinstance(node, Pointwise) or node.expr[0] != "mul":
        return None
    for i, j in ((2, 3), (3, 2)):
        v, rest = node.expr[i], node.expr[j]
        coefs = []
        while v[0] == "mul" and v[2][0] in ("n", "c"):
            coefs.append(v[2])
            v = v[3]
        if v[0] != "v" or coefs:
            continue
        raw = raw_parameter(it, node.args[v[1]])
        if raw is None:
            continue
        h = _as_node(it, rest, node)
        if _seen(raw.leaf, h):
            continue
        v_ket = Ket(_full_rank(it, node.args[v[1]], node.rank), x.layout, x.power)
        return readout(it, v_ket, Ket(_full_rank(it, h, node.rank), x.layout), outer)
    return None


def _full_rank(it: Interpreter, node: Node, rank: int) -> Node:
    return node if node.rank == rank else it.graph.view(node, expand(node.rank, rank - node.rank))


def _as_node(it: Interpreter, e: Any, node: Pointwise) -> Node:
    if e[0] == "v":
        return node.args[e[1]]
    if e[0] == "mul" and e[2][0] in ("n", "c") and e[3][0] == "v":
        return it.graph.scale(e[2][1] if e[2][0] == "n" else node.coefs[e[2][1]], node.args[e[3][1]])
    used = sorted(variables(e))
    renamed = substituted(e, {i: ("v", k) for k, i in enumerate(used)}, None)
    return it.graph.pointwise(renamed, [node.args[i] for i in used], node.coefs)
