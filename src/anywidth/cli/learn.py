"""`anywidth fit` and `anywidth predict`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from anywidth.cli.options import Drop, InputShape, NetworkName, NetworkOptions
from anywidth.errors import InputError

__all__ = ["fit", "predict"]

_TASKS = ("auto", "regression", "classification")


def fit(
    network: NetworkName,
    data: Annotated[Path, typer.Option(metavar="FILE", help="Training data: .csv, .parquet, .npz or .npy.")],
    target: Annotated[
        str,
        typer.Option(metavar="NAME", help="The column to predict; for .npz an array, for .npy another .npy file."),
    ],
    model: Annotated[Path, typer.Option(metavar="FILE", help="Where to keep the fitted model, such as model.npz.")],
    option: NetworkOptions = None,
    kernel: Annotated[str, typer.Option(metavar="[ntk|nngp]", help="Which kernel.")] = "ntk",
    task: Annotated[
        str,
        typer.Option(
            metavar="[auto|regression|classification]",
            help="auto: classification of text, of booleans, and of at most 20 different integers.",
        ),
    ] = "auto",
    noise: Annotated[
        float | None,
        typer.Option(
            min=0, metavar="VARIANCE", help="Variance of the noise, in units of the kernel. [default: the likeliest]"
        ),
    ] = None,
    drop: Drop = None,
    standardize: Annotated[bool, typer.Option(help="Bring features to mean zero and variance one.")] = True,
    input_shape: InputShape = None,
) -> None:
    """Fit a Gaussian process with the kernel of an infinitely wide network.

    With the NTK it predicts what the network predicts after training by gradient flow on the squared loss; with the
    NNGP kernel it is the Bayesian posterior. Labels are classified by regression on them.

    For example:

    \b
      anywidth fit --network zoo:mlp --option depth=3 --data train.csv --target price --model model.npz
      anywidth predict --model model.npz --data test.csv --out predictions.csv
    """
    for name, value, known in (("--kernel", kernel, ("ntk", "nngp")), ("--task", task, _TASKS)):
        if value not in known:
            raise typer.BadParameter(f"{value!r} is none of {', '.join(known)}", param_hint=name)
    if model.suffix != ".npz":
        raise InputError(f"a model is kept in a .npz file, and {model} is not one")
    import numpy as np

    from anywidth.cli.files import read_table
    from anywidth.cli.models import Recipe, estimator, save

    table = read_table(data, target, tuple(drop or ()))
    assert table.y is not None
    X, y = _rows(table.X, data), table.y
    if len(y) != len(X):
        raise InputError(f"there are {len(X)} examples in {data} and {len(y)} targets in {target}")
    if y.dtype.kind == "f" and not np.isfinite(y).all():
        raise InputError(f"the target {target!r} is NaN or infinite for {int((~np.isfinite(y)).sum())} examples")
    if task == "auto":
        task = "classification" if _are_labels(y) else "regression"
    if task == "regression" and y.dtype.kind not in "fiub":
        raise InputError(f"the target {target!r} holds {y[0]!r}, which is not a number: use --task classification")
    if task == "classification" and y.ndim == 1 and len(labels := np.unique(y)) == 1:
        raise InputError(
            f"the target {target!r} is {str(labels[0])!r} for every example: there is nothing to tell apart"
        )
    recipe = Recipe(task, network, tuple(option or ()), kernel, noise, input_shape, "float64", table.names, target)
    standard = (X.mean(0), _positive(X.std(0))) if standardize else None
    found = estimator(recipe).fit(_standardized(X, standard), y)
    save(model, recipe, found, standard)
    print(f"{task} of {target!r}: {len(X)} examples of {X.shape[1]} features")
    print(f"network: {' '.join((recipe.network, *recipe.options))}")
    print(f"noise: {found.noise_:.3g} in units of the {kernel} kernel{'' if noise is not None else ' (the likeliest)'}")
    print(f"log marginal likelihood: {found.log_marginal_likelihood_:.1f}")
    if found.jitter_:
        print(f"jitter: {found.jitter_:.3g} was added to the diagonal so that it could be factorised")
    print(f"model: {model}")


def predict(
    model: Annotated[Path, typer.Option(metavar="FILE", help='A model that "anywidth fit" wrote.')],
    data: Annotated[Path, typer.Option(metavar="FILE", help="Data of the same columns, with or without the target.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Predictions: .csv, .parquet, .npz or .npy.")],
    target: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The true values, as for fit. [default: what the model was fitted to, if there]"
        ),
    ] = None,
    spread: Annotated[
        bool, typer.Option(help="Also standard deviations of predictions, or probabilities of classes.")
    ] = True,
) -> None:
    """Predict with a fitted model.

    If the data has the target, the accuracy, or R2 and root mean squared error, of the predictions is printed.

    For example:

    \b
      anywidth predict --model model.npz --data test.csv --out predictions.csv
    """
    import numpy as np

    from anywidth.cli.files import KINDS, read_table, write_columns
    from anywidth.cli.models import load

    if out.suffix.lower() not in KINDS:
        raise InputError(f"{out} is not a file of a known kind ({', '.join(KINDS)})")
    recipe, found, standard = load(model)
    table = read_table(data, target or recipe.target, names=recipe.names, optional=target is None)
    X = _rows(table.X, data)
    if X.shape[1] != found.n_features_in_:
        raise InputError(f"{data} has {X.shape[1]} features, and the model was fitted to {found.n_features_in_}")
    if table.y is not None and table.y.shape[:1] != X.shape[:1]:
        raise InputError(
            f"there are {len(X)} examples in {data} and {len(table.y)} targets in {target or recipe.target}"
        )
    X = _standardized(X, standard)
    name = recipe.target if recipe.names else "prediction"
    columns: dict[str, Any] = {}
    if recipe.task == "classification":
        predicted = found.predict(X)
        columns[name] = predicted
        if spread:
            columns |= {f"p({c})": p for c, p in zip(found.classes_, found.predict_proba(X).T, strict=True)}
    else:
        predicted, deviation = found.predict(X, return_std=True) if spread else (found.predict(X), None)
        for i, column in enumerate(np.reshape(predicted, (len(X), -1)).T):
            columns[name if np.ndim(predicted) == 1 else f"{name}{i}"] = column
        if deviation is not None:
            total = np.sqrt(deviation**2 + found.noise_variance_)
            for i, column in enumerate(np.reshape(total, (len(X), -1)).T):
                columns["std" if np.ndim(predicted) == 1 else f"std{i}"] = column
    write_columns(out, columns)
    if table.y is not None:
        if recipe.task == "classification":
            print(f"accuracy: {np.mean(predicted.astype(str) == np.asarray(table.y).astype(str)):.4f}")
        else:
            wrong = np.asarray(table.y, float) - predicted
            print(f"R2: {1 - np.mean(wrong**2) / np.var(np.asarray(table.y, float)):.4f}")
            print(f"root mean squared error: {np.sqrt(np.mean(wrong**2)):.4g}")
    print(f"predictions: {out} ({len(X)} rows: {', '.join(list(columns)[:6])}{', ...' if len(columns) > 6 else ''})")


def _rows(X: Any, path: Path) -> Any:
    if X.ndim < 2:
        raise InputError(
            f"the examples in {path} must have an axis of examples and one of features, not shape {X.shape}"
        )
    return X.reshape(len(X), -1)


def _are_labels(y: Any) -> bool:
    import numpy as np

    return y.dtype.kind not in "fiu" or (y.dtype.kind in "iu" and y.ndim == 1 and len(np.unique(y)) <= 20)


def _positive(deviation: Any) -> Any:
    import numpy as np

    return np.where(deviation > 0, deviation, 1.0)


def _standardized(X: Any, standard: Any) -> Any:
    return X if standard is None else (X - standard[0]) / standard[1]
