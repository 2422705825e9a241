"""What each parameter contributes to the NTK: the derivative in its own epsilon."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from anywidth.kernels import kernels
from anywidth.network import Network
from anywidth.rates import at_widths


def contributions(net: Network, x: Any, y: Any) -> tuple[dict[str, Any], Any, Any]:
    """The share of every parameter, by its path; the NNGP; the NTK, which is their sum."""
    paths, tree = jax.tree_util.tree_flatten_with_path(at_widths(net)[0])
    count = len(paths)

    def of_rates(rates: Any) -> Any:
        found = kernels(net, lr=jax.tree.unflatten(tree, [rates[k] for k in range(count)]))(x, y)
        return found.nngp, found.ntk

    # the NTK is linear in the rates, so one compiled function gives every share
    nngp, shares = jax.vmap(of_rates)(jnp.eye(count))
    names = [jax.tree_util.keystr(path) or "parameter" for path, _ in paths]
    first, total = jax.tree.map(lambda a: a[0], nngp), jax.tree.map(lambda a: a.sum(0), shares)
    return {name: jax.tree.map(lambda a, k=k: a[k], shares) for k, name in enumerate(names)}, first, total
