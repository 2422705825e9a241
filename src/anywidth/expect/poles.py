r"""Sampling functions with a pole where their Gaussians vanish: quotients, roots, logarithms of them.

Batch normalisation u / |u| is bounded but its gradient is of order 1/|u|, so the product of two gradients, of which
an NTK is the mean, is of order 1/r^2: for a Gaussian of rank 3 that has a mean and no variance. Here is what
`sampled.py` does about it; nothing in it knows of normalisation. Let xi be standard normal, P the projection onto the
coordinates that the d Gaussians of one side depend on, r = |P xi|.

**Radius.** P xi is made shorter, xi + (t - 1) P xi, with t^2 beta distributed and independent of xi: for
t = U^(1/(d-2)), U uniform, r is chi distributed with d - 2 degrees of freedom instead of d, and the density of xi is
that of the normal law times

    w(r) = (d - 2) / r^2,

and for d = 2, with t = sin(pi U / 2), w(r) = sqrt(2 / pi) / r; for d = 1 nothing is done. Half of the points are drawn
so for either side, which makes them all points of the mixture, so the mean is that of f(xi) 2 / (w(r) + w'(r')):
unbiased whatever P is, and bounded near r = 0 if |f| < 1 / (r r').

**Coordinates.** The sum and the difference of the points' halves, each in the eigenvectors of the root of u + v: two
examples that are near each other have few coordinates then, the same example has as many as the rank. Any orthogonal
coordinates do. A fixed diagonal is added before, so that not rounding chooses the eigenvectors of equal eigenvalues.
Neither coordinates nor P nor the density are differentiated: for each choice of them the mean is right.

**Signs.** A value is cheap beside the gradients: it is the mean over a group of 16 changes of sign of the coordinates.
Of a polynomial in 15 of them, which is even, what is odd in two, and in most sets of four, is integrated by that.

**When there is no mean.** The product of two gradients of order 1/r has none if all Gaussians together have rank 2 or
less: batch normalisation without epsilon of three examples, or of four of which two coincide. `infinite` finds the
order by gradients far inside the pole.

>>> import jax, jax.numpy as jnp
>>> P = jnp.eye(3)
>>> xi, U = jax.random.normal(jax.random.key(0), (4096, 3)), jax.random.uniform(jax.random.key(1), (4096,))
>>> r = jnp.linalg.norm(shortened(xi, P, U), axis=-1)
>>> bool(jnp.abs((1 / density(r**2, P)).mean() - 1) < 0.1)          # the weights have mean one
True
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from anywidth.expr import LEAVES
from anywidth.kets import Contract, Node, Pointwise, Sum, View

__all__ = ["coordinates", "density", "flips", "infinite", "poles", "projection", "rank", "shortened"]

# the operand that must not vanish
_SINGULAR = {"div": 1, "rsqrt": 0, "sqrt": 0, "cbrt": 0, "log": 0, "pow": 0}
_POSITIVE = {"exp", "exp2", "logistic", "cosh"}
_MONOTONE = {"sqrt", "rsqrt", "cbrt", "integer_pow", "square", "abs", "neg", "copy", "name", "stop_gradient"}
_SIZE = 0.1  # numbers from here on are not small

# --- where a function has poles ---------------------------------------------------------------------------


def poles(graph: Any, node: Node) -> frozenset[Node]:
    """The Gaussian nodes of which something is divided by, or raised to a power, that vanishes with them."""
    found: set[Node] = set()
    seen: set[Any] = set()

    def read(x: Node) -> None:
        if x in seen or x.gaussian:
            return
        seen.add(x)
        if isinstance(x, Pointwise):
            read_expr(x.expr, x)
        for child in _below(graph, x):
            read(child)

    def read_expr(e: Any, x: Pointwise) -> None:
        if e[0] in LEAVES or (id(e), x) in seen:
            return
        seen.add((id(e), x))
        place = _SINGULAR.get(e[0])
        if e[0] == "integer_pow" and dict(e[1])["y"] < 0:
            place = 0
        if e[0] == "call" and getattr(e[1][0], "singular", False):
            place = 0
        if place is not None and not _stays(graph, e[2 + place], x):
            found.update(_bases(graph, e[2 + place], x))
        for a in e[2:]:
            read_expr(a, x)

    read(node)
    return frozenset(found)


def _below(graph: Any, x: Node) -> tuple[Node, ...]:
    if isinstance(x, View):
        y = graph.push(x)
        return () if y is x else (y,)
    if isinstance(x, Sum):
        return tuple(t for _, t in x.terms)
    if isinstance(x, Contract):
        return (x.operand,)
    return x.args if isinstance(x, Pointwise) else ()


def _bases(graph: Any, e: Any, x: Pointwise) -> set[Node]:
    """The Gaussian nodes below an expression."""
    if e[0] in LEAVES:
        return set() if e[0] != "v" else _gaussians(graph, x.args[e[1]])
    return set().union(*(_bases(graph, a, x) for a in e[2:]))


def _gaussians(graph: Any, x: Node) -> set[Node]:
    if x.gaussian:
        return {x}
    return set().union(*(_gaussians(graph, y) for y in _below(graph, x)))


def _stays(graph: Any, e: Any, x: Pointwise) -> bool:
    """Whether an expression is seen to stay away from zero."""
    if e[0] == "n":
        return abs(e[1]) >= _SIZE
    if e[0] == "v":
        return _node_stays(graph, x.args[e[1]])
    if e[0] in _POSITIVE:
        return True
    parts = (_stays(graph, a, x) for a in e[2:])
    return any(parts) if e[0] in ("add", "max") else all(parts) if e[0] in ("mul", "div", *_MONOTONE) else False


def _node_stays(graph: Any, x: Node) -> bool:
    if isinstance(x, Pointwise):
        return _stays(graph, x.expr, x)
    below = _below(graph, x)
    return isinstance(x, View | Sum | Contract) and any(_node_stays(graph, y) for y in below)


# --- how it is sampled ------------------------------------------------------------------------------------


def coordinates(A: Any, halves: bool) -> Any:
    """A times an orthogonal matrix, for the root A of the covariance of (u, v), or of u alone: (..., D, D).

    With `halves` the first half of the new coordinates is for the sum of u and v, and the other sign of the second
    half is the exchange of the two.
    """
    m = A.shape[-1] // 2 if halves else A.shape[-1]
    R = jax.lax.stop_gradient(A)
    if halves:
        cross = R[..., :m, m:]
        R = (R[..., :m, :m] + R[..., m:, m:]) + (cross + jnp.swapaxes(cross, -1, -2))
    size = jnp.trace(R, axis1=-2, axis2=-1)[..., None, None] / m
    order = np.diag(np.arange(m, 0, -1)) / (64.0 * m)
    _, Q = jnp.linalg.eigh(R + size * jnp.asarray(order, R.dtype))
    Q = Q[..., ::-1]
    Q = Q * jnp.where(jnp.einsum("p,...pq->...q", np.cos(np.arange(m) ** 2.0).astype(R.dtype), Q) < 0, -1, 1)[
        ..., None, :
    ].astype(R.dtype)
    if not halves:
        return A @ Q
    Q = Q * math.sqrt(0.5)
    first, second = A[..., :m] @ Q, A[..., m:] @ Q
    return jnp.concatenate([first + second, first - second], -1)


def flips(count: int) -> Any:
    """(16, count) signs, a group: their mean and that of a product of two of the first 15 columns are zero."""
    code = np.arange(16)[:, None] & (1 + np.arange(count) % 15)
    return 1.0 - 2.0 * (sum(code >> b for b in range(4)) % 2)


def projection(A: Any) -> Any:
    """(..., D, D): onto the coordinates that the rows of A (..., d, D) depend on."""
    A = jax.lax.stop_gradient(A)
    lam, U = jnp.linalg.eigh(jnp.swapaxes(A, -1, -2) @ A)
    noise = 4 * A.shape[-1] * jnp.finfo(A.dtype).eps * jnp.max(jnp.abs(lam), -1, keepdims=True)
    U = jnp.where((lam > noise)[..., None, :], U, 0)
    return U @ jnp.swapaxes(U, -1, -2)


def rank(P: Any) -> Any:
    """Of projections."""
    return jnp.round(jnp.trace(P, axis1=-2, axis2=-1))


def shortened(xi: Any, P: Any, U: Any) -> Any:
    """xi + (t - 1) P xi: (n, ..., D) points for (n, ..., D) normal ones, (..., D, D) projections and uniform U (n,)."""
    d = rank(P)
    U = U.reshape(U.shape + (1,) * d.ndim)
    t = jnp.where(d > 2, U ** (1 / jnp.maximum(d - 2, 1)), jnp.sin(math.pi / 2 * U))
    t = jnp.where(d < 2, 1, t)
    return xi + (t - 1)[..., None] * jnp.einsum("...pq,n...q->n...p", P, xi, precision="highest")


def density(square: Any, P: Any) -> Any:
    """The density w(r) of shortened points relative to normal ones, from r^2 (n, ...)."""
    d = rank(P)
    tiny = jnp.finfo(square.dtype).tiny
    square = jnp.maximum(square, 4 * tiny)
    w = jnp.where(d > 2, jnp.maximum(d - 2, 1) / square, math.sqrt(2 / math.pi) / jnp.sqrt(square))
    return jnp.where(d < 2, 1, w)


def infinite(gradients: Any, z: tuple[Any, Any], P: Any) -> Any:
    """Whether the mean of the product of the gradients of two sides is infinite, for every entry.

    `gradients` maps points (u, v), here `z`, to those of either side, (n, *axes, d); P is the projection onto the
    coordinates of both.
    """
    n = len(z[0])
    small = float(jnp.finfo(z[0].dtype).tiny) ** 0.2
    wide = [jnp.max(jnp.abs(g), -1) for g in gradients(tuple(jnp.concatenate([x, small * x]) for x in z))]
    near = [small * g[n:].max(0) >= 1e-3 * g[:n].max(0) for g in wide]
    return near[0] & near[1] & (rank(P) <= 2)
