"""A network read: its definitions under names fit to be shown."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp

from anywidth import _compat
from anywidth.derivation import terms as tm
from anywidth.derivation.layers import Item, bare, compressed
from anywidth.derivation.printing import BAR
from anywidth.derivation.read import Definition, Reader, Val
from anywidth.derivation.terms import Index, Num, Op, Sym, Term
from anywidth.expect.methods import Ways, recording
from anywidth.expect.sampler import Sampler
from anywidth.kernels import pair
from anywidth.network import Network
from anywidth.parameters import Parameters, read_parameters, read_program
from anywidth.rates import Rates, rates_of

OWN = {"h", "s", "a", "c", "f", "x", "q"}  # letters that the derivation uses itself


@dataclass(frozen=True)
class Reading:
    """The definitions: `items` with repeated layers as blocks, `definitions` each by itself under the same names."""

    items: tuple[Item, ...]
    definitions: tuple[Definition, ...]
    parameters: Parameters
    names: Mapping[str, Sym]
    inputs: tuple[Sym, ...]
    steps: Mapping[str, int]  # of the index letters of loops
    padded: bool  # whether windows reach over an edge
    ways: Ways  # by which the engine computes its expectations
    shifted: frozenset[str]  # parameters whose mean is not zero
    rates: Mapping[str, tuple[Any, Fraction]] | None  # (c, p) of the learning rate c n^p of each parameter, if given
    second_width: bool


def reading(net: Network, x: Any, lr: Rates = None, *, methods: bool = True) -> Reading:
    """The network on the shapes of x, its parameters trained at these rates.

    Without `methods` the program is only read, and need not have a limit.
    """
    floats = [a.dtype for a in jax.tree.leaves(x) if jnp.issubdtype(a.dtype, jnp.floating)]
    dtype = jnp.result_type(*floats, jnp.float32)
    parameters = read_parameters(net, dtype)
    program, _ = read_program(net, parameters, x, dtype)
    names = _names([p.leaf.name for p in parameters.items])
    rates = dict(zip(names, rates_of(net, lr), strict=True))
    names = {path: replace(s, rate=_rate(*rates[path])) for path, s in names.items()}
    ways = _ways(net, x, lr) if methods else Ways()
    reader = Reader(shifted=frozenset(p.leaf.name for p in parameters.items if p.mean is not None), ways=ways)
    symbols = _input_names(x)
    inputs = [_parameter(names[p.leaf.name], p.leaf) for p in parameters.items]
    inputs += [_input(s, a) for s, a in zip(symbols, jax.tree.leaves(x), strict=True)]
    outputs = reader.run(program, inputs)
    definitions = list(reader.definitions)
    for k, out in enumerate(outputs):
        at = reader.letters(out.shape)
        symbol = Sym("f", (k + 1,) if len(outputs) > 1 else ())
        free = tuple(i for i in at if isinstance(i, Index))
        definitions.append(Definition(symbol, free, out.at(at), "output", out.leaves, True, "", out.places))
    items, named = compressed(_numbered(_means([_gelu(d) for d in _inlined(_own_places(_used(definitions)))])))
    return Reading(
        tuple(items), tuple(named), parameters, names, tuple(symbols), dict(reader.sizes), reader.padded, ways,
        reader.shifted, None if lr is None else rates, net.second_width,
    )  # fmt: skip


def _rate(value: Any, power: Fraction) -> str:
    if _compat.is_tracer(value) or (float(value) and (float(value) != 1 or power)):
        return "η"
    return "1" if float(value) else "0"


def _ways(net: Network, x: Any, lr: Rates) -> Ways:
    """The methods of the engine, on examples of the shape of x: the kernel is traced and not computed."""
    with recording() as ways:
        jax.eval_shape(lambda a, b: pair(net, "ntk", a, b, Sampler(), lr), x, x)
    return ways


def _used(definitions: Sequence[Definition]) -> list[Definition]:
    """Without exponentials that have gone into a softmax."""
    used = {bare(t) for d in definitions for t in tm.walk(d.body) if isinstance(t, Sym)}
    gone = lambda d: d.kind == "activation" and isinstance(d.body, Op) and d.body.head == "fn:exp"  # noqa: E731
    return [d for d in definitions if not gone(d) or bare(d.symbol) in used]


def _own_places(definitions: Sequence[Definition]) -> list[Definition]:
    """Every definition with the equations that are its own, without those of the symbols that it is written in."""
    before: dict[Sym, frozenset[int]] = {}  # not of what a loop carries, while in its body
    out = []
    for d in definitions:
        used = {bare(t) for t in tm.walk(d.body) if isinstance(t, Sym)}
        out.append(replace(d, places=d.places.difference(*(before[s] for s in used if s in before))))
        before[bare(d.symbol)] = d.places
    return out


def _names(paths: Sequence[str]) -> dict[str, Sym]:
    """Short names: the last word of the path, numbers in it as superscripts; the whole path where these clash."""

    def split(path: str) -> tuple[list[str], tuple[int, ...]]:
        keys = re.findall(r"[A-Za-z_]\w*|\d+", re.sub(r"_(\d+)'", r"'[\1]", path))  # Flax counts as in Conv_1
        return [k for k in keys if not k.isdigit()], tuple(int(k) + 1 for k in keys if k.isdigit())

    short: dict[str, Sym] = {}
    for path in paths:
        words, numbers = split(path)
        short[path] = Sym(words[-1] if words else "w", numbers, leaf=path)
    seen = Counter((s.name, s.sup) for s in short.values())
    clash = {name for (name, _), count in seen.items() if count > 1}
    for path, s in short.items():
        if s.name in clash or s.name in OWN:
            words, numbers = split(path)
            short[path] = Sym("_".join(words) if len(words) > 1 else f"{s.name}_par", numbers, leaf=path)
    return short


def _parameter(s: Sym, leaf: Any) -> Val:
    at = lambda idx: replace(s, sub=tuple(i for i in idx if i is not None))  # noqa: E731
    return Val(tuple(leaf.shape), at, True, True, frozenset({leaf.name}), leaf.name, s)


def _input_names(x: Any) -> list[Sym]:
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(x)]
    if len(paths) == 1 and not paths[0]:
        return [Sym("x")]
    return [Sym("x", (re.sub(r"\W+", "", p),)) for p in paths]


def _input(s: Sym, a: Any) -> Val:
    return Val(tuple(a.shape), lambda idx: replace(s, sub=tuple(i for i in idx if i is not None)))


def _inlined(definitions: Sequence[Definition]) -> list[Definition]:
    """Without definitions that are only other names: h = k, what a loop carries where it has a name in the body.

    What is computed twice, as the mean is when the variance is, is defined once.
    """
    table: dict[Sym, Definition] = {}
    out: list[Definition] = []
    for d in definitions:
        body = tm.mapped(d.body, lambda t: _replaced(t, table))
        d = replace(d, body=body)
        same = next((k for k, e in enumerate(out) if _same(d, e)), None)
        if same is not None:
            e = out[same]
            table[bare(d.symbol)] = replace(d, body=replace(e.symbol, sub=e.symbol.sub or e.indices))
            out[same] = replace(e, places=e.places | d.places)
            continue
        if d.kind in ("gaussian", "activation", "number") and _other_name(body, d.gaussian):
            table[bare(d.symbol)] = replace(d, body=body)
            continue
        out.append(d)
    carries = {bare(d.body): d for d in out if d.kind == "carry" and isinstance(d.body, Sym)}
    for inner, d in carries.items():
        uses = sum(bare(t) == inner for e in out for t in tm.walk(e.body) if isinstance(t, Sym))
        maker = next((e for e in out if bare(e.symbol) == inner), None)
        if uses == 1 and maker is not None:
            whole = replace(d, body=maker.body, kind=maker.kind, places=d.places | maker.places)
            out = [whole if e is d else e for e in out if e is not maker]
    return out


def _means(definitions: Sequence[Definition]) -> list[Definition]:
    """The mean of a symbol over one or more of its axes under the symbol's own name, with a bar."""
    table: dict[Sym, str] = {}
    for d in definitions:
        match d.body:
            case Op("mul", (Num(value, Fraction(numerator=0)), Op("sum") as whole)) if 0 < value < 1:
                inner: Term = whole
                bound: list[Term] = []
                while isinstance(inner, Op) and inner.head == "sum":
                    bound.append(inner.args[0])
                    inner = inner.args[1]
                if not isinstance(inner, Sym) or inner.parameter or d.kind not in ("gaussian", "activation"):
                    continue
                mean = math.isclose(round(1 / value) * value, 1.0, rel_tol=1e-6)
                if mean and set(bound) <= set(inner.sub) and BAR not in inner.name:
                    table[bare(d.symbol)] = inner.name + BAR

    def f(t: Term) -> Term | None:
        if isinstance(t, Sym) and bare(t) in table:
            return replace(t, name=table[bare(t)], sub=tuple(tm.mapped(s, f) for s in t.sub))
        return None

    return [replace(d, symbol=tm.mapped(d.symbol, f), body=tm.mapped(d.body, f)) for d in definitions]  # type: ignore[arg-type]


def _other_name(body: Term, gaussian: bool) -> bool:
    """Whether it is a symbol, or a Gaussian times a number."""
    match body:
        case Op("mul", (Num(_, Fraction(numerator=0)), Sym() as s)) if gaussian:
            return not s.parameter
        case Sym() as s:
            return not s.parameter
    return False


def _gelu_argument(t: Term, u: Term) -> bool:
    match t:
        case Op("mul", (Num(c), Op("add", (v, Op("mul", (Num(b), Op("pow", (w, Num(3.0))))))))) if u == v == w:
            return math.isclose(c, (2 / math.pi) ** 0.5, rel_tol=1e-6) and math.isclose(b, 0.044715, rel_tol=1e-6)
    return False


def _gelu(d: Definition) -> Definition:
    """What JAX makes of gelu, u/2 erfc(-u/√2) or u/2 (1 + tanh(√(2/π) (u + 0.044715 u³)))."""

    def f(t: Term) -> Term | None:
        match t:
            case Op("sum", (Index() as i, body)):
                new = tm.mapped(body, f)
                return None if new == body else tm.total(i, new)
            case Op("mul", factors):
                others = [a for a in factors if not isinstance(a, Num)]
                for u, v in (others, others[::-1]) if len(others) == 2 else ():
                    name = _half_gelu(u, v)
                    if name:
                        return tm.mul(Num(2.0), *(a for a in factors if isinstance(a, Num)), tm.fn(name, u))
        return None

    return replace(d, body=tm.mapped(d.body, f))


def _half_gelu(u: Term, v: Term) -> str:
    """The gelu that 2 u v is, if it is one."""
    match v:
        case Op("fn:erfc", (Op("mul", (Num(c), w)),)) if u == w and math.isclose(c, -(0.5**0.5), rel_tol=1e-6):
            return "gelu"
        case Op("add", (Num(1.0), Op("fn:tanh", (t,)))) | Op("add", (Op("fn:tanh", (t,)), Num(1.0))):
            return "gelu_tanh" if _gelu_argument(t, u) else ""
    return ""


def _same(d: Definition, e: Definition) -> bool:
    kinds = ("gaussian", "activation", "number")
    return d.kind == e.kind and d.kind in kinds and (d.body, d.indices, d.over) == (e.body, e.indices, e.over)


def _replaced(t: Term, table: Mapping[Sym, Definition]) -> Term | None:
    if isinstance(t, Sym) and bare(t) in table:
        d = table[bare(t)]
        sub = tuple(tm.mapped(s, lambda u: _replaced(u, table)) for s in t.sub)
        return tm.substituted(d.body, dict(zip(d.indices, sub, strict=False)))
    return None


def _numbered(definitions: Sequence[Definition]) -> list[Definition]:
    """Numbers without gaps, and none on a symbol that is the only one of its letter."""
    order: dict[str, list[Sym]] = {}
    for d in definitions:
        known = order.setdefault(d.symbol.name, [])
        if bare(d.symbol) not in known:
            known.append(bare(d.symbol))
    table = {s: (k + 1,) if len(group) > 1 else () for group in order.values() for k, s in enumerate(group)}

    def f(t: Term) -> Term | None:
        if isinstance(t, Sym) and not t.parameter and bare(t) in table:
            return replace(t, sup=table[bare(t)], sub=tuple(tm.mapped(s, f) for s in t.sub))
        return None

    return [replace(d, symbol=tm.mapped(d.symbol, f), body=tm.mapped(d.body, f)) for d in definitions]  # type: ignore[arg-type]


__all__ = ["Reading", "reading"]
