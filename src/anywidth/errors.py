"""What can be wrong with a network, in the user's terms.

Every error that depends on a line of the user's code names that line.
"""

from __future__ import annotations

from typing import Any


class AnywidthError(Exception):
    """Base class of everything raised on purpose by anywidth."""


class NoLimitError(AnywidthError, ValueError):
    """The network as written has no (deterministic) infinite-width limit."""


class UnsupportedError(AnywidthError, NotImplementedError):
    """The limit exists, or may exist, but anywidth cannot compute it (yet)."""


class InputError(AnywidthError, ValueError):
    """The inputs cannot be right: NaN, infinite, or of a shape that does not fit."""


class AccuracyWarning(UserWarning):
    """The standard error of a kernel that had to be sampled is above the tolerance, at the end of the budget."""


class StoreError(AnywidthError, ValueError):
    """A store is not what it is asked to be: another kernel's, another data set's, unfinished, or none at all."""


class NeedsUnroll(Exception):
    """Internal: this loop must be unrolled (its carry needs more than its own grams)."""


class Resized(Exception):
    """Internal: a parameter that is zero gets another size (power of n), that of what it is added to.

    None: it is not only added to what is greater, and keeps its own.
    """

    def __init__(self, leaf: Any, size: Any) -> None:
        super().__init__(f"{leaf} is read again")
        self.leaf, self.size = leaf, size
