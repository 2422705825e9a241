"""Gated loops, sampled, against the exact kernels of the same networks unrolled, where these are polynomials."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import anywidth as aw
from anywidth import accuracy, gated, zoo
from anywidth.kernels import pair

REFERENCE = Path(__file__).parent / "reference" / "gp4a.npz"
RNG = np.random.default_rng(5)
X, Y = RNG.standard_normal((3, 3)), RNG.standard_normal((2, 3))
CASES = {}


def case(step, *, start="zeros", vectors=(), squares=("W",)):
    """A cell `step(p, h, c, u, n)` of two carries and the input's product u; read out at every state."""

    def init(n):
        params = {"U": aw.Normal((n, 3)), "v": aw.Normal((n,)), "h0": aw.Normal((n,), 0.5)}
        params |= {name: aw.Normal((n, n), 0.7) for name in squares}
        return params | {name: aw.Normal((n,), var, mean) for name, var, mean in vectors}

    def apply(unrolled, p, x):
        n = p["v"].shape[0]

        def body(carry, x_t):
            h, c = step(p, *carry, p["U"] @ x_t / jnp.sqrt(3.0), jnp.sqrt(n))
            return (h, c), h

        carry = (p["h0"] if start == "random" else jnp.zeros(n, x.dtype), jnp.ones(n, x.dtype))
        if unrolled:
            states = []
            for x_t in x:
                carry, h = body(carry, x_t)
                states.append(h)
            states = jnp.stack(states)
        else:
            carry, states = jax.lax.scan(body, carry, x)
        h, _ = carry
        return (states.mean(0) + 0.5 * h) @ p["v"] / jnp.sqrt(n)

    CASES[step.__name__] = [aw.Network(init, functools.partial(apply, unrolled)) for unrolled in (False, True)]
    return step


def product_gate(p, h, c, u, root):
    return h * (p["W"] @ h / root) + u, c


def two_carries(p, h, c, u, root):
    return c + 0.5 * h, c * (p["W"] @ h / root) + u


def two_levels_of_one_weight(p, h, c, u, root):
    gate = p["W"] @ h / root
    return 0.5 * h * gate + p["W"] @ (h * gate) / root + u, c


def decay_and_trained_gain(p, h, c, u, root):
    return p["a"] * h + 0.3 * (p["W"] @ h / root) * p["g"] + p["b"], c * 0.5 + u


case(product_gate)
case(two_carries)
case(two_levels_of_one_weight, start="random")
case(decay_and_trained_gain, vectors=(("a", 0.5, 0.0), ("g", 0.0, 1.0), ("b", 0.3, 0.0)), start="random")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.long) for name in CASES])
def test_against_the_exact_kernel(name):
    """The same input on both sides, and sequences of different lengths."""
    loop, unrolled = CASES[name]
    with jax.enable_x64(True):
        estimate, exact = jax.jit(aw.kernels(loop, points=2**16)), aw.kernels(unrolled)
        scales = [float(k) for k in exact(X, X)]
        for x, y in ((X, Y), (X, X)):
            found, wanted = estimate(x, y), exact(x, y)
            assert wanted.error == (0.0, 0.0)
            for value, error, true, scale in zip(found, found.error, wanted, scales, strict=True):
                assert 0 < error < 0.03 * scale
                assert abs(value - true) < 4 * error, (value, true, error)


@pytest.mark.long
@pytest.mark.parametrize("length", [2, 4, 8])
@pytest.mark.parametrize("cell", [zoo.gru, zoo.lstm])
def test_ntk_against_simulation(cell, length):
    """Seed means at widths 256 and 1024, extrapolated in 1/n, within their standard errors."""
    net = cell(3, varb=0.5)
    with jax.enable_x64(True):
        x, y = np.random.default_rng(length).standard_normal((2, length, 3))
        y = y[: length - 1]
        found = [aw.kernels(net, tol=1e-3)(a, b) for a, b in ((x, y), (x, x))]
        theory = np.array([float(k.ntk) for k in found])
        stated = np.array([float(k.error.ntk) for k in found])
        means, errors = [], []
        for n, seeds in ((256, 160), (1024, 40)):
            empirical = jax.jit(aw.empirical_ntk(net))
            draws = []
            for seed in range(seeds):
                params = net.sample(jax.random.key(seed + n), n)
                draws.append([float(empirical(params, x, y)), float(empirical(params, x, x))])
            means.append(np.mean(draws, 0))
            errors.append(np.std(draws, 0, ddof=1) / np.sqrt(seeds))
    limit = (4 * means[1] - means[0]) / 3
    error = np.hypot(4 * errors[1], errors[0]) / 3
    assert (np.abs(theory - limit) < 3.5 * np.hypot(error, stated)).all(), (theory, limit, error)


@pytest.mark.long
@pytest.mark.parametrize(("tol", "close"), [(1e-4, 1e-4), (2e-6, 2e-6)])
def test_gru_of_the_reference(tol, close):
    """The two sentences of Tensor Programs I; the states of the first against those of the second."""
    reference = np.load(REFERENCE)
    with jax.enable_x64(True):
        vectors = np.asarray(reference["glove_vecs"], float)
        net = zoo.gru(300, jax.lax.erf, gate=half, varb=1.0, pool="none")
        value = aw.nngp(net, tol=tol)(vectors[:7], vectors[7:])
    assert np.abs(value - reference["gru"][:7, 7:]).max() < close


@pytest.mark.long
@pytest.mark.parametrize(("cell", "gain"), [(zoo.gru, 0.5), (zoo.lstm, 0.9)])
def test_given_what_is_sampled_a_cell_is_what_its_paths_are(cell, gain, monkeypatch):
    """Integrating the candidate and the reset gate, or the output gate, stays within the error, which gets smaller."""
    net = cell(3, jax.lax.erf, gate=half, varb=1.0, pool="none")
    with jax.enable_x64(True):
        found, integrated = [], []
        original = gated.given
        for given in (lambda *a: integrated.append(original(*a)) or integrated[-1], lambda *_: None):
            monkeypatch.setattr(gated, "given", given)
            found.append(jax.jit(controlled(net))(X, Y))
    (value, error), (whole, coarse) = found
    assert all(integrated)
    assert (error > 0).all()
    assert error.max() < gain * coarse.max()
    assert (np.abs(value - whole) < 5 * np.hypot(error, coarse)).all()


@pytest.mark.parametrize("net", ["product", pytest.param("gru", marks=pytest.mark.long)])
def test_symmetric_to_the_last_bit(net):
    """K(x, y) and K(y, x) transposed, sampled: examples of one shape and of two."""
    if net == "gru":
        net, pairs = zoo.gru(3, pool="none"), [(X, Y), (X, -X)]
    else:
        init = lambda n: {"A": aw.Normal((n, 3)), "B": aw.Normal((n, 3)), "v": aw.Normal((n,))}  # noqa: E731
        net = aw.Network(init, lambda p, x: p["v"] @ jnp.tanh((p["A"] @ x) * (p["B"] @ x)) / jnp.sqrt(p["v"].size))
        pairs = [(X[0], X[1]), (X[2], X[0])]
    with jax.enable_x64(True):
        kernels = aw.kernels(net, tol=1e-2)
        for x, y in pairs:
            one, two = kernels(x, y), kernels(y, x)
            assert np.max(one.error.ntk) > 0
            for a, b in zip((*one, *one.error), (*two, *two.error), strict=True):
                assert np.array_equal(a, np.transpose(b))


def swap(p, h, c, u, root):
    return c, (p["W"] @ h / root) * h + u


case(swap)


@pytest.mark.long
@pytest.mark.parametrize("more", [False, True])
def test_symmetric_inside_transformations(more):
    """Which example is drawn given the other is not left to the order of the arguments, nor to that of a data set."""
    kernel = aw.nngp(CASES["swap"][0], points=2**10)
    data = np.concatenate([[X, -X, X[::-1]], RNG.standard_normal((4, 3, 3))])
    data[3:, 0] = X[0]  # the same beginning
    order = np.array([4, 0, 6, 2, 5, 1, 3])
    back = np.ix_(np.argsort(order), np.argsort(order))
    with jax.enable_x64(True):
        K = np.asarray(aw.gram(kernel, data))
        assert np.array_equal(K, K.T)
        assert np.array_equal(K, np.asarray(aw.gram(kernel, data[order]))[back])
        if more:
            compiled = jax.jit(kernel)
            assert compiled(X, Y) == compiled(Y, X)
            assert compiled(data[0], data[4]) == compiled(data[4], data[0])
            # tiles of other shapes are other programs, whose sums have another order
            for other in (aw.gram(kernel, data[:5], data), aw.gram(kernel, data, data[:3]).T):
                np.testing.assert_allclose(other, K[: len(other)], rtol=1e-12, atol=1e-13)


@pytest.mark.long
@pytest.mark.parametrize("start", [1.0, 0.0])
def test_derivatives_where_nothing_is_left_to_draw(start):
    """Of K(x, x) in its first argument, with a first token that may be zero (no variance), and in a variance.

    What is drawn at x + t a given x grows like |t|, times the error of the points: differences are off by that times
    the step. Where tokens are zero an estimate jumps, so that the steps are long.
    """
    x = X * np.array([start, 1, 1])[:, None]
    kernel = lambda b, points: aw.nngp(zoo.gru(3, jax.lax.erf, gate=half, varb=b), points=points)  # noqa: E731
    bias = 0.3 if start else None
    along = RNG.standard_normal(X.shape)
    with jax.enable_x64(True):
        slope = jax.jit(jax.grad(lambda a: kernel(bias, 2**14)(a, x)))(x)
        step, points, close = (1e-5, 2**14, 1e-4) if start else (0.05, 2**16, 0.02)
        moved = jax.jit(lambda t: kernel(bias, points)(x + t * along, x))
        wanted = (moved(step) - moved(-step)) / (2 * step)
        assert abs((slope * along).sum() - wanted) < close * abs(wanted)
        own = lambda b: kernel(b, 2**14)(x, x)  # noqa: E731
        change = jax.jit(lambda b: jax.jvp(own, (b,), (1.0,))[1])(0.3)
        own = jax.jit(own)
        assert abs(change - (own(0.3 + 1e-5) - own(0.3 - 1e-5)) / 2e-5) < 1e-6 * abs(change)


def half(t):
    """A sigmoid that has closed forms."""
    return (1 + jax.lax.erf(t)) / 2


def controlled(net):
    """The NNGP kernel and its standard error."""
    return accuracy.controlled(
        lambda x, y, s: pair(net, "nngp", x, y, s), accuracy.Accuracy(points=2**15), lambda: False
    )
