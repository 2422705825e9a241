r"""Arrays of size n x n that are made of others: products that wait for a vector.

The entries of A B, of an outer product k v^T or of W + W' have no limit of their own, but what a vector becomes has
one, as a product may be taken in any order:

    (A B) x = A (B x),     (sum_t k_t v_t^T / n)^T q = sum_t (k_t . q / n) v_t,     (W + W') x = W x + W' x.

So such an array is kept as it was written, a sum of products of values over named axes, of which some are summed
(an einsum). Once no two axes of the same width are left, each product is taken (`pairs.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from anywidth.errors import UnsupportedError
from anywidth.interpret import Interpreter, evaluated
from anywidth.kets import is_zero
from anywidth.rules import elementwise, linear, products
from anywidth.rules.pairs import as_number, evaluate
from anywidth.rules.pieces import added
from anywidth.trace import Eqn, Size, finite, is_wide
from anywidth.values import ZERO_POWER, Cat, Det, Ket, Mat, Operator, Term, crowded

SAME = {*elementwise.LINEAR, "neg"}


def handles(eqn: Eqn, inputs: Sequence[Any]) -> bool:
    """Whether an equation makes or takes an array that is not formed."""
    if any(isinstance(x, Operator) for x in inputs):
        return True
    mats = [x for x in inputs if isinstance(x, Mat)]
    kets = [x for x in inputs if isinstance(x, Ket)]
    if not mats and not kets:
        return False
    out, name = eqn.outputs[0], eqn.name
    # an array of zeros, say, to which outer products are added
    constant = any(isinstance(x, Det) and crowded(x.shape) for x in inputs)
    made = out is not None and crowded(out.shape)
    if name in ("mul", "div"):
        return len(mats) == 2 or (bool(kets) and made)
    if name == "dot_general":
        (sums, _), _ = eqn.params["dimension_numbers"]
        finite_sum = not any(is_wide(inputs[0].shape[a]) for a in sums)
        return len(mats) == 2 or made or constant or (bool(mats) and finite_sum)
    if name in ("square", "integer_pow"):
        return bool(mats) and eqn.params.get("y", 2) == 2
    if name in ("add", "sub", "add_any", "reduce_sum"):
        return bool(mats)
    return name == "broadcast_in_dim" and bool(kets) and made


def apply(it: Interpreter, eqn: Eqn, inputs: Sequence[Any]) -> Any:
    """The outputs of an equation that `handles` chose."""
    name = eqn.name
    if name in SAME:
        return inputs[0] if name != "neg" else scaled(it, inputs[0], -1.0)
    if name not in _RULES:
        made = next(x for x in inputs if isinstance(x, Operator))
        raise UnsupportedError(
            f"an array with two axes of the same width (n x n), {made.line}, goes through '{name}'. It is no parameter "
            "but made of others (a product of matrices, an outer product of vectors), and its entries have no limit of "
            "their own: it may be added, scaled, summed and multiplied by vectors. Apply it to its vector first"
        )
    return _RULES[name](it, *inputs, **eqn.params)


# --- making them ------------------------------------------------------------------------------------------


def terms_of(x: Any) -> tuple[Term, ...]:
    """The products that a value is the sum of."""
    if isinstance(x, Cat):
        raise UnsupportedError(
            "a concatenation becomes part of an n x n array: make one of each of its parts, and add what they give"
        )
    if isinstance(x, Operator):
        return x.terms
    if isinstance(x, Det):
        return (Term((replace(x, shape=tuple(np.shape(x.val))),)),)
    return (Term((x,)),)


def settled(it: Interpreter, terms: Sequence[Term], shape: Sequence[Size]) -> Any:
    """The sum of products: a value, where no two axes of one width are left."""
    shape, kept = tuple(shape), []
    for term in terms:
        zeros = [f for f in term.factors if (f.zero if isinstance(f, Det) else isinstance(f, Ket) and is_zero(f.node))]
        for f in zeros:
            if isinstance(f, Det):
                it.settled(f)
        if not zeros:
            kept.append(term)
    if not kept:
        return Det(np.zeros(linear.numeric(shape), it.eqn.outputs[0].dtype), ZERO_POWER, shape, zero=True)
    if not crowded(shape):
        return as_number(added(it, [evaluate(it, term, shape) for term in kept]))
    if len(kept) == 1 and not kept[0].summed:
        (mat, *dets) = sorted(kept[0].factors, key=lambda f: not isinstance(f, Mat))
        if isinstance(mat, Mat) and mat.shape == shape and all(isinstance(f, Det) for f in dets):
            for f in dets:
                mat = it.scale(f, mat)
            return mat
    return Operator(tuple(kept), shape, f"made at {it.eqn.line}")


def product(it: Interpreter, x: Any, y: Any, p: products.Plan, shape: Sequence[Size]) -> Any:
    """A product of two values, each axis of which has its place, summed over the last axes of the plan."""
    rank = p.outer + p.summed
    sizes: list[Size] = [1] * rank
    for value, places in ((x, p.lhs), (y, p.rhs)):
        for size, place in zip(value.shape, places, strict=True):
            sizes[place] = size if size != 1 else sizes[place]
    terms = []
    for s in terms_of(x):
        for t in terms_of(y):
            k = rank + len(s.summed)
            full = k + len(t.summed)
            left = [products.spread(f, (*p.lhs, *range(rank, k)), full) for f in s.factors]
            right = [products.spread(f, (*p.rhs, *range(k, full)), full) for f in t.factors]
            terms.append(Term((*left, *right), (*sizes[p.outer :], *s.summed, *t.summed)))
    return settled(it, terms, shape)


def moved(it: Interpreter, x: Any, places: Sequence[int], shape: Sequence[Size]) -> Any:
    """The value with its axes at other places; new ones are constant, axes of place -1, of size one, are left out."""
    rank, terms = len(shape), []
    keep = [i for i, p in enumerate(places) if p >= 0]
    for term in terms_of(x):
        more = len(term.summed)
        old = len(places)
        where = [*(places[i] for i in keep), *range(rank, rank + more)]
        lost = [i for i in range(old) if i not in keep]
        factors = [products.spread(linear.squeeze(it, f, dimensions=lost), where, rank + more) for f in term.factors]
        terms.append(Term(tuple(factors), term.summed))
    return settled(it, terms, shape)


def scaled(it: Interpreter, x: Operator, coef: Any) -> Any:
    """The array times a number: a Python number, or a deterministic scalar with its power of n."""
    number = coef if isinstance(coef, Det) else Det(np.asarray(coef), ZERO_POWER, ())
    number = replace(number, val=evaluated(lambda v: v.reshape(()), number.val), shape=())
    terms = []
    for term in x.terms:
        first, *rest = sorted(term.factors, key=lambda f: isinstance(f, Det))
        terms.append(replace(term, factors=(elementwise.mul_det(it, number, first) if isinstance(first, Det) else
                                            it.scale(number, first), *rest)))  # fmt: skip
    return settled(it, terms, x.shape)


# --- the rules --------------------------------------------------------------------------------------------


def _dot(it: Interpreter, x: Any, y: Any, dimension_numbers: Any, **params: Any) -> Any:
    p = products.plan(dimension_numbers, len(x.shape), len(y.shape))
    return product(it, x, y, p, it.eqn.outputs[0].shape)


def _mul(it: Interpreter, x: Any, y: Any, **params: Any) -> Any:
    for a, b in ((x, y), (y, x)):
        if isinstance(a, Det) and all(s == 1 for s in a.shape):
            return scaled(it, b, it.settled(a))
    if len(x.shape) != len(y.shape):
        raise UnsupportedError("a random scalar multiplies a matrix that all channels share: the limit stays random")
    axes = tuple(range(len(x.shape)))
    return product(it, x, y, products.Plan(axes, axes, len(axes), 0), it.eqn.outputs[0].shape)


def _div(it: Interpreter, x: Any, y: Any, **params: Any) -> Any:
    if isinstance(y, Operator | Mat):
        raise UnsupportedError("something is divided by the entries of an n x n array: they have no limit of their own")
    one = Det(np.ones((), it.eqn.outputs[0].dtype), ZERO_POWER, ())
    y = as_number(y)
    if isinstance(y, Det):
        it.settled(y)
        inverse: Any = replace(y, val=evaluated(lambda v: 1.0 / v, y.val), power=-y.power)
    else:
        inverse = it.pointwise("div", {}, [one, y], -y.power)
    return _mul(it, x, inverse)


def _square(it: Interpreter, x: Any, **params: Any) -> Any:
    if params.get("y", 2) != 2:
        raise UnsupportedError(f"the entries of an n x n array are raised to the power {params['y']}: only squares are "
                               "taken (the norm of weights)")  # fmt: skip
    return _mul(it, x, x)


def _add(it: Interpreter, x: Any, y: Any, **params: Any) -> Any:
    if it.eqn.name == "sub":
        y = scaled(it, y, -1.0) if isinstance(y, Operator) else elementwise.mul_det(
            it, Det(np.asarray(-1.0, it.eqn.outputs[0].dtype), ZERO_POWER, ()), y
        )  # fmt: skip
    shape = it.eqn.outputs[0].shape
    terms: list[Term] = []
    for v in (x, y):
        if not v.shape and isinstance(v, Det):
            v = linear.broadcast_in_dim(it, v, shape=(1,) * len(shape), broadcast_dimensions=())
        if len(v.shape) != len(shape):
            raise UnsupportedError("a random scalar is added to every entry of a matrix: the limit stays random")
        terms += terms_of(v)
    return settled(it, terms, shape)


def _sum(it: Interpreter, x: Any, axes: Sequence[int], **params: Any) -> Any:
    axes = tuple(int(a) for a in axes)
    kept = [i for i in range(len(x.shape)) if i not in axes]
    terms = []
    for term in terms_of(x):
        last = range(len(x.shape), len(x.shape) + len(term.summed))
        factors = [linear.transpose(it, f, (*kept, *axes, *last)) for f in term.factors]
        terms.append(Term(tuple(factors), (*(x.shape[a] for a in axes), *term.summed)))
    return settled(it, terms, it.eqn.outputs[0].shape)


def _cumsum(it: Interpreter, x: Operator, axis: int, reverse: bool, **params: Any) -> Any:
    if is_wide(x.shape[axis]):
        raise UnsupportedError("a cumulative sum over the width is taken")
    n, rank = finite(x.shape[axis]), len(x.shape)
    ones = np.ones((n, n), it.eqn.outputs[0].dtype)
    triangle = Det(np.triu(ones) if reverse else np.tril(ones), ZERO_POWER, (n, n))
    # sum_s [s <= t] x[s]: s is the axis that is summed, behind the others
    mine = tuple(rank if a == axis else a for a in range(rank))
    return product(it, x, triangle, products.Plan(mine, (axis, rank), rank, 1), x.shape)


def _transpose(it: Interpreter, x: Operator, permutation: Sequence[int], **params: Any) -> Any:
    places = [list(permutation).index(i) for i in range(len(x.shape))]
    return moved(it, x, places, tuple(x.shape[i] for i in permutation))


def _squeeze(it: Interpreter, x: Operator, dimensions: Sequence[int], **params: Any) -> Any:
    kept = [i for i in range(len(x.shape)) if i not in dimensions]
    places = [kept.index(i) if i in kept else -1 for i in range(len(x.shape))]
    return moved(it, x, places, tuple(x.shape[i] for i in kept))


def _broadcast(it: Interpreter, x: Any, *_: Any, shape: Any, broadcast_dimensions: Sequence[int], **params: Any) -> Any:
    return moved(it, x, broadcast_dimensions, shape)


def _expand_dims(it: Interpreter, x: Operator, dimensions: Sequence[int], **params: Any) -> Any:
    shape = it.eqn.outputs[0].shape
    return moved(it, x, [i for i in range(len(shape)) if i not in dimensions], shape)


def _reshape(it: Interpreter, x: Operator, *_: Any, new_sizes: Sequence[Size], **params: Any) -> Any:
    old, new = ([i for i, s in enumerate(shape) if s != 1] for shape in (x.shape, new_sizes))
    if [x.shape[i] for i in old] != [new_sizes[i] for i in new]:
        raise UnsupportedError(
            f"an n x n array that is made of others is reshaped from ({', '.join(map(str, x.shape))}) to "
            f"({', '.join(map(str, new_sizes))}): reshape what it is made of before it is made"
        )
    places = [new[old.index(i)] if i in old else -1 for i in range(len(x.shape))]
    return moved(it, x, places, new_sizes)


def _slice(it: Interpreter, x: Operator, start_indices: Any, limit_indices: Any, strides: Any, **params: Any) -> Any:
    strides = strides or (1,) * len(x.shape)
    terms = []
    for term in x.terms:
        factors = []
        for f in term.factors:
            more = len(f.shape) - len(x.shape)
            held = [s != 1 for s in f.shape[: len(x.shape)]]
            starts = [a if h else 0 for a, h in zip(start_indices, held, strict=True)] + [0] * more
            stops = [b if h else 1 for b, h in zip(limit_indices, held, strict=True)] + list(f.shape[len(x.shape) :])
            steps = [c if h else 1 for c, h in zip(strides, held, strict=True)] + [1] * more
            factors.append(linear.slice_(it, f, tuple(starts), tuple(stops), tuple(steps)))
        terms.append(replace(term, factors=tuple(factors)))
    return settled(it, terms, it.eqn.outputs[0].shape)


_RULES: dict[str, Callable[..., Any]] = {
    "dot_general": _dot, "mul": _mul, "div": _div, "square": _square, "integer_pow": _square, "add": _add, "sub": _add,
    "add_any": _add, "reduce_sum": _sum, "cumsum": _cumsum, "transpose": _transpose, "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast, "expand_dims": _expand_dims, "reshape": _reshape, "slice": _slice,
}  # fmt: skip


__all__ = ["apply", "handles"]
