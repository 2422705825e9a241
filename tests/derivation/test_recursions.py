"""The recursions that a derivation prints, evaluated as they stand, without any other knowledge of the network."""

import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import anywidth as aw
import networks
import test_rates
from anywidth import zoo
from anywidth.derivation import terms as tm
from anywidth.derivation.derive import Book, rules
from anywidth.derivation.reading import reading
from anywidth.derivation.terms import Index, Num, Op, Sym

ROWS = np.random.default_rng(1).normal(size=(9, 13))
X = np.random.default_rng(0).normal(size=(9, 3))
N = 7.0  # every power of n cancels, so any number does


def relu(q, r, c):
    angle = math.acos(min(c / math.sqrt(q * r), 1.0))
    value = math.sqrt(q * r) * (math.sin(angle) + (math.pi - angle) * math.cos(angle)) / (2 * math.pi)
    return value, (math.pi - angle) / (2 * math.pi)


def erf(q, r, c):
    root = (1 + 2 * q) * (1 + 2 * r)
    return 2 / math.pi * math.asin(2 * c / math.sqrt(root)), 4 / math.pi / math.sqrt(root - 4 * c * c)


PAIRS = {"fn:relu": relu, "fn:erf": erf}
W, STEP = np.exp(np.arange(-28.0, 9.0, 0.3)), 0.3  # exponentially good for what dies out like powers of w at both ends


def normalised(own, other, cross, moved):
    """E[relu(g_i / |g|) relu(g'_j / |g'|)] for all i and j, and its derivative as the covariance of g and g' is moved.

    With r^(-1/2) = 2/sqrt(pi) int exp(-w^2 r) dw for each copy: g and g' are Gaussian under the weight too, and what is
    left is the kernel of relu.
    """
    m = len(own)
    w, v = (a.ravel()[:, None, None] for a in np.meshgrid(W, W, indexing="ij"))
    weight = 2 * np.concatenate([np.repeat(a[:, 0] ** 2, k, 1) for a, k in ((w, m), (v, len(other)))], 1)
    whole = np.block([[own, cross], [cross.T, other]])
    turn = np.block([[0 * own, moved], [moved.T, 0 * other]])
    system = np.eye(len(whole)) + whole * weight[:, None, :]
    under = np.linalg.solve(system, np.broadcast_to(whole, system.shape))
    turned = np.linalg.solve(system, turn * weight[:, None, :])  # of log det: its trace
    moving = np.linalg.solve(system, turn - turn * weight[:, None, :] @ under)
    (q, r, c), (dq, dr, dc) = (
        (size[:, :m, None], size[:, None, m:], a[:, :m, m:])
        for a, size in ((a, np.diagonal(a, 0, 1, 2)) for a in (under, moving))
    )
    root = np.sqrt(np.maximum(q * r - c * c, 0.0))  # may be rounding, where the weight leaves nothing
    open_angle = np.pi - np.arctan2(root, c)
    pair = (root + c * open_angle) / (2 * np.pi)
    slope = (open_angle * dc + root * (dq / q + dr / r) / 2) / (2 * np.pi)
    slope = slope - pair * np.trace(turned, 0, 1, 2)[:, None, None] / 2
    front = 4 / np.pi * STEP**2 * w * v / np.sqrt(np.linalg.det(system))[:, None, None]
    return (front * pair).sum(0), (front * slope).sum(0)


class Evaluator:
    """`value(term)` for two examples: unprimed symbols are of the first one, primed symbols of the second."""

    def __init__(self, net, x, y, lr=None):
        read, other = reading(net, x, lr), reading(net, y, lr)
        self.rates = {path: c * N ** float(p) for path, (c, p) in (read.rates or {}).items()}
        self.sizes = [len(x), len(y)]
        self.inputs = [np.asarray(x), np.asarray(y)]
        self.vars = {p.leaf.name: float(p.leaf.var) * N ** float(2 * p.leaf.size) for p in read.parameters.items}
        self.definitions = {(d.symbol.name, d.symbol.sup): d for d in read.definitions if d.kind == "number"}
        # of the first example, of both, of the second
        pairs = (read, read), (read, other), (other, other)
        self.rules = [
            {
                (r.definition.symbol.name, r.definition.symbol.sup, r.definition.kind == "start"): r
                for r in rules(list(zip(p.definitions, q.definitions, strict=True)), Book(p.definitions), p.ways)
            }
            for p, q in pairs
        ]
        self.inner = functools.cache(self._inner)
        self.batches = functools.cache(self._batches)

    def value(self, t, at, copies=(0, 1)):
        """`at` gives the numbers of index letters, by letter and prime."""

        def v(u):
            return self.value(u, at, copies)

        if isinstance(t, Num):
            return t.value * N ** float(t.power)
        if isinstance(t, Index):
            return at[t.letter, t.primed] + t.shift
        if isinstance(t, Sym):
            d = self.definitions[t.name, t.sup]
            copy = copies[t.primed]
            here = {(i.letter, False): int(v(s)) for i, s in zip(d.indices, t.sub, strict=True)}
            return self.value(d.body, here, (copy, copy))
        a = t.args
        if t.head in ("E", "theta"):
            x, y = (a[0].args[0],) * 2 if isinstance(a[0], Op) else a
            sides = [(s.name, s.sup, tuple(int(v(i)) for i in s.sub), copies[s.primed]) for s in (x, y)]
            return self.inner(*sides)[t.head == "theta"]
        if t.head == "sum":
            i, copy = a[0], copies[a[0].primed]
            return sum(self.value(a[1], at | {(i.letter, i.primed): k + 1}, copies) for k in range(self.sizes[copy]))
        if t.head == "fn:softmax":
            i, copy = a[0], copies[a[0].primed]
            terms = [
                math.exp(self.value(a[1], at | {(i.letter, i.primed): k + 1}, copies)) for k in range(self.sizes[copy])
            ]
            return terms[int(v(i)) - 1] / sum(terms)
        if t.head == "fn:dot":
            p, q = ((*self.inputs[copies[s.primed]][[int(v(i)) - 1 for i in s.sub]],) for s in a)
            return float(np.dot(p[0], q[0])) if a[0].sub else float(self.inputs[copies[0]] @ self.inputs[copies[1]])
        if t.head == "fn:var":
            return self.vars[a[0].leaf]
        if t.head == "fn:rate":
            return self.rates[a[0].leaf]
        if t.head == "fn:where":
            return v(a[1]) if v(a[0]) else v(a[2])
        simple = {
            "add": lambda *s: sum(s), "mul": lambda *s: math.prod(s), "pow": lambda b, e: b**e,
            "fn:ge": lambda p, q: p >= q, "fn:same": lambda p, q: float(p == q),
        }  # fmt: skip
        return simple[t.head](*map(v, a))

    def _inner(self, one, two):
        """(E[a b], Theta[a, b]) from the printed rule of the symbol."""
        (name, sup, sub, copy), (name2, sup2, sub2, copy2) = one, two
        assert (name, sup) == (name2, sup2)  # the recursions close in these networks
        starts = [bool(s) and s[0] == 0 for s in (sub, sub2)]
        if copy > copy2:
            return self.inner(two, one)
        rule = self.rules[copy + copy2][name, sup, any(starts)]
        if any(starts):
            assert tm.is_number(rule.covariance, 0.0)
            assert tm.is_number(rule.theta, 0.0)
            return 0.0, 0.0
        d = rule.definition
        at = {(i.letter, p): k for p, s in ((False, sub), (True, sub2)) for i, k in zip(d.indices, s, strict=True)}
        copies = (copy, copy2)
        if rule.covariance is not None:
            return self.value(rule.covariance, at, copies), self.value(rule.theta, at, copies)
        if rule.argument is None:
            value, slope = self.batches(name, sup, copies)
            return value[sub[0] - 1, sub2[0] - 1], slope[sub[0] - 1, sub2[0] - 1]
        u, v = rule.argument, tm.primed(rule.argument)
        q, r, c = (self.value(tm.expectation(*p), at, copies) for p in ((u, u), (v, v), (u, v)))
        value, slope = PAIRS[d.body.head](q, r, c)
        return value, slope * self.value(tm.theta(u, v), at, copies)

    def _batches(self, name, sup, copies):
        """(E[s_i s'_j], Theta[s_i, s'_j]) of relu(c g_i / |g|), |g| over the batch, from the covariances of g."""
        rule = self.rules[sum(copies)][name, sup, False]
        (g,) = {replace(a, sub=()) for a in rule.arguments}
        scale = 1.0
        for d in (rule.definition, rule.twin):
            i, k = d.indices[0], Index("k")
            square = Op("sum", (k, tm.power(replace(g, sub=(k,)), 2)))
            (size,) = (f for f in d.body.args[0].args if isinstance(f, Num))
            assert d.body == tm.fn("relu", tm.div(tm.mul(size, replace(g, sub=(i,))), tm.power(square, 0.5)))
            scale *= size.value
        one, two = ([(g.name, g.sup, (j + 1,), c) for j in range(self.sizes[c])] for c in copies)
        own, other = (np.array([[self.inner(a, b)[0] for b in e] for a in e]) for e in (one, two))
        both = np.array([[self.inner(a, b) for b in two] for a in one])
        return [scale * np.asarray(a) for a in normalised(own, other, both[..., 0], both[..., 1])]

    def kernels(self):
        """Of a number, or of an output for each row of the examples."""
        if ("f", (), False) in self.rules[1] and not self.rules[1]["f", (), False].definition.indices:
            return self.inner(("f", (), (), 0), ("f", (), (), 1))
        one, two = ([("f", (), (j + 1,), c) for j in range(self.sizes[c])] for c in (0, 1))
        return np.moveaxis(np.array([[self.inner(a, b) for b in two] for a in one]), -1, 0)


BOTTLENECK = networks.get("mlp_bottleneck_expand")
NETWORKS = {
    "mlp": (zoo.mlp(3, 3, varb=0.2), X[0], X[1]),
    "rnn": (zoo.rnn(3, varu=2.0, varb=0.2, varw=0.9), X[:4], X[4:9]),
    "transformer": (zoo.transformer(3, 2, varu=1.6, varb=0.1, varw=1.3), X[:3], X[3:7]),
    "causal transformer": (zoo.transformer(3, 1, causal=True), X[:3], X[3:5]),
    "widths n/2 and 4n": (BOTTLENECK.net, BOTTLENECK.x, BOTTLENECK.y),
    "batchnorm": (zoo.batchnorm_mlp(13, 2), ROWS[:5], ROWS[5:9]),
    "standard parametrization": (
        test_rates.standard(),
        X[0],
        X[1],
        lambda n: {"W": 1 / n, "v": 2 / n, "b": [0.5, 0.0]},
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_printed_recursions_give_the_kernels(name):
    net, x, y, *lr = NETWORKS[name]
    found = Evaluator(net, jnp.asarray(x), jnp.asarray(y), *lr).kernels()
    expected = jax.jit(lambda x, y: tuple(aw.kernels(net, lr=lr[0] if lr else None)(x, y)))(x, y)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-13)
