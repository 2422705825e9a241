r"""Expectations by adaptive quadrature, of any function of each of two Gaussians.

Let (u, v) be centred Gaussian with Var u = q1, Var v = q2, Cov(u, v) = c. Write u = s1 z and, given u,
v = (c / s1) z + s y with s^2 = det / q1, and z, y standard normal and independent. As the correlation goes to
+-1, s goes to 0 and the double integral becomes the single one of f(u) g(+-u s2/s1) without further ado. Two rules:

- *trapezoid*, in z and in y. For functions that are smooth on the scale of the Gaussian it converges
  exponentially (every doubling of the points squares the error) and 24 or 48 points an axis are enough;
- *panels*: [-L, L] is cut where f or g has a kink or a jump, where that of g is felt by u, and at u = 0 and
  v = 0, where activations vary on a scale of one even if the Gaussian is a thousand wide. Each panel has the
  tanh-sinh rule (Takahasi & Mori 1974), whose points crowd the ends of the panel and resolve there every scale.

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
from jax import lax

from anywidth.expect.numerics import gram_det, is_zero, safe_recip, safe_rsqrt, safe_sqrt

_CHUNK = 12  # inner points evaluated at once; every number of points is a multiple of it
_TRAPEZOID, _PANELS = (24, 96), (24, 384)  # points per axis or panel: first try and last


def _reach(dtype):
    """Where a Gaussian is cut, in standard deviations, and the range of t in the tanh-sinh rule."""
    return (6.5, 2.6) if dtype == jnp.float32 else (8.5, 3.1)


def _tolerance(rtol, dtype):
    return rtol if rtol is not None else 1e-6 if dtype == jnp.float32 else 1e-9


def _density(z):
    return jnp.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def _knots(points, shape, dtype):
    """The ends of the panels, sorted along a leading axis: -L, L and the points between them."""
    reach = _reach(dtype)[0]
    ends = [jnp.full(shape, x, dtype) for x in (-reach, reach)]
    return jnp.sort(jnp.stack(ends + [jnp.clip(p, -reach, reach) for p in points]), axis=0)


def _nodes(knots, j, n):
    """Points and weights number j of n: arrays (len(j), panels, *shape), the weights with the normal density.

    ``knots`` None is the trapezoid rule on all of [-L, L], its arrays of shape (len(j), 1).
    """
    reach, span = _reach(n.dtype)
    step = 2 / n
    t = (j.astype(n.dtype) + 0.5) * step - 1
    if knots is None:
        z = (t * reach)[:, None]
        return z, reach * step * _density(z)
    t = t * span
    left = jax.nn.sigmoid(math.pi * jnp.sinh(t))  # in (0, 1); 1 - left without cancellation is the mirror image
    right = jax.nn.sigmoid(-math.pi * jnp.sinh(t))
    rate = span * step * math.pi * jnp.cosh(t) * left * right
    expand = lambda x: x.reshape(x.shape + (1,) * knots.ndim)
    low, width = knots[:-1], knots[1:] - knots[:-1]
    # From the nearer end, so that a kink is approached from one side only.
    z = jnp.where(expand(t) < 0, low + expand(left) * width, knots[1:] - expand(right) * width)
    return z, expand(rate) * width * _density(z)


def _as_standard(points, scale):
    """Locations as multiples of a standard deviation that may be zero (then: out of the way)."""
    return [p / jnp.where(scale > 0, scale, jnp.inf) for p in points]


def _flat(x, shape):
    return jnp.broadcast_to(x.reshape(x.shape[:2] + (x.shape[2:] or (1,) * len(shape))), x.shape[:2] + shape).reshape(
        (-1, *shape)
    )


def _stack(functions, u, coefs):
    """Several functions of u, along an axis behind that of the points."""
    return jnp.stack([f(u, *coefs) for f in functions], axis=1)


def _single(fs, coefs, q, breaks, panels, n):
    """E[f(u)] of each of the functions with n points (a traced float)."""
    s = safe_sqrt(q)
    knots = _knots(_as_standard([jnp.zeros_like(q), *breaks], s), q.shape, q.dtype) if panels else None

    def chunk(i, total):
        z, w = _nodes(knots, i * _CHUNK + jnp.arange(_CHUNK), n)
        z, w = _flat(z, q.shape), _flat(w, q.shape)
        return total + (w[:, None] * _stack(fs, s * z, coefs)).sum(0)

    return lax.fori_loop(0, n.astype(int) // _CHUNK, chunk, jnp.zeros((len(fs), *q.shape), q.dtype))


def _double(fs, f_coefs, gs, g_coefs, q1, q2, c, f_breaks, g_breaks, panels, n):
    """E[f(u) g(v)] of each pair of functions with n points an axis and panel (a traced float)."""
    shape, count = q1.shape, n.astype(int)
    s1 = safe_sqrt(q1)
    slope = c * safe_rsqrt(q1)
    inverse = safe_recip(q1)
    s = safe_sqrt(jnp.where(inverse > 0, gram_det(q1, q2, c) * inverse, q2))
    zero = jnp.zeros_like(q1)
    none = jnp.zeros((len(fs), *shape), q1.dtype)
    knots = None
    if panels:
        felt = [jnp.sign(slope) * p for p in _as_standard(g_breaks, jnp.abs(slope))]
        knots = _knots(_as_standard([zero, *f_breaks], s1) + felt, shape, q1.dtype)
    pieces = 1 if knots is None else knots.shape[0] - 1

    def outer(i, total):
        z, w = (jnp.broadcast_to(x[0, i % pieces], shape) for x in _nodes(knots, (i // pieces)[None], n))
        centre = slope * z
        inner_knots = (
            _knots(_as_standard([p - centre for p in (zero, *g_breaks)], s), shape, q1.dtype) if panels else None
        )

        def chunk(i, total):
            y, wy = _nodes(inner_knots, i * _CHUNK + jnp.arange(_CHUNK), n)
            y, wy = _flat(y, shape), _flat(wy, shape)
            return total + (wy[:, None] * _stack(gs, centre + s * y, g_coefs)).sum(0)

        given = lax.fori_loop(0, count // _CHUNK, chunk, none)
        return total + w * _stack(fs, (s1 * z)[None], f_coefs)[0] * given

    return lax.fori_loop(0, count * pieces, outer, none)


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
        return 2 * n, new, (n > first) & jnp.all(jnp.abs(new - old) <= math.sqrt(tol) / 3 * scale)

    start = jnp.where(trust, jnp.asarray(first, scale.dtype), 2 * last)
    return lax.while_loop(lambda s: ~s[2] & (s[0] <= last), step, (start, *state))[1:]


def _adapt(estimate, scale, trust, tol):
    """The trapezoid rule where ``trust`` (None: never, and it is not compiled), then panels unless that was good."""
    state = jnp.zeros_like(scale), jnp.asarray(False)
    if trust is not None:
        state = _refine(partial(estimate, False), state, _TRAPEZOID, scale, tol, trust)
    return _refine(partial(estimate, True), state, _PANELS, scale, tol, jnp.asarray(True))[0]


def _size(fs, coefs, q, breaks):
    """E[f(u)] of functions f >= 0 to some digits, and whether the trapezoid rule sees them at all.

    Between two of its points a bump under a wide Gaussian would go unnoticed, however often they are doubled.
    """
    whole = _single(fs, coefs, q, breaks, True, jnp.asarray(48, q.dtype))
    if breaks:
        return whole, None
    seen = _single(fs, coefs, q, breaks, False, jnp.asarray(_TRAPEZOID[1], q.dtype))
    return whole, jnp.all(jnp.abs(seen - whole) <= 1e-2 * whole)


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
    scale, trust = _size([_absolute(f) for f in fs], coefs, q, breaks)
    return _adapt(lambda panels, n: _single(fs, coefs, q, breaks, panels, n), scale, trust, tol)


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


@partial(jax.jit, static_argnums=(0, 1))  # traced once for the same functions and shapes
def _integrated(fgs, tol, f_coefs, g_coefs, q1, q2, c, f_breaks, g_breaks):
    fs, gs = zip(*fgs, strict=True)
    f2, trust_f = _size([_square(f) for f in fs], f_coefs, q1, f_breaks)
    g2, trust_g = _size([_square(g) for g in gs], g_coefs, q2, g_breaks)
    trust = None if trust_f is None or trust_g is None else trust_f & trust_g
    estimate = lambda panels, n: _double(fs, f_coefs, gs, g_coefs, q1, q2, c, f_breaks, g_breaks, panels, n)
    return _adapt(estimate, jnp.sqrt(f2) * jnp.sqrt(g2), trust, tol)


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
