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
    found, expected = ([float(line) for line in text.splitlines()[:2]] for text in (printed[0], said))
    assert found == pytest.approx(expected, rel=1e-4)


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
