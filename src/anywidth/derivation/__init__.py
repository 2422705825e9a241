r"""The derivation of a network's NNGP and NTK, written by reading the network.

>>> import jax, jax.numpy as jnp
>>> import anywidth as aw
>>> net = aw.Network(
...     lambda n: {"U": aw.Normal((n, 2)), "v": aw.Normal((n,))},
...     lambda p, x: p["v"] @ jax.nn.relu(p["U"] @ x) / jnp.sqrt(p["v"].size),
... )
>>> print(explain(net, jnp.ones(2)))                                           # doctest: +ELLIPSIS
Random vectors
...
  h = U x                                     Gaussian
  s = relu(h)
...
"""

from anywidth.derivation.document import Explanation, explain

__all__ = ["Explanation", "explain"]
