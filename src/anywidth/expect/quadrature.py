r"""Expectations by adaptive quadrature, of any function of each of two Gaussians.

Let (u, v) be centred Gaussian with Var u = q1, Var v = q2, Cov(u, v) = c. Write u = s1 z and, given u,
v = (c / s1) z + s y with s^2 = det / q1, and z, y standard normal and independent. As the correlation goes to
+-1, s goes to 0 and the double integral becomes the single one of f(u) g(+-u s2/s1) without further ado. Two rules:

- *trapezoid*, in z and in y. For functions that are smooth on the scale of the Gaussian it converges
  exponentially (every doubling of the points squares the error) and 24 or 48 points an axis are enough;
- *panels*: [-L, L] is cut where f or g has a kink or a jump, where that of g is felt by u, and at u = 0 and
  v = 0, where activations vary on a scale of one even if the Gaussian is a thousand wide. Each panel has the
  tanh-sinh rule.

The points are tables (`nodes.py`).

Points are doubled until two estimates agree, in a `while_loop` whose body is compiled once. Derivatives do
not go through it. They are expectations again, by Price's theorem (1958): d/dc E[f g] = E[f' g']; a value and its
derivatives share one quadrature.

>>> import jax, jax.numpy as jnp
>>> one, half = jnp.float32(1.0), jnp.float32(0.5)
>>> print(f"{pair(jnp.tanh, (), jnp.tanh, (), one, one, half):.4f}, {mean(jnp.square, (), 3 * one):.4f}")
0.1863, 3.0000
"""

import math
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from anywidth.expect.nodes import PANELS, TRAPEZOID, counts, knots_of, normal_table, on_panels, rows
from anywidth.expect.numerics import gram_det, is_zero, safe_recip, safe_rsqrt, safe_sqrt

_CHUNK = 12  # inner points evaluated at once; every number of points is a multiple of it
_SIZED = 48  # points per panel that tell the size of a function


def _tolerance(rtol, dtype):
    return rtol if rtol is not None else 1e-6 if dtype == jnp.float32 else 1e-9


def _as_standard(points, scale):
    """Locations as multiples of a standard deviation that may be zero (then: out of the way)."""
    away = jnp.where(scale > 0, scale, jnp.inf)
    return [p / away for p in points]


def _stack(functions, u, coefs):
    """Several functions of u, along an axis behind that of the points."""
    return jnp.stack([f(u, *coefs) for f in functions], axis=1)


def _weighted(w, values):
    return (w[:, None] * values).sum(0)


def _merge(x):
    """The points of all panels along one axis."""
    return x.reshape(-1, *x.shape[2:])


def _broken(fs, coefs, q, breaks):
    """n -> E[f(u)] of each of the functions, by panels of n points between their breaks."""
    s = safe_sqrt(q)
    knots = knots_of(_as_standard([jnp.zeros_like(q), *breaks], s), q.shape, q.dtype)

    def estimate(n):
        def chunk(i, total):
            z, w = on_panels(knots[:-1], knots[1:], n - PANELS[0] + i * _CHUNK, _CHUNK)
            return total + _weighted(_merge(w), _stack(fs, s * _merge(z), coefs))

        return lax.fori_loop(0, n // _CHUNK, chunk, jnp.zeros((len(fs), *q.shape), q.dtype))

    return estimate


def _size(sides):
    """E[f(u)] of functions f >= 0 to some digits, and whether the trapezoid rule sees them at all; or None.

    Between two of its points a bump under a wide Gaussian would go unnoticed, however often they are doubled.
    `sides` are functions, coefficients, variances and breaks.
    """
    smooth = [side for side in sides if not side[3]]
    found = {id(side): (_broken(*side)(_SIZED), None) for side in sides if side[3]}
    if smooth:
        table = normal_table(np.dtype(smooth[0][2].dtype))
        trapezoid, panels = TRAPEZOID[1], 2 * _SIZED
        starts = trapezoid - TRAPEZOID[0], 2 * trapezoid - TRAPEZOID[0] + 2 * (_SIZED - PANELS[0])
        assert trapezoid == panels

        def chunk(i, totals):
            out = []
            for (fs, coefs, q, _), total in zip(smooth, totals, strict=True):
                parts = [rows(table, start + i * _CHUNK, _CHUNK, q.ndim + 1) for start in starts]
                (z, w), (y, v) = parts
                values = _stack(fs, safe_sqrt(q) * jnp.concatenate([z, y]), coefs)
                out.append((total[0] + _weighted(w, values[:_CHUNK]), total[1] + _weighted(v, values[_CHUNK:])))
            return out

        none = [(jnp.zeros((len(fs), *q.shape), q.dtype),) * 2 for fs, _, q, _ in smooth]
        for side, (seen, whole) in zip(smooth, lax.fori_loop(0, panels // _CHUNK, chunk, none), strict=True):
            found[id(side)] = whole, jnp.all(jnp.abs(seen - whole) <= 1e-2 * whole)  # type: ignore[assignment]
    return [found[id(side)] for side in sides]


def _double(fs, f_coefs, gs, g_coefs, q1, q2, c, f_breaks, g_breaks, panels):
    """n -> E[f(u) g(v)] of each pair of functions with n points an axis and panel."""
    shape, dtype = q1.shape, np.dtype(q1.dtype)
    s1 = safe_sqrt(q1)
    slope = c * safe_rsqrt(q1)
    inverse = safe_recip(q1)
    s = safe_sqrt(jnp.where(inverse > 0, gram_det(q1, q2, c) * inverse, q2))
    none = jnp.zeros((len(fs), *shape), dtype)
    table = normal_table(dtype)
    knots = None
    if panels:
        zero = jnp.zeros_like(q1)
        felt = [jnp.sign(slope) * p for p in _as_standard(g_breaks, jnp.abs(slope))]
        knots = knots_of(_as_standard([zero, *f_breaks], s1) + felt, shape, dtype)
    pieces = 1 if knots is None else knots.shape[0] - 1

    def estimate(n):
        def outer(i, total):
            if knots is None:
                z, w = rows(table, n - TRAPEZOID[0] + i, 1, len(shape) + 1)
            else:
                low, high = lax.dynamic_slice_in_dim(knots, i % pieces, 2, allow_negative_indices=False)
                z, w = on_panels(low, high, n - PANELS[0] + i // pieces, 1)
            z, w = z[0], w[0]
            centre = slope * z
            if panels:
                ends = knots_of(_as_standard([p - centre for p in (zero, *g_breaks)], s), shape, dtype)

            def chunk(i, total):
                if panels:
                    y, wy = map(_merge, on_panels(ends[:-1], ends[1:], n - PANELS[0] + i * _CHUNK, _CHUNK))
                else:
                    y, wy = rows(table, n - TRAPEZOID[0] + i * _CHUNK, _CHUNK, len(shape) + 1)
                return total + _weighted(wy, _stack(gs, centre + s * y, g_coefs))

            given = lax.fori_loop(0, n // _CHUNK, chunk, none)
            return total + w * _stack(fs, (s1 * z)[None], f_coefs)[0] * given

        return lax.fori_loop(0, n * pieces, outer, none)

    return estimate


def _refine(estimate, state, rule, scale, tol, trust):
    """Doubles the points of a rule until two estimates agree; ``state`` is (value, whether it is good).

    Does nothing if the state is good already, or if the rule is not to be trusted. Both rules about square
    their error when the points are doubled, so the last estimate is good to ``tol`` when it moved by less
    than the square root of that (a third of it, for safety). One loop, in which n changes: XLA would hoist
    an estimate at a fixed n out of a loop that never runs.
    """
    first, last = rule

    def step(state):
        n, old, _ = state
        new = estimate(n)
        return 2 * n, new, (n > first) & _agree(new, old, scale, tol)

    start = jnp.where(trust, first, 2 * last)
    return lax.while_loop(lambda s: ~s[2] & (s[0] <= last), step, (start, *state))[1:]


def _agree(new, old, scale, tol):
    return jnp.all(jnp.abs(new - old) <= math.sqrt(tol) / 3 * scale)


def _smooth(fs, tol, coefs, q, scale, trust):
    """E[f(u)] of functions without breaks: both rules as those of `_refine`, in one loop, as they are one table."""
    s, table = safe_sqrt(q), normal_table(np.dtype(q.dtype))
    sizes = np.array(counts(TRAPEZOID) + [2 * n for n in counts(PANELS)])
    starts = np.cumsum(sizes) - sizes
    first = len(counts(TRAPEZOID))
    none = jnp.zeros((len(fs), *q.shape), q.dtype)

    def step(state):
        k, old, _ = state
        at = lambda x: rows((x,), k, 1, 1)[0][0]

        def chunk(i, total):
            z, w = rows(table, at(starts) + i * _CHUNK, _CHUNK, q.ndim + 1)
            return total + _weighted(w, _stack(fs, s * z, coefs))

        new = lax.fori_loop(0, at(sizes // _CHUNK), chunk, none)
        return k + 1, new, (k != 0) & (k != first) & _agree(new, old, scale, tol)

    start = jnp.where(trust, 0, first), none, jnp.asarray(False)
    return lax.while_loop(lambda s: ~s[2] & (s[0] < len(sizes)), step, start)[1]


@lru_cache(1024)
def _slope(f):
    """f' in u."""
    return lambda u, *coefs: jax.jvp(lambda x: f(x, *coefs), (u,), (jnp.ones_like(u),))[1]


@lru_cache(1024)
def _slope_coef(f, i):
    """The derivative of f in its coefficient number i."""

    def slope(u, *coefs):
        wide = lambda a: f(u, *coefs[:i], a, *coefs[i + 1 :])
        a = jnp.broadcast_to(coefs[i], u.shape)
        return jax.jvp(wide, (a,), (jnp.ones_like(a),))[1]

    return slope


@lru_cache(1024)
def _times_u(f):
    return lambda u, *coefs: u * f(u, *coefs)


def derived(f, power, order):
    """The derivative of some order of u^power f(u)."""
    for _ in range(power):
        f = _times_u(f)
    for _ in range(order):
        f = _slope(f)
    return f


@lru_cache(1024)
def _square(f):
    return lambda u, *coefs: f(u, *coefs) ** 2


@lru_cache(1024)
def _absolute(f):
    return lambda u, *coefs: jnp.abs(f(u, *coefs))


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _means(fs, tol, coefs, q, breaks):
    """E[f(u)] of each of the functions, along a leading axis."""
    return _mean_integrated(fs, tol, coefs, q, breaks)


@partial(jax.jit, static_argnums=(0, 1))  # traced once for the same functions and shapes
def _mean_integrated(fs, tol, coefs, q, breaks):
    ((scale, trust),) = _size([([_absolute(f) for f in fs], coefs, q, breaks)])
    if trust is not None:
        return _smooth(fs, tol, coefs, q, scale, trust)
    state = jnp.zeros_like(scale), jnp.asarray(False)
    return _refine(_broken(fs, coefs, q, breaks), state, PANELS, scale, tol, True)[0]


class _Wanted:
    """The expectations that a rule asks for: all of them go through one quadrature, the first `fs` in front."""

    def __init__(self, first):
        self.keys = list(first)

    def __call__(self, key):
        if key not in self.keys:
            self.keys.append(key)
        return self.keys.index(key)


def _with_slopes(compute, first, terms):
    """The values of the keys `first`, and their derivative: a list of (one linear form a key, tangent), as in

    form = [(factor, key), ...], of which the values of the keys are computed together with the first.
    """
    wanted = _Wanted(first)
    index = [[[(factor, wanted(key)) for factor, key in form] for form in forms] for forms, _ in terms]
    values = compute(tuple(wanted.keys))
    out = values[: len(first)]
    slope = jnp.zeros_like(out)
    for forms, (_, tangent) in zip(index, terms, strict=True):
        combined = [sum(factor * values[i] for factor, i in form) for form in forms]
        slope = slope + jnp.stack(combined) * tangent
    return out, slope


@partial(_means.defjvp, symbolic_zeros=True)
def _(fs, tol, primals, tangents):
    _, q, breaks = primals
    d_coefs, dq, _ = tangents
    # d/dq E[f] = E[f''] / 2, or E[u f'] / (2 q) where f' has jumps.
    half = safe_recip(q) / 2 if breaks else 0.5
    terms = []
    if not is_zero(dq):
        terms.append(([[(half, _times_u(_slope(f)) if breaks else _slope(_slope(f)))] for f in fs], dq))
    terms += [([[(1, _slope_coef(f, i))] for f in fs], d) for i, d in enumerate(d_coefs) if not is_zero(d)]
    return _with_slopes(lambda keys: _means(keys, tol, *primals), fs, terms)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _slopes(fs, tol, coefs, q, breaks):
    """E[f'(u)] of each of the continuous functions."""
    return _means(tuple(map(_slope, fs)), tol, coefs, q, breaks)


@partial(_slopes.defjvp, symbolic_zeros=True)
def _(fs, tol, primals, tangents):
    coefs, q, breaks = primals
    d_coefs, dq, _ = tangents
    keys = list(map(_slope, fs))
    compute = lambda keys: _means(keys, tol, *primals)
    if not breaks:
        return jax.jvp(
            lambda q, *coefs: _means(tuple(keys), tol, coefs, q, breaks), *_instantiated((q, *coefs), (dq, *d_coefs))
        )
    # f' has jumps: what is differentiated is E[u f] / q
    r = safe_recip(q)
    terms = []
    if not is_zero(dq):
        terms.append(([[(r * r / 2, derived(k, 2, 0)), (-r / 2, k)] for k in keys], dq))
    terms += [([[(r, _times_u(_slope_coef(f, i)))] for f in fs], d) for i, d in enumerate(d_coefs) if not is_zero(d)]
    return _with_slopes(compute, keys, terms)


def _instantiated(primals, tangents):
    return primals, tuple(jnp.zeros_like(p) if is_zero(t) else t for p, t in zip(primals, tangents, strict=True))


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _pairs(fgs, tol, f_coefs, g_coefs, q1, q2, c, f_breaks, g_breaks):
    """E[f(u) g(v)] of each of the pairs (f, g) of functions, along a leading axis."""
    return _integrated(fgs, tol, f_coefs, g_coefs, q1, q2, c, f_breaks, g_breaks)


@partial(jax.jit, static_argnums=(0, 1))
def _integrated(fgs, tol, f_coefs, g_coefs, q1, q2, c, f_breaks, g_breaks):
    fs, gs = zip(*fgs, strict=True)
    (f2, trust_f), (g2, trust_g) = _size(
        [([_square(f) for f in fs], f_coefs, q1, f_breaks), ([_square(g) for g in gs], g_coefs, q2, g_breaks)]
    )
    scale = jnp.sqrt(f2) * jnp.sqrt(g2)
    double = partial(_double, fs, f_coefs, gs, g_coefs, q1, q2, c, f_breaks, g_breaks)
    state = jnp.zeros_like(scale), jnp.asarray(False)
    if trust_f is not None and trust_g is not None:
        state = _refine(double(False), state, TRAPEZOID, scale, tol, trust_f & trust_g)
    return _refine(double(True), state, PANELS, scale, tol, True)[0]


@partial(_pairs.defjvp, symbolic_zeros=True)
def _(fgs, tol, primals, tangents):
    _, _, q1, q2, c, f_breaks, g_breaks = primals
    d_f, d_g, d1, d2, dc, _, _ = tangents
    # By Price's theorem d/dc E[f g] = E[f' g'] and d/dq1 E[f g] = E[f'' g] / 2, or where f' has jumps
    # (E[u f' g] - c E[f' g']) / (2 q1).
    terms = []
    if not is_zero(dc):
        terms.append(([[(1, (_slope(f), _slope(g)))] for f, g in fgs], dc))
    for d, q, breaks, order in ((d1, q1, f_breaks, 1), (d2, q2, g_breaks, -1)):
        if is_zero(d):
            continue
        half = safe_recip(q) / 2 if breaks else 0.5
        forms = []
        for f, g in (fg[::order] for fg in fgs):
            if breaks:
                forms.append([(half, (_times_u(_slope(f)), g)[::order]), (-half * c, (_slope(f), _slope(g))[::order])])
            else:
                forms.append([(half, (_slope(_slope(f)), g)[::order])])
        terms.append((forms, d))
    terms += [([[(1, (_slope_coef(f, i), g))] for f, g in fgs], d) for i, d in enumerate(d_f) if not is_zero(d)]
    terms += [([[(1, (f, _slope_coef(g, i)))] for f, g in fgs], d) for i, d in enumerate(d_g) if not is_zero(d)]
    return _with_slopes(lambda keys: _pairs(keys, tol, *primals), fgs, terms)


def _align(arrays, groups):
    """Everything in one dtype (float32 for half precision) and shape: arrays, groups of arrays, dtype given."""
    arrays, groups = [jnp.asarray(x) for x in arrays], [tuple(map(jnp.asarray, g)) for g in groups]
    given = jnp.result_type(*arrays)
    dtype = given if given in (jnp.float32, jnp.float64) else jnp.dtype(jnp.float32)
    shape = jnp.broadcast_shapes(*(x.shape for x in arrays), *(x.shape for g in groups for x in g))
    spread = lambda x: jnp.broadcast_to(x.astype(dtype), shape)
    return [spread(x) for x in arrays], [tuple(map(spread, g)) for g in groups], given


def mean(f, coefs, q, breaks=(), rtol=None):
    """E[f(u, *coefs)] for u ~ N(0, q), elementwise over q and the coefs (arrays that broadcast with q).

    ``f`` is called with u of shape (N, *shape) and coefs of the full shape. ``breaks`` are the locations,
    numbers or arrays, where f has a kink. Differentiable in q and coefs (see `pair`).
    """
    (q,), (coefs, breaks), given = _align((q,), (coefs, breaks))
    return _means((f,), _tolerance(rtol, q.dtype), coefs, q, breaks)[0].astype(given)


def line(f, coefs, q, c, breaks=(), rtol=None):
    """E[u f(v, *coefs)] = c E[f'(v, *coefs)] of a continuous function: v has variance q, and c is Cov(u, v).

    As `pair` with the identity, but a single integral.
    """
    (q, c), (coefs, breaks), given = _align((q, c), (coefs, breaks))
    return (c * _slopes((f,), _tolerance(rtol, q.dtype), coefs, q, breaks)[0]).astype(given)


def pair(f, f_coefs, g, g_coefs, q1, q2, c, f_breaks=(), g_breaks=(), rtol=None):
    """E[f(u, *f_coefs) g(v, *g_coefs)] for centred Gaussians with Var u = q1, Var v = q2, Cov = c, elementwise.

    All arrays broadcast together; f and g are called with u of shape (N, *shape), coefs of the full shape.
    ``breaks`` are the locations, numbers or arrays, where the function has a kink or a jump. ``rtol`` is
    relative to sqrt(E[f^2] E[g^2]): 1e-9 in float64 and 1e-6 in float32 unless told.

    Differentiable by Price's theorem, forward and backward: exactly for functions whose kinks are given in
    ``breaks``. A jump's own contribution to a derivative (a density on a line) is not included.
    """
    return pairs([(f, g)], f_coefs, g_coefs, q1, q2, c, f_breaks, g_breaks, rtol)[0]


def pairs(fgs, f_coefs, g_coefs, q1, q2, c, f_breaks=(), g_breaks=(), rtol=None):
    """As `pair`, of several pairs (f, g) of functions with the same coefficients and breaks: one quadrature."""
    (q1, q2, c), groups, given = _align((q1, q2, c), (f_coefs, g_coefs, f_breaks, g_breaks))
    f_coefs, g_coefs, f_breaks, g_breaks = groups
    tol = _tolerance(rtol, q1.dtype)
    return _pairs(tuple(map(tuple, fgs)), tol, f_coefs, g_coefs, q1, q2, c, f_breaks, g_breaks).astype(given)
