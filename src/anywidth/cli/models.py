"""Fitted estimators in files: plain arrays and a line of JSON, so that opening one runs nothing that is in it.

The network is kept by name, and is looked up again.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from anywidth.cli.networks import find_network, parse_shape
from anywidth.errors import InputError

__all__ = ["Recipe", "estimator", "load", "save"]

_FORMAT = 1
_ARRAYS = ("X_fit_", "weights_", "factor_", "scale_", "_shift", "_unit", "noise_variance_", "classes_")
_NUMBERS = ("noise_", "jitter_", "log_marginal_likelihood_", "n_features_in_")


@dataclass(frozen=True)
class Recipe:
    """What was fitted to what: enough to make the estimator again, and to read its data."""

    task: str
    network: str
    options: tuple[str, ...]
    kernel: str
    noise: float | None
    input_shape: str | None
    dtype: str
    names: tuple[str, ...] | None
    target: str


def estimator(recipe: Recipe) -> Any:
    """The estimator, not fitted yet."""
    from anywidth.sklearn import InfiniteWidthClassifier, InfiniteWidthRegressor

    make = InfiniteWidthClassifier if recipe.task == "classification" else InfiniteWidthRegressor
    return make(
        find_network(recipe.network, recipe.options),
        kernel=recipe.kernel,
        noise="auto" if recipe.noise is None else recipe.noise,
        input_shape=parse_shape(recipe.input_shape),
        dtype=recipe.dtype,
    )


def save(path: Path, recipe: Recipe, model: Any, standard: tuple[np.ndarray, np.ndarray] | None) -> None:
    """Keep a fitted estimator, and the means and deviations by which features are standardised."""
    arrays = {name: np.asarray(getattr(model, name)) for name in _ARRAYS if hasattr(model, name)}
    if arrays.get("classes_", np.zeros(0)).dtype == object:
        arrays["classes_"] = arrays["classes_"].astype(str)
    numbers = {name: float(getattr(model, name)) for name in _NUMBERS}
    columns = list(getattr(model, "_columns", ()))
    header = json.dumps({"format": _FORMAT, "recipe": asdict(recipe), "numbers": numbers, "columns": columns})
    if standard is not None:
        arrays |= {"mean": standard[0], "deviation": standard[1]}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.savez(file, anywidth=np.array(header), **cast(Any, arrays))


def load(path: Path) -> tuple[Recipe, Any, tuple[np.ndarray, np.ndarray] | None]:
    """A fitted estimator, as it was saved.

    Raises:
        InputError: the file is not a model, or its network is not found any more.
    """
    recipe, header, arrays = read(path)
    model = estimator(recipe)
    for name, value in header["numbers"].items():
        setattr(model, name, value)
    model.n_features_in_ = int(model.n_features_in_)
    for name in _ARRAYS:
        if name in arrays:
            setattr(model, name, arrays[name])
    model._columns = tuple(header["columns"])
    return recipe, model, (arrays["mean"], arrays["deviation"]) if "mean" in arrays else None


def read(path: Path) -> tuple[Recipe, dict[str, Any], dict[str, np.ndarray]]:
    """What a model file holds."""
    if not path.is_file():
        raise InputError(f"there is no model {path}")
    try:
        with np.load(path, allow_pickle=False) as found:
            arrays = dict(found)
        header = json.loads(str(arrays.pop("anywidth")))
        recipe = header["recipe"]
        made = Recipe(**cast(Any, {k: tuple(v) if isinstance(v, list) else v for k, v in recipe.items()}))
    except Exception:
        raise InputError(f'{path} is not a model that "anywidth fit" wrote') from None
    if header["format"] != _FORMAT:
        raise InputError(f"{path} was written by another version of anywidth; fit it again")
    return made, header, arrays
