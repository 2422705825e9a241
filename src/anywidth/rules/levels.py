r"""Sums over one of two widths: of n coordinates for every head, or of heads for every coordinate.

In a network with two widths the coordinates of a ket are numbered by n, by heads, or by both, and each of them is a
function f(a_h, b_d, c_hd) of Gaussians numbered by heads alone, by n alone and by both (the *levels* of its node).
Sums over d, say, at every h:

- of what depends on no a_h, n times a number (law of large numbers);
- of what depends on no a_h and has mean zero given b, sqrt(n) times a Gaussian number of every head, independent over
  heads: by the central limit theorem the covariance of two such sums is that of their terms. This is the limit of the
  scores q.k / sqrt(n) of attention with many heads (Hron, Bahri, Sohl-Dickstein and Novak, *Infinite attention*, 2020,
  theorem 3): Cov(S_st, S'_s't') = E[q_s q'_s'] E[k_t k'_t'];
- of what depends on nothing but a_h, n times itself.

And the same with the widths exchanged. Anything else would be random given a_h, and is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from anywidth.errors import UnsupportedError
from anywidth.expect import methods
from anywidth.expect.choose import tops
from anywidth.expr import variables
from anywidth.inner import ZERO
from anywidth.interpret import Interpreter
from anywidth.kets import Contract, Graph, Node, Pointwise, Product, Sum, View
from anywidth.trace import affine, kind_of, order
from anywidth.values import Ket, Layout, Wide

Level = frozenset[str]


def widths(layout: Layout) -> list[Wide]:
    """The width axes of a layout."""
    return [a for axis in layout for a in axis if isinstance(a, Wide)]


def level_of(layout: Layout) -> Level:
    """What the coordinates of a layout are numbered by."""
    return frozenset(name for a in widths(layout) for name in kind_of(a.size))


def random_at(levels: frozenset[Level], kept: Level) -> bool:
    """Whether something at these levels stays random when only the kept width is left."""
    return any(level and level <= kept for level in levels)


def sum_over_one(it: Interpreter, node: Node, power: Fraction, layout: Layout, outer: int, summed: int) -> Ket | None:
    """The sum over a width of kets at every coordinate of the other; None if it is a number.

    Its last `summed` axes are summed as well.
    """
    from anywidth.rules.products import summed_node
    from anywidth.rules.readouts import lengths_of

    kept, over = level_of(layout[:outer]), widths(layout[outer:])
    if not kept:
        return None
    size = 1.0
    for a in over:
        size *= float(affine(a.size)[0])
    orders = sum((order(a.size) for a in over), Fraction(0))
    total = summed_node(it, node, None, summed, lengths_of(layout, outer))
    levels = frozenset(level for level in node.levels if level)
    if levels and all(level <= kept for level in levels):
        return Ket(it.graph.scale(size, total), layout[:outer], power + orders)
    if random_at(levels, kept):
        raise UnsupportedError(
            f"a sum over {' and '.join(map(str, (a.size for a in over)))} coordinates stays random at every one of the "
            f"other width ({' '.join(sorted(kept))}), as the average over a head of what its own attention made of "
            "the tokens. anywidth has no rule for it; averages over both widths have one"
        )
    if it.mean(node) is not ZERO:
        return None
    everything = kept | level_of(layout[outer:])
    if not all(level == everything for level in levels) and not centred(it.graph, node, everything):
        raise UnsupportedError(
            "a sum over one of two widths has mean zero, but anywidth does not see that it has at every coordinate of "
            "the other"
        )
    methods.fluctuates(it.eqn.place)
    out = it.graph.fluctuation(total, kept)
    return Ket(out if size == 1.0 else it.graph.scale(size**0.5, out), layout[:outer], power + orders / 2)


def centred(graph: Graph, node: Node, level: Level) -> bool:
    """Whether a node has mean zero given everything that is not numbered by the whole level, for certain."""
    if isinstance(node, Product):
        return node.row is not None and node.row.level == level
    if isinstance(node, Sum):
        return all(centred(graph, t, level) for _, t in node.terms)
    if isinstance(node, View | Contract):
        return centred(graph, node.operand, level)
    return isinstance(node, Pointwise) and _odd(graph, node, node.expr, level)


def _odd(graph: Graph, node: Pointwise, e: Any, level: Level) -> bool:
    if e[0] == "v":
        return centred(graph, node.args[e[1]], level)
    if e[0] in ("add", "sub"):
        return all(_odd(graph, node, a, level) for a in e[2:])
    if e[0] != "mul":
        return False
    return any(
        _odd(graph, node, a, level) and _apart(graph, node, variables(a), variables(b))
        for a, b in ((e[2], e[3]), (e[3], e[2]))
    )


def _apart(graph: Graph, node: Pointwise, some: Sequence[int] | set[int], others: Sequence[int] | set[int]) -> bool:
    one, two = (
        frozenset().union(*(tops(graph, node.args[i]) for i in numbers)) for numbers in (some, others)
    )  # fmt: skip
    return None not in one | two and not one & two
