"""The engine knows no architecture, and the zoo knows nothing of the engine."""

import ast
from pathlib import Path

import pytest

import anywidth

PACKAGE = Path(anywidth.__file__).parent
COMMAND_LINE = {"cli.py", "figure1.py", "figure3.py"}
# What offers architectures to choose from: the estimators' default, and the table of real data.
MENUS = {"realdata.py", "sklearn/networks.py"}
# Plain JAX and what annotations need; anything else in an architecture is suspect.
PLAIN = {"jax", "jax.numpy", "jaxtyping", "collections.abc", "typing", "math", "functools"}


def imports(path):
    """(module, names) for every import of a file; no names for `import module`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(PACKAGE.parent).parent.parts
            base = package[: len(package) - node.level + 1] if node.level else ()
            yield ".".join((*base, *([node.module] if node.module else []))), tuple(a.name for a in node.names)


@pytest.mark.parametrize("path", sorted((PACKAGE / "zoo").glob("*.py")), ids=lambda path: path.stem)
def test_zoo_uses_public_names_only(path):
    for module, names in imports(path):
        if path.name == "__init__.py":
            assert module.startswith("anywidth.zoo.")
        elif module.startswith("anywidth"):
            assert module == "anywidth"
            assert set(names) <= set(anywidth.__all__)
            assert not any(name in {"nngp", "ntk", "kernels"} for name in names)
        else:
            assert module in PLAIN


def test_nothing_imports_the_zoo_but_the_command_line():
    importers = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if path.parent.name != "zoo"
        for module, names in imports(path)
        if module.startswith("anywidth.zoo") or (module == "anywidth" and "zoo" in names)
    }
    assert {p for p in importers if not p.startswith("cli/")} <= COMMAND_LINE | MENUS
    others = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if path.name not in COMMAND_LINE and path.parent.name != "cli"
        for module, names in imports(path)
        if module == "anywidth.figure1" or (module == "anywidth" and "figure1" in names)
    }
    assert not others


def test_modules_are_short():
    long = {path.name: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert max(long.values()) <= 480, long
