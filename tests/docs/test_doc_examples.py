"""The examples of the README and of docstrings run as they are."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import anywidth

README = Path(__file__).parents[2] / "README.md"
MODULES = sorted(
    m.name for m in pkgutil.walk_packages(anywidth.__path__, "anywidth.") if not m.name.endswith("__main__")
)


def test_readme(tmp_path, monkeypatch):
    """The blocks of Python, one after another in one session."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)
    assert blocks
    session: dict[str, object] = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, str(README), "exec"), session)


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
