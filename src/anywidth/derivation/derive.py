"""From definitions to the recursion: every covariance, and its derivative in epsilon.

A definition that is linear in random vectors gives its covariance by bilinearity (facts 1 and 2); any other is an
expectation of the Gaussians in it (fact 3). `Theta[a, b]` is the derivative of E[a b] in epsilon (fact 4): the same
recursion once more, plus one term for each product with a parameter that learns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from anywidth.derivation import terms as tm
from anywidth.derivation.functions import KNOWN, Known
from anywidth.derivation.read import Definition
from anywidth.derivation.terms import Index, Num, Op, Sym, Term
from anywidth.expect.methods import CLOSED, COVARIANCE, ORDER, Ways

OVER = "fn:over"  # (size, factors): a sum over one of two widths, Gaussian along the other


@dataclass(frozen=True)
class Atom:
    """A term of an affine definition: sum over `bound` of coef * [parameter *] ket."""

    bound: tuple[Index, ...]
    coef: Term
    parameter: Sym | None
    ket: Term | None  # None for a parameter by itself, a bias; without a parameter, for a number


@dataclass(frozen=True)
class Rule:
    """`covariance` and `theta` of a definition; both None where the expectation is that of its body.

    `twin` is the definition of the same symbol for the other example, which may be of another shape.
    """

    definition: Definition
    twin: Definition
    covariance: Term | None
    theta: Term | None
    method: str
    known: Known | None = None
    argument: Term | None = None
    arguments: tuple[Sym, ...] = ()
    earlier: bool = False  # whether the Gaussians of the steps before are arguments too


@dataclass(frozen=True)
class Cross:
    """What a parameter used more than once adds: the inner product of a ket with a product, and its derivative.

    `covariance` and `theta` are None where the ket is no Gaussian; then Stein's lemma gives them, over `arguments`.
    """

    ket: Term
    product: Term
    covariance: Term | None
    theta: Term | None
    arguments: tuple[Sym, ...] = ()


@dataclass(frozen=True)
class Book:
    """The definitions by symbol; `sample` is the layer whose definitions stand for those of a block."""

    definitions: tuple[Definition, ...]
    sample: int = 0
    shifted: frozenset[str] = frozenset()  # parameters whose mean is not zero

    def base(self, s: Sym) -> Sym:
        """The symbol without indices."""
        sup = tuple(self.sample + i.shift if isinstance(i, Index) else i for i in s.sup)
        return replace(s, sup=sup, sub=(), primed=False)

    def ket(self, t: Term) -> bool:
        """Whether it is a random vector that was defined, or a sum over one of two widths of such."""
        if isinstance(t, Op) and t.head == OVER:
            return True
        return isinstance(t, Sym) and any(
            self.base(d.symbol) == self.base(t) for d in self.definitions if d.kind != "number"
        )

    def definition(self, t: Term) -> Definition | None:
        if not isinstance(t, Sym) or t.parameter:
            return None
        return next((d for d in self.definitions if self.base(d.symbol) == self.base(t)), None)

    def key(self, s: Sym) -> tuple[object, ...]:
        """The symbol, whatever the layer where layers repeat."""
        return (s.name, *(s.sup[1:] if self.sample else s.sup))

    def leaves(self, s: Sym) -> frozenset[str]:
        return frozenset().union(*(d.leaves for d in self.definitions if self.base(d.symbol) == self.base(s)))

    def centred(self, t: Term, seen: frozenset[Sym] = frozenset()) -> bool:
        """Whether an affine term is seen to be Gaussian with mean zero."""
        atoms = linear(t, self)
        if atoms is None:
            return False
        for a in atoms:
            if a.parameter is not None:
                if a.parameter.leaf in self.shifted:
                    return False
                continue
            d = self.definition(a.ket) if a.ket is not None else None
            if d is None or not d.gaussian:
                return False
            if self.base(d.symbol) not in seen and not self.centred(d.body, seen | {self.base(d.symbol)}):
                return False
        return True

    def random(self, t: Term) -> bool:
        """Whether it is random: a parameter or a ket, outside of an average."""
        if isinstance(t, Op) and t.head in ("E", "theta"):
            return False
        if isinstance(t, Sym):
            return t.parameter or self.ket(t)
        return any(self.random(a) for a in tm.parts(t))


def linear(t: Term, book: Book) -> list[Atom] | None:
    """The term as a combination of kets, and a number; None if it is not affine in them."""
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
        return [] if tm.is_number(t, 0.0) else [Atom((), t, None, None)]
    parameters = [f for f in random if isinstance(f, Sym) and f.parameter]
    others = [f for f in random if f not in parameters]
    if len(parameters) > 1 or len(others) > 1:
        return None
    if others and not isinstance(others[0], Sym) and not book.ket(others[0]):
        inner = None if others[0] is t else linear(others[0], book)
        if inner is None or (parameters and any(a.parameter is not None or a.ket is None for a in inner)):
            return None
        p = parameters[0] if parameters else None
        return [replace(a, coef=tm.mul(rest, a.coef), parameter=p or a.parameter) for a in inner]
    if parameters and not others:  # a bias, or a parameter times the input
        data = [f for f in factors if f not in parameters and not isinstance(f, Num)]
        numbers = tm.mul(*(f for f in factors if isinstance(f, Num)))
        return [Atom((), numbers, parameters[0], tm.mul(*data) if data else None)]
    return [Atom((), rest, parameters[0] if parameters else None, others[0])]


def variance(p: Sym) -> Term:
    return Op("fn:var", (replace(p, sub=(), primed=False),))


def rate(p: Sym) -> Term:
    """What multiplies the parameter's epsilon."""
    if p.rate == "η":
        return Op("fn:rate", (replace(p, sub=(), primed=False),))
    return Num(float(p.rate))


def covariance(atoms: Sequence[Atom], others: Sequence[Atom], book: Book, derivative: bool) -> Term:
    """E[a b'], or its derivative in epsilon, by bilinearity."""
    out: list[Term] = []
    for a in atoms:
        for b in others:
            value = _pair(a, b, book, derivative)
            if not tm.is_number(value, 0.0):
                bp = tuple(replace(i, primed=True) for i in b.bound)
                for i in reversed((*a.bound, *bp)):
                    value = tm.total(i, value) if i in tm.indices_of(value) else Op("sum", (i, value))
                out.append(value)
    return _collected(out)


def _collected(terms: Sequence[Term]) -> Term:
    """The sum, terms that differ by a number taken together."""
    found: dict[Term, float] = {}
    for t in terms:
        factors = t.args if isinstance(t, Op) and t.head == "mul" else (t,)
        number = tm.mul(*(f for f in factors if isinstance(f, Num)))
        assert isinstance(number, Num)
        if number.power:
            number, factors = Num(1.0), (t,)
        rest = tm.mul(*(f for f in factors if not isinstance(f, Num) or f.power))
        same = next((k for k in found if _factors(k) == _factors(rest)), rest)
        found[same] = found.get(same, 0.0) + number.value
    return tm.add(*(tm.mul(Num(c), t) for t, c in found.items() if abs(c) > 1e-12))


def _factors(t: Term) -> Counter[Term]:
    return Counter(t.args if isinstance(t, Op) and t.head == "mul" else (t,))


def _pair(a: Atom, b: Atom, book: Book, derivative: bool) -> Term:
    coef = tm.mul(a.coef, tm.primed(b.coef))
    numbers = [x for x in (a, b) if x.parameter is None and x.ket is None]
    if numbers:
        if derivative or any(x.parameter is not None and x.parameter.leaf not in book.shifted for x in (a, b)):
            return Num(0.0)
        means = [m for m in (_product(a), tm.primed(_product(b))) if not tm.is_number(m, 1.0)]
        if any(isinstance(m, Sym) and book.centred(m) for m in means):
            return Num(0.0)
        return tm.mul(coef, *map(tm.expectation, means))
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
            return tm.mul(coef, rate(a.parameter) if derivative else var, *same)
        wide = book.ket(a.ket)
        x, y = a.ket, tm.primed(b.ket)
        inner = tm.expectation(x, y) if wide else Op("fn:dot", (x, y))
        width = a.parameter.width if wide else tm.ONE
        if not derivative:
            return tm.mul(coef, width, var, inner, *same)
        more = tm.mul(coef, width, rate(a.parameter), inner, *same)
        return tm.add(more, tm.mul(coef, width, var, tm.theta(x, y), *same)) if wide else more
    assert a.ket is not None
    assert b.ket is not None
    if OVER in (getattr(a.ket, "head", ""), getattr(b.ket, "head", "")):
        return tm.mul(coef, _fluctuations(a.ket, b.ket, book, derivative))
    inside = (a.ket, tm.primed(b.ket))
    return tm.mul(coef, tm.theta(*inside) if derivative else tm.expectation(*inside))


def _fluctuations(a: Term, b: Term, book: Book, derivative: bool) -> Term:
    """Sums over one width, of terms that are independent: of each term with itself (central limit theorem)."""
    if not (isinstance(a, Op) and isinstance(b, Op) and a.head == b.head == OVER):
        return Num(0.0)
    size, *own = a.args
    left, right = own, [tm.primed(t) for t in b.args[1:]]
    if not _independent(own, book):
        return tm.mul(size, (tm.theta if derivative else tm.expectation)(tm.mul(*left), tm.mul(*right)))
    pairs = list(zip(left, right, strict=True))
    if not derivative:
        return tm.mul(size, *(tm.expectation(u, v) for u, v in pairs))
    return tm.mul(size, tm.add(*(
        tm.mul(*((tm.theta if i == k else tm.expectation)(u, v) for i, (u, v) in enumerate(pairs)))
        for k in range(len(pairs))
    )))  # fmt: skip


def _independent(factors: Sequence[Term], book: Book) -> bool:
    """Whether two factors are products with parameters of which neither is in the other."""
    found = [book.definition(t) for t in factors]
    if len(found) != 2 or any(d is None for d in found):
        return False
    leaves = [{a.parameter.leaf for a in linear(d.body, book) or [] if a.parameter is not None} for d in found if d]
    return all(leaves) and not leaves[0] & leaves[1]


def _same_entry(p: Sym, q: Sym) -> list[Term]:
    """Entries of a parameter with finite axes are the same only where their indices agree."""
    pairs = [(i, tm.primed(j)) for i, j in zip(p.sub, q.sub, strict=False)]
    return [Op("fn:same", (i, j)) for i, j in pairs if not (isinstance(i, Num) and i == j)]


def _product(a: Atom) -> Term:
    return tm.mul(*(t for t in (a.parameter, a.ket) if t is not None))


def _contains(book: Book, y: Atom, parameter: Sym | None) -> bool:
    return isinstance(y.ket, Sym) and parameter is not None and parameter.leaf in book.leaves(y.ket)


Pairs = Sequence[tuple[Definition, Definition]]  # of the one example and of the other


def rules(definitions: Pairs, book: Book, ways: Ways) -> list[Rule]:
    """The covariance of every random vector of the list that is needed; the book says what each symbol is."""
    out = []
    for d, twin in definitions:
        if d.kind == "number":
            continue
        atoms, others = linear(d.body, book), linear(twin.body, book)
        if atoms is not None and others is not None:
            own, moved = (covariance(atoms, others, book, derivative) for derivative in (False, True))
            out.append(Rule(d, twin, own, moved, "linear"))
            continue
        out.append(_expectation(d, twin, book, ways))
    return _needed(out, [d.body for d, _ in definitions], book)


def _needed(found: Sequence[Rule], bodies: Sequence[Term], book: Book) -> list[Rule]:
    """Without activations that are arguments of nonlinear functions only: no inner product of theirs is asked for."""

    def symbols(t: Term | None) -> set[tuple[object, ...]]:
        return {book.key(s) for s in tm.walk(t) if isinstance(s, Sym) and not s.parameter} if t is not None else set()

    wanted = {k for body in bodies for t in tm.walk(body) if isinstance(t, Op) and t.head == "E" for k in symbols(t)}
    kept: list[Rule] = []
    while True:
        new = [
            r
            for r in found
            if r not in kept
            and ((r.definition.gaussian and r.definition.kind != "start") or book.key(r.definition.symbol) in wanted)
        ]
        if not new:
            return [r for r in found if r in kept]
        kept += new
        wanted |= {k for r in new for t in (r.covariance, r.theta) for k in symbols(t)}


def crosses(definitions: Pairs, book: Book) -> list[Cross]:
    """The inner products of a ket with a product of a parameter that it contains itself."""
    out: list[Cross] = []
    for d, twin in definitions:
        for a in linear(twin.body, book) or []:
            for b in linear(d.body, book) or []:
                if (
                    a.parameter is None
                    or a.ket is None
                    or b.ket is None
                    or b.parameter is not None
                    or not _contains(book, b, a.parameter)
                ):
                    continue
                found = _cross(b, a, [d for d, _ in definitions], book)
                if found is not None and found not in out:
                    out.append(found)
    return out


def _cross(b: Atom, a: Atom, definitions: Sequence[Definition], book: Book) -> Cross | None:
    assert isinstance(b.ket, Sym)
    name = book.key(b.ket)
    # where layers repeat, the definition for any layer; otherwise the ket's own
    d = next((d for d in reversed(definitions) if book.key(d.symbol) == name and d.kind != "start"), None)
    if d is None:
        return None
    other = {Index("ℓ"): Index("m")}
    product = Atom((), Num(1.0), *(tm.substituted(_any_layer(t), other) for t in (a.parameter, a.ket)))  # type: ignore[arg-type]
    ket = d.symbol if d.symbol.sub else replace(d.symbol, sub=d.indices)
    right = tm.primed(_product(product))
    atoms = linear(d.body, book)
    if atoms is None:
        return Cross(ket, right, None, None, _arguments(d, book)[0])
    own, moved = (covariance(atoms, [product], book, derivative) for derivative in (False, True))
    return Cross(ket, right, own, moved)


def _any_layer(t: Term | None) -> Term:
    """A symbol of the layer before, as of the layer itself."""
    assert t is not None

    def f(u: Term) -> Term | None:
        if isinstance(u, Sym) and any(isinstance(i, Index) for i in u.sup):
            return replace(u, sup=tuple(Index("m") if isinstance(i, Index) else i for i in u.sup))
        return None

    return tm.mapped(t, f)


def _expectation(d: Definition, twin: Definition, book: Book, ways: Ways) -> Rule:
    arguments, earlier = _arguments(d, book)
    body = d.body
    known = None
    if isinstance(body, Op) and len(body.args) == 1 and book.centred(body.args[0]):
        known = KNOWN.get(body.head.removeprefix("fn:"))
    used = _used(d.places, ways)
    method = "; ".join(m for m in ORDER if m in used)
    if known is not None and used == {CLOSED}:
        method += f": {known.reference}"
    argument = body.args[0] if known is not None and isinstance(body, Op) else None
    return Rule(d, twin, None, None, method, known, argument, arguments, earlier)


def _used(places: frozenset[int], ways: Ways) -> set[str]:
    """How the engine computed the expectations between what the equations at these places made."""
    found = {m for (p, q), methods in ways.items() if p in places and q in places for m in methods}
    if not found:  # as it is written, with a linear part it is not asked for
        found = {m for (p, q), methods in ways.items() if p in places or q in places for m in methods}
    return found - {COVARIANCE} or found


def _arguments(d: Definition, book: Book) -> tuple[tuple[Sym, ...], bool]:
    """The Gaussians that a function is of, and whether those of a loop's steps before are among them."""
    found: list[Sym] = []
    earlier = False
    todo = [d.body]
    while todo:
        for u in _outside_averages(todo.pop(0)):
            made = book.definition(u)
            if not isinstance(u, Sym) or (made is None and not u.parameter):
                continue
            if made is None or made.gaussian:
                found += [u] if u not in found else []
            elif made.kind in ("carry", "start") or made is d:
                earlier = True
            else:
                todo.append(tm.substituted(made.body, dict(zip(made.indices, u.sub, strict=False))))
    return tuple(found), earlier


def _outside_averages(t: Term) -> Iterable[Term]:
    yield t
    if isinstance(t, Op) and t.head in ("E", "theta"):
        return
    for a in tm.parts(t):
        yield from _outside_averages(a)
