"""Layers above the states of a loop: their variances ask for inner products of the states of one and the same loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import anywidth as aw

rng = np.random.default_rng(5)
X, Y = rng.normal(size=(2, 4, 3))
READ = {
    "one state": lambda h: h[2],
    "weighted": lambda h: jnp.arange(1.0, 5.0) @ h,
    "mean": lambda h: h.mean(0),
    "two states": lambda h: h[3] - 0.5 * h[1],
}
LONG = {"mean", "two states"}


def network(read, scan):
    def init(n):
        return {"U": aw.Normal((n, 3)), "W": aw.Normal((n, n)), "A": aw.Normal((n, n)), "v": aw.Normal((n,))}

    def apply(p, x):
        n = p["v"].shape[0]

        def step(h, x_t):
            h = jax.nn.relu(p["W"] @ h / jnp.sqrt(n) + p["U"] @ x_t)
            return h, h

        h = jnp.zeros(n)
        if scan:
            _, states = lax.scan(step, h, x)
        else:
            states = jnp.stack([h := step(h, x_t)[0] for x_t in x])
        return p["v"] @ jax.nn.relu(p["A"] @ read(states) / jnp.sqrt(n)) / jnp.sqrt(n)

    return aw.Network(init, apply)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long) if n in LONG else n for n in READ])
def test_a_layer_above_the_states(name):
    found, wanted = (aw.kernels(network(READ[name], scan)) for scan in (True, False))
    for kind in ("nngp", "ntk"):
        np.testing.assert_allclose(getattr(found(X, Y), kind), getattr(wanted(X, Y), kind), rtol=1e-10)
        # at correlation one a rounding error moves the angle by its root
        np.testing.assert_allclose(getattr(found(X, X), kind), getattr(wanted(X, X), kind), rtol=1e-7)
