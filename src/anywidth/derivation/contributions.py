"""What each parameter contributes to the NTK: the derivative in its own epsilon, at its learning rate."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from anywidth.errors import NoLimitError
from anywidth.kernels import kernels, ntk
from anywidth.network import Network
from anywidth.rates import Rates, at_widths, scaled


def contributions(net: Network, x: Any, y: Any, lr: Rates = None) -> tuple[dict[str, Any], Any, Any]:
    """The share of every parameter, by its path; the NNGP, None if the output vanishes; the NTK, which is their sum."""
    paths = jax.tree_util.tree_flatten_with_path(at_widths(net)[0])[0]
    count = len(paths)

    def both(switches: Any) -> Any:
        found = kernels(net, lr=scaled(net, lr, list(switches)))(x, y)
        return found.nngp, found.ntk

    def tangent(switches: Any) -> Any:
        return None, ntk(net, lr=scaled(net, lr, list(switches)))(x, y)

    # the NTK is linear in the rates, so one compiled function gives every share
    try:
        nngp, shares = jax.vmap(both)(jnp.eye(count))
    except NoLimitError as error:
        try:  # of maximal update the NTK has a limit, and the output is nothing
            nngp, shares = jax.vmap(tangent)(jnp.eye(count))
        except NoLimitError:
            raise error from None
    names = [jax.tree_util.keystr(path) or "parameter" for path, _ in paths]
    first, total = jax.tree.map(lambda a: a[0], nngp), jax.tree.map(lambda a: a.sum(0), shares)
    return {name: jax.tree.map(lambda a, k=k: a[k], shares) for k, name in enumerate(names)}, first, total
