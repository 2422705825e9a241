"""Networks from Flax and Equinox modules: distributions, kernels and what is refused."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.nn import initializers

import anywidth as aw
from anywidth import Network, Normal, zoo
from anywidth.laws import laws_of

x, y = np.array([0.9, -0.4, 1.1, 0.2]), np.array([0.5, 0.8, 0.7, -1.0])


class Linen(nn.Module):
    n: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(self.n)(x))
        x = nn.LayerNorm(epsilon=0.0)(nn.Dense(self.n)(x))
        return nn.Dense(1, use_bias=False)(nn.relu(x))[0]


class Nnx(nnx.Module):
    def __init__(self, n, rngs):
        self.first = nnx.Linear(4, n, rngs=rngs)
        self.second = nnx.Linear(n, n, rngs=rngs)
        self.norm = nnx.LayerNorm(n, epsilon=0.0, rngs=rngs)
        self.last = nnx.Linear(n, 1, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.first(x))
        return self.last(nnx.relu(self.norm(self.second(x))))[0]


def plain():
    """The same network by hand, in NTK parametrization."""

    def init(n):
        shapes = {"u": (n, 4), "w": (n, n), "v": (n,)}
        zeros = {"b1": 0.0, "b2": 0.0, "shift": 0.0, "gain": 1.0}
        return {k: Normal(s) for k, s in shapes.items()} | {k: Normal((n,), 0.0, m) for k, m in zeros.items()}

    def apply(p, x):
        n = p["v"].size
        h = jax.nn.relu(p["u"] @ x / 2 + p["b1"])
        h = p["w"] @ h / jnp.sqrt(n) + p["b2"]
        h = (h - h.mean()) * jax.lax.rsqrt(h.var()) * p["gain"] + p["shift"]
        return p["v"] @ jax.nn.relu(h) / jnp.sqrt(n)

    return Network(init, apply)


@pytest.fixture(scope="module")
def by_hand():
    # the rate of the input weights is that of a standard parametrization: var 1/4 in the parameter itself
    return aw.kernels(plain(), lr={"u": 4.0})(x, y)


CASES = {
    "linen": (lambda: Network.from_flax(lambda n: Linen(n), x, laws="gaussian"), "Dense_1", "Dense_2"),
    "nnx": (lambda: Network.from_flax(lambda n, rngs: Nnx(n, rngs), x, laws="gaussian"), "second", "last"),
}


@pytest.mark.parametrize("name", CASES)
def test_flax_is_the_network_by_hand(name, by_hand):
    make, hidden, last = CASES[name]
    net = make()
    lr = lambda n: {hidden: {"kernel": 1 / n}, last: {"kernel": 1 / n}}  # noqa: E731
    found = aw.kernels(net, lr=lr)(x, y)
    np.testing.assert_allclose(found.nngp, by_hand.nngp, rtol=1e-6)
    np.testing.assert_allclose(found.ntk, by_hand.ntk, rtol=1e-6)
    with pytest.raises(aw.NoLimitError, match=r"diverges like n\^1.*1 / n"):
        aw.ntk(net)(x, y)


def test_the_module_itself_is_run(key):
    net = Network.from_flax(lambda n: Linen(n), x, laws="gaussian")
    params = net.sample(key, 16)
    assert params.keys() == Linen(16).init(key, x)["params"].keys()
    np.testing.assert_allclose(net.apply(params, x), Linen(16).apply({"params": params}, x), rtol=1e-12)
    assert net.apply(net.sample(key, 16, jnp.float32), jnp.asarray(x, jnp.float32)).dtype == jnp.float32


def equinox_mlp(n, key):
    return eqx.nn.MLP(4, "scalar", n, 2, activation=jax.nn.relu, key=key)


def test_equinox():
    """Uniform entries of variance 1/(3 fan_in), biases included: they are added, so that their law matters."""
    with pytest.raises(aw.InputError, match=r"uniform.*not contracted over the width"):
        Network.from_equinox(equinox_mlp, x)
    net = Network.from_equinox(equinox_mlp, x, laws="gaussian")
    params = net.init(12)
    assert params["layers"][1]["weight"].shape == (12, 12)
    assert params["layers"][1]["weight"].var == pytest.approx(1 / 36, rel=1e-6)
    assert params["layers"][0]["bias"].var == pytest.approx(1 / 12, rel=1e-6)

    def init(n):
        return {"u": Normal((n, 4)), "w": Normal((n, n)), "v": Normal((n,)), "b": Normal((n,))}

    def apply(p, x):
        n = p["v"].size
        h = jax.nn.relu((p["u"] @ x + p["b"]) / jnp.sqrt(12))
        return p["v"] @ jax.nn.relu(p["w"] @ h / jnp.sqrt(3 * n)) / jnp.sqrt(3 * n)

    # the biases of the wider layers have variance 1/(3 n): nothing, and they are frozen here
    weights = {"layers": {0: 1.0, 1: {"weight": 0.0, "bias": 0.0}, 2: 0.0}}
    found = aw.kernels(net, lr=lambda n: weights | {"layers": {**weights["layers"], 2: {"weight": 3 / n, "bias": 0.0}}})
    nngp, ntk = found(x, y)
    expected = aw.kernels(Network(init, apply), lr={"u": 12.0, "b": 12.0, "w": 0.0, "v": 9.0})(x, y)
    np.testing.assert_allclose(nngp, expected.nngp, rtol=1e-6)
    np.testing.assert_allclose(ntk, expected.ntk, rtol=1e-6)


@pytest.mark.long
def test_check_of_a_module():
    net = Network.from_equinox(equinox_mlp, x, laws="gaussian", method=lambda m, x: m(x))
    lr = lambda n: {"layers": {1: {"weight": 1 / n}, 2: {"weight": 1 / n}}}  # noqa: E731
    result = aw.check(net, np.stack([x, y]), widths=(16, 64), seeds=40, lr=lr)
    assert result.medians[-1] < 0.35


INITIALISERS = {
    "lecun_normal": (initializers.lecun_normal(), "truncated normal", 0.0, 1 / 64),
    "he_normal": (initializers.he_normal(), "truncated normal", 0.0, 2 / 64),
    "glorot_uniform": (initializers.glorot_uniform(), "uniform", 0.0, 2 / (64 + 32)),
    "normal": (initializers.normal(0.02), "normal", 0.0, 0.02**2),
    "truncated": (initializers.truncated_normal(0.5), "truncated normal", 0.0, None),
    "zeros": (initializers.zeros, "constant", 0.0, 0.0),
    "ones": (initializers.ones, "constant", 1.0, 0.0),
    "constant": (initializers.constant(0.3), "constant", 0.3, 0.0),
    "shifted": (lambda k, s: 1 - 2 * jax.random.normal(k, s).T.reshape(s), "normal", 1.0, 4.0),
    "uniform": (initializers.uniform(0.3), "uniform", 0.15, 0.3**2 / 12),
}


@pytest.mark.parametrize("name", INITIALISERS)
def test_laws(name, key):
    init, family, mean, var = INITIALISERS[name]
    (law,) = laws_of(jax.make_jaxpr(lambda k: init(k, (64, 32)))(key))
    sample = np.asarray(init(key, (64, 32)), float)
    var = sample.var() if var is None else var
    rel = 0.1 if name == "truncated" else 1e-6
    assert law.family == family
    assert law.mean == pytest.approx(mean, abs=1e-7)
    assert law.std**2 == pytest.approx(var, rel=rel, abs=1e-12)
    assert sample.mean() == pytest.approx(mean, abs=5 * law.std / 45 + 1e-7)


def orthogonal(n):
    return nn.Sequential([nn.Dense(n, kernel_init=initializers.orthogonal()), nn.relu, nn.Dense(1)])


def test_what_cannot_be_read_is_given():
    with pytest.raises(aw.InputError, match=r"\['layers_0'\]\['kernel'\] cannot be read.*params="):
        Network.from_flax(orthogonal, x)
    given = {"layers_0": {"kernel": Normal((), 0.5)}, "layers_2": {"kernel": lambda n: Normal((), 2 / n)}}
    net = Network.from_flax(orthogonal, x, params=given)
    assert net.init(8)["layers_0"]["kernel"] == Normal((4, 8), 0.5)
    assert net.init(8)["layers_2"]["kernel"] == Normal((8, 1), 0.25)
    with pytest.raises(aw.InputError, match="no such parameter"):
        Network.from_flax(orthogonal, x, params={"layers_1": Normal((), 1.0)})
    with pytest.raises(aw.InputError, match="is a Normal"):
        Network.from_flax(orthogonal, x, params={"layers_0": {"kernel": 0.5}})


def test_laws_matter_only_where_nothing_is_contracted_over_the_width():
    """The truncated entries of the inputs' weights are refused; those of the hidden layer and the readout are not."""
    with pytest.raises(aw.InputError, match=r"\['Dense_0'\]\['kernel'\] are truncated normal"):
        Network.from_flax(lambda n: Linen(n), x)
    net = Network.from_flax(lambda n: Linen(n), x, params={"Dense_0": {"kernel": Normal((), 0.25)}})
    np.testing.assert_allclose(aw.nngp(net)(x, y), aw.nngp(plain())(x, y), rtol=1e-6)


class WithState(nn.Module):
    n: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.BatchNorm(use_running_average=True)(nn.Dense(self.n)(x)))


def test_state_is_refused():
    with pytest.raises(aw.InputError, match="batch_stats"):
        Network.from_flax(lambda n: WithState(n), x, laws="gaussian")


def test_other_mistakes():
    with pytest.raises(TypeError, match="linen module"):
        Network.from_flax(lambda n: jnp.tanh, x)
    with pytest.raises(aw.NoLimitError, match="grows with n"):
        Network.from_flax(lambda n: nn.Dense(3), x, laws="gaussian")
    with pytest.raises(ValueError, match="laws is"):
        Network.from_flax(lambda n: Linen(n), x, laws="any")


# --- convolutions, embeddings, attention, loops ---------------------------------------------------------------

IMAGES = np.random.default_rng(2).normal(size=(2, 4, 3, 3))


class LinenCnn(nn.Module):
    n: int

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.relu(nn.Conv(self.n, (3, 3))(x))
        return nn.Dense(10, use_bias=False)(x.mean((0, 1)))


class NnxCnn(nnx.Module):
    def __init__(self, n, rngs):
        self.first, self.second = (nnx.Conv(k, n, (3, 3), rngs=rngs) for k in (3, n))
        self.last = nnx.Linear(n, 10, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.second(nnx.relu(self.first(x)))).mean((0, 1)))


class EquinoxCnn(eqx.Module):
    convolutions: list
    last: eqx.nn.Linear

    def __init__(self, n, key):
        keys = jax.random.split(key, 3)
        self.convolutions = [
            eqx.nn.Conv2d(k, n, 3, padding=1, use_bias=False, key=key) for k, key in zip((3, n), keys, strict=False)
        ]
        self.last = eqx.nn.Linear(n, 10, use_bias=False, key=keys[2])

    def __call__(self, x):
        for convolution in self.convolutions:
            x = jax.nn.relu(convolution(x))
        return self.last(x.mean((1, 2)))


def cnn_rates(first, second, last):
    """Those of the NTK parametrization, for the parameters with these paths."""

    def rates(n):
        out = {}
        for path, rate in ((first, 1 / 27), (second, 1 / (9 * n)), (last, 1 / n)):
            at = out
            for key in path[:-1]:
                at = at.setdefault(key, {})
            at[path[-1]] = rate
        return out

    return rates


CNNS = {
    "linen": (
        lambda: Network.from_flax(lambda n: LinenCnn(n), IMAGES[0], laws="gaussian"),
        cnn_rates(("Conv_0", "kernel"), ("Conv_1", "kernel"), ("Dense_0", "kernel")),
        {"varw": 1.0, "varb": 0.0},
    ),
    "nnx": (
        lambda: Network.from_flax(lambda n, rngs: NnxCnn(n, rngs), IMAGES[0], laws="gaussian"),
        cnn_rates(("first", "kernel"), ("second", "kernel"), ("last", "kernel")),
        {"varw": 1.0, "varb": 0.0},
    ),
    # uniform entries of variance 1/(3 fan_in), channels first
    "equinox": (
        lambda: Network.from_equinox(EquinoxCnn, IMAGES[0].transpose(2, 0, 1), laws="gaussian"),
        cnn_rates(("convolutions", 0, "weight"), ("convolutions", 1, "weight"), ("last", "weight")),
        {"varw": 1 / 3, "varv": 1 / 3},
    ),
}


@pytest.mark.parametrize("library", CNNS)
def test_convolutional_modules_are_the_zoos_network(library):
    make, lr, variances = CNNS[library]
    images = IMAGES.transpose(0, 3, 1, 2) if library == "equinox" else IMAGES
    found = aw.kernels(make(), lr=lr)(*images)
    expected = aw.kernels(zoo.cnn(3, 2, **variances))(*IMAGES)
    np.testing.assert_allclose(found.nngp, expected.nngp, rtol=1e-6)
    np.testing.assert_allclose(found.ntk, expected.ntk, rtol=1e-6)


class Transformer(nn.Module):
    """Tokens, positions and one block, with scores over the size of a head, or over its root as Flax has them."""

    n: int
    scaled: bool = True

    @nn.compact
    def __call__(self, tokens):
        normal = nn.initializers.normal(1.0)
        x = nn.Embed(5, self.n, embedding_init=normal)(tokens) + self.param("positions", normal, (4, self.n))
        f = (lambda q, k, v, **_: nn.dot_product_attention(q / jnp.sqrt(q.shape[-1]), k, v)) if self.scaled else None
        attention = nn.MultiHeadDotProductAttention(2, use_bias=False, **({"attention_fn": f} if f else {}))
        x = x + attention(nn.LayerNorm(epsilon=0.0)(x))
        hidden = nn.relu(nn.Dense(2 * self.n, use_bias=False)(x))
        x = x + nn.Dense(self.n, use_bias=False)(hidden)
        return nn.Dense(1, use_bias=False)(x.mean(0))[0]


def transformer_by_hand():
    """The scores of independent queries and keys over n are zero: every token looks at all, equally."""

    def init(n):
        shapes = {"E": (5, n), "P": (4, n), "V": (n, n), "O": (n, n), "A": (n, 2 * n), "B": (2 * n, n), "v": (n,)}
        return {k: Normal(s) for k, s in shapes.items()}

    def apply(p, tokens):
        n = p["v"].size
        x = p["E"][tokens] + p["P"]
        z = (x - x.mean(1, keepdims=True)) / jnp.sqrt(x.var(1, keepdims=True))
        x = x + (z.mean(0) @ p["V"]) @ p["O"] / n
        x = x + jax.nn.relu(x @ p["A"] / jnp.sqrt(n)) @ p["B"] / jnp.sqrt(2 * n)
        return x.mean(0) @ p["v"] / jnp.sqrt(n)

    return Network(init, apply)


TOKENS = np.array([[0, 3, 1, 3], [3, 2, 0, 1]], np.int32)


@pytest.mark.long
def test_a_transformer_of_flax_modules():
    """Its queries and keys learn nothing in the limit; its gains and shifts are frozen here."""
    net = Network.from_flax(lambda n: Transformer(n), TOKENS[0])

    def lr(n):
        dense = {f"Dense_{i}": {"kernel": 1 / (2 * n if i == 1 else n)} for i in range(3)}
        heads = {"query": 0.0, "key": 0.0, "value": {"kernel": 1 / n}, "out": {"kernel": 1 / n}}
        return {**dense, "MultiHeadDotProductAttention_0": heads, "LayerNorm_0": 0.0}

    found, expected = aw.kernels(net, lr=lr)(*TOKENS), aw.kernels(transformer_by_hand())(*TOKENS)
    np.testing.assert_allclose(found.nngp, expected.nngp, rtol=1e-6)
    np.testing.assert_allclose(found.ntk, expected.ntk, rtol=1e-6)


def test_scores_over_the_root_are_refused_at_the_line_of_the_module():
    """Not at one of the library's own."""
    net = Network.from_flax(lambda n: Transformer(n, scaled=False), TOKENS[0])
    with pytest.raises(aw.NoLimitError, match=r"q\.k/sqrt\(n\).*Divide by n(?s:.*)test_modules\.py:\d+ \(Transformer"):
        aw.nngp(net)(*TOKENS)


class Recurrent(nn.Module):
    n: int

    @nn.compact
    def __call__(self, x):
        cell = nn.SimpleCell(self.n, activation_fn=jax.lax.erf, param_dtype=jnp.float64)
        return nn.Dense(1, use_bias=False)(nn.RNN(cell)(x)[-1])[0]


def test_a_recurrent_module_has_a_leaf_that_cannot_be_read():
    sequences = IMAGES[:, :, 0]
    with pytest.raises(aw.InputError, match=r"\['SimpleCell_0'\]\['h'\]\['kernel'\] cannot be read.*'h': {'kernel'"):
        Network.from_flax(lambda n: Recurrent(n), sequences[0], laws="gaussian")
    given = {"SimpleCell_0": {"h": {"kernel": lambda n: Normal((), 1 / n)}}}
    net = Network.from_flax(lambda n: Recurrent(n), sequences[0], laws="gaussian", params=given)
    lr = lambda n: {"SimpleCell_0": {"h": 1 / n, "i": {"kernel": 1 / 3}}, "Dense_0": 1 / n}  # noqa: E731
    found = aw.kernels(net, lr=lr)(*sequences)
    expected = aw.kernels(zoo.rnn(3, varw=1.0, varu=1.0, varb=0.0, pool="last"))(*sequences)
    np.testing.assert_allclose(found.nngp, expected.nngp, rtol=1e-6)
    np.testing.assert_allclose(found.ntk, expected.ntk, rtol=1e-6)


def test_noise_is_refused():
    def linen(n):
        return nn.Sequential([nn.Dense(n), nn.Dropout(0.5, deterministic=False), nn.Dense(1)])

    with pytest.raises(aw.InputError, match=r"draws random numbers.*dropout.*deterministic"):
        aw.ntk(Network.from_flax(linen, x, laws="gaussian"))(x, y)


class Vanishing(nnx.Module):
    """Flax's own embedding: of variance 1/n, so that nothing is left of a token."""

    def __init__(self, n, rngs):
        self.embedding, self.last = nnx.Embed(5, n, rngs=rngs), nnx.Linear(n, 3, rngs=rngs)

    def __call__(self, tokens):
        return self.last(nnx.gelu(self.embedding(tokens)).mean(0))


def test_a_network_without_a_limit_is_not_blamed_on_its_readout():
    """What is wrong comes before the truncated entries of the readout, which would do."""
    net = Network.from_flax(lambda n, rngs: Vanishing(n, rngs), TOKENS[0])
    with pytest.raises(aw.NoLimitError, match=r"'tanh' vanishes like n\^-1/2(?s:.*)test_modules.py:\d+ \(Vanishing"):
        aw.nngp(net)(*TOKENS)
