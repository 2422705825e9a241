"""One short rule for each primitive, by family. Importing this package fills the table."""

from anywidth.rules import elementwise, linear, loop, products, reductions, windows

__all__ = ["elementwise", "linear", "loop", "products", "reductions", "windows"]
