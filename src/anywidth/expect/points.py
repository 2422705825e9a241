r"""Low-discrepancy normal points: scrambled Sobol sequences, of which a program carries the digits only.

A Sobol point is linear in the binary digits of its number: with gray(i) = i xor (i >> 1) and the direction numbers V_b,

    x_i = s  xor  V_b for every bit b that is set in gray(i),

so a program needs no table of points. It gets V and s, an array of (digits, dimension) integers, and makes the points
where it uses them, any part of the sequence at a time. The direction numbers are SciPy's (Joe & Kuo 2008), up to
21201 dimensions. A *randomisation* multiplies them by random lower triangular matrices over GF(2) and draws the shift s
(Matousek 1998): each point is then uniform, the points stay a net, and averages over independent randomisations have an
error that can be measured. They depend on the seed, the dimension and the number of the randomisation alone.

>>> import jax.numpy as jnp
>>> net = digits(3, seed=0, randomisations=2)
>>> z = normals(net.at(0), 0, 256, jnp.float32)
>>> z.shape, bool(jnp.abs(z.mean(0)).max() < 0.02), bool(jnp.abs(z.T @ z / 256 - jnp.eye(3)).max() < 0.05)
((256, 3), True, True)
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

__all__ = ["MOST", "Digits", "digits", "normals"]

_LENGTH = 20  # binary digits of the number of a point
_BITS = 30  # binary digits of a point before the shift
MOST = 2**_LENGTH  # points there are


class Digits(NamedTuple):
    """Direction numbers (..., 20, dimension) and shift (..., dimension), as 32-bit integers."""

    directions: Any
    shift: Any

    def at(self, randomisation: Any) -> Digits:
        """One randomisation of several; its number may be traced."""
        return Digits(*(jnp.asarray(a)[randomisation] for a in self))

    def later(self, first: Any) -> Digits:
        """The sequence from point number `first` on, a multiple of the power of two that is used; it may be traced."""
        return Digits(self.directions, _digital(self, jnp.asarray(first, jnp.uint32)[None])[0])


@lru_cache(64)
def _directions(dimension: int) -> np.ndarray:
    """The (20, dimension) direction numbers, read off the sequence: point 2^b is point 2^b - 1 xor V_b."""
    from scipy.stats import qmc  # takes longer to import than all of this package

    engine = qmc.Sobol(dimension, scramble=False, bits=_BITS)
    first = engine.random(4)
    pairs = [(first[0], first[1]), (first[1], first[2]), (first[3], engine.random(1)[0])]
    for b in range(3, _LENGTH):
        engine.fast_forward(2**b - 1 - engine.num_generated)
        pairs.append(tuple(engine.random(1)[0] for _ in range(2)))
    before, after = (np.array([p[k] for p in pairs]) * 2.0**_BITS for k in (0, 1))
    return before.astype(np.uint64) ^ after.astype(np.uint64)


@lru_cache(64)
def digits(dimension: int, seed: int, randomisations: int) -> Digits:
    """The digits of several randomisations, stacked: (R, 20, dimension) and (R, dimension)."""
    plain = _directions(dimension)
    places = np.arange(_BITS - 1, -1, -1, dtype=np.uint64)  # the leading digit first
    bits = ((plain[..., None] >> places) & 1).astype(np.uint8)  # (20, dimension, 30)
    directions, shifts = [], []
    for r in range(randomisations):
        rng = np.random.default_rng([seed, dimension, r])
        lower = np.tril(rng.integers(0, 2, (dimension, _BITS, _BITS), dtype=np.uint8), -1) | np.eye(
            _BITS, dtype=np.uint8
        )
        mixed = np.einsum("dij,bdj->bdi", lower, bits, optimize=True) & 1
        directions.append((mixed.astype(np.uint64) << places).sum(-1) << np.uint64(32 - _BITS))
        shifts.append(rng.integers(0, 2**32, dimension, dtype=np.uint64))
    return Digits(np.stack(directions).astype(np.uint32), np.stack(shifts).astype(np.uint32))


def normals(net: Digits, start: Any, count: int, dtype: Any) -> Float[Array, "count dimension"]:
    """The standard normal points number start : start + count of one randomisation; `start` may be traced."""
    x = _digital(net, jnp.asarray(start, jnp.uint32) + jnp.arange(count, dtype=jnp.uint32))
    # odd numbers of half a unit, so that no point is at infinity; float32 rounds the last ones to one
    signed = lax.bitcast_convert_type(x ^ jnp.uint32(2**31), jnp.int32)
    u = (signed.astype(dtype) + jnp.asarray(0.5, dtype)) * jnp.asarray(2.0**-31, dtype)
    edge = 1 - jnp.finfo(dtype).epsneg
    return jnp.asarray(np.sqrt(2.0), dtype) * lax.erf_inv(jnp.clip(u, -edge, edge))


def _digital(net: Digits, i: Any) -> Any:
    """The points of some numbers, as integers."""
    gray = i ^ (i >> 1)
    x = jnp.broadcast_to(jnp.asarray(net.shift), (len(i), net.shift.shape[-1]))
    for b in range(_LENGTH):
        bit = (gray >> b) & jnp.uint32(1)
        x = x ^ (bit[:, None] * jnp.asarray(net.directions)[b])
    return x
