"""From definitions to the recursion: every covariance, and its derivative in epsilon.

A definition that is linear in random vectors gives its covariance by bilinearity (facts 1 and 2 of the design); any other
is an expectation of the Gaussians in it (fact 3). `Theta[a, b]` is the derivative of E[a b] in epsilon (fact 4): the
same recursion once more, plus one term for each product with a parameter that learns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from anywidth.derivation import terms as tm
from anywidth.derivation.functions import CLOSED, KNOWN, Known
from anywidth.derivation.read import Definition
from anywidth.derivation.terms import Index, Num, Op, Sym, Term


@dataclass(frozen=True)
class Atom:
    """A term of a linear definition: sum over `bound` of coef * [parameter *] ket."""

    bound: tuple[Index, ...]
    coef: Term
    parameter: Sym | None
    ket: Term | None  # None for a parameter by itself, a bias


@dataclass(frozen=True)
class Rule:
    """`covariance` and `theta` of a definition; both None where `function` says what the expectation is of."""

    definition: Definition
    covariance: Term | None
    theta: Term | None
    method: str
    known: Known | None = None
    argument: Term | None = None
    arguments: tuple[Sym, ...] = ()


@dataclass(frozen=True)
class Book:
    """The definitions by symbol; `sample` is the layer whose definitions stand for those of a block."""

    definitions: tuple[Definition, ...]
    sample: int = 0

    def base(self, s: Sym) -> Sym:
        """The symbol without indices."""
        sup = tuple(self.sample + i.shift if isinstance(i, Index) else i for i in s.sup)
        return replace(s, sup=sup, sub=(), primed=False)

    def ket(self, t: Term) -> bool:
        """Whether it is a random vector that was defined."""
        return isinstance(t, Sym) and any(
            self.base(d.symbol) == self.base(t) for d in self.definitions if d.kind != "number"
        )

    def leaves(self, s: Sym) -> frozenset[str]:
        return frozenset().union(*(d.leaves for d in self.definitions if self.base(d.symbol) == self.base(s)))

    def random(self, t: Term) -> bool:
        """Whether it is random: a parameter or a ket, outside of an average."""
        if isinstance(t, Op) and t.head in ("E", "theta"):
            return False
        if isinstance(t, Sym):
            return t.parameter or self.ket(t)
        return any(self.random(a) for a in tm.parts(t))


def linear(t: Term, book: Book) -> list[Atom] | None:
    """The term as a linear combination of kets; None if it is not one."""
    if isinstance(t, Op) and t.head == "add":
        out: list[Atom] = []
        for a in t.args:
            found = linear(a, book)
            if found is None:
                return None
            out += found
        return out
    if isinstance(t, Op) and t.head == "sum":
        inner = linear(t.args[1], book)
        return None if inner is None else [replace(a, bound=(t.args[0], *a.bound)) for a in inner]  # type: ignore[arg-type]
    factors = t.args if isinstance(t, Op) and t.head == "mul" else (t,)
    random = [f for f in factors if book.random(f)]
    rest = tm.mul(*(f for f in factors if f not in random))
    if not random:
        return [] if tm.is_number(t, 0.0) else None
    parameters = [f for f in random if isinstance(f, Sym) and f.parameter]
    others = [f for f in random if f not in parameters]
    if len(parameters) > 1 or len(others) > 1:
        return None
    if others and not isinstance(others[0], Sym):
        if parameters:
            return None
        inner = None if others[0] is t else linear(others[0], book)
        return None if inner is None else [replace(a, coef=tm.mul(rest, a.coef)) for a in inner]
    if parameters and not others:  # a bias, or a parameter times the input
        data = [f for f in factors if f not in parameters and not isinstance(f, Num)]
        numbers = tm.mul(*(f for f in factors if isinstance(f, Num)))
        return [Atom((), numbers, parameters[0], tm.mul(*data) if data else None)]
    return [Atom((), rest, parameters[0] if parameters else None, others[0])]


def variance(p: Sym) -> Term:
    return Op("fn:var", (replace(p, sub=(), primed=False),))


def covariance(atoms: Sequence[Atom], book: Book, derivative: bool) -> Term:
    """E[a b'], or its derivative in epsilon, by bilinearity."""
    out: list[Term] = []
    for a in atoms:
        for b in atoms:
            value = _pair(a, b, book, derivative)
            if not tm.is_number(value, 0.0):
                bp = tuple(replace(i, primed=True) for i in b.bound)
                for i in reversed((*a.bound, *bp)):
                    value = tm.total(i, value) if i in tm.indices_of(value) else Op("sum", (i, value))
                out.append(value)
    return tm.add(*out)


def _pair(a: Atom, b: Atom, book: Book, derivative: bool) -> Term:
    coef = tm.mul(a.coef, tm.primed(b.coef))
    if a.parameter is not None or b.parameter is not None:
        if a.parameter is None or b.parameter is None or a.parameter.leaf != b.parameter.leaf:
            if a.parameter is not None and b.parameter is not None:
                return Num(0.0)  # products with different parameters are independent (fact 2)
            product, other = (a, b) if a.parameter is not None else (b, a)
            if not _contains(book, other, product.parameter):
                return Num(0.0)
            inside = (_product(a), tm.primed(_product(b)))
            return tm.mul(coef, tm.theta(*inside) if derivative else tm.expectation(*inside))
        same = _same_entry(a.parameter, b.parameter)
        var = variance(a.parameter)
        if a.ket is None or b.ket is None:
            return tm.mul(coef, Num(1.0) if derivative else var, *same)
        wide = book.ket(a.ket)
        x, y = a.ket, tm.primed(b.ket)
        inner = tm.expectation(x, y) if wide else Op("fn:dot", (x, y))
        width = tm.number(1.0, 1 if wide else 0)
        if not derivative:
            return tm.mul(coef, width, var, inner, *same)
        more = tm.mul(coef, width, inner, *same)
        return tm.add(more, tm.mul(coef, width, var, tm.theta(x, y), *same)) if wide else more
    assert a.ket is not None and b.ket is not None
    inside = (a.ket, tm.primed(b.ket))
    return tm.mul(coef, tm.theta(*inside) if derivative else tm.expectation(*inside))


def _same_entry(p: Sym, q: Sym) -> list[Term]:
    """Entries of a parameter with finite axes are the same only where their indices agree."""
    pairs = [(i, tm.primed(j)) for i, j in zip(p.sub, q.sub, strict=False)]
    return [Op("fn:same", (i, j)) for i, j in pairs if not (isinstance(i, Num) and i == j)]


def _product(a: Atom) -> Term:
    return tm.mul(*(t for t in (a.parameter, a.ket) if t is not None))


def _contains(book: Book, y: Atom, parameter: Sym | None) -> bool:
    return isinstance(y.ket, Sym) and parameter is not None and parameter.leaf in book.leaves(y.ket)


def rules(definitions: Sequence[Definition], known: Sequence[Definition], sample: int) -> list[Rule]:
    """The covariance of every random vector of the first list; the second one says what each symbol is."""
    book = Book(tuple(known), sample)
    out = []
    for d in definitions:
        if d.kind == "number":
            continue
        atoms = linear(d.body, book)
        if atoms is not None:
            out.append(Rule(d, covariance(atoms, book, False), covariance(atoms, book, True), "linear"))
            continue
        out.append(_expectation(d, book))
    return out


def _expectation(d: Definition, book: Book) -> Rule:
    arguments = _arguments(d.body, book)
    body = d.body
    known = None
    if (
        isinstance(body, Op)
        and body.head.removeprefix("fn:") in KNOWN
        and len(body.args) == 1
        and linear(body.args[0], book) is not None
    ):
        known = KNOWN[body.head.removeprefix("fn:")]
    heads = {t.head for t in tm.walk(body) if isinstance(t, Op)}
    several = len({book.base(a) for a in arguments}) > 1 or any(
        isinstance(t, Op) and t.head == "sum" and book.random(t) for t in tm.walk(body)
    )
    normalised = any(
        isinstance(t, Op) and t.head == "pow" and _exponent(t) in (0.5, -0.5) and book.random(t.args[0])
        for t in tm.walk(body)
    )
    if known is not None:
        method = f"closed form: {known.reference}"
    elif normalised and several:
        method = (
            "normalised over a finite axis: an integral over one auxiliary variable for each copy if the function is positively "
            "homogeneous (r^(-1/2) = 2/√π ∫ exp(-w² r) dw), otherwise randomised quasi-Monte Carlo"
        )
    elif several:
        method = "several Gaussians: independent groups factorise; what is left is integrated by randomised quasi-Monte Carlo"
    elif heads <= CLOSED:
        method = "closed form: moments of one Gaussian on each side"
    else:
        method = "adaptive quadrature, two Gaussians of one dimension each"
    return Rule(d, None, None, method, known, body.args[0] if known is not None else None, tuple(arguments))  # type: ignore[union-attr]


def _exponent(t: Op) -> float:
    return t.args[1].value if isinstance(t.args[1], Num) else 0.0


def _arguments(t: Term, book: Book) -> list[Sym]:
    found: list[Sym] = []
    for u in _outside_averages(t):
        if isinstance(u, Sym) and (u.parameter or book.ket(u)) and u not in found:
            found.append(u)
    return found


def _outside_averages(t: Term) -> Iterable[Term]:
    yield t
    if isinstance(t, Op) and t.head in ("E", "theta"):
        return
    for a in tm.parts(t):
        yield from _outside_averages(a)
