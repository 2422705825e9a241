"""The examples of the README and of docstrings run as they are."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import jax
import pytest

import anywidth

README = Path(__file__).parents[2] / "README.md"
MODULES = sorted(
    m.name for m in pkgutil.walk_packages(anywidth.__path__, "anywidth.") if not m.name.endswith("__main__")
)


PAGES = [p for p in sorted((README.parent / "docs").rglob("*.md")) if "_build" not in p.parts]
NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def test_readme(tmp_path, monkeypatch, capsys):
    """The blocks of Python, one after another in one session; the first one prints what it is said to."""
    monkeypatch.chdir(tmp_path)
    text = README.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    (said,) = re.findall(r"```text\n(.*?)```", text, flags=re.S)
    session: dict[str, object] = {"__name__": "readme"}
    printed = []
    with jax.enable_x64(False):  # as a reader's session is
        for block in blocks:
            exec(compile(block, str(README), "exec"), session)
            printed.append(capsys.readouterr().out)
    assert NUMBER.sub("0", printed[0]).split() == NUMBER.sub("0", said).split()
    found, expected = ([float(n) for n in NUMBER.findall(text)] for text in (printed[0], said))
    assert found[:2] == pytest.approx(expected[:2], rel=1e-4)
    assert found[2:] == pytest.approx(expected[2:], rel=0.02, abs=2e-3)  # of finite networks in float32


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda p: p.stem)
def test_links_to_files_exist(page):
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    for target in targets:
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


def test_the_map_of_the_code_is_whole():
    table = (README.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+(?:\.py|/))`", table))
    here = Path(anywidth.__file__).parent
    modules = {p.name + "/" * p.is_dir() for p in here.iterdir() if p.suffix == ".py" or p.is_dir()}
    assert modules - {"__init__.py", "__main__.py", "__pycache__/"} <= named


def test_every_public_name_is_in_the_reference():
    reference = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\.\. auto\w+:: (?:anywidth\.)?([\w.]+)", reference))
    assert set(anywidth.__all__) <= named
    assert {f"sklearn.{name}" for name in anywidth.sklearn.__all__} <= named
    assert "zoo" in named


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert failed == 0
