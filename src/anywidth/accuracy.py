"""Kernels whose expectations had to be sampled: as many points as the tolerance needs, and the error that remains.

What is computed is a function of a pair of examples and of a `Sampler`. It is run for every randomisation of the
points; the mean is the answer and the standard error of the mean goes with it, exactly zero where nothing was sampled.
The error is known from few values only: it is stated so much larger that three of it are exceeded as seldom as three
standard errors of a normal law.
Where one example is drawn given the other (loops), the two are put into an order of their own, so that K(x, y) is
K(y, x) transposed. Called with ordinary arrays, the number of points grows until the standard error is below the
tolerance or the budget is spent. Inside a transformation (jit, vmap, grad, `anywidth.gram`) nothing can depend on an
error: there their number is fixed beforehand.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from anywidth import _compat
from anywidth.errors import AccuracyWarning, NoLimitError
from anywidth.expect.points import MOST
from anywidth.expect.sampler import LEAST, RANDOMISATIONS, FixedCount, Sampler

__all__ = ["Accuracy", "controlled"]

_INFINITE = (
    "the NTK of these two examples is infinite: something is divided by what vanishes together with Gaussians of which "
    "only two are independent, as in batch normalisation without epsilon when no more than three of the examples of a "
    "batch differ. Add an epsilon to what is divided by, or leave out examples that occur twice"
)
TOGETHER = 2**11  # points of each randomisation up to which all randomisations run side by side
MEMORY = 2**28  # bytes for points that are held all at once
WIDER = 1.2  # so much wider than a normal law's is Student's for 16 values, where one case in 370 is beyond


@dataclass(frozen=True)
class Accuracy:
    """How well expectations that have to be sampled are computed.

    Args:
        tol: the standard error that is wanted, relative to the scale of the kernel: the largest |K(x, y)| over its
            entries or, for two examples of one shape, the root of K(x, x) K(y, y) if that is larger.
        seed: of the points. The same seed gives the same numbers.
        points: how many samples a kernel takes inside a transformation, where it cannot adapt to the tolerance.
        budget: how many it takes at most.
    """

    tol: float = 1e-4
    seed: int = 0
    points: int = 2**14
    budget: int = 2**22

    def __post_init__(self) -> None:
        if not (isinstance(self.tol, int | float) and self.tol > 0):
            raise ValueError(f"tol is a positive number, and it is {self.tol!r}")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed is a nonnegative integer, and it is {self.seed!r}")
        for name in ("points", "budget"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is a positive integer, and it is {value!r}")

    def count(self, samples: int) -> int:
        """Points in each randomisation, a power of two."""
        return min(max(2 ** round(math.log2(max(samples / RANDOMISATIONS, 1))), LEAST), MOST)


Run = Callable[[Any, Any, Sampler], Any]


def controlled(run: Run, accuracy: Accuracy, traced: Callable[[], bool]) -> Any:
    """The kernel, a pytree, and its standard errors, as a function of two examples (pytrees of arrays).

    `traced()` tells whether the network itself holds numbers that are being transformed (a variance that is
    differentiated in).
    """
    exact: set[Any] = set()  # the shapes of examples for which nothing is sampled
    whole: dict[Any, int] = {}  # those for which points are held all at once, and how many bytes each takes
    poles: set[Any] = set()  # those for which a kernel may be infinite
    ordered: set[Any] = set()  # those of which the second is drawn given the first

    def estimates(x: Any, y: Any, count: Any, rotations: Any) -> tuple[Any, Any, Any]:
        used = False

        def part(number: Any, block: Any, size: Any) -> Any:
            nonlocal used
            sampler = Sampler(size, number, accuracy.seed, rotations=rotations, block=block)
            out = run(x, y, sampler)
            used |= sampler.used
            if sampler.ordered:
                ordered.update((_key(x, y), _key(y, x)))
            if sampler.held:  # and as much again for what is made of them on the way
                whole[_key(x, y)] = 2 * jnp.dtype(sampler.dtype).itemsize * sampler.held
            if sampler.poles:
                poles.add(_key(x, y))
            return out, sampler.found

        size, mapped = count, False
        if isinstance(count, int) and count > TOGETHER:
            if _key(x, y) not in whole:
                jax.eval_shape(lambda: part(0, 0, LEAST))  # tells whether points are held
            mapped = _key(x, y) in whole
            while mapped and size > LEAST and size * whole[_key(x, y)] > MEMORY:
                size //= 2
        blocks = 1 if size is count else count // size

        numbers = jnp.arange(RANDOMISATIONS * blocks)
        if mapped:
            parts = jax.lax.map(lambda k: part(k // blocks, k % blocks if blocks > 1 else 0, size), numbers)
            values, found = jax.tree.map(lambda a: a.reshape(RANDOMISATIONS, blocks, *a.shape[1:]).mean(1), parts)
        else:
            values, found = jax.vmap(lambda number: part(number, 0, count))(numbers)
        if not used:
            exact.add(_key(x, y))
            value = jax.tree.map(lambda a: a[0], values)
            return value, jax.tree.map(jnp.zeros_like, value), {}
        mean = jax.tree.map(lambda a: a.mean(0), values)
        error = jax.tree.map(lambda a: WIDER * a.std(0, ddof=1) / math.sqrt(RANDOMISATIONS), values)
        return mean, error, jax.tree.map(lambda a: a.mean(0), found)

    def settled(x: Any, y: Any) -> tuple[Any, Any]:
        """With the points that there are inside a transformation."""

        def pair(x: Any, y: Any) -> tuple[Any, Any]:
            return estimates(x, y, accuracy.count(accuracy.points), {})[:2]

        if _key(x, y) not in ordered:  # nothing that one example has by itself is computed for every pair
            out = pair(x, y)
            if _key(x, y) not in ordered:
                return out
        if _shapes(x) != _shapes(y):
            return jax.tree.map(_transposed, pair(y, x)) if _shapes(x) > _shapes(y) else pair(x, y)
        turned = _greater(x, y)
        first, second = (jax.tree.map(lambda a, b: jnp.where(turned, b, a), p, q) for p, q in ((x, y), (y, x)))
        return jax.tree.map(lambda a: jnp.where(turned, _transposed(a), a), pair(first, second))

    fixed = jax.jit(settled)
    counted = jax.jit(estimates)
    compiled = jax.jit(estimates, static_argnums=2)

    def growing(x: Any, y: Any, count: int, rotations: Any) -> tuple[Any, Any, Any]:
        if _key(x, y) not in whole:
            try:
                return counted(x, y, jnp.int32(count), rotations)
            except FixedCount:
                whole.setdefault(_key(x, y), 0)
        return compiled(x, y, count, rotations)

    last = accuracy.count(accuracy.budget)

    def adaptive(x: Any, y: Any) -> tuple[Any, Any]:
        count = min(LEAST * 2, last)
        scale: Any = None
        rotations: Any = {}
        while True:
            value, error, found = growing(x, y, count, rotations)
            if any(map(_compat.is_tracer, jax.tree.leaves(value))):
                return value, error
            # layers above an infinite one make NaN of it
            if _key(x, y) in poles and _finite((x, y)) and not _finite(value):
                raise NoLimitError(_INFINITE)
            if _key(x, y) in exact:
                return value, error
            excess = _excess(error, value) / accuracy.tol
            if excess > 1:
                scale = own_scale(x, y, len(jax.tree.leaves(value))) if scale is None else scale
                excess = _excess(error, value, scale) / accuracy.tol
            if not excess > 1 or count >= last:
                if excess > 1:
                    warnings.warn(
                        f"the standard error of a sampled kernel is {excess * accuracy.tol:.1g} of its scale and the "
                        f"tolerance is {accuracy.tol:.1g}, with {count * RANDOMISATIONS} samples, which is the budget. "
                        "Pass a larger budget= or tol=",
                        AccuracyWarning,
                        stacklevel=4,
                    )
                return value, error
            # the points' first dimensions are the best: they go where the variance is
            rotations = rotations or {k: np.linalg.svd(L)[2].T for k, L in found.items()}
            # errors of these points fall faster than the root of their number
            count = min(count * 2 ** min(max(math.ceil(math.log2(excess) * 1.2), 1), 6), last)

    def own_scale(x: Any, y: Any, leaves: int) -> list[float]:
        """The root of K(x, x) K(y, y) for each leaf, to a digit or two, for examples of one shape."""
        if _key(x, x) != _key(y, y):
            return [0.0] * leaves
        own = [growing(e, e, min(2 * LEAST, last), {})[0] for e in (x, y)]
        sizes = (
            math.sqrt(float(np.abs(p).max()) * float(np.abs(q).max()))
            for p, q in zip(*map(jax.tree.leaves, own), strict=True)
        )
        return [size if math.isfinite(size) else 0.0 for size in sizes]  # of one example it may be infinite

    def kernel(x: Any, y: Any) -> tuple[Any, Any]:
        inside = traced() or any(map(_compat.is_tracer, jax.tree.leaves((x, y))))
        if inside:
            return fixed(x, y)
        # of two examples the second is drawn given the first: which is which is not left to the caller
        turned = _order(x) > _order(y)
        value, error = adaptive(y, x) if turned else adaptive(x, y)
        if any(map(_compat.is_tracer, jax.tree.leaves(value))):  # apply closes over numbers that are transformed
            return fixed(x, y)
        return jax.tree.map(_transposed, (value, error)) if turned else (value, error)

    # whether nothing is sampled for such examples (arrays, or shapes and dtypes) that were traced before
    kernel.exact = lambda x, y: _key(x, y) in exact  # type: ignore[attr-defined]
    return kernel


def _finite(x: Any) -> bool:
    return all(np.isfinite(a).all() for a in jax.tree.leaves(x))


def _shapes(x: Any) -> Any:
    """Orders examples that are not alike."""
    return [(tuple(a.shape), str(a.dtype)) for a in jax.tree.leaves(x)]


def _order(x: Any) -> Any:
    """Orders examples, by their numbers alone."""
    return _shapes(x), [np.asarray(a).tobytes() for a in jax.tree.leaves(x)]


def _greater(x: Any, y: Any) -> Any:
    """Whether the first number in which two examples of the same shapes differ is greater in x; they may be traced."""
    differ, greater = [], []
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        for part in (jnp.real, jnp.imag) if jnp.iscomplexobj(a) else (lambda a: a,):
            differ.append(jnp.ravel(part(a) != part(b)))
            greater.append(jnp.ravel(part(a) > part(b)))
    if not sum(d.size for d in differ):
        return jnp.zeros((), bool)
    return jnp.concatenate(greater)[jnp.argmax(jnp.concatenate(differ))]


def _transposed(a: Any) -> Any:
    """K(y, x) as K(x, y): the axes of the two outputs, which are as many, change places."""
    half = a.ndim // 2
    return jnp.transpose(a, (*range(half, a.ndim), *range(half)))


def _key(x: Any, y: Any) -> Any:
    leaves, tree = jax.tree.flatten((x, y))
    return tree, tuple((tuple(a.shape), np.dtype(a.dtype)) for a in leaves), bool(getattr(jax.config, "jax_enable_x64"))  # noqa: B009


def _excess(error: Any, value: Any, scale: list[float] | None = None) -> float:
    """The largest standard error relative to the scale of its kernel."""
    out = 0.0
    for i, (e, v) in enumerate(zip(jax.tree.leaves(error), jax.tree.leaves(value), strict=True)):
        size = max(float(np.abs(v).max(initial=0.0)), 0.0 if scale is None else scale[i])
        worst = float(np.max(e, initial=0.0))
        out = max(out, worst / size if size > 0 else (math.inf if worst > 0 else 0.0))
    return out
