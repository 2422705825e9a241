r"""Points and weights for integrals over a normal law, as tables of constants.

*Trapezoid* rule on [-L, L], and the *tanh-sinh* rule on panels (Takahasi & Mori 1974), whose points crowd the ends of
the panel and resolve there every scale: for |t| < T

    z = low + width / (1 + exp(-pi sinh t)),    dz = width pi cosh(t) / (2 + 2 cosh(pi sinh t)) dt.

A table holds the points of a rule for 24 points, 48, ... one behind the other, so that those of n begin at n - 24 and n
may be traced.

>>> import jax.numpy as jnp
>>> z, w = rows(normal_table(np.dtype("float32")), 0, 24, 1)
>>> print(f"{w.sum():.5f} {(w * z**2).sum():.5f}")
1.00000 1.00000
"""

import math
from functools import lru_cache

import jax.numpy as jnp
import numpy as np
from jax import lax

TRAPEZOID, PANELS = (24, 96), (24, 384)  # points per axis or panel: first try and last


def _reach(dtype):
    """Where a Gaussian is cut, in standard deviations, and the range of t in the tanh-sinh rule."""
    return (6.5, 2.6) if dtype == np.float32 else (8.5, 3.1)


def _density(z):
    return jnp.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def counts(rule):
    """How many points are tried, one after the other."""
    first, last = rule
    return [first << k for k in range((last // first).bit_length())]


def _middles(n):
    return (np.arange(n) + 0.5) * (2 / n) - 1


def _tanh_sinh(span):
    """Whether a point is nearer to the lower end, its way from there or from the upper one, and its weight, in widths.

    From the nearer end, so that a kink is approached from one side only.
    """
    t = np.concatenate([span * _middles(n) for n in counts(PANELS)])
    step = np.concatenate([np.full(n, 2 / n) for n in counts(PANELS)])
    left, right = (1 / (1 + np.exp(sign * np.pi * np.sinh(t))) for sign in (-1, 1))
    return t < 0, np.where(t < 0, left, -right), span * step * np.pi * np.cosh(t) * left * right


@lru_cache(None)
def _panel_table(dtype):
    nearer, way, rate = _tanh_sinh(_reach(dtype)[1])
    return nearer, way.astype(dtype), rate.astype(dtype)


@lru_cache(None)
def normal_table(dtype):
    """Points and weights of the trapezoid rule, and behind it those of two panels that meet at zero: 2 n for n."""
    reach, span = _reach(dtype)
    nearer, way, rate = _tanh_sinh(span)
    z = [reach * _middles(n) for n in counts(TRAPEZOID)]
    w = [np.full(n, reach * 2 / n) for n in counts(TRAPEZOID)]
    for n in counts(PANELS):
        part = slice(n - PANELS[0], 2 * n - PANELS[0])
        for low in (-reach, 0.0):
            z.append(np.where(nearer[part], low, low + reach) + way[part] * reach)
            w.append(rate[part] * reach)
    points = np.concatenate(z)
    weights = np.concatenate(w) * np.exp(-(points**2) / 2) / math.sqrt(2 * math.pi)
    return points.astype(dtype), weights.astype(dtype)


def rows(table, start, size, rank):
    """Rows of a table, as arrays (size, 1, ...) of this rank."""
    part = lambda x: lax.dynamic_slice_in_dim(jnp.asarray(x), start, size, allow_negative_indices=False)
    return [part(x).reshape((size,) + (1,) * (rank - 1)) for x in table]


def knots_of(points, shape, dtype):
    """The ends of the panels, sorted along a leading axis: -L, L and the points between them."""
    reach = _reach(dtype)[0]
    inner = jnp.stack([jnp.broadcast_to(jnp.clip(p, -reach, reach), shape) for p in points])
    low, high = (jnp.full((1, *shape), x, dtype) for x in (-reach, reach))
    return jnp.concatenate([low, jnp.sort(inner, axis=0) if len(points) > 1 else inner, high])


def on_panels(low, high, start, size):
    """Points and weights, with the normal density: arrays (size, *low.shape)."""
    nearer, way, rate = rows(_panel_table(np.dtype(low.dtype)), start, size, low.ndim + 1)
    width = high - low
    z = jnp.where(nearer, low, high) + way * width
    return z, rate * width * _density(z)
