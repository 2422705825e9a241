"""Learning-rate multipliers: parametrizations against simulation, and what their errors say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import anywidth as aw
from anywidth import Network, Normal
from anywidth.rates import rates_at, rates_of, width_of

x, y = np.array([0.9, -0.4, 1.1]), np.array([0.5, 0.8, 0.7])
relu = jax.nn.relu


def standard():
    def init(n):
        return {
            "U": Normal((n, 3), 1 / 3),
            "b": [Normal((n,), 0.0), Normal((n,), 0.0)],
            "W": Normal((n, n), 2 / n),
            "v": Normal((n,), 1 / n),
        }

    def apply(p, x):
        h = relu(p["U"] @ x + p["b"][0])
        return p["v"] @ relu(p["W"] @ h + p["b"][1])

    return Network(init, apply)


def ntk_parametrization():
    def init(n):
        return standard().init(n) | {"W": Normal((n, n), 2.0), "v": Normal((n,))}

    def apply(p, x):
        n = p["v"].size
        h = relu(p["U"] @ x + p["b"][0])
        return p["v"] @ relu(p["W"] @ h / jnp.sqrt(n) + p["b"][1]) / jnp.sqrt(n)

    return Network(init, apply)


def maximal_update():
    """The abc-parametrization of Tensor Programs IV for SGD with learning rate one."""

    def init(n):
        return standard().init(n) | {"U": Normal((n, 3), 1 / (3 * n))}

    def apply(p, x):
        n = p["v"].size
        h = relu(jnp.sqrt(n) * (p["U"] @ x + p["b"][0]))
        return p["v"] @ relu(p["W"] @ h + jnp.sqrt(n) * p["b"][1]) / jnp.sqrt(n)

    return Network(init, apply)


def maximal_update_by_rates():
    """The same written as a standard network with a small readout and rates that grow."""

    def apply(p, x):
        return standard().apply(p, x) / jnp.sqrt(p["v"].size)

    return Network(standard().init, apply), lambda n: {"U": n, "b": n}


def zero_residual():
    """A zero-initialised branch in standard parametrization: its matrix has no size of its own."""

    def init(n):
        return {"U": Normal((n, 3), 1 / 3), "W": Normal((n, n), 0.0), "v": Normal((n,), 1 / n), "c": Normal((), 0.0)}

    def apply(p, x):
        h = p["U"] @ x
        return p["v"] @ relu(h + p["W"] @ relu(h)) + p["c"]

    return Network(init, apply)


CASES = {
    "standard, 1/n for all": (standard(), lambda n: 1 / n),
    "standard, 1/n where it diverges": (standard(), lambda n: {"W": 1 / n, "v": 1 / n}),
    "ntk, several rates": (ntk_parametrization(), {"b": [3.0, 0.0], "v": 0.5}),
    "frozen but the readout": (ntk_parametrization(), {"U": 0, "W": 0, "b": 0}),
    "maximal update": (maximal_update(), None),
    "maximal update by rates": maximal_update_by_rates(),
    "zero residual": (zero_residual(), lambda n: {"W": 1 / n, "v": 1 / n}),
}


QUICK = {"standard, 1/n for all", "maximal update", "zero residual"}


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.long) for n in CASES])
def test_against_simulation(name):
    net, lr = CASES[name]
    result = aw.check(net, np.stack([x, y]), widths=(32, 128), seeds=100, lr=lr)
    noise = 4 * result.stderrs[-1] + 0.6 * np.abs(result.means[-1] - result.means[0]) + 1e-12
    assert (np.abs(result.means[-1] - result.limit) < noise).all(), result
    assert result.medians[-1] < 0.3


def test_parametrizations_that_are_one():
    """Standard with 1/n where it diverges is the NTK parametrization; maximal update can be written in two ways."""
    a = aw.kernels(standard(), lr=lambda n: {"W": 1 / n, "v": 1 / n})(x, y)
    b = aw.kernels(ntk_parametrization())(x, y)
    np.testing.assert_allclose(tuple(a), tuple(b), rtol=1e-14)
    net, lr = maximal_update_by_rates()
    np.testing.assert_allclose(aw.ntk(maximal_update())(x, y), aw.ntk(net, lr=lr)(x, y), rtol=1e-14)


def test_the_ntk_is_linear_in_the_rates():
    net = ntk_parametrization()
    names = ["U", "W", "b", "v"]
    shares = [float(aw.ntk(net, lr={k: float(k == name) for k in names})(x, y)) for name in names]
    assert sum(shares) == pytest.approx(float(aw.ntk(net)(x, y)), rel=1e-13)
    slope = jax.jit(jax.grad(lambda r: aw.ntk(net, lr=r)(x, y)))(dict.fromkeys(names, 1.0))
    np.testing.assert_allclose([slope[k] for k in names], shares, rtol=1e-12)


def test_traced_rates_and_variances_with_powers_of_n():
    def kernel(rate, var):
        net = Network(lambda n: standard().init(n) | {"W": Normal((n, n), var / n)}, standard().apply)
        return aw.ntk(net, lr=lambda n: {"W": rate / n, "v": 1 / n})(x, y)

    slopes = jax.grad(kernel, (0, 1))(1.0, 2.0)
    d = 1e-4
    for i, slope in enumerate(slopes):
        up, down = ([1.0, 2.0], [1.0, 2.0])
        up[i] += d
        down[i] -= d
        assert float(slope) == pytest.approx(float((kernel(*up) - kernel(*down)) / (2 * d)), rel=1e-6)
    assert float(kernel(1.0, 2.0)) == pytest.approx(float(aw.ntk(ntk_parametrization())(x, y)), rel=1e-13)


def test_empirical_ntk_reads_the_width_off_the_parameters(key):
    net, lr = standard(), lambda n: {"W": 1 / n, "b": {1: 0.0}}
    params = net.sample(key, 20)
    assert width_of(net, params) == 20
    g, h = jax.grad(net.apply)(params, x), jax.grad(net.apply)(params, y)
    rates = {"U": 1, "W": 1 / 20, "b": [1, 0], "v": 1}
    expected = sum(jax.tree.leaves(jax.tree.map(lambda r, a, b: r * jnp.vdot(a, b), rates, g, h)))
    assert float(aw.empirical_ntk(net, lr=lr)(params, x, y)) == pytest.approx(float(expected), rel=1e-12)


def test_rules():
    net = standard()
    order = ["U", "W", "b0", "b1", "v"]

    def at(lr):
        return dict(zip(order, rates_at(net, lr, 10), strict=True))

    assert at(None) == dict.fromkeys(order, 1.0)
    assert at(0.5) == dict.fromkeys(order, 0.5)
    assert at({"b": 2.0}) == dict.fromkeys(order, 1.0) | {"b0": 2.0, "b1": 2.0}
    assert at({"b": [2.0, 0.0]}) == dict.fromkeys(order, 1.0) | {"b0": 2.0, "b1": 0.0}
    assert at(lambda n: {"b": {1: 1 / n}}) == dict.fromkeys(order, 1.0) | {"b1": 0.1}
    assert [str(p) for _, p in rates_of(net, lambda n: {"W": n**-0.5})] == ["0", "-1/2", "0", "0", "0"]


@pytest.mark.parametrize(
    ("lr", "words"),
    [
        ({"w": 1.0}, "no such parameter"),
        ({"b": {2: 1.0}}, "no such parameter"),
        ({"W": -1.0}, "nonnegative"),
        ({"W": np.nan}, "nonnegative"),
        ({"W": None}, "one nonnegative number"),
        ({"W": np.ones(3)}, "one nonnegative number"),
    ],
)
def test_wrong_rates_are_refused(lr, words):
    with pytest.raises(aw.InputError, match=words):
        aw.ntk(standard(), lr=lr)(x, y)


def test_errors_say_which_rates_would_do():
    """The advice is code, and it works."""
    for net, lr, word in [
        (standard(), None, "diverges like n"),
        (standard(), lambda n: n**-2, "vanishes like n"),
        (maximal_update(), lambda n: {"v": n}, "diverges like n"),
    ]:
        with pytest.raises(aw.NoLimitError, match=word) as error:
            aw.ntk(net, lr=lr)(x, y)
        message = str(error.value)
        assert "test_rates.py" in message
        advice = eval(message[message.index("lr=lambda") + 3 :].split("}")[0] + "}")

        def both(n, lr=lr, advice=advice, net=net):
            given, more = rates_at(net, lr, n), rates_at(net, advice, n)
            return jax.tree.unflatten(
                jax.tree.structure(net.init(n)), [a * b for a, b in zip(given, more, strict=True)]
            )

        assert np.isfinite(aw.ntk(net, lr=both)(x, y))


def test_nothing_left_to_train():
    with pytest.raises(aw.NoLimitError, match="freezes every parameter"):
        aw.ntk(ntk_parametrization(), lr=0.0)(x, y)


def test_maximal_update_has_no_nngp():
    with pytest.raises(aw.NoLimitError, match=r"vanishes like n\^-1/2"):
        aw.nngp(maximal_update())(x, y)
    with pytest.raises(aw.NoLimitError, match="ask for ntk alone"):
        aw.kernels(maximal_update())(x, y)


def lower_branch(deep):
    """A branch that is nothing against what it is added to; `deep` if it is a layer of its own."""

    def init(n):
        return {"U": Normal((n, 3)), "B": Normal((n, 3), 0.5), "W": Normal((n, n)), "v": Normal((n,))}

    def apply(p, x):
        n = p["v"].size
        h = p["U"] @ x
        branch = p["W"] @ relu(h) / n if deep else p["B"] @ x / jnp.sqrt(n)
        return p["v"] @ relu(h + branch) / jnp.sqrt(n)

    return Network(init, apply)


def test_a_parameter_of_lower_order_may_learn():
    """As a bias of variance 1/n does, or weights divided by sqrt(n) with rate n: here they learn as U does."""
    net, plain = lower_branch(deep=False), lower_branch(deep=True)
    rates = {"U": 2.0, "W": 0.0, "B": 0.0}
    expected = aw.ntk(plain, lr=rates)(x, y)
    np.testing.assert_allclose(aw.ntk(net, lr=lambda n: {"B": n})(x, y), expected, rtol=1e-13)
    np.testing.assert_allclose(aw.ntk(net)(x, y), aw.ntk(plain, lr={"W": 0.0})(x, y), rtol=1e-13)
    np.testing.assert_allclose(aw.nngp(net)(x, y), aw.nngp(plain)(x, y), rtol=1e-13)


def test_a_parameter_of_lower_order_that_is_used_elsewhere():
    """Its variance counts in the other place, so it is not taken for zero."""

    def apply(p, x):
        n = p["v"].size
        h = relu(p["U"] @ x + p["B"] @ x / jnp.sqrt(n)) + relu(p["B"] @ x)
        return p["v"] @ h / jnp.sqrt(n)

    net = Network(lower_branch(deep=False).init, apply)
    without = Network(net.init, lambda p, x: p["v"] @ (relu(p["U"] @ x) + relu(p["B"] @ x)) / jnp.sqrt(p["v"].size))
    np.testing.assert_allclose(tuple(aw.kernels(net)(x, y)), tuple(aw.kernels(without)(x, y)), rtol=1e-13)


def test_learning_that_is_lost_is_refused():
    """A layer of lower order that learns fast: its share of the NTK is of order one, and has no rule."""
    net = lower_branch(deep=True)
    assert np.isfinite(aw.ntk(net)(x, y))
    with pytest.raises(aw.UnsupportedError, match="adds nothing to the output"):
        aw.ntk(net, lr=lambda n: {"W": n})(x, y)
    assert np.isfinite(aw.nngp(net)(x, y))
