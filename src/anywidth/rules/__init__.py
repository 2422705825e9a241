"""One short rule for each primitive, by family. Importing this package fills the table."""

from anywidth.rules import branches, elementwise, gathers, joins, linear, loop, products, reductions, unrolled, windows

__all__ = [
    "branches",
    "elementwise",
    "gathers",
    "joins",
    "linear",
    "loop",
    "products",
    "reductions",
    "unrolled",
    "windows",
]
