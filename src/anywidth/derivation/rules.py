"""How each primitive is written: one short rule for each, as in the engine."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np

from anywidth.derivation import terms as tm
from anywidth.derivation.read import SAME, Indices, Reader, Val, widths
from anywidth.derivation.terms import Index, Num, Op, Sym, Term
from anywidth.trace import Eqn, Size, add_sizes, affine, finite, is_wide

RULES: dict[str, Callable[[Reader, Eqn, list[Val]], Any]] = {}


def register(*names: str) -> Callable[[Any], Any]:
    def add(rule: Any) -> Any:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return add


# --- entry by entry ------------------------------------------------------------------------------------


@register(*SAME)
def same(r: Reader, eqn: Eqn, inputs: list[Val]) -> Val:
    (x,) = inputs
    if eqn.name != "convert_element_type" or x.ket:
        return x

    def entry(idx: Indices) -> Term:
        """Whether two positions are the same, as a number."""
        t = x.at(idx)
        alike = isinstance(t, Op) and t.head == "fn:eq" and all(isinstance(i, Index) for i in t.args)
        return Op("fn:same", t.args) if alike and isinstance(t, Op) else t

    return replace(x, at=entry, base=None)


@register("add", "add_any", "sub", "neg")
def add(r: Reader, eqn: Eqn, inputs: list[Val]) -> Val:
    def f(a: Term, b: Term | None = None) -> Term:
        if eqn.name == "neg":
            return tm.neg(a)
        assert b is not None
        return tm.add(a, tm.neg(b) if eqn.name == "sub" else b)

    return r.pointwise(f, inputs, eqn.outputs[0].shape, linear=True)


@register("mul", "div")
def mul(r: Reader, eqn: Eqn, inputs: list[Val]) -> Val:
    x, y = inputs
    linear = not (x.ket and y.ket) and not (eqn.name == "div" and y.ket)
    if linear and (x.ket or y.ket):
        inputs = [r.coefficient(v) for v in inputs]

    def f(a: Term, b: Term) -> Term:
        return tm.mul(a, b) if eqn.name == "mul" else softmax(r.written(a), r.written(b)) or tm.div(a, b)

    if x.ket and y.ket and eqn.name == "mul" and (x.raw or y.raw):  # v * h on the way to a readout
        out = r.pointwise(f, inputs, eqn.outputs[0].shape, linear=True)
        return replace(out, gaussian=False)
    return r.pointwise(f, inputs, eqn.outputs[0].shape, linear)


def softmax(a: Term, b: Term) -> Term | None:
    """exp(u_j) / sum_k exp(u_k), by its name."""
    if not (isinstance(a, Op) and a.head == "fn:exp" and isinstance(b, Op) and b.head == "sum"):
        return None
    k, below = b.args
    if not (isinstance(below, Op) and below.head == "fn:exp" and isinstance(k, Index)):
        return None
    u = a.args[0]
    for j in tm.indices_of(u):
        if tm.substituted(u, {j: k}) == below.args[0]:
            pieces = u.args if isinstance(u, Op) and u.head == "add" else (u,)
            kept = [p for p in pieces if j in tm.indices_of(p) and not _is_max(p)]
            return Op("fn:softmax", (j, tm.add(*kept)))
    return None


def _is_max(t: Term) -> bool:
    return any(isinstance(u, Op) and u.head == "fn:max_over" for u in tm.walk(t))


def _variance(t: Term) -> bool:
    """Whether it is E[u²] or E[u²] - E[u]², which is kept from being negative where it is computed."""
    match t:
        case Op("E", (Op("pow", (_, Num(2.0))),)):
            return True
        case Op(
            "add", (Op("E", (Op("pow", (u, Num(2.0))),)), Op("mul", (Num(-1.0), Op("pow", (Op("E", (v,)), Num(2.0))))))
        ):
            return u == v
    return False


@register("max")
def maximum(r: Reader, eqn: Eqn, inputs: list[Val]) -> Val:
    def f(a: Term, b: Term) -> Term:
        for x, y in ((a, b), (b, a)):
            if tm.is_number(x, 0.0):
                return y if _variance(y) else tm.fn("relu", y)
            if isinstance(x, Num) and x.value == -np.inf:
                return y
        return tm.fn("max", a, b)

    return r.pointwise(f, inputs, eqn.outputs[0].shape)


@register("integer_pow", "square", "sqrt", "rsqrt")
def powers(r: Reader, eqn: Eqn, inputs: list[Val]) -> Val:
    known: dict[str, Any] = {"square": 2, "sqrt": Fraction(1, 2), "rsqrt": Fraction(-1, 2)}
    exponent = known.get(eqn.name) or eqn.params["y"]
    return r.pointwise(lambda a: tm.power(a, exponent), inputs, eqn.outputs[0].shape)


@register("select_n")
def select(r: Reader, eqn: Eqn, inputs: list[Val]) -> Val:
    which, *cases = inputs
    if not which.ket and any(_infinite(c) for c in cases):  # the scores that a mask leaves out
        cases = [r.argument(c) for c in cases]
        inputs = [which, *cases]
        cases = [replace(c, gaussian=False) for c in cases]
    linear = not which.ket and all((c.ket and c.gaussian) or not c.ket for c in cases)

    def f(w: Term, *cs: Term) -> Term:
        return cs[int(w.value)] if isinstance(w, Num) else Op("fn:where", (w, *reversed(cs)))

    return r.pointwise(f, inputs, eqn.outputs[0].shape, linear)


def _infinite(x: Val) -> bool:
    body = None if x.ket else x.at(tuple(None for _ in x.shape))
    return isinstance(body, Num) and body.value == -np.inf


@register("iota")
def iota(r: Reader, eqn: Eqn, inputs: list[Val]) -> Val:
    """Positions count from one, what the program computes with them from zero."""
    axis = eqn.params["dimension"]
    return Val(tuple(eqn.params["shape"]), lambda idx: Num(0.0) if idx[axis] is None else _shifted(idx[axis], -1))


_SIGNS: dict[str, Callable[[int, int], bool]] = {
    "gt": operator.gt, "ge": operator.ge, "lt": operator.lt, "le": operator.le, "eq": operator.eq, "ne": operator.ne,
}  # fmt: skip


def _sign(t: Term) -> int | None:
    """The sign, for large n, of a number that is known."""
    numbers = t.args if isinstance(t, Op) and t.head == "add" else (t,)
    if not all(isinstance(x, Num) and np.isfinite(x.value) for x in numbers):
        return None
    powers: Counter[Fraction] = Counter()
    for x in numbers:
        assert isinstance(x, Num)
        powers[x.power] += x.value  # type: ignore[assignment]
    leading = max((p for p, v in powers.items() if v), default=None)
    return 0 if leading is None else int(np.sign(powers[leading]))


@register("gt", "ge", "lt", "le", "eq", "ne")
def compare(r: Reader, eqn: Eqn, inputs: list[Val]) -> Val:
    def f(a: Term, b: Term) -> Term:
        sign = _sign(tm.add(a, tm.neg(b)))
        if sign is not None:
            return Num(float(_SIGNS[eqn.name](sign, 0)))
        if isinstance(a, Index) and isinstance(b, Index) and a.shift == b.shift:
            a, b = replace(a, shift=0), replace(b, shift=0)
        return tm.fn(eqn.name, a, b)

    return r.pointwise(f, inputs, eqn.outputs[0].shape)


# --- reading entries elsewhere -------------------------------------------------------------------------


@register("transpose")
def transpose(r: Reader, eqn: Eqn, inputs: list[Val]) -> Val:
    p = eqn.params["permutation"]
    inverse = [p.index(i) for i in range(len(p))]
    return r.moved(inputs[0], tuple(inputs[0].shape[i] for i in p), lambda idx: tuple(idx[k] for k in inverse))


@register("broadcast_in_dim")
def broadcast(r: Reader, eqn: Eqn, inputs: list[Val]) -> Val:
    x, dims = inputs[0], eqn.params["broadcast_dimensions"]
    return r.moved(
        x,
        tuple(eqn.params["shape"]),
        lambda idx: tuple(None if x.shape[i] == 1 else idx[d] for i, d in enumerate(dims)),
    )


@register("squeeze")
def squeeze(r: Reader, eqn: Eqn, inputs: list[Val]) -> Val:
    x, gone = inputs[0], eqn.params["dimensions"]
    shape = tuple(s for i, s in enumerate(x.shape) if i not in gone)

    def where(idx: Indices) -> Indices:
        rest = iter(idx)
        return tuple(None if i in gone else next(rest) for i in range(len(x.shape)))

    return r.moved(x, shape, where)


@register("reshape")
def reshape(r: Reader, eqn: Eqn, inputs: list[Val]) -> Val:
    x, shape = inputs[0], tuple(eqn.params["new_sizes"])
    old, new = ([i for i, s in enumerate(sh) if s != 1] for sh in (x.shape, shape))
    if [x.shape[i] for i in old] == [shape[i] for i in new]:
        place = dict(zip(old, new, strict=True))
        return r.moved(x, shape, lambda idx: tuple(idx[place[i]] if i in place else None for i in range(len(x.shape))))
    named = r.operand(x)
    return replace(named, shape=shape, base=None, at=lambda idx: _reshaped(named.at(tuple(None for _ in x.shape)), idx))


def _reshaped(t: Term, idx: Indices) -> Term:
    found = tuple(i for i in idx if i is not None)
    return replace(t, sub=(*t.sub, *found)) if isinstance(t, Sym) else Op("fn:reshape", (t, *found))


@register("slice")
def slice_(r: Reader, eqn: Eqn, inputs: list[Val]) -> Val:
    x, starts = inputs[0], eqn.params["start_indices"]
    return _cut(r, x, eqn.outputs[0].shape, starts, eqn.params["strides"])


@register("split")
def split(r: Reader, eqn: Eqn, inputs: list[Val]) -> list[Val]:
    (x,), axis = inputs, eqn.params["axis"]
    start: Size = 0
    out = []
    for size in eqn.params["sizes"]:
        shape = tuple(size if i == axis else s for i, s in enumerate(x.shape))
        out.append(_cut(r, x, shape, [start if i == axis else 0 for i in range(len(shape))], None))
        start = add_sizes(start, size)
    return out


def _cut(r: Reader, x: Val, shape: Sequence[Size], starts: Sequence[Size], strides: Sequence[int] | None) -> Val:
    def where(idx: Indices) -> Indices:
        out: list[Term | None] = []
        for i, (s, start) in enumerate(zip(x.shape, starts, strict=True)):
            if is_wide(s) or s == 1:
                out.append(None)
            elif shape[i] == 1:
                out.append(Num(float(finite(start) + 1)))
            elif strides is None or strides[i] == 1:
                out.append(_shifted(idx[i], finite(start)))
            else:
                step = float(strides[i])
                out.append(tm.add(tm.mul(Num(step), idx[i] or Num(1.0)), Num(float(finite(start) + 1) - step)))
        return tuple(out)

    for i, (s, start) in enumerate(zip(x.shape, starts, strict=True)):
        if is_wide(s) and shape[i] != s:
            x = _part(r, x, start, shape[i])
    return r.moved(x, tuple(shape), where)


def _part(r: Reader, x: Val, start: Size, size: Size) -> Val:
    """Some of the coordinates of a random vector: those of a product are the product with these rows of the matrix."""
    (a, b), (c, d) = affine(start), affine(size)
    number = a / c + 1 if b == d == 0 and c and (a / c).denominator == 1 else None
    label = str(number) if number is not None else f"from_{start}"

    def of_parameters(t: Term) -> Term | None:
        if isinstance(t, Op) and t.head == "E":
            return t
        if isinstance(t, Sym) and t.parameter:
            return replace(t, name=f"{t.name}_{label}", leaf=f"{t.leaf}[{label}]")
        return None

    body = x.at(r.letters(x.shape))
    addends = body.args if isinstance(body, Op) and body.head == "add" else (body,)
    parted = [any(isinstance(t, Sym) and t.parameter for t in tm.walk(u)) for u in addends]
    if not (x.gaussian and all(parted)):
        named = r.operand(x)
        return replace(named, at=lambda idx: tm.fn(f"part_{label}", named.at(idx)), gaussian=False, base=None)
    leaves = x.leaves | {f"{leaf}[{label}]" for leaf in x.leaves}
    raw = None if x.raw is None else f"{x.raw}[{label}]"
    return replace(x, at=lambda idx: tm.mapped(x.at(idx), of_parameters), leaves=leaves, raw=raw, base=None)


def _shifted(i: Term | None, by: int) -> Term:
    if isinstance(i, Index):
        return replace(i, shift=i.shift + by)
    return Num(float(by)) if i is None else tm.add(i, Num(float(by)))


@register("concatenate")
def concatenate(r: Reader, eqn: Eqn, inputs: list[Val]) -> Val:
    axis = eqn.params["dimension"]
    shape = eqn.outputs[0].shape
    parts = [r.operand(x) for x in inputs]

    def entry(idx: Indices) -> Term:
        at = idx[axis]
        rows = [x.at(tuple(None if k == axis and x.shape[k] == 1 else i for k, i in enumerate(idx))) for x in parts]
        return Op("fn:concat", tuple(rows) if at is None else (*rows,))

    leaves = frozenset().union(*(x.leaves for x in inputs))
    kets = [x for x in inputs if x.ket]
    return Val(shape, entry, bool(kets), bool(kets) and all(x.gaussian for x in kets), leaves)


# --- products and sums ---------------------------------------------------------------------------------


@register("dot_general")
def dot_general(r: Reader, eqn: Eqn, inputs: list[Val]) -> Val:
    x, y = inputs
    (cx, cy), (bx, by) = eqn.params["dimension_numbers"]
    over_width = any(is_wide(x.shape[i]) for i in cx)
    if over_width:
        x, y = (v if v.raw else r.operand(v) for v in (x, y))
    elif x.ket and y.ket:
        x, y = (v if v.raw else r.argument(v) for v in (x, y))
    elif x.ket or y.ket:
        x, y = (r.coefficient(v) for v in (x, y))
    fx = [i for i in range(len(x.shape)) if i not in (*cx, *bx)]
    fy = [i for i in range(len(y.shape)) if i not in (*cy, *by)]
    plain = not over_width and bool(x.raw) != bool(y.raw)  # U x: the index of the features is left out
    size = widths([x.shape[i] for i in cx])
    fluctuates = eqn.place in r.ways.fluctuating
    average = over_width and x.ket and y.ket and not _product(x, y) and not fluctuates

    def entry(idx: Indices) -> Term:
        nb = len(bx)
        ix: list[Term | None] = [None] * len(x.shape)
        iy: list[Term | None] = [None] * len(y.shape)
        for k, (i, j) in enumerate(zip(bx, by, strict=True)):
            ix[i] = iy[j] = idx[k]
        for k, i in enumerate(fx):
            ix[i] = idx[nb + k]
        for k, j in enumerate(fy):
            iy[j] = idx[nb + len(fx) + k]
        bound: list[Index] = []
        for i, j in zip(cx, cy, strict=True):
            if not is_wide(x.shape[i]) and x.shape[i] != 1 and not plain:
                bound.append(r.fresh([*idx, *ix, *bound]))
                ix[i] = iy[j] = bound[-1]
        a, b = x.at(tuple(ix)), y.at(tuple(iy))
        if over_width and not average:
            assert size is not None
            a, b = (_along(t, size) for t in (a, b))
        if not x.raw and y.raw:
            a, b = b, a
        if fluctuates and size:
            out: Term = Op("fn:over", (size, a, b))
        else:
            out = tm.mul(size, tm.expectation(a, b)) if average and size else tm.mul(a, b)
        for i in reversed(bound):
            out = tm.total(i, out)
        return out

    if fluctuates:
        return Val(eqn.outputs[0].shape, entry, True, True, x.leaves | y.leaves)
    out = _result(x, y, eqn.outputs[0].shape, entry, average, linear=True)
    return replace(out, gaussian=False) if eqn.place in r.ways.mixed else out


def _along(t: Term, size: Num) -> Term:
    """A parameter that is multiplied along an axis of this width; anything else as it is."""
    return replace(t, width=size) if isinstance(t, Sym) and t.parameter else t


def _product(x: Val, y: Val) -> bool:
    """Whether a product over the width is Gaussian: with a matrix, or a readout with a vector of its own."""
    return any(p.raw is not None and (p.wides >= 2 or p.raw not in q.leaves) for p, q in ((x, y), (y, x)))


def _result(x: Val, y: Val, shape: tuple[Size, ...], entry: Any, average: bool, linear: bool) -> Val:
    kets = [v for v in (x, y) if v.ket]
    if average:
        return Val(shape, entry)
    gaussian = bool(kets) and (_product(x, y) if len(kets) == 2 else kets[0].gaussian)
    return Val(shape, entry, bool(kets), gaussian, x.leaves | y.leaves)


@register("reduce_sum")
def reduce_sum(r: Reader, eqn: Eqn, inputs: list[Val]) -> Val:
    x, axes = inputs[0], eqn.params["axes"]
    size, fluctuates = widths([x.shape[i] for i in axes]), eqn.place in r.ways.fluctuating
    shape = tuple(s for i, s in enumerate(x.shape) if i not in axes)

    def entry(idx: Indices) -> Term:
        rest = iter(idx)
        full: list[Term | None] = [None if i in axes else next(rest) for i in range(len(x.shape))]
        bound: list[Index] = []
        sizes: list[Num] = []
        for i in axes:
            if not is_wide(x.shape[i]) and x.shape[i] != 1:
                bound.append(r.fresh([*idx, *bound]))
                sizes.append(Num(float(x.shape[i])))
                full[i] = bound[-1]
        out = x.at(tuple(full))
        if fluctuates and size:
            factors = out.args if isinstance(out, Op) and out.head == "mul" and len(out.args) == 2 else (out,)
            out = Op("fn:over", (size, *factors))
        elif size and x.ket:
            readout = _readout(out, size)
            out = readout if readout is not None else tm.mul(size, r.mean(x, out))
        elif size:
            out = tm.mul(size, out)
        for i, length in reversed(list(zip(bound, sizes, strict=True))):
            out = tm.total(i, out, length)
        return out

    if fluctuates:
        return Val(shape, entry, True, True, x.leaves)
    if size and x.ket:
        probe = _readout(x.at(r.letters(x.shape)), Num(1.0))
        return Val(shape, entry, probe is not None, probe is not None, x.leaves if probe is not None else frozenset())
    return Val(shape, entry, x.ket, x.gaussian, x.leaves)


def _readout(t: Term, size: Num) -> Term | None:
    """V * h summed over the width is the product with v."""
    factors = t.args if isinstance(t, Op) and t.head == "mul" else (t,)
    if len(factors) == 1 or not any(isinstance(f, Sym) and f.parameter for f in factors):
        return None
    return tm.mul(*(_along(f, size) for f in factors))


@register("reduce_max", "argmax")
def reduce_max(r: Reader, eqn: Eqn, inputs: list[Val]) -> Val:
    x, axes = r.argument(inputs[0]), eqn.params["axes"]
    shape = tuple(s for i, s in enumerate(x.shape) if i not in axes)
    head = "fn:max_over" if eqn.name == "reduce_max" else "fn:argmax_over"

    def entry(idx: Indices) -> Term:
        rest = iter(idx)
        full: list[Term | None] = [None if i in axes else next(rest) for i in range(len(x.shape))]
        bound: list[Index] = []
        for i in axes:
            if not is_wide(x.shape[i]) and x.shape[i] != 1:
                bound.append(r.fresh([*idx, *bound]))
                full[i] = bound[-1]
        return Op(head, (*bound, x.at(tuple(full))))

    return Val(shape, entry, x.ket, False, x.leaves)
