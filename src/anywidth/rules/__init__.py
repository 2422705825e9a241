"""One short rule for each primitive, by family. Importing this package fills the table."""

from anywidth.rules import elementwise, gathers, linear, loop, products, reductions, windows

__all__ = ["elementwise", "gathers", "linear", "loop", "products", "reductions", "windows"]
