"""What a network is: drawing parameters, and refusing what cannot be drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anywidth import Network, Normal


def test_shapes_are_normalised():
    assert Normal(5).shape == (5,)
    assert Normal([2, 3]).shape == (2, 3)
    assert Normal((np.int64(4),)).shape == (4,)
    assert Normal(()).shape == ()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"shape": (8 / 2,)}, TypeError, "n // 4"),
        ({"shape": (-1,)}, ValueError, "negative"),
        ({"shape": (3,), "var": -1.0}, ValueError, "var of a Normal must be a finite nonnegative"),
        ({"shape": (3,), "var": float("nan")}, ValueError, "var"),
        ({"shape": (3,), "var": jnp.float32(-2)}, ValueError, "var"),
        ({"shape": (3,), "mean": float("inf")}, ValueError, "mean"),
        ({"shape": (3,), "var": np.ones(3)}, ValueError, "one number for all entries"),
        ({"shape": (3,), "var": "large"}, TypeError, "real number"),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        Normal(**arguments)


def test_normal_is_a_leaf():
    assert len(jax.tree.leaves({"a": Normal((2,)), "b": [Normal((3,))]})) == 2


def test_sample_has_the_moments_and_the_structure(key):
    net = Network(
        lambda n: {"w": [Normal((n, n), var=3.0, mean=-1.0)], "b": Normal((n,), var=0.0, mean=2.0)}, lambda p, x: x
    )
    params = net.sample(key, 400)
    assert params["w"][0].shape == (400, 400)
    np.testing.assert_array_equal(params["b"], 2.0)
    assert abs(params["w"][0].mean() + 1) < 5 * np.sqrt(3) / 400
    assert abs(params["w"][0].var() - 3) < 5 * 3 * np.sqrt(2) / 400


def test_leaves_are_independent(key):
    params = Network(lambda n: (Normal((n,)), Normal((n,))), lambda p, x: x).sample(key, 1000)
    assert abs(params[0] @ params[1] / 1000) < 0.2


@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.float64, jnp.bfloat16])
def test_dtype(key, dtype):
    net = Network(lambda n: Normal((n,), var=2.0 / n), lambda p, x: p)
    assert net.sample(key, 3, dtype).dtype == (jnp.float64 if dtype is None else dtype)


def test_var_may_be_traced(key):
    def second_moment(var):
        return (Network(lambda n: Normal((n,), var=var), lambda p, x: p).sample(key, 100) ** 2).mean()

    value, slope = jax.jit(jax.value_and_grad(second_moment))(2.0)
    np.testing.assert_allclose(slope, value / 2)


def test_a_leaf_that_is_not_a_normal_is_named(key):
    net = Network(lambda n: {"layers": [{"w": jnp.ones(n)}]}, lambda p, x: x)
    with pytest.raises(TypeError, match=r"\['layers'\]\[0\]\['w'\]"):
        net.sample(key, 3)


def test_sample_refuses_bad_widths_and_dtypes(key):
    net = Network(lambda n: Normal((n,)), lambda p, x: x)
    with pytest.raises(ValueError, match="positive"):
        net.sample(key, 0)
    with pytest.raises(TypeError, match="floating"):
        net.sample(key, 3, jnp.int32)


def test_networks_are_hashable_and_frozen():
    def apply(p, x):
        return x

    def init(n):
        return Normal((n,))

    assert Network(init, apply) == Network(init, apply)
    assert len({Network(init, apply), Network(init, apply)}) == 1
    with pytest.raises(AttributeError):
        Network(init, apply).init = None
