"""Networks by name: `zoo:mlp`, `mypkg.nets:rnn`, and options like `depth=3`."""

import ast
import difflib
import importlib
import inspect
import sys
from collections.abc import Sequence
from typing import Any

from anywidth.errors import InputError

__all__ = ["find_network", "parse_shape"]


def find_network(name: str, options: Sequence[str] = ()) -> Any:
    """The `Network`, or the `Factory` with its options, that a name stands for.

    Args:
        name: `zoo:NAME`, or `MODULE:NAME` for a Network or for a function from the number of features to one. Modules
            are looked for in the current directory too.
        options: `NAME=VALUE` for such a function. A value is a Python literal, or a word; for a nonlinearity, a name
            from jax.nn, jax.lax or jax.numpy.

    Raises:
        InputError: in one line, what is not there.
    """
    from anywidth import Network
    from anywidth.sklearn.networks import Factory

    where, colon, attribute = name.partition(":")
    if not colon or not attribute:
        raise InputError(f"a network is named MODULE:NAME or zoo:NAME, and {name!r} is neither")
    module = _module("anywidth.zoo" if where == "zoo" else where)
    found = getattr(module, attribute, None)
    if found is None:
        known = [n for n in getattr(module, "__all__", vars(module)) if not n.startswith("_")]
        close = difflib.get_close_matches(attribute, known, 1)
        hint = f"; it has {', '.join(known)}" if where == "zoo" else f"; is it {close[0]!r}?" if close else ""
        raise InputError(f"{'the zoo' if where == 'zoo' else where} has no {attribute!r}{hint}")
    if isinstance(found, Network):
        if options:
            raise InputError(f"{name} is a Network, which takes no options; a function that makes one does")
        return found
    if not callable(found) or inspect.isclass(found):
        raise InputError(f"{name} is neither a Network nor a function that makes one, but a {type(found).__name__}")
    parsed = dict(_option(option, found) for option in options)
    try:
        return Factory(found, **parsed)
    except TypeError as error:
        raise InputError(str(error)) from None


def parse_shape(text: str | None) -> tuple[int, ...] | None:
    """The shape `8,8` or `8x8`."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        raise InputError(f"a shape is written like 8x8, and {text!r} is not") from None


def _module(name: str) -> Any:
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise InputError(f"there is no module {name!r}, here or installed") from None
        raise InputError(f"the module {name!r} imports {error.name!r}, which is not there") from None
    except Exception as error:
        raise InputError(f"the module {name!r} cannot be imported: {type(error).__name__}: {error}") from None


def _option(text: str, make: Any) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"an option is written NAME=VALUE, and {text!r} is not")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        pass
    parameter = inspect.signature(make).parameters.get(name)
    default = None if parameter is None else parameter.default
    if not callable(default) or inspect.isclass(default):
        return name, value
    import jax

    for module in (jax.nn, jax.lax, jax.numpy):
        if callable(found := getattr(module, value, None)):
            return name, found
    raise InputError(f"{name}={value}: jax.nn, jax.lax and jax.numpy have no function {value!r}")
