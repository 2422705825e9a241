"""Loops that keep a part of their state: the scan against the same loop written out, of which nothing is carried."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import anywidth as aw
from anywidth import _compat, loops

rng = np.random.default_rng(7)
X, Y = rng.normal(size=(2, 3, 3))


def last(h, states):
    return h


def mean(h, states):
    return states.mean(0)


def leaky(p, x, h, phi, wide):
    return 0.7 * h + 0.3 * phi(wide(p["W"], h) + p["U"] @ x)


def masked(p, x, h, phi, wide):
    return jnp.where(x[0] > 0, phi(wide(p["W"], h) + p["U"] @ x), h)


def residual(p, x, h, phi, wide):
    """Weight-shared layers of a residual network: the state itself is Gaussian."""
    return h + 0.5 * wide(p["W"], phi(h)) + p["U"] @ x


def momentum(p, x, state, phi, wide):
    h, v = state
    v = 0.5 * v + phi(wide(p["W"], h) + p["U"] @ x)
    return h + 0.1 * v, v


def tokens(p, x, h, phi, wide):
    """A state with a finite axis, along which it is mixed."""
    return 0.5 * h + phi(wide(p["W"], jnp.roll(h, 1, 0)) + x[:2, None] * p["U"][:, 0])


# the step, what it starts from (zero, or a number), its shape, what is read
LOOPS = {
    "leaky": (leaky, 0.0, (), last),
    "leaky, averaged": (leaky, 0.0, (), mean),
    "leaky, from one": (leaky, 1.0, (), last),
    "masked": (masked, 0.0, (), last),
    "residual": (residual, 0.0, (), last),
    "momentum": (momentum, 0.0, (), last),
    "tokens": (tokens, 0.0, (2,), last),
}
ABOVE = {"leaky, averaged", "masked"}
LONG = LOOPS.keys() - {"leaky, averaged"}


def network(name, scan, phi=jax.nn.relu, above=False):
    step, start, shape, read = LOOPS[name]

    def init(n):
        return {"U": aw.Normal((n, 3)), "W": aw.Normal((n, n)), "A": aw.Normal((n, n)), "v": aw.Normal((n,))}

    def apply(p, x):
        n = p["v"].shape[0]

        def wide(w, h):
            return h @ w.T / jnp.sqrt(n)

        def one(state, x_t):
            state = step(p, x_t, state, phi, wide)
            return state, state[0] if isinstance(state, tuple) else state

        h = jnp.full((*shape, n), start)
        state = (h, h) if step is momentum else h
        if scan:
            state, states = lax.scan(one, state, x)
        else:
            states = []
            for x_t in x:
                state, h = one(state, x_t)
                states.append(h)
            states = jnp.stack(states)
        h = read(state[0] if isinstance(state, tuple) else state, states)
        if above:
            h = phi(wide(p["A"], h))
        out = h @ p["v"] / jnp.sqrt(n)
        return out.sum() if shape else out

    return aw.Network(init, apply)


@pytest.fixture(autouse=True)
def short_loops_too(monkeypatch):
    monkeypatch.setattr(loops, "_SHORT", 0)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long) if n in LONG else n for n in LOOPS])
def test_the_loop_written_out(name):
    """Of the same and of different lengths, of one example with itself, with a layer above."""
    above = name in ABOVE
    found, wanted = (jax.jit(aw.kernels(network(name, scan, above=above)).values) for scan in (True, False))
    for x, y in ((X, Y[:2]), (X, X)):
        a, b = found(x, y), wanted(x, y)
        # at correlation one a rounding error moves the angle by its root
        np.testing.assert_allclose((a.nngp, a.ntk), (b.nngp, b.ntk), rtol=1e-7)


@pytest.mark.parametrize("name", ["leaky", pytest.param("tokens", marks=pytest.mark.long)])
def test_one_program_for_all_lengths(name):
    kernel = aw.nngp(network(name, True))
    sizes = [equations(jax.make_jaxpr(kernel)(*rng.normal(size=(2, length, 3))).jaxpr) for length in (3, 9)]
    assert sizes[0] == sizes[1]


@pytest.mark.long
@pytest.mark.parametrize("name", ["leaky", "residual"])
def test_gradients(name):
    kernel = aw.ntk(network(name, True))
    for y in (X, Y):
        f = jax.jit(lambda x, y=y: kernel(x, y))
        direction = rng.normal(size=X.shape)
        slope = (f(X + 1e-6 * direction) - f(X - 1e-6 * direction)) / 2e-6
        np.testing.assert_allclose((jax.jit(jax.grad(f))(X) * direction).sum(), slope, rtol=1e-5)


def equations(jaxpr):
    return sum(1 + sum(map(equations, _compat.sub_jaxprs(eqn))) for eqn in jaxpr.eqns)


@pytest.mark.long
@pytest.mark.parametrize("kept", [True, False])
def test_a_trained_start(kept):
    """What the loop starts from meets what it carries, of sequences of different lengths."""

    def kernels(scan):
        def step(p, h, x_t):
            new = jax.nn.relu(p["W"] @ h / jnp.sqrt(h.size) + p["U"] @ x_t)
            return 0.5 * h + new if kept else new

        def apply(p, x):
            h = p["h"]
            if scan:
                h, _ = lax.scan(lambda h, x_t: (step(p, h, x_t), None), h, x)
            else:
                for x_t in x:
                    h = step(p, h, x_t)
            return p["v"] @ h / jnp.sqrt(h.size)

        shapes = lambda n: {"U": (n, 3), "W": (n, n), "h": (n,), "v": (n,)}  # noqa: E731
        return jax.jit(aw.kernels(aw.Network(lambda n: {k: aw.Normal(s) for k, s in shapes(n).items()}, apply)).values)

    for y in (Y, Y[:2]):
        a, b = (kernels(scan)(X, y) for scan in (True, False))
        np.testing.assert_allclose((a.nngp, a.ntk), (b.nngp, b.ntk), rtol=1e-10)
