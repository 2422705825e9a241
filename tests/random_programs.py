"""Small random programs whose expectations anywidth has to sample, for `propagation.py`: one for every number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

SMOOTH = ("tanh", "sigmoid", "sin", "softplus", "erf", "gauss")
KINKED = ("relu", "abs", "leaky")
DRAWS = 4  # examples, and coefficients, of each structure


@dataclass
class Random:
    """What is drawn for the structure of a program."""

    rng: Any

    def function(self, *kinds):
        """A function f(m, z) of the width's coordinates."""
        return FUNCTIONS[self.rng.choice(kinds)]

    def smooth(self):
        return self.function(*SMOOTH)

    def any(self):
        return self.function(*SMOOTH, *KINKED)

    def gate(self):
        return self.function("sigmoid", "half", "half")

    def yes(self, chance=0.5):
        return bool(self.rng.random() < chance)


FUNCTIONS = {
    "tanh": lambda m, z: m.xp.tanh(z),
    "sigmoid": lambda m, z: m.sigmoid(z),
    "half": lambda m, z: (1 + m.erf(z)) / 2,
    "sin": lambda m, z: m.xp.sin(z),
    "softplus": lambda m, z: m.xp.logaddexp(z, 0.0),
    "erf": lambda m, z: m.erf(z),
    "gauss": lambda m, z: m.xp.exp(-(z**2) / 2),
    "relu": lambda m, z: m.xp.maximum(z, 0.0),
    "abs": lambda m, z: m.xp.abs(z),
    "leaky": lambda m, z: m.xp.where(z > 0, z, 0.2 * z),
}


def softmax(m, z):
    """Over the first axis."""
    e = m.xp.exp(z - m.xp.max(z, 0))
    return e / e.sum(0)


VECTOR = {"U": ("weights", 1.5), "V": ("weights", 1.0), "W": ("weights", 0.8)}


def gates(r):
    """Functions of sums of functions, multiplied."""
    f, g, h = r.smooth(), r.any(), r.smooth()

    def program(m, x, c):
        u, v, w = m.weights("U", x), m.weights("V", x), m.weights("W", x)
        return h(m, c[0] * u + c[1] * g(m, w)) * f(m, v + c[2] * w)

    return program, VECTOR, (3,)


def maxima(r):
    """The largest of nonlinear branches, and a product."""
    f, g, h = r.any(), r.any(), r.smooth()

    def program(m, x, c):
        u, v = m.weights("U", x), m.weights("V", x) + m.bias("b")
        return m.xp.maximum(f(m, u + c[0] * v), g(m, v) + c[1]) + c[2] * h(m, u * v)

    return program, {"U": ("weights", 1.0), "V": ("weights", 1.0), "b": ("bias", 0.3)}, (3,)


def differences(r):
    """Kinks of differences of branches."""
    f, g, k = r.any(), r.smooth(), r.function(*KINKED)

    def program(m, x, c):
        u, v = m.weights("U", x), m.weights("V", x)
        return k(m, f(m, u) - g(m, v + c[0] * u)) + c[1] * f(m, v) * u

    return program, {"U": ("weights", 1.0), "V": ("weights", 1.5)}, (3,)


def products(r):
    """Three nonlinear branches multiplied."""
    f, g, h = r.any(), r.smooth(), r.any()

    def program(m, x, c):
        u, v, w = m.weights("U", x), m.weights("V", x), m.weights("W", x)
        return f(m, u) * g(m, v + c[0] * u) * h(m, w + c[1] * v)

    return program, VECTOR, (3,)


def masks(r):
    """A choice by numbers and a choice by what is random, where nothing jumps; two outputs."""
    f, g, h = r.any(), r.smooth(), r.any()

    def program(m, x, c):
        u, v = m.weights("U", x[:2]), m.weights("V", x[:2])
        keep = (x[2, 0] > 0).astype(x.dtype)
        low = keep * f(m, u[0] * v[0]) + (1 - keep) * g(m, v[0] + c[0])
        p, q = h(m, u[1] + c[0] * v[1]), g(m, v[1])
        return m.xp.stack([low, m.xp.where(p > q, p, q) * u[0]])

    return program, {"U": ("weights", 1.0), "V": ("weights", 1.0)}, (3, 2)


def mixtures(r):
    """Softmax over an axis of kets; or its logsumexp."""
    f, log, count = r.any(), r.yes(0.3), int(r.rng.integers(2, 4))

    def program(m, x, c):
        u, v = m.weights("U", x), m.weights("V", x)
        if log:
            return m.xp.log(m.xp.exp(c[0] * u).sum(0)) + f(m, v[0] * u[0])
        return (softmax(m, 1.5 * c[0] * u) * f(m, v)).sum(0)

    return program, {"U": ("weights", 1.0), "V": ("weights", 1.0)}, (count, 2)


def pools(r):
    """The largest of several positions, then perhaps a second layer with a gate."""
    f, g, h, count = r.any(), r.smooth(), r.gate(), int(r.rng.integers(3, 5))
    linear, deep = r.yes(0.4), r.yes()

    def program(m, x, c):
        u = m.weights("U", x) + m.bias("b")
        h1 = m.xp.max(u if linear else f(m, u), 0)
        if not deep:
            return h1 * h(m, u[0])
        return g(m, m.matrix("A", h1)) * h(m, m.matrix("B", h1) + c[0])

    variances = {"U": ("weights", 1.0), "b": ("bias", 0.2), "A": ("matrix", 1.0), "B": ("matrix", 0.5)}
    return program, variances if deep else {k: variances[k] for k in "Ub"}, (count, 2)


def batch_norms(r):
    """Normalised over a batch, then any nonlinearity; an output for each of the batch or the first."""
    f, count, eps, each = r.any(), int(r.rng.integers(3, 5)), float(r.rng.choice([1e-3, 0.1])), r.yes()
    gate = r.yes(0.3)

    def program(m, x, c):
        u = m.weights("U", x)
        u = u - u.mean(0)
        u = u / m.xp.sqrt((u**2).mean(0) + eps)
        out = f(m, u) * m.sigmoid(u[0]) if gate else m.xp.tanh(u + c[0])
        return out if each else out[0]

    return program, {"U": ("weights", 1.0)}, (count, 3)


def layer_norms(r):
    """Gated branches, normalised over the width, and a second layer of two matrices."""
    f, g, h = r.any(), r.smooth(), r.smooth()

    def program(m, x, c):
        u, v = m.weights("U", x), m.weights("V", x)
        z = f(m, u + c[0] * v) * g(m, v)
        z = z - m.mean(z)
        z = z / m.xp.sqrt(m.mean(z**2) + 1e-3)
        return h(m, m.matrix("A", z) + m.matrix("B", z) * z)

    variances = {"U": ("weights", 1.0), "V": ("weights", 1.0), "A": ("matrix", 1.0), "B": ("matrix", 0.6)}
    return program, variances, (3,)


def attentions(r):
    """Deterministic scores from width averages of gated branches, which mix them."""
    f, g, h = r.any(), r.smooth(), r.smooth()

    def program(m, x, c):
        u, v = m.weights("U", x), m.weights("V", x)
        z = f(m, u) * g(m, u + v)
        s = softmax(m, c[0] * m.xp.stack([m.mean(z[i] * z[0]) for i in range(len(x))]))
        mixed = sum(s[i] * z[i] for i in range(len(x)))
        return h(m, m.matrix("A", mixed)) * z[0]

    return program, {"U": ("weights", 1.0), "V": ("weights", 1.0), "A": ("matrix", 1.0)}, (2, 3)


def units(r):
    """A gated recurrent unit, with functions of any kind; every state, the last, or their mean."""
    gate, f, pool = r.gate(), r.function("tanh", "erf", "erf", "sin", "relu"), r.rng.integers(3)
    reset, length = r.yes(0.4), int(r.rng.integers(2, 4))

    def program(m, x, c):
        def step(h, x_t):
            z = gate(m, m.weights("U", x_t) + m.matrix("A", h) + m.bias("b"))
            h_in = h * gate(m, m.weights("R", x_t) + m.matrix("B", h)) if reset else h
            new = f(m, m.weights("V", x_t) + m.matrix("C", h_in))
            return ((1 - z) * h + z * new,)

        states = m.loop(step, (0.0,), x)
        return [states, states[-1], states.mean(0)][pool]

    variances = {
        "U": ("weights", 1.0), "A": ("matrix", 0.7), "b": ("bias", 0.3), "V": ("weights", 1.5), "C": ("matrix", 1.0),
    }  # fmt: skip
    return program, variances | ({"R": ("weights", 1.0), "B": ("matrix", 1.0)} if reset else {}), (length, 2)


def memories(r):
    """Two carries, as in an LSTM: an output gate of what a memory that is added to holds."""
    gate, f, g, pool = r.gate(), r.function("tanh", "erf", "sin"), r.function("tanh", "erf"), r.yes()
    length = int(r.rng.integers(2, 4))

    def program(m, x, c):
        def step(h, s, x_t):
            o = gate(m, m.weights("U", x_t) + m.matrix("A", h))
            s = 0.8 * s * (gate(m, m.bias("b")) if pool else 1.0) + f(m, m.weights("V", x_t) + m.matrix("B", h))
            return o * g(m, s), s

        states = m.loop(step, (0.0, 0.0), x)
        return states.mean(0) if pool else states[-1]

    variances = {"U": ("weights", 1.0), "A": ("matrix", 1.0), "V": ("weights", 1.0), "B": ("matrix", 0.8)}
    return program, variances | ({"b": ("bias", 1.0)} if pool else {}), (length, 2)


def multiplied(r):
    """A recurrence that multiplies its state with a function of what it becomes."""
    f, length = r.function(*SMOOTH, "leaky"), int(r.rng.integers(2, 4))

    def program(m, x, c):
        def step(h, x_t):
            return (f(m, m.matrix("A", h) + m.weights("U", x_t)) * (1 + 0.5 * h),)

        return m.loop(step, (0.5,), x)[-1]

    return program, {"U": ("weights", 1.0), "A": ("matrix", 1.0)}, (length, 2)


SHAPES = (
    gates, maxima, differences, products, masks, mixtures, pools, batch_norms, layer_norms, attentions, units, memories,
    multiplied,
)  # fmt: skip
LOOPS = ("units", "memories", "multiplied")


@dataclass
class Structure:
    """A program(m, x, c), the kinds and variances of its parameters, and what its examples are drawn with."""

    name: str
    program: Any
    variances: dict[str, tuple[str, float]]
    shape: tuple[int, ...]
    rng: Any

    def examples(self):
        """Two examples (x, c), with coefficients of their own."""
        x, y = self.rng.normal(size=(2, *self.shape))
        return tuple((a, self.rng.normal(size=3)) for a in (x, 0.5 * x + y))


def structure(number):
    """The structure of a number: all shapes take turns."""
    rng = np.random.default_rng([number, 20231])
    make = SHAPES[number % len(SHAPES)]
    return Structure(make.__name__, *make(Random(rng)), rng)
