r"""A product of several factors, summed over some of their axes, two factors at a time.

The order is one in which nothing of size n x n is formed: of A B x, B x first. Sums of squares over a row of a
parameter are numbers, n var, by the law of large numbers: the weights of a normalised layer. That a weight's norm
depends on the weight is nothing in the limit: in the derivative of W_i.x / |W_i| it takes from x its part along W_i,
of length O(1) where x has length sqrt(n).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np

from anywidth.errors import UnsupportedError
from anywidth.interpret import Interpreter, evaluated
from anywidth.kets import Const, is_zero
from anywidth.rules import elementwise, linear, products, reductions
from anywidth.trace import Size, affine, finite, is_wide, order
from anywidth.values import ZERO_POWER, Ax, Det, Ket, Mat, Term, Wide, crowded, spelled_out


def as_number(x: Any) -> Any:
    """Kets that are the same number in every coordinate as that number."""
    if isinstance(x, Ket) and isinstance(x.node, Const):
        val = spelled_out(x.node.array, x.layout)
        if val is not None:
            shape = x.shape
            whole = linear.numeric(shape)
            return Det(evaluated(lambda v: jnp.broadcast_to(v, whole), val), x.power, shape, zero=is_zero(x.node))
    return x


def evaluate(it: Interpreter, term: Term, shape: Sequence[Size]) -> Any:
    """The product, two factors at a time."""
    outer = len(shape)
    sizes = (*shape, *term.summed)
    factors = list(term.factors)
    todo = {a for a in range(outer, len(sizes)) if sizes[a] != 1}
    # what no factor varies along
    count, grows = 1.0, Fraction(0)
    for a in sorted(todo):
        if not any(holds(f, a) for f in factors):
            todo.remove(a)
            count, grows = (
                count * float(affine(sizes[a])[0] if is_wide(sizes[a]) else finite(sizes[a])),
                grows + order(sizes[a]),
            )
    factors[0] = _times(it, Det(np.asarray(count), grows, ()), factors[0])
    while True:
        for i, f in enumerate(factors):
            alone = [a for a in sorted(todo) if _held(factors, a) == [i]]
            # a parameter summed over finite axes alone still waits for its vector
            if alone and not (isinstance(f, Mat) and not any(is_wide(f.shape[a]) for a in alone)):
                factors[i] = _summed(it, f, alone)
                todo -= set(alone)
        if len(factors) == 1:
            break
        pairs = [
            (cost, i, j)
            for i in range(len(factors))
            for j in range(i + 1, len(factors))
            if (cost := _cost(factors, i, j, todo)) is not None
        ]
        if not pairs:
            raise UnsupportedError(
                "matrices of size n x n that are made of others are multiplied in a way that no order of taking the "
                "products keeps to vectors (the trace of a product, say): multiply them by vectors only"
            )
        _, i, j = min(pairs)
        gone = _gone(factors, i, j, todo)
        result = _pair(it, factors[i], factors[j], gone)
        todo -= set(gone)
        factors = [f for k, f in enumerate(factors) if k not in (i, j)] + [result]
    (out,) = factors
    out = linear.squeeze(it, out, dimensions=range(outer, len(sizes)))
    if out.shape != tuple(shape):
        out = linear.broadcast_in_dim(it, out, shape=tuple(shape), broadcast_dimensions=tuple(range(outer)))
    return out


def holds(x: Any, axis: int) -> bool:
    return x.shape[axis] != 1


def _held(factors: Sequence[Any], axis: int) -> list[int]:
    return [i for i, f in enumerate(factors) if holds(f, axis)]


def _gone(factors: Sequence[Any], i: int, j: int, todo: set[int]) -> list[int]:
    """The axes that can be summed with this pair, as no other factor varies along them."""
    return [a for a in sorted(todo) if set(_held(factors, a)) <= {i, j}]


def _cost(factors: Sequence[Any], i: int, j: int, todo: set[int]) -> tuple[int, float] | None:
    """Which pair goes first: sums over the width, then the smallest result. None: the pair cannot be taken."""
    a, b = factors[i], factors[j]
    gone = _gone(factors, i, j, todo)
    held = [x for x in range(len(a.shape)) if holds(a, x) or holds(b, x)]
    sizes = [a.shape[x] if holds(a, x) else b.shape[x] for x in held]
    kept = [s for x, s in zip(held, sizes, strict=True) if x not in gone]
    wide_sum = any(is_wide(a.shape[x]) or is_wide(b.shape[x]) for x in gone)
    mats = sum(isinstance(f, Mat) for f in (a, b))
    if mats == 2:
        if not (wide_sum and all(is_wide(b.shape[x]) for x in held if is_wide(a.shape[x]))):
            return None
        if crowded(kept):
            return None
    elif mats and any(isinstance(f, Ket) for f in (a, b)):
        if not wide_sum or crowded(kept):
            return None
    elif mats:
        if gone:
            return None
    elif isinstance(a, Ket) and isinstance(b, Ket) and crowded(sizes):
        return None
    last = 2 if mats and not wide_sum else 0 if wide_sum else 1
    return last, float(np.prod([s for s in kept if not is_wide(s)], initial=1.0))


def _pair(it: Interpreter, a: Any, b: Any, gone: Sequence[int]) -> Any:
    """The product of two factors, summed over some axes, which are then of size one."""
    full = len(a.shape)
    kept = [x for x in range(full) if x not in gone]
    a, b = (linear.transpose(it, f, (*kept, *gone)) for f in (a, b))
    for f in (a, b):
        if isinstance(f, Det) and not (isinstance(a, Det) and isinstance(b, Det)):
            it.settled(f)
    if isinstance(a, Det) and isinstance(b, Det):
        out: Any = products.numbers(it, a, b, len(kept))
    elif isinstance(a, Mat) and isinstance(b, Mat):
        out = _matrices(it, a, b, len(kept))
    elif any(isinstance(f, Mat) for f in (a, b)) and any(isinstance(f, Det) for f in (a, b)):
        mat, coef = (a, b) if isinstance(a, Mat) else (b, a)
        out = it.scale(coef, mat)
    else:
        out = as_number(products.contraction(it, a, b, len(kept)))
    return products.spread(out, kept, full)


def _summed(it: Interpreter, x: Any, axes: Sequence[int]) -> Any:
    """One factor, summed over axes that no other varies along."""
    full = len(x.shape)
    kept = [a for a in range(full) if a not in axes]
    if not isinstance(x, Mat):
        return products.spread(reductions.reduce_sum(it, x, axes=axes), kept, full)
    sizes = tuple(s if i in axes else 1 for i, s in enumerate(x.shape))
    wide = [i for i in axes if is_wide(sizes[i])]
    ones = Det(np.ones(linear.numeric(sizes), it.eqn.outputs[0].dtype), ZERO_POWER, sizes)
    first = [a for a in axes if a != wide[-1]] if len(wide) > 1 else []
    now = [a for a in axes if a not in first]
    ones = replace(ones, val=ones.val, shape=tuple(1 if i in first else s for i, s in enumerate(sizes)))
    out = _pair(it, x, elementwise.to_ket(it.graph, ones), now)
    return _summed(it, out, first) if first else out


def _times(it: Interpreter, number: Det, x: Any) -> Any:
    if isinstance(x, Det):
        val = evaluated(lambda v, c: v * c.astype(v.dtype), x.val, number.val)
        return replace(x, val=val, power=x.power + number.power)
    return it.scale(number, x)


def _matrices(it: Interpreter, a: Mat, b: Mat, outer: int) -> Det:
    """The sum over a width of the products of the entries of two parameters: n times a variance, or zero."""
    power, factor = a.power + b.power, 1.0
    orders = Fraction(0)
    lengths = []
    for axis in a.layout[outer:]:
        for atom in axis:
            if isinstance(atom, Wide):
                orders, factor = orders + order(atom.size), factor * float(affine(atom.size)[0])
        lengths.append(int(np.prod([atom.size for atom in axis if isinstance(atom, Ax)], initial=1)))
    shape = tuple(s if s != 1 else t for s, t in zip(a.shape, b.shape, strict=True))
    dtype = it.eqn.outputs[0].dtype
    if a.leaf is not b.leaf:
        zeros = np.zeros(linear.numeric(shape[:outer]), dtype)
        noise = power + orders / 2
        return Det(zeros, power + orders, shape[:outer], zero=True, noise=noise, line=it.eqn)
    ia, ib = dict(a.indices), dict(b.indices)
    same = a.layout == b.layout and a.rows == b.rows and ia.keys() == ib.keys() and all(
        ia[k] is ib[k] or (isinstance(ia[k], np.ndarray) and np.array_equal(ia[k], ib[k])) for k in ia
    )  # fmt: skip
    if not same or a.mean is not None:
        raise UnsupportedError(
            f"entries of the parameter '{a.leaf.name}' are multiplied with others of its own and summed "
            + ("though they have a mean" if same else "(W and its transpose, or two parts of it)")
            + ": sums of squares are taken (the norm of weights), of parameters of mean zero"
        )
    if a.leaf.zero_var:
        return Det(np.zeros(linear.numeric(shape[:outer]), dtype), power + orders, shape[:outer], zero=True)
    coef = np.ones((1,) * a.axes, dtype)
    for c in (a.coef, b.coef):
        coef = coef if c is None else evaluated(lambda u, v: u * v, coef, c)
    val = spelled_out(coef, a.layout)
    if val is None:
        raise UnsupportedError("the norm of a parameter that is scaled differently in the blocks of its width is taken")
    total = jnp.sum(val, tuple(range(outer, len(shape))), dtype=dtype)
    missing = [n for n, m in zip(lengths, np.shape(val)[outer:], strict=True) if m == 1]
    total = total * (a.leaf.var * factor * float(np.prod(missing, initial=1)))
    return Det(jnp.broadcast_to(total, linear.numeric(shape[:outer])), power + orders, shape[:outer])
