r"""Where functions of one variable have kinks and jumps, found from their values.

A comparison, a maximum or an absolute value adds to the kinks of its operands the roots of their difference d. Between
the kinks of d itself, d is a polynomial of known degree or it is not:

- of degree at most two, its roots follow from three values on each interval, up to rounding and for any coefficients,
  traced ones included;
- otherwise changes of sign are looked for on a grid that is fine near zero and reaches far, and are bisected.

Functions are given as f(u, *coefs) that broadcasts. Kinks are numbers where they are known, and arrays otherwise.

>>> import jax.numpy as jnp
>>> relu = lambda u: jnp.maximum(u + 1, 0)
>>> second, = roots(lambda u: 2 - relu(u), (), (-1.0,), 1)    # of min(max(u + 1, 0), 2)
>>> round(second, 5)
1.0
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from anywidth import _compat

__all__ = ["TooMany", "continuous", "roots", "union"]

Function = Callable[..., Any]
MOST = 24  # roots of one function whose coefficients are known
SEVERAL = 6  # and of one whose coefficients are not
FAR = 1e4  # beyond, nothing is looked for


class TooMany(Exception):
    """A function with more changes of sign than are told apart."""


def _number(x: Any) -> bool:
    return not _compat.is_tracer(x) and np.size(x) == 1


def _with(f: Function, coefs: Sequence[Any]) -> Function:
    """f of the variable alone, its coefficients being numbers."""
    numbers = [float(np.reshape(c, ())) for c in coefs]
    return lambda u: f(u, *(jnp.asarray(x, u.dtype) for x in numbers))


def union(*groups: Iterable[Any]) -> tuple[Any, ...]:
    """All kinks once."""
    out: list[Any] = []
    for x in (x for group in groups for x in group):
        x = float(np.reshape(x, ())) if _number(x) else x
        if isinstance(x, float):
            same = any(isinstance(y, float) and abs(x - y) <= 1e-12 * max(1.0, abs(x)) for y in out)
        else:
            same = any(x is y for y in out)
        if not same:
            out.append(x)
    return tuple(out)


def roots(f: Function, coefs: Sequence[Any], breaks: Sequence[Any], degree: int | None) -> tuple[Any, ...]:
    """The roots of f, of which `breaks` are the kinks and jumps and between them it has a degree (None: any function).

    Kinks at which f vanishes need not be among them.

    Raises: TooMany, for more than can be told apart.
    """
    if degree == 0:
        return ()
    if all(_number(x) for x in (*coefs, *breaks)):
        known = sorted(union(breaks))
        values = lambda u: _values(_with(f, coefs), u)
        found = _scanned(values) if degree is None or degree > 2 else _by_values(np, values, known)
        return tuple(x for x in union(known, found) if x not in known)
    coefs = [lax.stop_gradient(jnp.asarray(c)) for c in coefs]
    breaks = [lax.stop_gradient(jnp.asarray(b)) for b in breaks]
    shape = np.broadcast_shapes(*(x.shape for x in (*coefs, *breaks)))
    dtype = jnp.result_type(float, *coefs, *breaks)
    values = lambda u: f(u, *coefs)
    if degree is None or degree > 2:
        return tuple(_scanned_array(values, shape, dtype))
    knots: Any = jnp.sort(jnp.stack([jnp.broadcast_to(b, shape).astype(dtype) for b in breaks]), 0) if breaks else []
    return tuple(_by_values(jnp, values, knots, shape, dtype))


def _values(f: Function, u: Any) -> Any:
    """f at numbers, in the highest precision there is; padded, as every length is compiled for itself."""
    u = np.asarray(u, float)
    size = max(16, 1 << (len(u) - 1).bit_length())
    with jax.ensure_compile_time_eval():
        out = f(jnp.asarray(np.pad(u, (0, size - len(u)), mode="edge"), jnp.result_type(float)))
    return np.broadcast_to(np.asarray(out, float), (size,))[: len(u)]


def _by_values(xp: Any, values: Function, knots: Any, shape: tuple[int, ...] = (), dtype: Any = float) -> list[Any]:
    """Roots of what has degree two at most between the knots (k, *shape), from three values on each interval."""
    count = len(knots)
    if count:
        knots = xp.asarray(knots)
        first, last = knots[:1], knots[-1:]
        low, high = xp.concatenate([first, knots]), xp.concatenate([knots, last])
        a = xp.concatenate([first - 1 - abs(first), knots])
        b = xp.concatenate([knots, last + 1 + abs(last)])
    else:
        a, b = xp.full((1, *shape), -1.0, dtype), xp.full((1, *shape), 1.0, dtype)
        low = high = a
    inf = xp.full((1, *shape), np.inf, dtype)
    low, high = xp.concatenate([-inf, low[1:]]), xp.concatenate([high[:-1], inf])
    middle, half = (a + b) / 2, (b - a) / 3  # not as far as the ends, where jumps are
    points = xp.concatenate([middle - half, middle, middle + half])
    fa, fm, fb = xp.split(xp.broadcast_to(values(points), points.shape), 3)
    # f = A s^2 + B s + C in s = (u - middle) / half
    A, B, C = (fa + fb) / 2 - fm, (fb - fa) / 2, fm
    size = abs(A) + abs(B) + abs(C)
    eps = np.finfo(np.dtype(dtype)).eps if xp is jnp else np.finfo(np.dtype(jnp.result_type(float))).eps
    A = xp.where(abs(A) <= 64 * eps * size, 0, A)
    disc = B * B - 4 * A * C
    real = disc >= -64 * eps * (B * B + abs(4 * A * C))
    top = -(B + xp.where(B < 0, -1, 1) * xp.sqrt(xp.maximum(disc, 0))) / 2
    quotient = lambda p, q: xp.where(q != 0, p / xp.where(q != 0, q, 1), np.inf)
    double = (top == 0) & (A != 0)
    found = [xp.where(double, 0, quotient(C, top)), quotient(top, A)]
    out: list[Any] = []
    for s in found:
        u = middle + half * s
        inside = real & (u > low) & (u < high) & (abs(u) < FAR**2)
        if xp is np:
            out += [float(x) for x in u[inside]]
        else:
            out += list(xp.where(inside, u, xp.clip(xp.zeros_like(u), low, high)))
    return out


def _grid(n: int) -> Any:
    """Points on [-FAR, FAR], a hundred-thousandth apart at zero."""
    s = np.linspace(-1, 1, n)
    end = np.arcsinh(FAR * 1e3)
    return 1e-3 * np.sinh(s * end) * (1 + 1e-9) + 1.7e-6  # on no round number


def _scanned(values: Function) -> list[float]:
    u = _grid(4001)
    sign = np.sign(np.nan_to_num(values(u)))
    at = np.flatnonzero(sign[1:] != sign[:-1])
    if len(at) > MOST:
        raise TooMany
    if not len(at):
        return []
    low, high, left = u[at], u[at + 1], sign[at]
    for _ in range(70):
        middle = (low + high) / 2
        same = np.sign(np.nan_to_num(values(middle))) == left
        low, high = np.where(same, middle, low), np.where(same, high, middle)
    return [float(x) for x in (low + high) / 2]


def _scanned_array(values: Function, shape: tuple[int, ...], dtype: Any) -> list[Any]:
    n = 2001
    u = jnp.asarray(_grid(n), dtype).reshape((n, *(1,) * len(shape)))
    of = lambda u: jnp.sign(jnp.nan_to_num(jnp.broadcast_to(values(u), (u.shape[0], *shape))))
    sign = of(jnp.broadcast_to(u, (n, *shape)))
    index = jnp.arange(n - 1).reshape((n - 1, *(1,) * len(shape)))
    at = jnp.sort(jnp.where(sign[1:] != sign[:-1], index, n), 0)[:SEVERAL]
    found = at < n
    at = jnp.where(found, at, 0)
    low, high = u.ravel()[at], u.ravel()[at + 1]
    left = jnp.take_along_axis(sign, at, 0)

    def halved(_: Any, ends: tuple[Any, Any]) -> tuple[Any, Any]:
        low, high = ends
        middle = (low + high) / 2
        same = of(middle) == left
        return jnp.where(same, middle, low), jnp.where(same, high, middle)

    low, high = lax.fori_loop(0, 70, halved, (low, high))
    return list(jnp.where(found, (low + high) / 2, 0))


def continuous(f: Function, coefs: Sequence[Any], breaks: Sequence[Any]) -> bool:
    """Whether f, which may jump at the breaks only, is seen to jump at none of them. False where that is not known."""
    if not all(_number(x) for x in (*coefs, *breaks)):
        return False
    b = np.asarray(union(breaks))
    if not len(b):
        return True
    eps = float(np.finfo(np.dtype(jnp.result_type(float))).eps)
    step = eps**0.4 * (1 + abs(b))
    near = [_values(_with(f, coefs), b + sign * h) for h in (step, step / 16) for sign in (1, -1)]
    if not all(np.isfinite(x).all() for x in near):
        return False
    wide, narrow = abs(near[0] - near[1]), abs(near[2] - near[3])
    scale = np.max([abs(x) for x in near], 0)
    return bool(np.all((narrow <= wide / 2) | (narrow <= 256 * eps * (scale + 1))))
