"""The code on the how-to pages, on the start page and beside neural-tangents' runs as it stands."""

import re
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import anywidth as aw

DOCS = Path(__file__).parents[2] / "docs"
HOWTO = sorted(p for p in (DOCS / "howto").glob("*.md") if p.stem != "index")


def blocks(path):
    text = path.read_text(encoding="utf-8")
    return [textwrap.dedent(b) for b in re.findall(r"```python\n(.*?)```", text, flags=re.S)]


@pytest.fixture
def session(tmp_path, monkeypatch):
    """What the pages speak of: a network, and examples of different lengths."""
    monkeypatch.chdir(tmp_path)
    net = aw.zoo.rnn(3)
    sequences = [np.random.default_rng(i).normal(size=(t, 3)) for i, t in enumerate((5, 7, 5))]
    x, y, z = (jnp.asarray(s) for s in sequences)
    return {"aw": aw, "jax": jax, "jnp": jnp, "net": net, "x": x, "y": y, "z": z, "X": jnp.stack([x, z])}


LONG = {"cells"}  # to compile


@pytest.mark.parametrize(
    "path", [pytest.param(p, marks=[pytest.mark.long] if p.stem in LONG else [], id=p.stem) for p in HOWTO]
)
def test_howto(path, session):
    before = jax.config.jax_enable_x64
    try:
        for block in blocks(path):
            exec(compile(block, str(path), "exec"), session)
    finally:
        jax.config.update("jax_enable_x64", before)


def test_start_page_is_the_readme():
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    assert blocks(DOCS / "index.md") == blocks(DOCS.parent / "README.md")[:1]
    for printed in re.findall(r"```text\n.*?```", readme, flags=re.S):
        assert printed in (DOCS / "index.md").read_text(encoding="utf-8")


def test_beside_neural_tangents(session):
    """The right column of the table, one cell after another."""
    ours = [b for b in blocks(DOCS / "neural-tangents.md") if "aw." in b or "net.sample" in b]
    assert len(ours) == 8
    session |= {"targets": jnp.arange(3.0)}
    session |= {"X": jnp.ones((3, 8)) * jnp.arange(1.0, 4.0)[:, None], "Y": jnp.ones((2, 8))}
    session |= {"x": session["X"][0], "y": session["Y"][0], "key": jax.random.key(0)}
    for block in ours:
        exec(compile(block, "neural-tangents.md", "exec"), session)
