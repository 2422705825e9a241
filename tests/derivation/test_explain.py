"""Derivations against stored text, and their evaluated terms against the kernels."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import anywidth as aw
import networks
import test_rates
from anywidth import zoo
from anywidth.derivation.document import Explanation, derivation
from anywidth.derivation.reading import reading
from anywidth.expect import methods
from anywidth.expect.sampler import Sampler
from anywidth.kernels import pair

HERE = Path(__file__).parent
X = np.random.default_rng(0).normal(size=(7, 3))
ROWS = np.random.default_rng(1).normal(size=(12, 13))
NETWORKS = {
    "rnn": (zoo.rnn(3, varu=2.0, varb=0.2), X[:5], X[4:7]),
    "transformer": (zoo.transformer(3, 1, causal=True, varb=0.1), X[:2], X[2:4]),
    "batchnorm": (zoo.batchnorm_mlp(13, 1), ROWS[:7], ROWS[7:]),
}


def gru():
    gates = ("update", "reset", "new")

    def init(n):
        square, inputs = ({k: aw.Normal(s) for k in gates} for s in ((n, n), (n, 3)))
        return {"W": square, "U": inputs, "v": aw.Normal((n,))}

    def apply(p, x):
        n = p["v"].shape[0]

        def pre(k, h, x_t):
            return p["W"][k] @ h / jnp.sqrt(n) + p["U"][k] @ x_t / jnp.sqrt(3)

        def step(h, x_t):
            z, r = jax.nn.sigmoid(pre("update", h, x_t)), jax.nn.sigmoid(pre("reset", h, x_t))
            h = (1 - z) * h + z * jnp.tanh(pre("new", r * h, x_t))
            return h, h

        return p["v"] @ jax.lax.scan(step, jnp.zeros(n), x)[1][-1] / jnp.sqrt(n)

    return aw.Network(init, apply)


def shared_residual():
    """The same W in every block."""

    def apply(p, x):
        n = p["v"].shape[0]
        h = p["U"] @ x / jnp.sqrt(3)
        for _ in range(3):
            h = h + p["W"] @ jax.nn.relu(h) / jnp.sqrt(n)
        return p["v"] @ h / jnp.sqrt(n)

    return aw.Network(
        lambda n: {"U": aw.Normal((n, 3)), "W": aw.Normal((n, n)), "v": aw.Normal((n,))},
        apply,
    )


# only their formulas are looked at
READ = {
    "gru": (gru(), X[:4]),
    "attention": (zoo.attention(3, causal=True), X[:4]),
    "cnn": (zoo.cnn(3, 2, varb=0.1), np.ones((4, 4, 3))),
    "residual": (shared_residual(), X[0]),
    "mlp": (zoo.mlp(3, 4), X[0]),
    "transformer": (zoo.transformer(3, 2, causal=True, varb=0.1), X[:4]),
    "rnn": NETWORKS["rnn"][:2],
    "batchnorm": NETWORKS["batchnorm"][:2],
}


def read(net, x, y=None):
    other = None if y is None else reading(net, y)
    return str(Explanation(tuple(derivation(reading(net, x), other)), {})) + "\n"


@pytest.mark.parametrize("name", READ)
def test_formulas_are_the_stored_ones(name):
    """`python tests/derivation/test_explain.py` writes the stored texts anew: read them before they are committed."""
    assert read(*READ[name]) == (HERE / "text" / f"{name}.txt").read_text(encoding="utf-8")


def test_positions_are_counted_from_one():
    """The last of four states is that of step four, and so is the first one of a loop that runs backwards."""

    def network(reverse, at):
        def apply(p, x):
            n = p["v"].shape[0]

            def step(s, x_t):
                s = jnp.tanh(p["W"] @ s / jnp.sqrt(n) + p["U"] @ x_t)
                return s, s

            states = jax.lax.scan(step, jnp.zeros(n), x, reverse=reverse)[1]
            return p["v"] @ states[at] / jnp.sqrt(n)

        return aw.Network(
            lambda n: {"U": aw.Normal((n, 3)), "W": aw.Normal((n, n)), "v": aw.Normal((n,))},
            apply,
        )

    forwards, backwards = read(network(False, -1), X[:4]), read(network(True, 0), X[:4])
    assert "f = v s_4" in forwards
    assert "U x_t" in forwards
    assert "f = v s_4" in backwards
    assert "U x_{5 - t}" in backwards


def test_what_is_computed_twice_is_defined_once():
    """The mean over a batch, once by itself and once in the standard deviation; nor is an empty batch spoken of."""

    def apply(p, x):
        h = x @ p["W"]
        return jax.nn.relu((h - h.mean(0)) / h.std(0)) @ p["v"] / jnp.sqrt(h.shape[1])

    found = read(aw.Network(lambda n: {"W": aw.Normal((3, n)), "v": aw.Normal((n,))}, apply), X[:5])
    assert "s_i = relu(√5 h^2_i / (√(Σ_k (h^2_k)^2)))" in found
    assert "h^3" not in found
    assert methods.NORMALISED in " ".join(found.split())


def test_what_has_a_name_has_it():
    """An exact gelu; the mean over positions; the identity added to a graph; what an LSTM's loop starts from."""
    vit = read(zoo.vit(3, (8, 8)), np.ones((8, 8, 3)))
    assert "s_i = gelu(h^9_i)" in vit
    graph = read(zoo.gcn(3, 1), (np.ones((4, 4)), X[:4]))
    assert "1[i = k]" in graph
    assert "s̄ = Σ_k s_k / 4" in graph
    lstm = read(zoo.lstm(3), X[:3])
    assert "s^1_0 = 0 " in lstm
    assert "s^2_0 = 0 " in lstm
    assert "ℓ" not in lstm


def test_layers_of_flax_are_numbered():
    """Conv_0, Conv_1, ... repeat; the variance that is kept from being negative is one; gelu has its name."""
    nn = pytest.importorskip("flax.linen")

    class Convolutions(nn.Module):
        n: int

        @nn.compact
        def __call__(self, x):
            for _ in range(3):
                x = nn.relu(nn.Conv(self.n, (3,))(x))
            return nn.Dense(1)(nn.gelu(nn.Dense(self.n)(nn.LayerNorm()(x))).mean(0))

    example = jnp.ones((4, 3))
    net = aw.Network.from_flax(lambda n: Convolutions(n), example, laws="gaussian")
    found = str(Explanation(tuple(derivation(reading(net, example, lambda n: 1 / n))), {}))
    assert "h^ℓ_i = Σ_k Conv_kernel^ℓ_k s^(ℓ-1)_{i + k - 2} + Conv_bias^ℓ" in found
    assert "s^5 = Σ_k gelu_tanh(h^5_k) / 4" in found
    assert "relu(E[" not in found
    assert "Σ_k 1" not in found


def test_words_in_names_are_subscripts():
    def apply(p, x):
        n = p["W2"].shape[0]
        return p["v_out"] @ jax.nn.relu(p["W2"] @ jnp.tanh(p["W_in"] @ x) / jnp.sqrt(n)) / jnp.sqrt(n)

    init = lambda n: {"W_in": aw.Normal((n, 3)), "W2": aw.Normal((n, n)), "v_out": aw.Normal((n,))}  # noqa: E731
    latex = Explanation(tuple(derivation(reading(aw.Network(init, apply), X[0]))), {}).latex()
    assert r"h^{(1)} &= W_{\mathrm{in}} x" in latex
    assert r"W_{2} s^{(1)}" in latex
    assert r"\sigma^2_{v_{\mathrm{out}}}" in latex


def test_a_loop_over_the_states_of_a_loop():
    case = networks.get("rnn_two_scans")
    found = read(case.net, jnp.asarray(case.x))
    assert "U2 s^1_t / √n" in found
    assert "E[f f'] = var(v) Σ_k Σ_k' E[s^2_k s^2'_k']" in found


@pytest.fixture(scope="module", params=NETWORKS)
def explained(request):
    net, x, y = NETWORKS[request.param]
    return request.param, net, x, y, aw.explain(net, x, y)


def test_formulas_come_with_the_numbers(explained):
    _, net, x, y, found = explained
    assert str(found).startswith(read(net, x, y))
    assert "At the given examples" in str(found)


def test_shares_sum_to_the_ntk(explained):
    _, net, x, y, found = explained
    total = sum(np.asarray(v) for v in found.contributions.values())
    np.testing.assert_allclose(total, aw.ntk(net)(x, y), rtol=1e-10, atol=1e-12)
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(net.init(8))]
    assert list(found.contributions) == paths


RATES = {
    "standard": (test_rates.standard(), lambda n: {"W": 1 / n, "v": 1 / n, "b": [1.0, 0.0]}),
    "maximal update": test_rates.maximal_update_by_rates(),
    "frozen": (test_rates.ntk_parametrization(), {"U": 0.0, "v": 2.0}),
}


@pytest.mark.parametrize("name", RATES)
def test_shares_are_those_at_the_learning_rates(name):
    net, lr = RATES[name]
    found = aw.explain(net, X[0], X[1], lr=lr)
    total = sum(np.asarray(v) for v in found.contributions.values())
    np.testing.assert_allclose(total, aw.ntk(net, lr=lr)(X[0], X[1]), rtol=1e-10)
    assert ("the output vanishes" in str(found)) == (name == "maximal update")
    assert " learning rate " in str(found)


def test_layers_with_rates_of_their_own_are_not_written_as_one():
    """The second of six is frozen, the fourth learns at another rate."""
    net = zoo.mlp(3, 6, varb=0.1)
    found = str(Explanation(tuple(derivation(reading(net, X[0], {"W": {1: 0.0, 3: 0.5}}))), {}))
    assert "2 ≤ ℓ ≤ 6" in read(net, X[0])
    assert "5 ≤ ℓ ≤ 6" in found
    assert found.count("η(") == 1
    assert "h^1 = W^1 x / √3 + b^1" in found
    assert "Θ[h^4, h^4'] = η(W^4) E[s^3 s^3'] + var(W^4) Θ[s^3, s^3'] + 1" in found
    assert "Θ[h^2, h^2'] = var(W^2) Θ[s^1, s^1'] + 1" in found


def test_examples_of_different_shapes():
    """The mean over the other sequence is of its own length."""
    net, x, y = NETWORKS["rnn"]
    text = read(net, x, y)
    assert "s̄' = Σ_k' s'_k' / 3" in text
    assert "E[s̄ s̄'] = Σ_k Σ_k' E[s_k s'_k'] / 15" in text
    assert "t' = 1, ..., 3" in text


def test_markdown_and_latex_are_balanced(explained):
    *_, found = explained
    markdown, latex = found._repr_markdown_(), found.latex()
    assert markdown.count("$$") % 2 == 0
    for text in (markdown, latex):
        assert text.count("{") == text.count("}")
        assert text.count(r"\left") == text.count(r"\right")
    assert latex.isascii()
    assert latex.count(r"\begin{") == latex.count(r"\end{")


def branch(activation):
    """A gate of two independent Gaussians."""

    def apply(p, x):
        n = p["v"].shape[0]
        return p["v"] @ (activation(p["A"] @ x) * jnp.tanh(p["B"] @ x)) / jnp.sqrt(n)

    return aw.Network(lambda n: {"A": aw.Normal((n, 3)), "B": aw.Normal((n, 3)), "v": aw.Normal((n,))}, apply)


METHODS = {
    "relu": (zoo.mlp(3, 2), X[0], {methods.CLOSED}),
    "tanh": (zoo.mlp(3, 2, jnp.tanh), X[0], {methods.QUADRATURE}),
    "rnn": (zoo.rnn(3), X[:3], {methods.CLOSED}),
    "an RNN of tanh": (zoo.rnn(3, jnp.tanh), X[:3], {methods.QUADRATURE}),
    "gate": (branch(jax.lax.erf), X[0], {methods.CLOSED, methods.QUADRATURE}),
    "batchnorm": (zoo.batchnorm_mlp(13, 1), ROWS[:5], {methods.NORMALISED}),
    "batchnorm, tanh": (zoo.batchnorm_mlp(13, 1, jnp.tanh), ROWS[:5], {methods.SAMPLED}),
    "gru": (gru(), X[:3], {methods.PATHS}),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_those_of_the_engine(name):
    """What is said of each expectation is what the engine reports, and sampling is said where there is an error."""
    net, x, expected = METHODS[name]
    found = read(net, x)
    flat = " ".join(found.split())
    said = {m for m in methods.ORDER if m in flat.split("NTK", 1)[0]}
    assert said == expected
    sampler = Sampler()
    jax.eval_shape(lambda x: pair(net, "ntk", x, x, sampler), x)
    assert sampler.used == bool(said & {methods.SAMPLED, methods.PATHS})


# in as many styles
STYLES = [
    "mlp_nested_jit_gelu", "resnet_deep_branches", "rnn_bidirectional",
    "transformer_fused_qkv", "pre_norm_transformer", "convolution_primitive_2d", "batch_norm_tanh", "gated_linear_unit",
    "max_pooling_over_positions", "group_norm", "highway_of_gates", "split_stack_and_take", "embedding_tied_to_readout",
]  # fmt: skip


@pytest.mark.parametrize("name", STYLES)
def test_any_network_is_explained(name):
    case = networks.get(name)
    found = Explanation(tuple(derivation(reading(case.net, jax.tree.map(jnp.asarray, case.x)))), {})
    markdown = found._repr_markdown_()
    assert markdown.count("{") == markdown.count("}")
    assert found.latex().isascii()
    assert max(map(len, str(found).splitlines())) <= 100
    (nngp,) = (s for s in found.sections if s.title == "NNGP")
    (ntk,) = (s for s in found.sections if s.title == "NTK")
    assert str(found).count("Θ[f") >= 1
    assert len(nngp.lines) == len(ntk.lines) > 2


def test_layers_that_repeat_are_written_once():
    deep, shallow = (read(zoo.mlp(3, depth), X[0]) for depth in (6, 4))
    random_vectors = [t[: t.index("parameter")].count("\n") for t in (deep, shallow)]
    assert random_vectors[0] == random_vectors[1]
    assert "2 ≤ ℓ ≤ 6" in deep


def test_a_network_without_a_limit_has_no_derivation():
    net = aw.Network(
        lambda n: {"U": aw.Normal((n, 3)), "v": aw.Normal((n,))}, lambda p, x: p["v"] @ jnp.tanh(p["U"] @ x)
    )
    with pytest.raises(aw.NoLimitError, match=r"diverges like n\^1/2"):
        aw.explain(net, X[0])


def test_a_function_without_a_name_and_several_outputs():
    def init(n):
        return {
            "layer": {"W": aw.Normal((n, 3)), "b": aw.Normal((n,), var=0.0)},
            "out": [aw.Normal((n,)), aw.Normal((n,))],
        }

    def apply(p, x):
        n = p["layer"]["b"].shape[0]
        h = jnp.arctan(p["layer"]["W"] @ x["left"] + p["layer"]["b"])
        return {"first": p["out"][0] @ h / jnp.sqrt(n), "second": p["out"][1] @ (h + h**2) / jnp.sqrt(n)}

    text = read(aw.Network(init, apply), {"left": X[0]})
    assert "arctan(h)" in text or "atan(h)" in text
    assert "f^1" in text
    assert "f^2" in text
    assert "quadrature" in text


def test_drawing(tmp_path):
    from xml.etree import ElementTree

    net, x, _ = NETWORKS["transformer"]
    path = aw.draw(net, x).save(tmp_path / "net.svg")
    root = ElementTree.parse(path).getroot()
    labels = ["".join(t.itertext()) for t in root.iter("{http://www.w3.org/2000/svg}text")]
    assert any(label.startswith("f = v") for label in labels)
    assert any("softmax" in label for label in labels)
    assert "v" in labels
    rnn = aw.draw(NETWORKS["rnn"][0], X[:5])._repr_svg_()
    assert "stroke-dasharray" in rnn  # the arrow back into the loop
    standard = aw.draw(test_rates.standard(), X[0])  # its NTK diverges at learning rate one
    assert ElementTree.fromstring(standard.svg) is not None
    residual = aw.draw(shared_residual(), X[0]).svg  # a line past what stands between
    assert min(float(m) for m in re.findall(r" C(-?[\d.]+),", residual)) > 0


def write():
    for name, (net, x) in READ.items():
        (HERE / "text" / f"{name}.txt").write_text(read(net, x), encoding="utf-8")


if __name__ == "__main__":  # with tests/ on the path
    jax.config.update("jax_enable_x64", True)
    write()
