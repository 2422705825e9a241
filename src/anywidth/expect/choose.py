"""Fact 3: the expectation of a product of coordinatewise functions, by the most exact method that applies.

Both sides are brought to normal form (`atoms.py`), a sum of products of functions of one Gaussian each and of
functions of several (`Joint`). The factors of a pair of such products are grouped by dependence, and independent groups
factorise. A group of one Gaussian is a mean; of two, a closed form (`closed.py`) or quadrature (`quadrature.py`);
powers of any number of Gaussians, times functions of two more at most, follow by Wick's theorem (`wick.py`); functions
of linear combinations are functions of one Gaussian (`gather.py`); a batch normaliser goes to `batch.py`.
Any other group, and no more than that, is sampled (`sampled.py`); where many would have to be, the whole is sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from anywidth.errors import NeedsUnroll, NoLimitError, UnsupportedError
from anywidth.expect import batch, closed, methods, quadrature, sampled, wick
from anywidth.expect.atoms import (
    IDENTITY,
    Generic,
    Joint,
    Mono,
    SeveralGaussians,
    as_function,
    atom_key,
    atom_product,
    discontinuous,
    jumps,
    known,
    monomial,
    times,
)
from anywidth.expect.forms import Normaliser
from anywidth.expect.gather import gathered
from anywidth.expr import substituted, variables
from anywidth.kets import Const, Contract, Fluctuation, Node, Pointwise, Product, Sum, View

FEW_SAMPLED = 6  # so many groups are sampled one by one


def expectation(gram: Any, a: Node, b: Node, eps: bool) -> Any:
    """E[Z^a Z^b] of two nodes of which at least one is a coordinatewise function."""
    with methods.asked(gram.graph, a, b, eps):
        return _expectation(gram, a, b, eps)


def _expectation(gram: Any, a: Node, b: Node, eps: bool) -> Any:
    from anywidth.inner import ZERO, add

    whole = a, b
    a, b = simplest(gram, a), simplest(gram, b)
    left, right = forms(gram, a), forms(gram, b)
    terms = []
    count = 0
    for x in left:
        for y in right:
            try:
                term = _Term(gram, (a, b), (x, y), eps)
            except NoLimitError as e:
                origin = gram.graph.origin.get(a if isinstance(a, Pointwise) else b)
                raise e if origin is None or "\n  " in str(e) else NoLimitError(f"{e}.\n  at {origin.line}") from None
            terms.append(term)
            count += term.sampled
            if count > FEW_SAMPLED:
                return sampled.expectation(gram, *whole, eps)
    total: Any = ZERO
    for term in terms:
        total = add(total, term.value())
    return total


def simplest(gram: Any, node: Node) -> Node:
    """The same node, written with functions of one Gaussian alone if it can be."""
    if not isinstance(node, Pointwise) or not any(m.joints for m in forms(gram, node)):
        return node
    new = gathered(gram.graph, node)
    return node if any(m.joints for m in forms(gram, new)) else new


def arguments(node: Node) -> tuple[Node, ...]:
    """The nodes that the factors of its normal form speak of."""
    return node.args if isinstance(node, Pointwise) else () if isinstance(node, Const) else (node,)


def forms(gram: Any, node: Node) -> list[Mono]:
    """The normal form of a node."""
    if isinstance(node, Const):
        return [Mono(node.array, ())]
    if not isinstance(node, Pointwise):
        return [Mono(1.0, ((0, IDENTITY),))]
    key = ("form", node)
    table = gram.graph.table
    if key not in table:
        small = frozenset(i for i, x in enumerate(node.args) if _no_variance(x))
        opaque = frozenset(i for i, x in enumerate(node.args) if not x.gaussian)
        # functions of the two copies are one and the same, so that what integrates them is traced once
        alike = ("form of", node.expr, tuple(map(id, node.coefs)), small, opaque)
        if alike not in table:
            table[alike] = Normaliser(node.coefs, small, opaque).form(node.expr)
        table[key] = table[alike]
    return table[key]


def _no_variance(node: Node) -> bool:
    x = node
    while isinstance(x, View):
        x = x.operand
    if isinstance(x, Product):
        return x.leaf.zero_var
    children = [t for _, t in x.terms] if hasattr(x, "terms") else [x.operand] if isinstance(x, Contract) else []
    return bool(children) and all(_no_variance(c) for c in children)


class SeveralError(UnsupportedError):
    """Carries the node, so that the interpreter can name the user's line."""

    def __init__(self, node: Node, message: str) -> None:
        super().__init__(message)
        self.node = node


class _Item:
    """A factor: an atom of one node, a normaliser, or a function of several nodes."""

    def __init__(self, gram: Any, side: int, what: Any, nodes: tuple[Node, ...], numbers: tuple[int, ...]) -> None:
        self.side, self.what, self.nodes, self.numbers = side, what, nodes, numbers
        self.simple = not isinstance(what, Joint | batch.Norm) and nodes[0].gaussian
        self.tops = frozenset().union(*(tops(gram.graph, n) for n in nodes))
        # a jump has derivative zero almost everywhere
        self.frozen = self.simple and jumps(what)


class _Term:
    """A pair of monomials: its factors in independent groups."""

    def __init__(self, gram: Any, nodes: tuple[Node, Node], monos: tuple[Mono, Mono], eps: bool) -> None:
        self.gram, self.nodes, self.eps = gram, nodes, eps
        self.coef = times(monos[0].coef, monos[1].coef)
        self.monos = monos
        self.exact: Any = None  # of batch norm
        self.groups: list[tuple[list[_Item], Any]] = []
        if (monos[0].norm or monos[1].norm) and not (monos[0].joints or monos[1].joints):
            try:
                args = arguments(nodes[0]), arguments(nodes[1])
                self.exact = batch.expectation(gram, monos[0], args[0], monos[1], args[1], eps)
                return
            except SeveralGaussians:
                pass
        items = [item for side in (0, 1) for item in self._items(side)]
        cov = self._dependences(items)
        for group in _groups(len(items), cov):
            members = [items[i] for i in group]
            between = _between(cov, group)
            # what is sampled for two examples is sampled for one of them as well: see `sampled.py`
            merged = self._merged(members) if _integrable(members, between) and not _closed(members) else members
            if len(merged) < len(members):
                members, between = merged, _between(self._dependences(merged), range(len(merged)))
            self.groups.append((members, between))

    def _items(self, side: int) -> list[_Item]:
        mono, args = self.monos[side], arguments(self.nodes[side])
        new = lambda what, numbers: _Item(self.gram, side, what, tuple(args[i] for i in numbers), numbers)
        out = [new(atom, (i,)) for i, atom in mono.factors]
        if mono.norm is not None:
            out.append(new(mono.norm, (mono.norm.argument,)))
        return out + [new(j, tuple(sorted(variables(j.expr)))) for j in mono.joints]

    def _merged(self, items: list[_Item]) -> list[_Item]:
        """Functions of one and the same Gaussian on both sides as one."""
        out: list[_Item] = []
        for x in items:
            same = [i for i, y in enumerate(out) if x.simple and y.simple and x.nodes[0] is y.nodes[0]]
            if same:
                y = out[same[0]]
                coef, atom = atom_product(y.what, x.what)
                self.coef = times(self.coef, coef)
                out[same[0]] = _Item(self.gram, y.side, atom, y.nodes, y.numbers)
            else:
                out.append(x)
        return out

    def _dependences(self, items: list[_Item]) -> dict[tuple[int, int], Any]:
        """Of each item and each later one."""
        n = len(items)
        return {(i, j): self._dependence(items[i], items[j]) for i in range(n) for j in range(i + 1, n)}

    def _dependence(self, x: _Item, y: _Item) -> Any:
        """The covariance, or None of factors that depend on each other in another way."""
        from anywidth.inner import ZERO

        eps = self.eps and x.side != y.side
        if x.simple and y.simple:
            return self.gram(x.nodes[0], y.nodes[0], eps and not x.frozen and not y.frozen)
        if not (x.tops & y.tops) and None not in x.tops | y.tops:
            return ZERO
        if all(n.gaussian for n in (*x.nodes, *y.nodes)):
            independent = all(self.gram(u, v, eps) is ZERO for u in x.nodes for v in y.nodes)
            return ZERO if independent else None
        return None

    @property
    def sampled(self) -> int:
        """How many of the groups have to be sampled."""
        return sum(not _integrable(members, cov) for members, cov in self.groups)

    def value(self) -> Any:
        from anywidth.inner import ZERO, scaled

        if self.exact is not None:
            return scaled(self.coef, self.exact)
        total: Any = self.coef
        for members, cov in self.groups:
            if _integrable(members, cov):
                key = tuple((m.side, m.nodes[0], atom_key(m.what)) for m in members)
                compute = lambda m=members, c=cov: _group(
                    self.gram, [wick.Factor(i.side, i.nodes[0], i.what) for i in m], c
                )
                value = _remembered(self.gram, ("group", key, self.eps), compute, members)
            else:
                value = self._sample(members)
            if value is ZERO:
                return ZERO
            total = value if known(total) and float(total) == 1.0 else total * value
        return total

    def _sample(self, members: list[_Item]) -> Any:
        left, right = (self._product(side, [m for m in members if m.side == side]) for side in (0, 1))
        compute = lambda: sampled.expectation(self.gram, left, right, self.eps)
        return _remembered(self.gram, ("sampled", left, right, self.eps), compute)

    def _product(self, side: int, members: list[_Item]) -> Node:
        """The product of some factors of one side, as a node."""
        graph, node = self.gram.graph, self.nodes[side]
        if not members:
            return graph.const(np.ones((1,) * node.rank))
        args: list[Node] = []
        coefs = list(node.coefs) if isinstance(node, Pointwise) else []

        def variable(x: Node) -> Any:
            if x not in args:
                args.append(x)
            return ("v", args.index(x))

        def coefficient(c: Any) -> Any:
            if isinstance(c, float | int):
                return ("n", float(c))
            coefs.append(c if np.ndim(c) == node.rank else jnp.reshape(c, (1,) * node.rank))
            return ("c", len(coefs) - 1)

        factors = []
        for m in members:
            if isinstance(m.what, Joint):
                places = {i: variable(x) for i, x in zip(m.numbers, m.nodes, strict=True)}
                factors.append(substituted(m.what.expr, places, None))
            elif isinstance(m.what, batch.Norm):
                power = -m.what.s / 2
                call = ("call", (_Normaliser(power), "smooth"), variable(m.nodes[0]))
                factors.append((*call, coefficient(m.what.alpha), coefficient(m.what.eps)))
            elif m.what is IDENTITY:
                factors.append(variable(m.nodes[0]))
            else:
                f, cs, breaks = as_function(m.what)
                how = "jump" if discontinuous(m.what) else "kink" if breaks else "smooth"
                factors.append(("call", (f, how), variable(m.nodes[0]), *(coefficient(c) for c in cs)))
        e = factors[0]
        for factor in factors[1:]:
            e = ("mul", (), e, factor)
        if e[0] == "v":
            return args[0]
        out = graph.pointwise(e, args, coefs)
        graph.origin[out] = graph.origin.get(node, graph.current)
        return out


class _Normaliser:
    """r -> (alpha r + eps)^power."""

    singular = True  # where r vanishes

    def __init__(self, power: float) -> None:
        self.power = power

    def __call__(self, r: Any, alpha: Any, eps: Any) -> Any:
        return (alpha * r + eps) ** self.power

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Normaliser) and other.power == self.power

    def __hash__(self) -> int:
        return hash(self.power)


def _remembered(gram: Any, key: Hashable, compute: Callable[[], Any], alive: Any = None) -> Any:
    """The same expectation once; `alive` is what the key speaks of by identity."""
    with methods.remembered(gram.memo, key, key in gram.memo):
        if key in gram.memo:
            return gram.memo[key]
        value = compute()
    if not gram.sealed:
        gram.memo[key] = value
        gram.graph.keep.append(alive)
    return value


def tops(graph: Any, node: Node) -> frozenset[Any]:
    """The parameters whose products a node is a function of; None among them for what is not known."""
    key = ("tops", node)
    if key not in graph.table:
        if isinstance(node, Product):
            row = None if node.row is None else (node.row.offset, node.row.size)
            graph.table[key] = frozenset({(node.leaf, row)})
        elif isinstance(node, Fluctuation):
            below = tops(graph, node.operand)
            graph.table[key] = frozenset(None if t is None else ("fluctuation", t) for t in below)
        else:
            children = _children(node)
            graph.table[key] = frozenset({None}) if children is None else frozenset().union(
                *(tops(graph, c) for c in children)
            )  # fmt: skip
    return graph.table[key]


def _children(node: Node) -> tuple[Node, ...] | None:
    if isinstance(node, Sum):
        return tuple(t for _, t in node.terms)
    if isinstance(node, View | Contract):
        return (node.operand,)
    if isinstance(node, Pointwise):
        return node.args
    return () if isinstance(node, Const) else None


def _between(cov: dict[tuple[int, int], Any], group: Sequence[int]) -> Callable[[int, int], Any]:
    """The covariance of two members of a group."""
    return lambda i, j: cov[group[min(i, j)], group[max(i, j)]]


def _groups(n: int, cov: dict[tuple[int, int], Any]) -> list[list[int]]:
    from anywidth.inner import ZERO

    groups = [{i} for i in range(n)]
    for (i, j), c in cov.items():
        if c is not ZERO:
            gi, gj = (next(g for g in groups if k in g) for k in (i, j))
            if gi is not gj:
                gi |= gj
                groups.remove(gj)
    return [sorted(g) for g in groups]


def _integrable(members: list[_Item], cov: Any) -> bool:
    """Whether `_group` has a rule for such factors."""
    if not all(m.simple for m in members):
        return False
    return len(members) <= 2 or wick.integrable([wick.Factor(m.side, m.nodes[0], m.what) for m in members], cov)


def _closed(members: list[_Item]) -> bool:
    """Two functions of one Gaussian whose expectation has a closed form, where that of their product has none."""
    if len(members) != 2 or members[0].nodes[0] is not members[1].nodes[0]:
        return False
    f, g = (m.what for m in members)
    if isinstance(f, Generic) or isinstance(g, Generic) or not closed.has_closed_form(f, g):
        return False
    return isinstance(atom_product(f, g)[1], Generic)


def _group(gram: Any, factors: list[wick.Factor], cov: Any) -> Any:
    if len(factors) == 1:
        return mean(gram, factors[0].node, factors[0].atom)
    if len(factors) == 2 and not all(monomial(f.atom) for f in factors):
        (_, u, f), (_, v, g) = factors
        return _univariate(f, g, variance(gram, u), variance(gram, v), cov(0, 1))
    if len(factors) == 2 and all(f.atom.k == 1 for f in factors):
        methods.used(methods.COVARIANCE)
        return times(factors[0].atom.plus * factors[1].atom.plus, cov(0, 1))
    return wick.expectation(gram, factors, cov)


def variance(gram: Any, u: Node) -> Any:
    """E[u^2], an array."""
    from anywidth.inner import ZERO

    q = gram(u, u)
    return jnp.zeros((1,) * u.rank) if q is ZERO else q


def mean(gram: Any, u: Node, atom: Any) -> Any:
    """E of a function of one Gaussian, or ZERO."""
    from anywidth.inner import ZERO

    if monomial(atom) and atom.k % 2:
        return ZERO
    if isinstance(atom, closed.ErfPower) and atom.k % 2 == 0:
        return ZERO
    if isinstance(atom, closed.GaussPower) and atom.k % 2:
        return ZERO
    q = variance(gram, u)
    if isinstance(atom, Generic):
        methods.used(methods.QUADRATURE)
        return quadrature.mean(atom.function, aligned(atom.coefs, q), q, breaks=aligned(atom.breaks, q))
    methods.used(methods.CLOSED)
    return closed.mean(atom, q)


def _univariate(f: Any, g: Any, q1: Any, q2: Any, c: Any) -> Any:
    if not isinstance(f, Generic) and not isinstance(g, Generic) and closed.has_closed_form(f, g):
        methods.used(methods.CLOSED)
        return closed.pair(f, g, q1, q2, c)
    methods.used(methods.QUADRATURE)
    for x, y, q in ((f, g, q2), (g, f, q1)):
        if monomial(x) and x.k == 1 and isinstance(y, Generic) and not y.discontinuous:
            q, c = jnp.broadcast_arrays(q, c)
            return times(x.plus, quadrature.line(y.function, aligned(y.coefs, c), q, c, breaks=aligned(y.breaks, c)))
    (ff, fc, fb), (gf, gc, gb) = as_function(f), as_function(g)
    return quadrature.pair(
        ff, aligned(fc, c), gf, aligned(gc, c), q1, q2, c, f_breaks=aligned(fb, c), g_breaks=aligned(gb, c)
    )


def aligned(arrays: Any, like: Any) -> tuple[Any, ...]:
    """Coefficients in the dtype of an array."""
    return tuple(jnp.asarray(a, jnp.asarray(like).dtype) for a in arrays)


__all__ = ["NeedsUnroll", "SeveralError", "expectation"]
