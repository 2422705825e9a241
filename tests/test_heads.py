"""Networks with two widths, init(n, heads): many heads with scores over the root of their size (Hron et al. 2020)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import anywidth as aw
import two_tokens
from anywidth import Network, NoLimitError, Normal, UnsupportedError, zoo
from anywidth.trace import HEADS, HEADS_ORDER, WIDTHS, fit_dim, fit_number, kind_of, readable

X = jax.random.normal(jax.random.key(1), (2, 2, 3))


def scores(q, k, n, causal=False):
    s = q @ jnp.swapaxes(k, -1, -2) / jnp.sqrt(n)
    return jnp.where(jnp.tri(s.shape[-1], dtype=bool), s, -jnp.inf) if causal else s


def direct(causal=False):
    """One layer on the inputs, read without an output matrix."""

    def init(n, heads):
        return {name: Normal((heads, n, 3), var=1.5 if name == "K" else 1.0) for name in "QKV"} | {
            "r": Normal((heads, n))
        }

    def apply(p, x):
        heads, n = p["r"].shape
        q, k, v = (jnp.einsum("hdi,ti->htd", p[name], x) / jnp.sqrt(3) for name in "QKV")
        o = jax.nn.softmax(scores(q, k, n, causal)) @ v
        return jnp.einsum("hsd,hd->s", o, p["r"]).mean() / jnp.sqrt(n * heads)

    return Network(init, apply)


def layer(style):
    """Embedding, residual attention and readout, written in three ways that are the same network."""

    def init(n, heads):
        wide, square = (n * heads,), (n * heads, n * heads)
        one = (
            {name: Normal((heads, n, n)) for name in "QKVO"}
            if style != "packed"
            else {k: Normal(square) for k in "QKVO"}
        )
        stream = (n,) if style != "packed" else wide
        return one | {"E": Normal((*stream, 3)), "r": Normal(stream), "g": Normal((heads, n), var=0.0)}

    def apply(p, x):
        (heads, n), D = p["g"].shape, p["r"].size
        x = x @ p["E"].T / jnp.sqrt(3)
        if style == "einsum":
            q, k, v = (jnp.einsum("hdi,ti->htd", p[name], x) / jnp.sqrt(D) for name in "QKV")
            o = jnp.einsum("hst,htd->hsd", jax.nn.softmax(scores(q, k, n)), v)
            x = x + jnp.einsum("hsd,hdm->sm", o, p["O"]) / jnp.sqrt(n * heads)
        elif style == "vmap":

            def head(Q, K, V, out):
                q, k, v = (x @ W.T / jnp.sqrt(n) for W in (Q, K, V))
                return jax.nn.softmax(scores(q, k, n)) @ v @ out / jnp.sqrt(n)

            x = x + jax.vmap(head)(p["Q"], p["K"], p["V"], p["O"]).sum(0) / jnp.sqrt(heads)
        else:
            q, k, v = ((x @ p[name].T / jnp.sqrt(D)).reshape(-1, heads, n).transpose(1, 0, 2) for name in "QKV")
            o = (jax.nn.softmax(scores(q, k, n)) @ v).transpose(1, 0, 2).reshape(-1, D)
            x = x + o @ p["O"].T / jnp.sqrt(D)
        return x.mean(0) @ p["r"] / jnp.sqrt(D)

    return Network(init, apply)


def simulated(net, n, heads, seeds, readout="r", dtype=None):
    """Means and standard errors of NNGP (given all but the readout) and NTK of the pairs 01 and 00."""

    def one(key):
        p = net.sample(key, n, dtype, heads=heads)
        g = [jax.grad(net.apply)(p, x.astype(dtype)) for x in X]

        def dots(a, b):
            shares = jax.tree.leaves(jax.tree.map(jnp.vdot, a, b))
            return jnp.stack([jnp.vdot(a[readout], b[readout]), sum(shares)])

        return jnp.stack([dots(g[0], g[1]), dots(g[0], g[0])])

    found = np.asarray(jax.jit(lambda keys: jax.lax.map(one, keys))(jax.random.split(jax.random.key(7), seeds)))
    return found.mean(0), found.std(0) / np.sqrt(seeds)


def theory(net, tol=3e-4):
    k = aw.kernels(net, tol=tol)
    return np.array([[float(v) for v in (r.nngp, r.ntk)] for r in (k(X[0], X[1]), k(X[0], X[0]))])


@pytest.mark.parametrize("causal", [False, pytest.param(True, marks=pytest.mark.long)])
def test_against_simulation_as_both_widths_grow(causal):
    net = direct(causal)
    limit = theory(net)
    for n, heads in ((48, 24), (96, 48)):
        mean, error = simulated(net, n, heads, 400)
        assert (abs(mean - limit) < 4 * error + 2e-3 * abs(limit)).all(), (mean, limit, error)


BLOCKS = [(1, "attention", False), (1, "transformer", True), (2, "attention", False), (2, "transformer", True)]


@pytest.mark.parametrize(
    ("depth", "block", "causal"), [BLOCKS[0], *(pytest.param(*b, marks=pytest.mark.long) for b in BLOCKS[1:])]
)
def test_blocks_against_integrals(depth, block, causal):
    """Residual blocks, with layer norm and without, to the tolerance and within four stated errors."""
    net = aw.kernels(zoo.attention(3, depth, block=block, causal=causal), tol=1e-3)
    for y in X:
        k = net(X[0], y)
        exact = two_tokens.kernels(X[0], y, depth, block, causal)
        for value, error, wanted in zip((k.nngp, k.ntk), k.error, exact, strict=True):
            assert 0 < error < 2e-3 * wanted
            assert abs(value - wanted) < 4 * error


@pytest.mark.long
@pytest.mark.parametrize("block", ["attention", "transformer"])
def test_depth_two_as_both_widths_grow(block):
    """Simulations of 8 and 16 heads of these sizes, without their term of order 1/n, against the integrals."""
    net = zoo.attention(3, 2, block=block)
    exact = np.array([two_tokens.kernels(X[0], y, 2, block, False) for y in (X[1], X[0])])
    (small, first), (large, second) = (
        simulated(net, n, n, seeds, "v", jnp.float32) for n, seeds in ((8, 3000), (16, 1000))
    )
    error = np.hypot(2 * second, first)
    assert (error < 0.04 * exact).all()
    assert (abs(2 * large - small - exact) < 4 * error).all(), (2 * large - small, exact, error)


@pytest.mark.long
def test_spellings_agree():
    einsum, vmapped, packed = (theory(layer(style), 1e-3) for style in ("einsum", "vmap", "packed"))
    np.testing.assert_allclose(vmapped, einsum, rtol=1e-5)
    np.testing.assert_allclose(packed, einsum, rtol=1e-5)


def test_widths_are_told_apart():
    for size, kind in (
        (lambda n, h: 2 * n, {"n"}),
        (lambda n, h: h // 2, {"heads"}),
        (lambda n, h: n * h, {"n", "heads"}),
    ):
        dim = fit_dim([size(n, h) for n, h in zip(WIDTHS, HEADS, strict=True)])
        assert kind_of(dim) == kind
    value, power = fit_number([3 * (n * h) ** -0.5 for n, h in zip(WIDTHS, HEADS, strict=True)])
    assert value == pytest.approx(3.0, rel=1e-12)
    assert power == -(1 + HEADS_ORDER) / 2
    assert readable(f"like n^{power}") == "like n^-1/2 heads^-1/2"
    assert readable("like n^1/3") == "like n^1/3"


def test_what_is_refused_and_why():
    init = direct().init

    def unscaled(p, x):
        return direct().apply(p, x) * jnp.sqrt(p["r"].shape[0])

    with pytest.raises(NoLimitError, match=r"diverges like heads\^1/2"):
        aw.nngp(Network(init, unscaled))(X[0], X[1])

    def normed(p, x):
        heads, n = p["r"].shape
        q, k, v = (jnp.einsum("hdi,ti->htd", p[name], x) for name in "QKV")
        o = jax.nn.softmax(scores(q, k, n)) @ v
        o = o / jnp.sqrt((o**2).mean(-1, keepdims=True))
        return jnp.einsum("hsd,hd->s", o, p["r"]).mean() / jnp.sqrt(n * heads)

    with pytest.raises(UnsupportedError, match="stays random"):
        aw.nngp(Network(init, normed))(X[0], X[1])
    few = Network(lambda n: init(n, 4), lambda p, x: direct().apply(p, x))
    with pytest.raises((NoLimitError, UnsupportedError)):
        aw.nngp(few)(X[0], X[1])


def test_finite_networks_have_both_widths():
    net = direct()
    assert net.sample(jax.random.key(0), 8, heads=4)["Q"].shape == (4, 8, 3)
    with pytest.raises(ValueError, match="two widths"):
        net.sample(jax.random.key(0), 8)
    one = net.along(lambda n: n // 2)
    p = one.sample(jax.random.key(0), 8)
    assert p["Q"].shape == (4, 8, 3)
    rates = lambda n, heads: {"Q": 1 / (n * heads)}  # noqa: E731
    half = aw.empirical_ntk(net, lr=rates)(p, X[0], X[1])
    assert np.isfinite(half)
    with pytest.raises(ValueError, match="heads"):
        aw.check(net, X)


def test_it_is_explained_and_drawn():
    net = direct()
    found = aw.explain(net, X[0], X[1])
    k = aw.kernels(net, tol=1e-3)(X[0], X[1])
    np.testing.assert_allclose(sum(found.contributions.values()), k.ntk, atol=4 * k.error.ntk)
    np.testing.assert_allclose(found.contributions["['r']"], k.nngp, atol=4 * k.error.nngp)
    lines = [" ".join(line.split()) for line in str(found).splitlines()]
    assert "E[h^3_{i,j} h^3'_{i',j'}] = E[h^1_i h^1'_i'] E[h^2_j h^2'_j']" in lines
    assert "√(n heads)" in aw.draw(net, X[0]).svg


@pytest.mark.long
def test_gradients_in_the_inputs():
    """Through an expectation that is sampled, of a softmax, which subtracts a maximum under stop_gradient."""
    ntk = jax.jit(lambda x: aw.ntk(direct())(x, 0.6 * X[0] + X[1]))
    step = 1e-3 * jax.random.normal(jax.random.key(3), X[0].shape)
    slope = jax.jit(jax.grad(ntk))(X[0])
    np.testing.assert_allclose(jnp.vdot(slope, 2 * step), ntk(X[0] + step) - ntk(X[0] - step), rtol=1e-5)
