"""Derivations against stored text, and their evaluated terms against the kernels."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import anywidth as aw
from anywidth import zoo

HERE = Path(__file__).parent
X = np.random.default_rng(0).normal(size=(7, 3))
ROWS = np.random.default_rng(1).normal(size=(12, 13))
NETWORKS = {
    "rnn": (zoo.rnn(3, varu=2.0, varb=0.2), X[:5], X[4:]),
    "transformer": (zoo.transformer(3, 2, causal=True, varb=0.1), X[:4], X[3:]),
    "batchnorm": (zoo.batchnorm_mlp(13, 1), ROWS[:7], ROWS[7:]),
    "mlp": (zoo.mlp(3, 4), X[0], X[1]),
}


def formulas(text):
    """The derivation without the numbers at its end."""
    return text[: text.index("At the given examples")].rstrip() + "\n"


@pytest.fixture(scope="module", params=NETWORKS)
def explained(request):
    net, x, y = NETWORKS[request.param]
    return request.param, net, x, y, aw.explain(net, x, y)


def test_text_is_the_stored_one(explained):
    """`python tests/derivation/test_explain.py` writes the stored texts anew: read them before they are committed."""
    name, *_, found = explained
    assert formulas(str(found)) == (HERE / "text" / f"{name}.txt").read_text(encoding="utf-8")


def test_shares_sum_to_the_ntk(explained):
    _, net, x, y, found = explained
    total = sum(np.asarray(v) for v in found.contributions.values())
    np.testing.assert_allclose(total, aw.ntk(net)(x, y), rtol=1e-10, atol=1e-12)
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(net.init(8))]
    assert list(found.contributions) == paths


def test_markdown_and_latex_are_balanced(explained):
    *_, found = explained
    markdown, latex = found._repr_markdown_(), found.latex()
    assert markdown.count("$$") % 2 == 0
    for text in (markdown, latex):
        assert text.count("{") == text.count("}")
        assert text.count(r"\left") == text.count(r"\right")
    assert latex.isascii()
    assert latex.count(r"\begin{") == latex.count(r"\end{")


def test_layers_that_repeat_are_written_once():
    deep, shallow = (formulas(str(aw.explain(zoo.mlp(3, depth), X[0]))) for depth in (6, 4))
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

    text = str(aw.explain(aw.Network(init, apply), {"left": X[0]}))
    assert "arctan(h)" in text or "atan(h)" in text
    assert "f^1" in text
    assert "f^2" in text
    assert "quadrature" in text


def test_drawing(tmp_path):
    from xml.etree import ElementTree

    net, x, _ = NETWORKS["transformer"]
    path = aw.draw(net, x).save(tmp_path / "net.svg")
    root = ElementTree.parse(path).getroot()
    labels = [t.text for t in root.iter("{http://www.w3.org/2000/svg}text")]
    assert any(label.startswith("f = v") for label in labels)
    assert any("softmax" in label for label in labels)
    assert "v" in labels
    rnn = aw.draw(NETWORKS["rnn"][0], X[:5])._repr_svg_()
    assert "stroke-dasharray" in rnn  # the arrow back into the loop


def write():
    for name, (net, x, y) in NETWORKS.items():
        (HERE / "text" / f"{name}.txt").write_text(formulas(str(aw.explain(net, x, y))), encoding="utf-8")


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    write()
