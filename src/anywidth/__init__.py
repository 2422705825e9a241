"""anywidth: the infinite-width limit of any neural network written in plain JAX."""

from anywidth.errors import AccuracyWarning, AnywidthError, InputError, NoLimitError, StoreError, UnsupportedError
from anywidth.finite import Check, check, empirical_ntk
from anywidth.kernels import Errors, Kernels, kernels, nngp, ntk
from anywidth.network import Network, Normal
from anywidth.store import open_gram
from anywidth.tiles import gram

__version__ = "0.1.0"

__all__ = [
    "AccuracyWarning",
    "AnywidthError",
    "Check",
    "Errors",
    "InputError",
    "Kernels",
    "Network",
    "NoLimitError",
    "Normal",
    "StoreError",
    "UnsupportedError",
    "check",
    "empirical_ntk",
    "gram",
    "kernels",
    "nngp",
    "ntk",
    "open_gram",
]
