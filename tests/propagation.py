r"""The kernels of small programs by brute force, in plain NumPy: what stated errors are compared with.

A program is a function `program(m, x, c)` of operations m and an example, inputs x and coefficients c; its kets have
the width as their last axis.
It runs on anywidth through `network`, and here on sample points: the width is M points of Gaussians that are drawn one
after the other, first all those of x, then all those of y,

    Cov(u_k, u_l) = var * mean(o_k o_l)   if one parameter made both, from the operands o_k and o_l, and 0 otherwise,

each given all before it. The NTK comes from the same sums once more, by Price's theorem for one Gaussian after another,

    dC_kl = C_kl / var + var * sum_ab mean(d_a o_k  d_b o_l) dC_ab,      NTK(x, y) = dC(output, output),

the derivatives being differences of the program run again with one Gaussian moved. The points are SciPy's scrambled
Sobol points, of several scrambles: the reference has an error of its own. It shares no code with anywidth.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special
from scipy.stats import qmc

import anywidth as aw

STEP = 1e-5


# --- on sample points ------------------------------------------------------------------------------------------


@dataclass
class Gaussian:
    """A product with a parameter: its variance, and the operand, a vector (input) or samples (M,)."""

    name: str
    var: float
    operand: np.ndarray
    inner: bool  # a ket
    example: int


@dataclass
class Points:
    """M points, and the Gaussians that were drawn on them."""

    normals: np.ndarray  # (D, M)
    drawn: list[Gaussian] = field(default_factory=list)
    L: np.ndarray = None

    def covariance(self, g, h):
        """E[u_g u_h]."""
        if g.name != h.name:
            return 0.0
        both = g.operand @ h.operand
        return g.var * both / (self.normals.shape[1] if g.inner else len(g.operand))

    def draw(self, new):
        """Samples of one more Gaussian, given all before it."""
        k, D = len(self.drawn), len(self.normals)
        if self.L is None:
            self.L = np.zeros((D, D))
        row = self.L[k]
        for j, g in enumerate(self.drawn):
            if self.L[j, j]:
                row[j] = (self.covariance(g, new) - row[:j] @ self.L[j, :j]) / self.L[j, j]
        own = self.covariance(new, new)
        pivot = own - row @ row
        row[k] = np.sqrt(pivot) if pivot > 1e-9 * own else 0.0
        self.drawn.append(new)
        return row[: k + 1] @ self.normals[: k + 1]


class Samples:
    """The operations of a program on sample points. With `known`, a run with the Gaussians and means given."""

    xp, erf, sigmoid = np, staticmethod(special.erf), staticmethod(special.expit)

    def __init__(self, variances, points, example=0, known=None):
        self.variances, self.points, self.example, self.known = variances, points, example, known
        self.gaussians, self.means, self.made = [], [], []
        self.count = points.normals.shape[1]

    def _product(self, name, operand, inner):
        if operand.ndim > 1:
            return np.stack([self._product(name, o, inner) for o in operand])
        new = Gaussian(name, self.variances[name][1], np.array(operand), inner, self.example)
        self.made.append(new)
        u = self.points.draw(new) if self.known is None else self.known[0][len(self.gaussians)]
        self.gaussians.append(u)
        return u

    def weights(self, name, x):
        """An input layer of numbers (..., d)."""
        return self._product(name, np.asarray(x, float), False)

    def matrix(self, name, h):
        """A square matrix times kets (..., n)."""
        return self._product(name, np.broadcast_to(h, (*np.shape(h)[:-1], self.count)), True)

    def bias(self, name):
        """A vector of parameters."""
        return self._product(name, np.ones(1), False)

    def mean(self, z):
        """Over the width."""
        value = z.mean(-1) if self.known is None else self.known[1][len(self.means)]
        self.means.append(value)
        return value

    def loop(self, step, carry, xs):
        """The states of a loop that starts from zero, and the last of them."""
        carry = tuple(np.full(self.count, c) for c in carry)
        states = []
        for x in xs:
            carry = step(*carry, x)
            states.append(carry[0])
        return np.stack(states)


def normal_points(dimension, count, seed):
    """(dimension, count) scrambled Sobol points."""
    u = qmc.Sobol(dimension, scramble=True, bits=40, rng=np.random.default_rng(seed)).random(count).T
    return special.ndtri(np.clip(u, 2.0**-45, 1 - 2.0**-45))


def _run(variances, program, x, y, normals):
    """NNGP and NTK of one set of points, and the number of Gaussians."""
    points = Points(normals)
    sides = []
    for number, example in enumerate((x, y)):
        m = Samples(variances, points, number)
        out = program(m, *example)
        outputs = [out] if out.ndim == 1 else list(out)
        sides.append((m, outputs))
    slopes = [_slopes(variances, program, e, points, *s) for e, s in zip((x, y), sides, strict=True)]
    M = normals.shape[1]
    (left, f), (right, g) = sides
    K, Kr = len(left.made), len(right.made)
    dC = np.zeros((K, Kr))

    def inner(p, q):
        """The change of E[p q], the gradients of both given for each Gaussian before them."""
        live = [(a, b) for a in p for b in q if dC[a, b]]
        return sum(dC[a, b] * (p[a] @ q[b]) for a, b in live) / M

    for k, u in enumerate(left.made):
        for j, v in enumerate(right.made):
            if u.name == v.name:
                dC[k, j] = points.covariance(u, v) / u.var
                if u.inner:
                    dC[k, j] += u.var * inner(slopes[0][0][k], slopes[1][0][j])
    nngp = np.array([[p @ q / M for q in g] for p in f])
    ntk = nngp + np.array([[inner(p, q) for q in slopes[1][1]] for p in slopes[0][1]])
    return nngp, ntk


def _slopes(variances, program, x, points, m, outputs):
    """Gradients of the operands and of the outputs in the Gaussians, where they are not zero: {number: samples}."""
    operands, ends = [{} for _ in m.made], [{} for _ in outputs]
    for a in range(len(m.gaussians)):
        runs = []
        for sign in (1, -1):
            moved = [u + sign * STEP if k == a else u for k, u in enumerate(m.gaussians)]
            again = Samples(variances, points, m.example, (moved, m.means))
            out = program(again, *x)
            runs.append(([g.operand for g in again.made], [out] if out.ndim == 1 else list(out)))
        for found, both in ((operands, [r[0] for r in runs]), (ends, [r[1] for r in runs])):
            for k, (p, q) in enumerate(zip(*both, strict=True)):
                if (p.shape == m.gaussians[a].shape) and not np.array_equal(p, q):
                    found[k][a] = (p - q) / (2 * STEP)
    return operands, ends


def reference(variances, program, x, y, count=2**14, scrambles=8, seed=0):
    """((NNGP, NTK), their standard errors), each (outputs, outputs)."""
    dimension = sum(_gaussians(variances, program, e) for e in (x, y))
    found = []
    for s in range(scrambles):
        found.append(_run(variances, program, x, y, normal_points(dimension, count, [seed, s])))
    found = np.array(found)
    return found.mean(0), found.std(0, ddof=1) / np.sqrt(scrambles)


def _gaussians(variances, program, x):
    m = Samples(variances, Points(np.ones((64, 4))))
    program(m, *x)
    return len(m.made)


# --- on anywidth -----------------------------------------------------------------------------------------------


class Plain:
    """The operations of a program in JAX, at any width."""

    xp, erf, sigmoid = jnp, staticmethod(jax.lax.erf), staticmethod(jax.nn.sigmoid)

    def __init__(self, params):
        self.params = params

    def weights(self, name, x):
        return x @ self.params[name].T / np.sqrt(x.shape[-1])

    def matrix(self, name, h):
        return h @ self.params[name].T / jnp.sqrt(h.shape[-1])

    def bias(self, name):
        return self.params[name]

    def mean(self, z):
        return z.mean(-1)

    def loop(self, step, carry, xs):
        n = self.params["readout"].shape[0]

        def body(c, x):
            new = step(*c, x)
            return new, new[0]

        return jax.lax.scan(body, tuple(jnp.full(n, c, xs.dtype) for c in carry), xs)[1]


def network(variances, program, dimension):
    """The same program as a network; `variances` has (kind, variance) for the name of each parameter."""

    def init(n):
        shapes = {"weights": (n, dimension), "matrix": (n, n), "bias": (n,)}
        params = {name: aw.Normal(shapes[kind], var=var) for name, (kind, var) in variances.items()}
        return params | {"readout": aw.Normal((n,))}

    def apply(p, x):
        return program(Plain(p), *x) @ p["readout"] / jnp.sqrt(p["readout"].size)

    return aw.Network(init, apply)
