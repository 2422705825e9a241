"""Everything that depends on the JAX version, in one place. Public JAX only."""

from __future__ import annotations

import os
import re
import sysconfig
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex

_JAX_DIR = os.path.dirname(jax.__file__)
_HERE = os.path.dirname(__file__)
_ZOO = os.path.join(_HERE, "zoo")
_STDLIB = sysconfig.get_path("stdlib") + os.sep
_CELL = re.compile(r"ipykernel_\d|ipython-input-")  # in the file names that IPython and Colab give to cells
_LIBRARIES = tuple(f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages"))

Literal = jex.Literal
ClosedJaxpr = jex.ClosedJaxpr
Jaxpr = jex.Jaxpr

# Primitives that only call another jaxpr, under the names of several JAX versions, and the parameter
# that holds it.
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "custom_lin": "call_jaxpr",
}


def is_tracer(x: Any) -> bool:
    return isinstance(x, jax.core.Tracer)


def is_key(x: Any) -> bool:
    """Whether an array holds random keys."""
    dtype = getattr(x, "dtype", None)
    return dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def user_line(eqn: Any) -> str | None:
    """`file:line (function)` of the innermost frame of the user's own code, if there is one."""
    frames = getattr(getattr(eqn.source_info, "traceback", None), "frames", None)
    return _own_line((frame.file_name, frame.line_num, frame.function_name) for frame in frames or ())


def failing_line(error: BaseException) -> str | None:
    """`file:line (function)` of the innermost frame of the user's own code that an error came from, if there is one."""
    frames = [(f.f_code.co_filename, line, f.f_code.co_qualname) for f, line in traceback.walk_tb(error.__traceback__)]
    return _own_line(reversed(frames))


def _own_line(frames: Iterable[tuple[str, int, str]]) -> str | None:
    """The first frame, innermost first, of a file that is not a library's; of a library (Flax, say) if there is none.

    What lies beyond a frame of anywidth's own is the user's call of it, and not the network.
    """
    inside_a_library = None
    for file, line, name in frames:
        if file.startswith(_HERE + os.sep) and not file.startswith(_ZOO):
            if inside_a_library is not None:
                break
        elif not file.startswith((_JAX_DIR, "<frozen")):
            where = f"line {line} of a notebook's cell" if _CELL.search(file) else f"{file}:{line}"
            found = f"{where} ({name})"
            if not (file.startswith(_STDLIB) or any(part in file for part in _LIBRARIES)):
                return found
            inside_a_library = inside_a_library or found
    return inside_a_library


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """The open jaxpr and its constants, of a closed or an open one."""
    if isinstance(jaxpr, ClosedJaxpr):
        return jaxpr.jaxpr, jaxpr.consts
    return jaxpr, ()


def sub_jaxprs(eqn: Any) -> Iterator[Any]:
    """The open jaxprs that an equation calls, repeats or chooses among."""
    for value in eqn.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, ClosedJaxpr | Jaxpr):
                yield open_jaxpr(one)[0]


def irreversible_loop(error: ValueError, jaxpr: Any) -> str | None:
    """Where the loop is that JAX refuses to differentiate in reverse mode, if the error is that."""
    if "everse-mode" not in str(error):
        return None

    def found(jaxpr: Any) -> str | None:
        for eqn in jaxpr.eqns:
            inner = next(filter(None, map(found, sub_jaxprs(eqn))), None)
            if inner is not None or eqn.primitive.name == "while":
                return inner or user_line(eqn) or "an unknown line"
        return None

    return found(open_jaxpr(jaxpr)[0])


def as_fun(jaxpr: Any) -> Any:
    return jex.jaxpr_as_fun(jaxpr)


class Settings(NamedTuple):
    """The settings of JAX that change what a program computes."""

    x64: bool
    precision: str | None


def settings() -> Settings:
    """Those in force here."""
    config: Any = jax.config
    return Settings(bool(config.jax_enable_x64), config.jax_default_matmul_precision)


def default_device() -> str:
    """The device set for this thread or process, as a string that tells it from others."""
    config: Any = jax.config
    return str(config.jax_default_device)


@contextmanager
def under(settings: Settings) -> Iterator[None]:
    """These settings, in this thread and for this block."""
    with jax.enable_x64(settings.x64), jax.default_matmul_precision(settings.precision):
        yield


def equation_as_fun(eqn: Any, inputs: Sequence[Any]) -> Any:
    """One equation as a function of the given variables of it, with its own derivative rules."""
    return jex.jaxpr_as_fun(ClosedJaxpr(_one(eqn, inputs), ()))


def _one(eqn: Any, inputs: Sequence[Any]) -> Any:
    return _EMPTY.replace(constvars=[], invars=list(inputs), outvars=list(eqn.outvars), eqns=[eqn], effects=eqn.effects)


_EMPTY = jax.make_jaxpr(lambda: ())().jaxpr


# Calls by which jax.random draws, under the names that its versions give them.
_RANDOM = {
    "_normal": "normal",
    "_normal_real": "normal",
    "_uniform": "uniform",
    "_truncated_normal": "truncated normal",
}


def random_family(eqn: Any) -> str | None:
    """The family that an equation draws from: its operands are a key and the two bounds, if it has bounds."""
    return _RANDOM.get(str(eqn.params.get("name"))) if eqn.primitive.name in CALLS else None
