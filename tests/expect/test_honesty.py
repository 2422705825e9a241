"""Stated errors against brute force: random small programs whose expectations have to be sampled."""

import warnings

import jax
import numpy as np
import pytest
from scipy.special import ndtri
from scipy.stats import qmc

import anywidth as aw
import random_programs
from anywidth.accuracy import Accuracy, controlled
from anywidth.kernels import pair
from propagation import network, reference

DRAWS = 4  # examples, and coefficients, of each structure


def deviations(number, draws=DRAWS, count=2**14):
    """Of the answers of one structure: (program, deviation, stated error and the reference's own), an entry a line.

    The kernels of two examples and of one with itself. What is not held at once adapts to a tolerance, so that the rule
    that stops is among what is tested.
    """
    structure = random_programs.structure(number)
    net = network(structure.variances, structure.program, structure.shape[-1])
    if structure.name in random_programs.LOOPS:
        kernels = jax.jit(aw.kernels(net, points=2**14, seed=number))
    else:
        kernels = aw.kernels(net, tol=[3e-3, 1e-3, 3e-4][number % 3], budget=2**16, seed=number)
    out = []
    for draw in range(draws):
        x, y = structure.examples()
        for a, b in ((x, y), (x, x)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", aw.AccuracyWarning)
                found = kernels(a, b)
            wanted, own = reference(structure.variances, structure.program, a, b, count, seed=1000 * number + draw)
            for which, true, sigma in zip(("nngp", "ntk"), wanted, own, strict=True):
                value, error = (np.reshape(getattr(k, which), -1) for k in (found, found.error))
                assert np.isfinite(value).all()
                assert (error > 0).any(), (structure.name, "is not sampled")  # of several outputs, some may be exact
                out += zip([(number, draw)] * value.size, value - true.ravel(), error, sigma.ravel(), strict=True)
    return out


def surprises(found):
    """The part of the answers that are off by more than three standard errors."""
    return np.mean([abs(d) > 3 * np.hypot(e, s) for _, d, e, s in found])


@pytest.mark.slow
def test_errors_are_honest():
    found = [x for number in (0, 3, 7) for x in deviations(number, 1)]
    assert surprises(found) * len(found) <= 1 + 0.02 * len(found)  # those of one program are not independent


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_errors_are_honest_over_many_programs():
    """Two hundred programs: fifty structures with coefficients and examples drawn four times for each."""
    found = [x for number in range(200 // DRAWS) for x in deviations(number)]
    assert len({program for program, *_ in found}) == 200
    assert surprises(found) <= 0.02
    # most answers are known far better than what is tested
    assert np.mean([s < e / 2 for _, _, e, s in found]) > 0.8


# --- loops of which a part is integrated ------------------------------------------------------------------------

VARIANCES = {"U": 0.6, "A": 0.5, "V": 1.5, "C": 1.0, "b": 0.2}
LENGTH = 2


def half(t):
    return (1 + jax.lax.erf(t)) / 2


def gated(p, x):
    """A gated unit, at every step; its candidate is integrated, and its gate sampled."""
    n = p["v"].size

    def step(h, x_t):
        z = half(p["U"] @ x_t / np.sqrt(2) + p["A"] @ h / n**0.5 + p["b"])
        h = (1 - z) * h + z * jax.lax.erf(p["V"] @ x_t / np.sqrt(2) + p["C"] @ h / n**0.5)
        return h, h

    return jax.lax.scan(step, np.zeros(n), x)[1] @ p["v"] / n**0.5


def gated_by_sampling(x, y, seeds=16):
    """E[h_t h'_s], and its standard error, with the gates drawn by brute force."""
    found = [gated_from_points(x, y, np.random.default_rng([seed, 11])) for seed in range(seeds)]
    return np.mean(found, 0), np.std(found, 0) / (seeds - 1) ** 0.5


def gated_from_points(x, y, rng):
    """h_t is a sum over j <= t of z_j (1 - z_{j+1}) ... (1 - z_t) phi(c_j); gates and candidates are independent."""
    inputs, v = np.concatenate([x, y]), VARIANCES
    outer = inputs @ inputs.T / inputs.shape[1]
    T, N = len(x), len(inputs)
    times = np.concatenate([np.arange(T), np.arange(T)])
    H = np.zeros((N, N))  # E[h h'] of all states of both
    points = ndtri(np.clip(qmc.Sobol(N, rng=rng).random(2**16), 1e-16, None))
    for t in range(T):
        before = np.zeros((N, N))  # of the states before each step
        late = np.flatnonzero(times > 0)
        before[np.ix_(late, late)] = H[np.ix_(late - 1, late - 1)]
        gates = v["U"] * outer + v["A"] * before + v["b"]
        c = v["V"] * outer + v["C"] * before
        diagonal = np.diagonal(c)
        phi = 2 / np.pi * np.arcsin(2 * c / np.sqrt(np.outer(1 + 2 * diagonal, 1 + 2 * diagonal)))
        lam, Q = np.linalg.eigh(gates)
        u = points @ (Q * np.sqrt(np.maximum(lam, 0))).T
        g = np.asarray(half(u))
        factors = {}
        for i in range(N):
            for j in range(i - times[i], i + 1):
                factors[i, j] = g[:, j] * np.prod(1 - g[:, j + 1 : i + 1], 1)
        for i in range(N):
            for k in range(N):
                if max(times[i], times[k]) == t:
                    pairs = [(a, b) for a in factors if a[0] == i for b in factors if b[0] == k]
                    H[i, k] = sum((factors[a] * factors[b]).mean() * phi[a[1], b[1]] for a, b in pairs)
    return H[:T, T:]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.long) for s in range(1, 5))])
def test_errors_of_what_is_integrated_in_part_are_honest(seed):
    def init(n):
        shapes = {"U": (n, 2), "A": (n, n), "V": (n, 2), "C": (n, n), "b": (n,), "v": (n,)}
        return {k: aw.Normal(s, var=VARIANCES.get(k, 1.0)) for k, s in shapes.items()}

    kernel = jax.jit(accuracy_of(aw.Network(init, gated), seed))
    rng = np.random.default_rng(seed)
    beyond = []
    for _ in range(5):
        x, y = rng.normal(size=(2, LENGTH, 2))
        for a, b in ((x, 0.5 * x + y), (x, x)):
            value, error = kernel(a, b)
            assert (error > 0).all()
            wanted, own = gated_by_sampling(a, b)
            beyond.append(np.abs(value - wanted) > 3 * np.hypot(error, own))
    assert np.mean(beyond) <= 0.02


def accuracy_of(net, seed):
    """The NNGP kernel and its stated error."""
    return controlled(lambda x, y, s: pair(net, "nngp", x, y, s), Accuracy(points=2**14, seed=seed), lambda: False)
