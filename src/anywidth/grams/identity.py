"""What a Gram matrix is the Gram matrix of, in a form that can be kept and compared."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from anywidth import _compat
from anywidth.examples import Dataset
from anywidth.grams.fingerprint import data_fingerprint, kernel_fingerprint
from anywidth.parameters import read_parameters

__all__ = ["differences", "identity"]


def identity(kernel: Callable[[Any, Any], Any], xs: Dataset, ys: Dataset | None, dtypes: Sequence[Any]) -> dict:
    """Everything that decides the numbers, as JSON values.

    Args:
        kernel: the kernel.
        xs: the examples of the rows.
        ys: those of the columns; None if they are the same, and one triangle is computed.
        dtypes: of the arrays that the kernel returns.
    """
    import anywidth

    specs = [(group.spec, group.spec) for group in xs.groups]
    if ys is not None:
        specs += [(xs.groups[0].spec, group.spec) for group in ys.groups]
    return {
        "anywidth": anywidth.__version__,
        "jax": jax.__version__,
        "x64": _compat.settings().x64,
        "precision": str(_compat.settings().precision),
        "kernel": getattr(kernel, "__name__", type(kernel).__name__),
        "parameters": _parameters(getattr(kernel, "network", None)),
        "program": kernel_fingerprint(kernel, specs),
        "dtype": [np.dtype(dtype).name for dtype in dtypes],
        "X": _data(xs),
        "Y": None if ys is None else _data(ys),
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs, in the user's terms; an empty list if nothing does that decides the numbers."""
    found = []
    for key, name in {
        "anywidth": "the version of anywidth",
        "x64": "jax_enable_x64",
        "precision": "jax_default_matmul_precision",
        "kernel": "the kernel",
    }.items():
        if old.get(key) != new[key]:
            found.append(f"{name}: {old.get(key)} in the store, {new[key]} now")
    for name in ("X", "Y"):
        found += _data_differences(name, old.get(name), new[name])
    before, after = (", ".join(sorted(set(x.get("dtype", [])))) for x in (old, new))  # of several arrays, mostly one
    if before != after:
        found.append(f"the dtype: {before} in the store, {after} now")
    if not found:  # each of these changes the traced program
        was, now = old.get("parameters") or {}, new["parameters"]
        found += [
            f"the parameter {name}: {was.get(name, 'absent')} in the store, {now.get(name, 'absent')} now"
            for name in {**was, **now}
            if was.get(name) != now.get(name)
        ]
        if not found and old.get("program") != new["program"]:
            found.append("the network's code, or an option of the kernel: another program was traced")
            if old.get("jax") != new["jax"]:
                found[-1] += f" (by JAX {old.get('jax')} then, {new['jax']} now, which may be why)"
    return found


def _data(data: Dataset) -> dict:
    leaves = [leaf for group in data.groups for leaf in jax.tree.leaves(group.stack)]
    return {
        "examples": len(data),
        "shapes": sorted({str(tuple(leaf.shape[1:])) for leaf in leaves}),
        "dtypes": sorted({leaf.dtype.name for leaf in leaves}),
        "fingerprint": data_fingerprint(data),
    }


def _data_differences(name: str, old: Any, new: Any) -> list[str]:
    if (old is None) != (new is None):
        return [f"{name}: {'none' if old is None else 'given'} in the store, {'none' if new is None else 'given'} now"]
    if old is None:
        return []
    found = [
        f"the {key} of {name}: {_shown(old.get(key))} in the store, {_shown(new[key])} now"
        for key in ("examples", "shapes", "dtypes")
        if old.get(key) != new[key]
    ]
    if not found and old.get("fingerprint") != new["fingerprint"]:
        found = [f"the numbers in {name}, or their order"]
    return found


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _parameters(network: Any) -> dict[str, str]:
    """The distributions of the parameters, for people; what counts is in the program."""
    if network is None:
        return {}
    out = {}
    for item in read_parameters(network, jnp.float32).items:
        shape = ", ".join(map(str, item.leaf.shape)) + ("," if len(item.leaf.shape) == 1 else "")
        mean = "" if item.mean is None else f", mean={float(item.mean[0]):.6g}"
        out[item.leaf.name] = f"Normal(({shape}), var={float(item.leaf.var):.6g}{mean})"
    return out
