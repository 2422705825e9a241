"""Averages over sampled Gaussians: the last resort of `choose.py`, and what every estimate shares.

A kernel is run as a whole once for each of several randomisations of the points, each of which gives an estimate of its
own; their mean is the answer and their spread its standard error. So an error that one layer makes goes through the
layers above as it does in the answer. Within a randomisation a nested estimate is a nonlinear function of another one:
that costs a bias of the order of the error squared.

A `Sampler` is the settings of one such run. It is found at `gram.graph.sampler`; whoever uses it calls `net`, whose
digits belong to this randomisation, and `average`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from anywidth.expect.points import Digits, digits, normals

__all__ = ["LEAST", "RANDOMISATIONS", "FixedCount", "Sampler", "average", "chunk_of"]

RANDOMISATIONS = 16  # so many that three standard errors are exceeded in less than one case of a hundred
LEAST = 1024  # points of a randomisation


class FixedCount(Exception):
    """What is sampled holds all points at once: their number has to be a Python number."""


@dataclass(eq=False)
class Sampler:
    """`count` points in each randomisation, of which this run is `number`; both may be traced.

    A count that is a Python number allows derivatives backward, one that is traced forward ones only. `used` tells
    whether anything was sampled. Gaussians u = L z that are drawn one after the other have the same law with Q z for
    any orthogonal Q; what names them in `rotations` gets that one, and its L is noted in `found` for a later run.
    `poles` tells whether an NTK may be infinite, because something is divided by what vanishes with its Gaussians.
    `ordered` tells whether what belongs to one example was drawn given what belongs to the other.
    The points are those from number `block` times their count on. What keeps numbers for every point, all at once,
    notes how many in `held`.
    """

    count: Any = 1024
    number: Any = 0
    seed: int = 0
    dtype: Any = None
    used: bool = False
    poles: bool = False
    ordered: bool = False
    rotations: Mapping[str, Any] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)
    block: Any = 0
    held: int = 0

    def net(self, dimension: int, share: int = 1) -> Digits:
        """The digits of the points of some dimension, of which `count / share` are used."""
        self.used = True
        net = digits(dimension, self.seed, RANDOMISATIONS).at(self.number)
        first = self.block * (self.count // share)
        return net if isinstance(first, int) and first == 0 else net.later(first)

    def hold(self, count: int, *arrays: Any) -> None:
        """Notes arrays that are kept for each of `count` points."""
        self.held += sum(a.size for a in jax.tree.leaves(arrays)) // count


def chunk_of(size: int) -> int:
    """How many points to evaluate at once when each takes `size` numbers: a power of two."""
    chunk = 1024
    while chunk > 16 and chunk * size > 2**18:
        chunk //= 2
    return chunk


def average(f: Callable[[Any], Any], net: Digits, count: Any, dtype: Any, chunk: int) -> Any:
    """The mean over `count` points of f(z), where f maps points (k, dimension) to its mean over them (a pytree).

    Both numbers of points are powers of two. The points are made and used `chunk` at a time.
    """

    def part(k: Any, size: int) -> Any:
        return f(normals(net, k * size, size, dtype))

    if isinstance(count, int):
        size = min(count, chunk)
        number = count // size
        if number == 1:
            return part(0, size)
        step = jax.checkpoint(lambda k: part(k, size))
        shapes = jax.eval_shape(step, 0)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        total, _ = lax.scan(lambda t, k: (jax.tree.map(jnp.add, t, step(k)), None), zeros, jnp.arange(number))
        return jax.tree.map(lambda t: t / number, total)
    shapes = jax.eval_shape(lambda: part(0, LEAST // 2))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    chunk = min(chunk, LEAST // 2)
    number = count // chunk
    total = lax.fori_loop(0, number, lambda k, t: jax.tree.map(jnp.add, t, part(k, chunk)), zeros)
    return jax.tree.map(lambda t: t / number, total)
