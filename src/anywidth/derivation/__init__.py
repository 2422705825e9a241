"""The derivation of a network's NNGP and NTK, written by reading the network; and its program as a picture.

`read.py` walks the traced program with mathematics in place of numbers, `rules.py` says how each primitive is written,
`layers.py` finds layers that repeat, `derive.py` turns definitions into covariances and their derivatives in epsilon,
`document.py` puts them in order, `printing.py` and `formats.py` print them.
"""

from anywidth.derivation.document import Explanation, explain
from anywidth.derivation.draw import Drawing, draw

__all__ = ["Drawing", "Explanation", "draw", "explain"]
