"""Every notebook and the tutorial run, in their fast mode."""

from pathlib import Path

import jax
import pytest

DOCS = Path(__file__).parents[2] / "docs"
NOTEBOOKS = [*sorted(p for p in (DOCS / "notebooks").glob("*.md") if p.stem != "index"), DOCS / "tutorial.md"]
jupytext = pytest.importorskip("jupytext")


@pytest.fixture
def shell(monkeypatch):
    from IPython.core.interactiveshell import InteractiveShell

    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.delenv("ANYWIDTH_FULL", raising=False)
    before = jax.config.jax_enable_x64
    yield InteractiveShell()
    jax.config.update("jax_enable_x64", before)


@pytest.mark.filterwarnings("default")  # of the notebooks' own libraries
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path, shell):
    cells = [c.source for c in jupytext.read(path).cells if c.cell_type == "code"]
    assert cells
    for source in cells:
        shell.run_cell(source, silent=True, store_history=False).raise_error()


def test_setup_cell_installs_the_package():
    for path in NOTEBOOKS[:-1]:
        assert '%pip install -q "anywidth[all]' in path.read_text(), path


def test_every_page_is_in_a_table_of_contents():
    pages = {p.relative_to(DOCS).with_suffix("").as_posix() for p in DOCS.rglob("*.md") if "_build" not in p.parts}
    listed = set()
    for index in DOCS.rglob("index.md"):
        folder = index.parent.relative_to(DOCS).as_posix()
        block = index.read_text().split("```{toctree}")[1].split("```")[0]
        names = [line for line in block.splitlines() if line and not line.startswith(":")]
        listed |= {name if folder == "." else f"{folder}/{name}" for name in names}
    assert pages - listed == {"index"}
