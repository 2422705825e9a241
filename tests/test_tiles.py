"""Kernels over data sets, with kernels simple enough to be computed without tiles."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anywidth.grams import evaluate, here, tiles
from anywidth.grams.tiles import gram


class Pair(NamedTuple):
    a: jax.Array
    b: jax.Array


def scalar(x, y):
    return jnp.tanh(jnp.sum(x) * jnp.sum(y)) + jnp.sum(x * jnp.cos(x)) * jnp.sum(y * jnp.cos(y))


def tokens(x, y):
    """Outputs (T,) for examples (T, d), in two kernels."""
    return Pair(jnp.tanh(x @ y.T), x @ jnp.sin(y).T + jnp.sin(x) @ y.T)


def table(kernel, X, Y):
    return [[kernel(jnp.asarray(x), jnp.asarray(y)) for y in Y] for x in X]


@pytest.fixture
def rng():
    return np.random.default_rng(3)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (5, 3), (130, 70)])
@pytest.mark.parametrize("memory", [None, 20_000])
def test_rectangle(rng, n, m, memory):
    X, Y = rng.normal(size=(n, 4)), rng.normal(size=(m, 4))
    K = gram(lambda x, y: jnp.tanh(x @ y), X, Y, memory=memory)
    assert isinstance(K, jax.Array)
    np.testing.assert_allclose(K, np.tanh(X @ Y.T), rtol=1e-13)


@pytest.mark.parametrize("n", [1, 7, 130])
@pytest.mark.parametrize("memory", [None, 20_000])
def test_triangle_is_mirrored_exactly(rng, n, memory):
    X = rng.normal(size=(n, 4))
    K = gram(lambda x, y: jnp.tanh(x @ y), X, memory=memory)
    np.testing.assert_allclose(K, np.tanh(X @ X.T), rtol=1e-13)
    np.testing.assert_array_equal(K, K.T)


def test_only_one_triangle_is_computed(rng):
    """The kernel is not symmetric, so what was not computed shows."""
    K = np.asarray(gram(lambda x, y: x[0] - 2 * y[0], rng.normal(size=(200, 1))))
    np.testing.assert_array_equal(K, K.T)
    X = np.arange(200.0)[:, None]
    K = np.asarray(gram(lambda x, y: x[0] - 2 * y[0], X))
    upper = np.triu_indices(200)
    np.testing.assert_allclose(K[upper], (X - 2 * X.T)[upper])


@pytest.mark.parametrize(("steps", "tiles"), [(1, 1), (10_000, 10)])
def test_a_triangle_is_skipped_where_it_costs_more_than_tiles(rng, monkeypatch, steps, tiles):
    calls = []
    launch = here.launch
    monkeypatch.setattr(
        here, "launch", lambda kernel, tile, *sides: (calls.append(tile), launch(kernel, tile, *sides))[1]
    )

    def kernel(x, y):
        return jax.lax.fori_loop(0, steps, lambda _, k: k / 2 + 1, x @ y)

    X = rng.normal(size=(200, 3))
    expected = (X @ X.T - 2) * 0.5**steps + 2
    np.testing.assert_allclose(gram(kernel, X), expected, rtol=1e-12)
    assert len(calls) == tiles


def test_outputs_with_axes_are_transposed_when_mirrored(rng):
    X = rng.normal(size=(70, 3, 2))
    K = gram(tokens, X, memory=300_000)
    assert isinstance(K, Pair)
    assert K.a.shape == (70, 70, 3, 3)
    np.testing.assert_allclose(K.b, gram(tokens, X, X).b, rtol=1e-12, atol=1e-13)
    np.testing.assert_array_equal(K.b, np.transpose(K.b, (1, 0, 3, 2)))


def test_examples_of_different_shapes_keep_their_order(rng):
    X = [rng.normal(size=(t, 2)) for t in (5, 3, 5, 7, 3)]
    Y = [rng.normal(size=(t, 2)) for t in (3, 4)]
    np.testing.assert_allclose(gram(scalar, X), np.array(table(scalar, X, X)), rtol=1e-12)
    np.testing.assert_allclose(gram(scalar, X, Y), np.array(table(scalar, X, Y)), rtol=1e-12)


def test_outputs_of_different_shapes_give_a_nested_list(rng):
    X = [rng.normal(size=(t, 2)) for t in (5, 3, 5, 2)]
    K, expected = gram(tokens, X), table(tokens, X, X)
    for i in range(4):
        for j in range(4):
            np.testing.assert_allclose(K.a[i][j], expected[i][j].a, rtol=1e-12, atol=1e-14)
            np.testing.assert_allclose(K.b[i][j], expected[i][j].b, rtol=1e-12, atol=1e-14)


def test_pytree_examples(rng):
    X = {"left": rng.normal(size=(6, 2)), "right": (rng.normal(size=(6, 3)),)}
    K = gram(lambda x, y: x["left"] @ y["left"] * (x["right"][0] @ y["right"][0]), X)
    np.testing.assert_allclose(K, (X["left"] @ X["left"].T) * (X["right"][0] @ X["right"][0].T), rtol=1e-12)
    listed = [jax.tree.map(lambda leaf, i=i: leaf[i], X) for i in range(6)]
    np.testing.assert_allclose(gram(lambda x, y: x["left"] @ y["right"][0][:2], listed, listed).shape, (6, 6))


def test_compiled_once_whatever_the_number_of_examples(rng):
    traces = []

    def kernel(x, y):
        traces.append(1)
        return x @ y

    gram(kernel, rng.normal(size=(40, 3)), memory=4000)
    few = len(traces)
    traces.clear()

    def kernel2(x, y):
        traces.append(1)
        return x @ y

    gram(kernel2, rng.normal(size=(333, 3)), memory=4000)
    assert len(traces) <= few + 3  # a smaller tile may be tried once more


def test_compiled_program_is_kept(rng):
    traces = []

    def kernel(x, y):
        traces.append(1)
        return x @ y

    X = rng.normal(size=(40, 3))
    gram(kernel, X)
    count = len(traces)
    gram(kernel, X + 1)
    assert len(traces) <= count + 2  # for shapes alone; not for a program
    assert evaluate._compiled.cache_info().hits > 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtype_follows_the_inputs(rng, dtype):
    assert gram(lambda x, y: x @ y, rng.normal(size=(4, 2)).astype(dtype)).dtype == dtype


def test_integer_examples():
    X = np.arange(6).reshape(3, 2)
    np.testing.assert_array_equal(gram(lambda x, y: (x @ y) * 1.0, X), X @ X.T)


def with_hole(X, value):
    X = np.array(X)
    X[1, 2] = value
    return X


@pytest.mark.parametrize(
    ("X", "Y", "error", "words"),
    [
        (with_hole(np.ones((3, 4)), np.nan), None, ValueError, r"X has 1 entries that are NaN.*\(1, 2\)"),
        (np.ones((3, 4)), with_hole(np.ones((3, 4)), np.inf), ValueError, "Y has 1 entries that are NaN"),
        ([np.ones(3), np.full(3, np.nan)], None, ValueError, r"X\[1\] has 3 entries"),
        (np.ones((0, 4)), None, ValueError, "no examples"),
        ([], None, ValueError, "no examples"),
        (np.float64(1.0), None, ValueError, "leading example axis"),
        ([[1.0, 2.0]], None, TypeError, "must be an array"),
        (np.array(["a"]), None, TypeError, "numbers"),
        ((np.ones((3, 2)), np.ones((4, 2))), None, ValueError, r"disagree.*\[3, 4\]"),
        (np.ones((3, 4)), np.ones(4), ValueError, r"axes.*\(\) and \(4,\)"),
        (np.ones((3, 4)), (np.ones((3, 4)),), ValueError, "structure"),
        ([np.ones(3), np.ones((2, 3))], None, ValueError, "axes"),
        (None, None, TypeError, "no arrays"),
    ],
)
def test_refused_before_any_work(X, Y, error, words):
    def kernel(x, y):
        raise AssertionError("work was done")

    with pytest.raises(error, match=words):
        gram(kernel, X, Y)


def test_not_under_a_transformation(rng):
    with pytest.raises(TypeError, match="being traced"):
        jax.jit(lambda X: gram(scalar, X))(rng.normal(size=(3, 2)))


def test_kernels_that_are_not_kernels_are_refused():
    with pytest.raises(ValueError, match=r"S \+ S"):
        gram(lambda x, y: jnp.ones((2, 3)), np.ones((3, 2)))


def test_memory_errors(monkeypatch):
    with pytest.raises(MemoryError, match="budget is 10 bytes"):
        gram(scalar, np.ones((3, 2)), memory=10)
    monkeypatch.setattr(tiles, "free_memory", lambda: 100)
    with pytest.raises(MemoryError, match=r"3000 x 3000 examples takes 68\.7 MiB and 32 MiB is free"):
        gram(scalar, np.ones((3000, 2)))


def test_progress(rng):
    pytest.importorskip("rich")
    assert gram(scalar, rng.normal(size=(3, 2)), progress=True).shape == (3, 3)
