"""Kernels of finite networks against products of Jacobians, however they are contracted."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import anywidth as aw
from anywidth import Network, Normal, zoo
from anywidth.finite.empirical import _Pair
from anywidth.finite.structure import Structure

rng = np.random.default_rng(5)


def scaled_and_transposed():
    """A matrix used transposed and divided by a number, in a call, on several positions and by an einsum of heads."""

    def init(n):
        shapes = {"u": (3, n), "w": (n, n), "heads": (2, n // 2, n), "b": (n,), "v": (n, 4)}
        return {k: Normal(s) for k, s in shapes.items()}

    def apply(p, x):
        h = jax.jit(lambda u, x: jnp.tanh(x @ u))(p["u"], x)
        h = jax.checkpoint(lambda w, h: jnp.tanh(h @ (w / jnp.sqrt(h.shape[-1])).T))(p["w"], h) + p["b"]
        h = jnp.tanh(jnp.einsum("hij,tj->thi", p["heads"], h)).reshape(h.shape)
        return h @ p["v"]

    return Network(init, apply)


def used_in_two_ways():
    """A matrix and its transpose, one raised to a power, a scan and a weight that is used twice in one way."""

    def init(n):
        return {"u": Normal((n, 3)), "w": Normal((n, n)), "q": Normal((n, n)), "t": Normal((n, n)), "v": Normal((n,))}

    def apply(p, x):
        h = jnp.tanh(x @ p["u"].T)
        h = jnp.tanh(h @ p["w"] + h @ p["w"].T + h @ p["q"] ** 2)
        h = jnp.tanh(jnp.tanh(h @ p["t"]) @ p["t"])
        h, _ = jax.lax.scan(lambda s, a: (jnp.tanh(p["w"] @ s + a), None), h[0], h)
        return p["v"] @ h

    return Network(init, apply)


def dictionary_of_outputs():
    def apply(p, x):
        h = jnp.tanh(p["u"] @ x)
        return {"f": p["v"] @ h, "features": h[:3]}

    return Network(lambda n: {"u": Normal((n, 3)), "v": Normal((n,))}, apply)


CASES = {
    "mlp": (zoo.mlp(3, 2, varb=0.1, classes=4), (3,), (3,)),
    "rnn of tokens": (zoo.rnn(3, pool="none"), (5, 3), (4, 3)),
    "transformer": (zoo.transformer(3, 2, varb=0.1), (5, 3), (4, 3)),
    "batch norm": (zoo.batchnorm_mlp(3, epsilon=0.1), (4, 3), (6, 3)),
    "scaled and transposed": (scaled_and_transposed(), (3, 3), (2, 3)),
    "used in two ways": (used_in_two_ways(), (3, 3), (2, 3)),
}


SLOW = {"scaled and transposed", "transformer", "used in two ways", "batch norm"}  # to compile


def jacobian(f, params, x):
    leaves = jax.tree.leaves(jax.jacrev(f)(params, x))
    shape = jax.eval_shape(f, params, x).shape
    return jnp.concatenate([leaf.reshape(*shape, -1) for leaf in leaves], axis=-1)


def setting(name, n=12):
    net, *shapes = CASES[name]
    params = net.sample(jax.random.key(3), n)
    x, y = (jnp.asarray(rng.normal(size=s)) for s in shapes)
    return net, params, x, y


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long) if n in SLOW else n for n in CASES])
def test_every_method_is_the_product_of_jacobians(name):
    net, params, x, y = setting(name)
    expected = jnp.tensordot(jacobian(net.apply, params, x), jacobian(net.apply, params, y), [-1, -1])
    for method in ("auto", "structure", "jacobian", "vector-products"):
        K = aw.empirical_ntk(net, method=method)(params, x, y)
        assert K.shape == expected.shape
        np.testing.assert_allclose(K, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["mlp", pytest.param("scaled and transposed", marks=pytest.mark.long), "rnn of tokens"]
)
def test_within_a_memory_budget(name):
    """A few outputs at a time; one output that does not fit is refused, and goes by vectors if it may."""
    net, params, x, y = setting(name)
    expected = aw.empirical_ntk(net)(params, x, y)
    pair = _Pair(net.apply, params, x, y, [1.0] * len(jax.tree.leaves(params)), ())
    structured, seen, memory = pair._structured(), set(), 1_000_000
    while (blocks := pair._blocks(structured, memory)) is not None:
        if blocks not in seen:
            seen.add(blocks)
            K = aw.empirical_ntk(net, method="structure", memory=memory)(params, x, y)
            np.testing.assert_allclose(K, expected, rtol=1e-11, atol=1e-12)
        memory = memory * 3 // 4
    assert len(seen) > 1
    with pytest.raises(MemoryError, match="vector-products"):
        aw.empirical_ntk(net, method="structure", memory=100)(params, x, y)
    np.testing.assert_allclose(aw.empirical_ntk(net, memory=100)(params, x, y), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("method", ["structure", "jacobian", "vector-products"])
@pytest.mark.parametrize(("axes", "spec"), [(-1, "tcuc->tu"), ((0, 1), "tctc->"), (0, "tctd->cd")])
def test_trace_axes_average_the_diagonal(method, axes, spec):
    net, params, x, _ = setting("scaled and transposed")
    full = aw.empirical_ntk(net)(params, x, 2 * x)
    expected = jnp.einsum(spec, full) / {-1: 4, (0, 1): 12, 0: 3}[axes]
    for memory in (None, 100_000):
        K = aw.empirical_ntk(net, trace_axes=axes, method=method, memory=memory)(params, x, 2 * x)
        np.testing.assert_allclose(K, expected, rtol=1e-11)
    nngp = aw.empirical_nngp(net)(params, x, 2 * x)
    traced = aw.empirical_nngp(net, trace_axes=axes)(params, x, 2 * x)
    np.testing.assert_allclose(traced, jnp.einsum(spec, nngp) / {-1: 4, (0, 1): 12, 0: 3}[axes], rtol=1e-11)


def test_a_pytree_of_outputs():
    net = dictionary_of_outputs()
    params, x = net.sample(jax.random.key(0), 8), jnp.ones(3)
    K = aw.empirical_ntk(net)(params, x, x)
    assert jax.tree.map(jnp.shape, K) == {"f": (), "features": (3, 3)}
    one = aw.empirical_ntk(Network(net.init, lambda p, x: net.apply(p, x)["f"]))(params, x, x)
    np.testing.assert_allclose(K["f"], one)


def test_what_has_structure_is_seen():
    net, params, x, _ = setting("scaled and transposed")
    found = Structure.of(net.apply, params, x)
    names = sorted(params)
    assert {names[i] for i in found.structured()} == {"u", "w", "heads", "v"}
    assert {names[i] for i in found.plain} == {"b"}
    net, params, x, _ = setting("used in two ways")
    assert {sorted(params)[i] for i in Structure.of(net.apply, params, x).structured()} == {"u", "t", "v"}


def test_no_gradient_of_a_matrix_is_formed():
    """The program of a pair of a wide network holds no array as large as its matrix."""
    net = zoo.mlp(5, 2, classes=10)
    spec = jax.eval_shape(lambda k: net.sample(k, 1000, jnp.float32), jax.random.key(0))
    x = jax.ShapeDtypeStruct((5,), jnp.float32)
    program = jax.jit(aw.empirical_ntk(net)).lower(spec, x, x).compile()
    assert program.memory_analysis().temp_size_in_bytes < 4 * 1000**2 / 4


def convolutions(classes):
    def init(n):
        return {"A": Normal((3, 3, 3, n)), "B": Normal((3, 3, n, n)), "v": Normal((n, classes))}

    def apply(p, x):
        for k in "AB":
            (x,) = jax.lax.conv_general_dilated(
                x[None], p[k], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.nn.relu(x / jnp.sqrt(9 * x.shape[-1]))
        return x.mean((0, 1)) @ p["v"]

    return Network(init, apply)


@pytest.mark.parametrize(
    ("net", "shape", "n", "method"),
    [
        (zoo.mlp(50, 2, classes=300), (50,), 256, "auto"),
        (zoo.mlp(50, 2, classes=20), (50,), 256, "jacobian"),
        (convolutions(60), (8, 8, 3), 16, "auto"),
    ],
)
@pytest.mark.parametrize(("axes", "budgets"), [((), (2, 8, 64)), (-1, (8,))])
def test_what_a_pair_holds_is_within_the_budget(net, shape, n, method, axes, budgets):
    """The compiled programs' own account, in float32, and more memory is used where there is more."""
    spec = jax.eval_shape(lambda k: net.sample(k, n, jnp.float32), jax.random.key(0))
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    held = []
    for budget in budgets:
        function = aw.empirical_ntk(net, trace_axes=axes, method=method, memory=f"{budget} MiB")
        held.append(jax.jit(function).lower(spec, x, x).compile().memory_analysis().temp_size_in_bytes / 2**20)
    assert all(a <= b for a, b in zip(held, budgets, strict=True)), held
    assert held == sorted(held), held


def test_gram_compiles_once_for_all_draws():
    net, _, x, _ = setting("mlp")
    X, traced, counts = jnp.stack([x, 2 * x, -x]), [], 0

    def kernel(params, x, y):
        traced.append(0)
        return aw.empirical_ntk(net)(params, x, y)

    for seed in range(3):
        draw = net.sample(jax.random.key(seed), 12)
        K = aw.gram(partial(kernel, draw), X)
        expected = aw.empirical_ntk(net)(draw, X[0], X[1])
        np.testing.assert_allclose(K[0, 1], expected, rtol=1e-11)
        counts = len(traced) if seed == 0 else counts
    assert len(traced) < 3 * counts


def test_frozen_and_rated(key):
    net, params, x, y = setting("mlp")
    parts = [aw.empirical_ntk(net, lr={k: float(k == name) for k in params})(params, x, y) for name in params]
    np.testing.assert_allclose(sum(parts), aw.empirical_ntk(net)(params, x, y), rtol=1e-11)
    assert not aw.empirical_ntk(net, lr=0.0)(params, x, y).any()


@pytest.mark.parametrize("memory", [None, 20_000])
@pytest.mark.parametrize("name", ["mlp", "scaled and transposed"])
def test_products_with_vectors(name, memory):
    net, params, x, y = setting(name)
    X, Y = jnp.stack([x, 2 * x, -x]), jnp.stack([y, y + 1])
    lr = lambda n: {"v": 1 / n}  # noqa: E731
    K = aw.gram(partial(aw.empirical_ntk(net, lr=lr), params), X, Y)
    v = rng.normal(size=jax.vmap(net.apply, (None, 0))(params, Y).shape)
    axes = list(range(2, 2 + v.ndim - 1))
    expected = jnp.tensordot(jnp.moveaxis(K, 1, len(axes) + 1), v, v.ndim)
    found = jax.jit(aw.ntk_vp(net, lr=lr, memory=memory))(params, X, Y, v)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    same = aw.ntk_vp(net)(params, Y, None, v)
    np.testing.assert_allclose(same, aw.ntk_vp(net)(params, Y, Y, v), rtol=1e-12)
    with pytest.raises(ValueError, match="v is an output for each example"):
        aw.ntk_vp(net)(params, X, Y, v[:1])


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_taylor_expansion(degree):
    """The error is of the next order in the step."""
    net, params, x, _ = setting("mlp")
    net = Network(net.init, lambda p, x: jnp.tanh(p["W"][0] @ x + p["b"][0]) @ p["v"].T)
    direction = net.sample(jax.random.key(9), 12)
    model = aw.linearize(net, params, degree=degree)

    def error(t):
        new = jax.tree.map(lambda a, d: a + t * d, params, direction)
        return np.abs(model(new, x) - net.apply(new, x)).max()

    assert error(0.0) < 1e-14
    assert np.log2(error(0.02) / error(0.01)) == pytest.approx(degree + 1, abs=0.35)


def test_the_kernel_of_the_linear_model_is_the_empirical_ntk():
    net, params, x, y = setting("mlp")
    model = Network(net.init, aw.linearize(net, params))
    other = net.sample(jax.random.key(8), 12)
    expected = aw.empirical_ntk(net)(params, x, y)
    np.testing.assert_allclose(aw.empirical_ntk(model, method="jacobian")(other, x, y), expected, rtol=1e-10)


def test_bad_arguments():
    net, params, x, _ = setting("mlp")
    with pytest.raises(ValueError, match="method is"):
        aw.empirical_ntk(net, method="fast")
    with pytest.raises(ValueError, match="trace_axes"):
        aw.empirical_ntk(net, trace_axes=2)(params, x, x)
    with pytest.raises(ValueError, match="number of bytes"):
        aw.ntk_vp(net, memory="much")
    with pytest.raises(ValueError, match="degree"):
        aw.linearize(net, params, degree=-1)


def while_loop(p, x):
    def step(state):
        return state[0] + 1, jax.lax.erf(p["W"] @ state[1] / jnp.sqrt(state[1].size))

    return p["v"] @ jax.lax.while_loop(lambda state: state[0] < 2, step, (0, p["U"] @ x))[1]


def test_a_loop_without_a_reverse_mode_is_refused_with_its_line(key):
    """Of a network whose infinite-width kernel is there, and whose other tools work."""
    net = Network(lambda n: {"U": Normal((n, 3)), "W": Normal((n, n)), "v": Normal((n,), 1 / n)}, while_loop)
    params, x = net.sample(key, 8), jnp.ones(3)
    many = jnp.stack([x, 2 * x])
    calls = {
        "ntk": lambda: aw.empirical_ntk(net)(params, x, x),
        "vectors": lambda: aw.empirical_ntk(net, method="vector-products")(params, x, x),
        "products": lambda: aw.ntk_vp(net)(params, many, None, jnp.ones(2)),
        "check": lambda: aw.check(net, many, widths=(4,), seeds=2, lr=lambda n: 1 / n),
    }
    for call in calls.values():
        with pytest.raises(aw.UnsupportedError, match=r"(?s)while_loop.*lax.scan.*test_empirical.py:\d+ \(while"):
            call()
    assert np.isfinite(aw.ntk(net, lr=lambda n: {"v": 1 / n})(x, x))
    assert aw.empirical_nngp(net)(params, x, x).shape == ()
    np.testing.assert_allclose(aw.linearize(net, params)(params, x), net.apply(params, x))


def outputs_of_a_batch(p, x):
    h = jnp.tanh(x @ p["U"].T)
    return (h @ p["v"] / jnp.sqrt(h.shape[-1])).reshape(len(x), 1, 2)


def test_outputs_of_other_shapes_for_the_two_examples(key):
    net = Network(lambda n: {"U": Normal((n, 3)), "v": Normal((n, 2))}, outputs_of_a_batch)
    params, x, y = net.sample(key, 8), rng.normal(size=(4, 3)), rng.normal(size=(5, 3))
    full = aw.empirical_ntk(net)(params, x, y)
    assert full.shape == (4, 1, 2, 5, 1, 2)
    traced = aw.empirical_ntk(net, trace_axes=-1, memory="1 MiB")(params, x, y)
    np.testing.assert_allclose(traced, jnp.einsum("aicbjc->aibj", full) / 2, rtol=1e-12)
    for function in (aw.empirical_ntk, aw.empirical_nngp):
        with pytest.raises(ValueError, match=r"other sizes in the two outputs.*\(4, 1, 2\) and \(5, 1, 2\)"):
            function(net, trace_axes=0)(params, x, y)
    v = rng.normal(size=(3, 5, 1, 2))
    found = aw.ntk_vp(net)(params, x[None], jnp.stack([y, 2 * y, -y]), v)
    expected = sum(jnp.tensordot(aw.empirical_ntk(net)(params, x, s * y), v[i], 3) for i, s in enumerate((1, 2, -1)))
    np.testing.assert_allclose(found[0], expected, rtol=1e-11)


def test_outputs_that_are_not_numbers_to_differentiate(key):
    net = Network(lambda n: {"U": Normal((n, 3))}, lambda p, x: jnp.argmax(p["U"] @ x))
    with pytest.raises(aw.InputError, match="int"):
        aw.empirical_ntk(net)(net.sample(key, 8), jnp.ones(3), jnp.ones(3))


def test_a_relu_mlp_against_neural_tangents():
    """784-512-512-10 on 100 x 100 examples, all 10 x 10 outputs, in float32: two sums of its structured derivatives.

    They are printed by benchmarks/neural_tangents_times.py.
    """
    draw, points = np.random.default_rng(1), np.random.default_rng(0)
    shapes = [(784, 512), (512, 512), (512, 10)]
    params = [draw.normal(size=shape).astype(np.float32) for shape in shapes]
    X, Y = (points.normal(size=(100, 784)).astype(np.float32) for _ in range(2))

    def apply(params, x):
        for i, w in enumerate(params):
            x = (jax.nn.relu(x) if i else x) @ w / jnp.sqrt(w.shape[0])
        return x

    net = Network(lambda n: [Normal(shape) for shape in shapes], apply)
    K = np.asarray(aw.gram(partial(aw.empirical_ntk(net), params), X, Y, progress=False), np.float64)
    assert K.shape == (100, 100, 10, 10)
    assert K.sum() == pytest.approx(18679.2300, rel=1e-6)
    assert K.ravel() @ np.cos(np.arange(K.size)) == pytest.approx(-0.59984, abs=1e-4)
