"""anywidth: the infinite-width limit of any neural network written in plain JAX."""

import importlib
from typing import Any

from anywidth.derivation import Drawing, Explanation, draw, explain
from anywidth.errors import AccuracyWarning, AnywidthError, InputError, NoLimitError, StoreError, UnsupportedError
from anywidth.finite import Check, check, empirical_nngp, empirical_ntk, linearize, ntk_vp
from anywidth.grams import gram, open_gram
from anywidth.kernels import Errors, Kernels, kernels, nngp, ntk
from anywidth.network import Network, Normal

__version__ = "0.1.0"

__all__ = [
    "AccuracyWarning",
    "AnywidthError",
    "Check",
    "Drawing",
    "Errors",
    "Explanation",
    "InputError",
    "Kernels",
    "Network",
    "NoLimitError",
    "Normal",
    "StoreError",
    "UnsupportedError",
    "check",
    "draw",
    "empirical_nngp",
    "empirical_ntk",
    "explain",
    "gram",
    "kernels",
    "linearize",
    "nngp",
    "ntk",
    "ntk_vp",
    "open_gram",
    "predict",
]


def __getattr__(name: str) -> Any:
    """`aw.predict`, `aw.zoo` and `aw.sklearn` are imported when they are first asked for."""
    if name in ("predict", "sklearn", "zoo"):
        return importlib.import_module(f"anywidth.{name}")
    raise AttributeError(f"module 'anywidth' has no attribute {name!r}")
