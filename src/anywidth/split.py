r"""What of a gated loop has to be sampled, and what is integrated given the rest.

The Gaussians of a loop fall into independent *families* (those that no parameter links). In a GRU

    h_t = (1 - z_t) h_{t-1} + z_t phi(c_t)

the state is affine in itself and in phi(c_t) given the gates z, and the gate r enters as a factor r_t h_{t-1} of an
operand only, independent of h_{t-1}. So z alone is sampled. In general, given the *sampled* families,

- a carry is a number (a function of sampled Gaussians), or a vector of the Hilbert space that is spanned by 1 and by
  *atoms* psi(u_t), products of functions of one integrated Gaussian each: every step is affine in carries and atoms;
- an operand is a sum of such vectors, each times at most one atom of families that no carry contains (`outer`).

Inner products of atoms are closed forms or quadrature, and those of vectors follow by recursion (`conditional.py`).
`Split` finds the smallest set of sampled families: all are taken to be integrated, and those that break one of the
rules are sampled, until none does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np

from anywidth.cells import pure, size
from anywidth.expect import choose, closed, quadrature
from anywidth.expect.atoms import IDENTITY, Generic, Joint, as_function, atom_key, discontinuous, known, monomial
from anywidth.expr import substituted, variables
from anywidth.kets import Carry, Contract, Node, Pointwise, Sum, View
from anywidth.paths import Stage

Array = Any
WIDEST = 8  # entries of carries and atoms at a step up to which their inner products are kept for every sample


class Blame(Exception):
    """What has to be sampled: Gaussians, and carries that are numbers given these."""

    def __init__(self, gaussians: Iterable[Node], carries: Iterable[Node] = ()) -> None:
        super().__init__()
        self.gaussians, self.carries = set(gaussians), set(carries)


class NoSplit(Exception):
    """Nothing can be integrated."""


@dataclass(frozen=True, eq=False)
class Atom:
    """A product of functions of one Gaussian each, of different families."""

    factors: tuple[tuple[Node, Any], ...]

    @cached_property
    def key(self) -> Any:
        """Equal for equal functions."""
        return tuple((u, atom_key(f)) for u, f in self.factors)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Of the finite axes at one step."""
        return np.broadcast_shapes(*(u.shape[1:] for u, _ in self.factors))

    @property
    def size(self) -> int:
        """Number of entries at one step."""
        return int(np.prod(self.shape))


@dataclass(frozen=True, eq=False)
class Part:
    """One term: scalar (a function of what is sampled; None: one) * vector (None: one) * atom (None: one)."""

    scalar: Node | None
    vector: Node | None
    atom: Atom | None


class Split:
    """The families of a stage that are sampled; its carries that are vectors, and the atoms they consist of."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.family = _components(stage.gaussians, stage.couplings)
        self.sampled: set[Node] = set()
        self.numbers: set[Node] = set()
        if stage.starts:
            raise NoSplit
        while True:
            self._scalar: dict[Node, bool] = {}
            self._parts: dict[Node, list[Part]] = {}
            self.atoms: list[Atom] = []
            try:
                self._analyse()
                break
            except Blame as blame:
                families = {self.family[u] for u in blame.gaussians}
                sampled = self.sampled | {u for u in stage.gaussians if self.family[u] in families}
                numbers = self.numbers | blame.carries
                if (sampled, numbers) == (self.sampled, self.numbers):
                    raise NoSplit from None
                self.sampled, self.numbers = sampled, numbers
        self.integrated = [u for u in stage.gaussians if u not in self.sampled]
        if not self.integrated or self.columns > WIDEST + 1:
            raise NoSplit

    # --- sizes ---

    @property
    def vectors(self) -> list[Node]:
        """The carries that are vectors."""
        return [x for x in self.stage.carried if x not in self.numbers]

    @property
    def carries(self) -> int:
        """How many entries they have at a step."""
        return sum(map(size, self.vectors))

    @property
    def columns(self) -> int:
        """Of a vector: one, the carries, the atoms."""
        return 1 + self.carries + sum(a.size for a in self.atoms)

    @property
    def drawn(self) -> list[Node]:
        """The Gaussians that are drawn, in order."""
        return [u for u in self.stage.gaussians if u in self.sampled]

    # --- the rules ---

    def _analyse(self) -> None:
        stage = self.stage
        pairs = list(zip(stage.loop.carries, stage.loop.nexts, strict=True))
        for x, after in pairs:
            if x is not None and x in self.numbers and not self.scalar(after):
                raise Blame(*self.leaves(after))
        for x, after in pairs:
            if x is not None and x not in self.numbers:
                self._affine(after)
        for x in stage.operands:
            self.outer(x)

    def scalar(self, x: Node) -> bool:
        """A function of what is sampled."""
        if x not in self._scalar:
            gaussians, carries = self.leaves(x)
            self._scalar[x] = gaussians <= self.sampled and carries <= self.numbers
        return self._scalar[x]

    def leaves(self, x: Node) -> tuple[set[Node], set[Node]]:
        """The Gaussians and the carries that a node of the body is a function of."""
        gaussians: set[Node] = set()
        carries: set[Node] = set()
        seen: set[Node] = set()

        def walk(y: Node) -> None:
            if y in seen:
                return
            seen.add(y)
            if pure(y):
                gaussians.add(y)
            elif isinstance(y, Carry):
                carries.add(y)
            else:
                for z in self.stage.children(y):
                    walk(z)

        walk(x)
        return gaussians, carries

    def _affine(self, x: Node, atoms: bool = True) -> None:
        """Checks that x is affine in carries and (if allowed) atoms, which are noted."""
        if self.scalar(x) or isinstance(x, Carry):
            return
        if isinstance(x, View):
            self._affine(self.below(x), atoms)
        elif isinstance(x, Sum) and not pure(x):
            for _, term in x.terms:
                self._affine(term, atoms)
        elif isinstance(x, Contract) and not pure(x):
            self._affine(x.operand, atoms)
        else:
            for part in self.parts(x):
                if part.atom is not None:
                    if part.vector is not None or not atoms:
                        raise Blame(u for u, _ in part.atom.factors)
                    self._note(part.atom)
                elif part.vector is not None:
                    self._affine(part.vector, atoms)

    def below(self, x: View) -> Node:
        """What a view that is no Gaussian reads: a node of the loop, or itself pushed to its arguments."""
        (child,) = self.stage.children(x)
        return child

    def _note(self, atom: Atom) -> None:
        if all(a.key != atom.key for a in self.atoms):
            self.atoms.append(atom)

    def index(self, atom: Atom) -> int:
        """The first column of an atom."""
        i = next(i for i, a in enumerate(self.atoms) if a.key == atom.key)
        return 1 + self.carries + sum(a.size for a in self.atoms[:i])

    def outer(self, x: Node, atoms: bool = False) -> list[Part]:
        """The terms of an operand (or, with `atoms`, of what leaves the loop), checked."""
        inside = {self.family[u] for a in self.atoms for u, _ in a.factors}
        out = []
        for part in self.terms(x):
            if part.atom is not None and inside & {self.family[u] for u, _ in part.atom.factors}:  # noqa: SIM102
                if part.vector is not None or not atoms or all(a.key != part.atom.key for a in self.atoms):
                    raise Blame(u for u, _ in part.atom.factors)
            if part.vector is not None:
                before = len(self.atoms)
                self._affine(part.vector, atoms)
                if len(self.atoms) != before:
                    del self.atoms[before:]
                    raise Blame(self.leaves(part.vector)[0])
            out.append(part)
        return out

    def terms(self, x: Node) -> list[Part]:
        """A node as a sum of parts."""
        if self.scalar(x):
            return [Part(x, None, None)]
        if isinstance(x, Pointwise) or (pure(x) and x in self.family):
            return self.parts(x)
        return [Part(None, x, None)]

    def parts(self, x: Node) -> list[Part]:
        """A coordinatewise function as a sum of parts; or a Gaussian that is integrated."""
        if x not in self._parts:
            self._parts[x] = self._read(x) if isinstance(x, Pointwise) else [Part(None, None, Atom(((x, IDENTITY),)))]
        return self._parts[x]

    def _read(self, x: Pointwise) -> list[Part]:
        out = []
        for m in choose.forms(self.stage.gram, x):
            if m.norm is not None:
                raise Blame(*self.leaves(x))
            scalars: list[tuple[Node, Any]] = []
            vector: Node | None = None
            atoms: list[tuple[Node, Any]] = []
            coef = m.coef
            for i, f in m.factors:
                a = x.args[i]
                if self.scalar(a):
                    scalars.append((a, f))
                elif pure(a):
                    if not _fits(f, a):
                        raise Blame([a])
                    atoms.append((a, f))
                elif not (monomial(f) and f.k == 1) or vector is not None:
                    raise Blame(*self.leaves(a))
                else:
                    vector, coef = a, coef * f.plus
            for joint in m.joints:
                involved = [x.args[i] for i in variables(joint.expr)]
                loose = [a for a in involved if not self.scalar(a)]
                if loose:
                    found = [self.leaves(a) for a in loose]
                    raise Blame(set().union(*(g for g, _ in found)), set().union(*(c for _, c in found)))
            families = [self.family[u] for u, _ in atoms]
            shapes = {u.shape[1:] for u, _ in atoms if size(u) > 1}
            if len(set(families)) < len(families) or len(shapes) > 1:
                raise Blame(u for u, _ in atoms)
            scalar = _product(self.stage.gram.graph, x, coef, scalars, m.joints)
            out.append(Part(scalar, vector, Atom(tuple(atoms)) if atoms else None))
        return out


def drawable(one: Split, two: Split) -> bool:
    """Whether the families of two loops lie within one another and are treated alike."""
    nodes = [*((1, u) for u in one.stage.gaussians), *((2, u) for u in two.stage.gaussians)]
    links = [((1, u), (1, v)) for u, v in one.stage.couplings] + [((2, u), (2, v)) for u, v in two.stage.couplings]
    links += [
        ((1, u), (2, v))
        for u in one.stage.gaussians
        for v in two.stage.gaussians
        if one.stage.asked(two.stage, u, v)[0]
    ]
    joined = _components(nodes, links)
    for number, own in ((1, one), (2, two)):
        mine = {(joined[number, u], own.family[u]) for u in own.stage.gaussians}
        if len({j for j, _ in mine}) < len(mine):
            return False
    kind = lambda number, own: {  # noqa: E731
        joined[number, u]: (u in own.sampled, any(u is v for a in own.atoms for v, _ in a.factors))
        for u in own.stage.gaussians
    }
    a, b = kind(1, one), kind(2, two)
    sampled = all(a[j][0] == b[j][0] for j in a.keys() & b.keys())
    inside = [{j for j, (_, i) in k.items() if i} for k in (a, b)]
    outside = [{j for j, (s, i) in k.items() if not s and not i} for k in (a, b)]
    return sampled and not inside[0] & outside[1] and not inside[1] & outside[0]


def _components(nodes: Sequence[Any], links: Iterable[tuple[Any, Any]]) -> dict[Any, int]:
    family = {u: i for i, u in enumerate(nodes)}
    for u, v in links:
        old, new = family[u], family[v]
        family = {x: new if i == old else i for x, i in family.items()}
    return family


def _fits(f: Any, u: Node) -> bool:
    """Whether the coefficients of a function have no axes that its Gaussian has not."""
    shapes = [np.shape(c)[1:] for c in _arrays(f) if np.ndim(c)]
    try:
        return np.broadcast_shapes(u.shape[1:], *shapes) == u.shape[1:]
    except ValueError:
        return False


def _arrays(f: Any) -> list[Any]:
    if isinstance(f, Generic):
        return [*f.coefs, *f.breaks]
    return [getattr(f, k.name) for k in fields(f)]


def _product(graph: Any, node: Pointwise, coef: Any, factors: Sequence[Any], joints: Sequence[Joint]) -> Node | None:
    """A number times functions of what is sampled, as a node; None for one."""
    args: list[Node] = []
    coefs = list(node.coefs)

    def variable(x: Node) -> Any:
        if x not in args:
            args.append(x)
        return ("v", args.index(x))

    def coefficient(c: Any) -> Any:
        if known(c):
            return ("n", float(c))
        coefs.append(c if np.ndim(c) == node.rank else jnp.reshape(c, (1,) * node.rank))
        return ("c", len(coefs) - 1)

    terms: list[Any] = [] if known(coef) and float(coef) == 1.0 else [coefficient(coef)]
    for x, f in factors:
        if f is IDENTITY:
            terms.append(variable(x))
        else:
            function, cs, breaks = as_function(f)
            how = "jump" if discontinuous(f) else "kink" if breaks else "smooth"
            terms.append(("call", (function, how), variable(x), *(coefficient(c) for c in cs)))
    for joint in joints:
        terms.append(substituted(joint.expr, {i: variable(node.args[i]) for i in variables(joint.expr)}, None))
    if not terms:
        return None
    if not args:
        value = terms[0][1] if terms[0][0] == "n" else coefs[terms[0][1]]
        return graph.const(np.full((1,) * node.rank, value) if terms[0][0] == "n" else value)
    e = terms[0]
    for term in terms[1:]:
        e = ("mul", (), e, term)
    return args[0] if e == ("v", 0) else graph.pointwise(e, args, coefs)


# --- inner products of atoms ----------------------------------------------------------------------------------


def inner(
    left: Atom, right: Atom, t: Any, s: Any, variances: tuple[Any, Any], linked: Callable[[Node, Node], bool],
    cov: Callable[[Node, Node], Array],
) -> Array:  # fmt: skip
    """E[psi_t psi'_s] for all entries, (k, k'); `variances` hold those of the Gaussians at t and at s."""
    value: Any = 1.0
    rest = list(right.factors)
    for u, f in left.factors:
        f, q = _at(f, u, t, (-1, 1)), variances[0][u][:, None]
        partner = next((p for p in rest if linked(u, p[0])), None)
        if partner is None:
            value = value * _mean(f, q)
            continue
        rest = [p for p in rest if p is not partner]
        v, g = partner[0], _at(partner[1], partner[0], s, (1, -1))
        value = value * _pair(f, g, q, variances[1][v][None], cov(u, v))
    for v, g in rest:
        value = value * _mean(_at(g, v, s, (1, -1)), variances[1][v][None])
    return jnp.broadcast_to(value, (left.size, right.size))


def mean(atom: Atom, t: Any, variances: Any) -> Array:
    """E[psi_t], (k,)."""
    value: Any = 1.0
    for u, f in atom.factors:
        value = value * _mean(_at(f, u, t, (-1,)), variances[u])
    return jnp.broadcast_to(value, (atom.size,))


def _at(f: Any, u: Node, t: Any, shape: tuple[int, ...]) -> Any:
    """A function whose coefficients have the time as their first axis, at step t, for the flattened entries of u."""

    def now(a: Any) -> Any:
        if np.ndim(a) == 0:
            return a
        a = a[0] if np.shape(a)[0] == 1 else jnp.asarray(a)[t]
        return jnp.broadcast_to(a, u.shape[1:]).reshape(shape)

    if isinstance(f, Generic):
        return replace(f, coefs=tuple(map(now, f.coefs)), breaks=tuple(map(now, f.breaks)))
    moved = {k.name: getattr(f, k.name) for k in fields(f)}
    return replace(f, **{k: now(a) for k, a in moved.items() if np.ndim(a)})


def _mean(f: Any, q: Array) -> Array:
    if isinstance(f, Generic):
        return quadrature.mean(f.function, _full(f.coefs, q), q, breaks=_full(f.breaks, q))
    return jnp.broadcast_to(closed.mean(f, q), q.shape)


def _pair(f: Any, g: Any, q1: Array, q2: Array, c: Array) -> Array:
    if monomial(f) and monomial(g) and f.k == g.k == 1:
        return f.plus * g.plus * c
    c = jnp.where(q1 * q2 > 0, c, jnp.zeros((), c.dtype))  # steps to come have no variance yet: nothing may be refined
    return choose._univariate(f, g, jnp.broadcast_to(q1, c.shape), jnp.broadcast_to(q2, c.shape), c)


def _full(arrays: Any, q: Array) -> tuple[Any, ...]:
    return tuple(jnp.broadcast_to(jnp.asarray(a, q.dtype), q.shape) for a in arrays)


__all__ = ["Atom", "NoSplit", "Part", "Split", "inner", "mean"]
