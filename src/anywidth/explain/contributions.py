"""What each parameter contributes to the NTK: the derivative in its own epsilon."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from anywidth.kernels import kernels, ntk, read_parameters, read_program
from anywidth.network import Network


def contributions(net: Network, x: Any, y: Any) -> tuple[dict[str, Any], Any, Any]:
    """The share of every parameter, by its path, the NNGP and the NTK."""
    both = kernels(net)(x, y)
    paths, tree = jax.tree_util.tree_flatten_with_path(net.init(64))
    shares = {}
    for k, (path, _) in enumerate(paths):
        rates = jax.tree.unflatten(tree, [float(i == k) for i in range(len(paths))])
        shares[jax.tree_util.keystr(path) or "parameter"] = ntk(net, lr=rates)(x, y)
    return shares, both.nngp, both.ntk


def read(net: Network, x: Any) -> tuple[Any, Any]:
    """The parameters and the program, on the shapes of x."""
    dtype = jnp.result_type(*[a.dtype for a in jax.tree.leaves(x)], jnp.float32)
    parameters = read_parameters(net, dtype)
    program, _ = read_program(net, parameters, x, dtype)
    return parameters, program
