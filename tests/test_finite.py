"""Finite width, and `check` against kernels that are known without the engine."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anywidth import Network, Normal, zoo
from anywidth.finite import simulation
from anywidth.finite.empirical import empirical_nngp, empirical_ntk
from anywidth.finite.simulation import Check, check, loglog_slope, simulate


@pytest.fixture
def x(rng):
    return rng.normal(size=(5, 3))


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def jacobian(net, params, x):
    leaves = jax.tree.leaves(jax.jacrev(net.apply)(params, x))
    shape = jax.eval_shape(net.apply, params, x).shape
    return jnp.concatenate([leaf.reshape(*shape, -1) for leaf in leaves], axis=-1)


@pytest.mark.parametrize(
    "net",
    [
        zoo.rnn(3, varb=0.2),
        zoo.rnn(3, pool="none"),
        pytest.param(zoo.transformer(3, 2, varb=0.1), marks=pytest.mark.long),
        zoo.batchnorm_mlp(3, epsilon=0.1),
    ],
    ids=["rnn", "rnn tokens", "transformer", "batchnorm"],
)
def test_empirical_ntk_is_the_product_of_jacobians(net, rng, key):
    x, y = jnp.asarray(rng.normal(size=(5, 3))), jnp.asarray(rng.normal(size=(4, 3)))
    params = net.sample(key, 12)
    expected = jnp.tensordot(jacobian(net, params, x), jacobian(net, params, y), [-1, -1])
    K = jax.jit(empirical_ntk(net))(params, x, y)
    assert K.shape == expected.shape
    np.testing.assert_allclose(K, expected, rtol=1e-10, atol=1e-12)


def test_empirical_nngp(x, key):
    net = zoo.rnn(3, pool="none")
    params = net.sample(key, 12)
    out = net.apply(params, x)
    np.testing.assert_allclose(empirical_nngp(net)(params, x, x[:2]), np.outer(out, out[:2]), rtol=1e-12)


def test_simulate_agrees_with_empirical_ntk_on_examples_of_different_shapes(rng, key):
    net = zoo.batchnorm_mlp(3, epsilon=0.1)
    X = [rng.normal(size=(b, 3)) for b in (4, 2, 4)]
    keys = jax.random.split(key, 3)
    found = simulate(net, X, 16, keys)
    assert found.shape == (3, 1, 10, 10)
    one = jax.jit(empirical_ntk(net))
    for seed in range(3):
        params = net.sample(keys[seed], 16)
        blocks = [[one(params, jnp.asarray(x), jnp.asarray(y)) for y in X] for x in X]
        np.testing.assert_allclose(found[seed, 0], np.block(blocks), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "together", [500, pytest.param(1, marks=pytest.mark.long), pytest.param(2**24, marks=pytest.mark.long)]
)
def test_a_seed_depends_on_its_own_key_only(x, key, monkeypatch, together):
    """However many are worked on together, which depends on memory."""
    net, keys = zoo.rnn(3), jax.random.split(key, 5)
    alone = simulate(net, [x], 10, keys[3:4])
    monkeypatch.setattr(simulation, "_TOGETHER", together)
    np.testing.assert_allclose(simulate(net, [x], 10, keys)[3], alone[0], rtol=1e-12)


def linear(classes):
    """Two linear layers: NNGP x.y/d and NTK 2 x.y/d, at infinite width."""
    return Network(
        lambda n: {"u": Normal((n, 3)), "v": Normal((n, classes) if classes else (n,))},
        lambda p, x: jnp.tanh(0.0) + (p["u"] @ x) @ p["v"] / jnp.sqrt(3 * p["v"].shape[0]),
    )


@pytest.fixture
def known(monkeypatch):
    monkeypatch.setattr(simulation, "ntk", lambda net: lambda x, y: 2 * x @ y / 3)
    monkeypatch.setattr(simulation, "nngp", lambda net: lambda x, y: x @ y / 3)


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("classes", [None, 4])
def test_check_finds_the_slope(rng, classes):
    result = check(linear(classes), rng.normal(size=(3, 3)), widths=(16, 64, 256), seeds=60)
    assert abs(result.slope + 0.5) < 4 * result.slope_stderr
    assert result.slope_stderr < 0.1
    assert result.deviations.shape == (3, 60)
    assert np.all(np.abs(result.means - result.limit) < 5 * result.stderrs)


@pytest.mark.usefixtures("known")
def test_check_of_the_nngp(rng):
    result = check(linear(None), rng.normal(size=(3, 3)), widths=(16, 64), seeds=20, kernel="nngp", draws=500)
    assert np.all(np.abs(result.means - result.limit) < 5 * result.stderrs)
    assert result.medians.max() < 0.2


@pytest.mark.usefixtures("known")
def test_check_sees_a_wrong_theory(rng, monkeypatch):
    monkeypatch.setattr(simulation, "ntk", lambda net: lambda x, y: 1.1 * 2 * x @ y / 3)
    result = check(linear(None), rng.normal(size=(3, 3)), widths=(64, 512, 4096), seeds=20)
    assert result.medians[-1] > 0.08
    assert result.slope > -0.35


@pytest.mark.usefixtures("known")
def test_check_prints_a_table_and_repeats_itself(rng):
    X = rng.normal(size=(2, 3))
    a, b = (check(linear(None), X, widths=(32, 16), seeds=3) for _ in range(2))
    assert isinstance(a, Check)
    assert a.widths == (16, 32)
    np.testing.assert_array_equal(a.deviations, b.deviations)
    lines = str(a).splitlines()
    assert "median" in lines[1]
    assert lines[2].split()[0] == "16"
    assert lines[-1].startswith("slope ")
    assert repr(a) == str(a)


@pytest.mark.usefixtures("known")
def test_check_refuses(rng):
    X = rng.normal(size=(2, 3))
    with pytest.raises(ValueError, match="kernel is"):
        check(linear(None), X, kernel="NTK")
    with pytest.raises(ValueError, match="needs a width"):
        check(linear(None), X, widths=())
    with pytest.raises(ValueError, match="reconciles"):
        check(linear(4), X, copies=())


@pytest.mark.usefixtures("known")
def test_plot(rng, tmp_path):
    pytest.importorskip("matplotlib")
    ax = check(linear(None), rng.normal(size=(2, 3)), widths=(16, 32), seeds=3).plot()
    ax.figure.savefig(tmp_path / "check.png")
    assert (tmp_path / "check.png").stat().st_size > 1000


def test_plot_without_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    result = Check("ntk", (1, 2), np.ones((2, 3)), 0.0, 0.0, np.ones((1, 1)), np.ones((2, 1, 1)), np.ones((2, 1, 1)))
    with pytest.raises(ImportError, match=r"anywidth\[plots\]"):
        result.plot()


def test_slope_of_a_power_is_exact():
    widths = np.array([64, 128, 256])
    slope, stderr = loglog_slope(widths, (widths**-0.5)[:, None] * np.ones(4))
    assert slope == pytest.approx(-0.5)
    assert stderr == pytest.approx(0, abs=1e-12)
    assert np.isnan(loglog_slope([64], np.ones((1, 5)))[0])
