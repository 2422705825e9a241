"""How loops are written: their body once, at a running step, and what they carry as a recursion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from anywidth.derivation import terms as tm
from anywidth.derivation.read import Definition, Indices, Reader, Val
from anywidth.derivation.rules import register
from anywidth.derivation.terms import Index, Num, Sym, Term
from anywidth.trace import Eqn


@register("scan")
def scan(r: Reader, eqn: Eqn, inputs: list[Val]) -> list[Val]:
    """The body once, at a running step: what is carried is named, and defined by what it was a step before."""
    p = eqn.params
    consts, carry = inputs[: p["num_consts"]], inputs[p["num_consts"] : p["num_consts"] + p["num_carry"]]
    xs = inputs[p["num_consts"] + p["num_carry"] :]
    taken = {i.letter for i in r.loops} | {c for c, size in r.sizes.items() if size != p["length"]}
    t = next(Index(c) for c in "tuwzyoeghn" if c not in taken)
    outer = tuple(r.loops)
    r.sizes[t.letter] = p["length"]
    bases: list[Sym] = []
    before: list[Val] = []
    gaussian = [False] * len(carry)
    for x in carry:
        letter = "s" if x.ket or x.wides else "c"
        r.counts[letter] += 1
        bases.append(Sym(letter, (r.counts[letter],)))

    def stepped(base: Sym, step: Term) -> Any:
        return lambda idx: replace(base, sub=(*outer, step, *(i for i in idx if i is not None)))

    kets = [x.ket or x.wides > 0 for x in carry]
    for x, base, g, ket in zip(carry, bases, gaussian, kets, strict=True):
        at = stepped(base, replace(t, shift=-1))
        before.append(Val(x.shape, at, ket, g, x.leaves | _all_leaves(consts, carry, xs), None, base))

    def step_of(i: Term) -> Term:
        """The step at a position of what is run over, and the other way round."""
        return tm.add(Num(float(p["length"] + 1)), tm.neg(i)) if p["reverse"] else i

    here = [r.moved(x, x.shape[1:], lambda idx: (step_of(t), *idx)) for x in xs]
    start = len(r.definitions)
    r.loops.append(t)
    out = r.run(p["jaxpr"], [*consts, *before, *here])
    r.loops.pop()
    after, ys = out[: len(carry)], out[len(carry) :]
    inner = r.definitions[start:]
    del r.definitions[start:]
    for x, base in zip(carry, bases, strict=True):
        at = r.letters(x.shape)
        body = x.at(at)
        free = tuple(i for i in at if isinstance(i, Index))
        r.definitions.append(
            Definition(replace(base, sub=(Num(0.0), *free)), free, body, "start", x.leaves, x.gaussian)
        )
    r.definitions += inner
    for v, base, ket in zip(after, bases, kets, strict=True):
        at = r.letters(v.shape, (t,))
        free = tuple(i for i in at if isinstance(i, Index))
        kind = "carry" if ket else "number"
        r.definitions.append(Definition(base, (t, *free), v.at(at), kind, v.leaves, v.gaussian, t.letter, v.places))
    last: Term = Num(float(p["length"]))
    results = [
        Val(v.shape, stepped(b, last), k, v.gaussian, v.leaves) for v, b, k in zip(after, bases, kets, strict=True)
    ]
    for y in ys:
        same_as = next((b for v, b in zip(after, bases, strict=True) if v is y), None)
        shape = (p["length"], *y.shape)
        if same_as is not None:

            def at_step(idx: Indices, b: Sym = same_as) -> Term:
                return stepped(b, step_of(idx[0] or Num(1.0)))(idx[1:])

            results.append(Val(shape, at_step, y.ket, y.gaussian, y.leaves))
        else:

            def written_at(idx: Indices, y: Val = y) -> Term:
                return tm.substituted(y.at(idx[1:]), {t: step_of(idx[0] or Num(1.0))})

            results.append(replace(y, shape=shape, base=None, at=written_at))
    return results


def _all_leaves(*groups: Sequence[Val]) -> frozenset[str]:
    return frozenset().union(*(x.leaves for group in groups for x in group))
