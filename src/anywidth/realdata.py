"""How infinitely wide networks predict on real data: the data sets that come with scikit-learn, and usual baselines.

A network's numbers are those of `anywidth.sklearn` as they come: noise and scale by marginal likelihood, nothing else
tuned. The baselines are tuned: the SVM by cross-validation over C and gamma, the length scale (and noise) of the
Gaussian process with an RBF kernel by marginal likelihood.
"""

import csv
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from anywidth import zoo

__all__ = ["DATA", "Score", "append", "heading", "markdown", "models", "read", "row", "scores"]

DATA = ("diabetes", "wine", "breast cancer", "digits")


@dataclass(frozen=True)
class Score:
    """One model on one split: accuracy or R2, and the mean log-likelihood of a test target."""

    data: str
    model: str
    split: int
    quality: float
    log_likelihood: float  # NaN if the model has no probabilities


@dataclass(frozen=True)
class _Problem:
    X: np.ndarray
    y: np.ndarray
    classes: bool
    train: int
    sequence: tuple[int, int] | None  # how a row reads as a sequence, if it does


def _problem(name: str) -> _Problem:
    from sklearn import datasets

    load = {
        "diabetes": datasets.load_diabetes,
        "wine": datasets.load_wine,
        "breast cancer": datasets.load_breast_cancer,
        "digits": datasets.load_digits,
    }[name]
    X, y = load(return_X_y=True)
    sequence = (8, 8) if name == "digits" else None
    return _Problem(X, y, name != "diabetes", 500 if name == "digits" else round(0.7 * len(y)), sequence)


def models(problem: "_Problem") -> dict[str, Any]:
    """The models that are compared, by name: scikit-learn estimators."""
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.gaussian_process import GaussianProcessClassifier, GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
    from sklearn.model_selection import GridSearchCV
    from sklearn.svm import SVC, SVR

    from anywidth.sklearn import Factory, InfiniteWidthClassifier, InfiniteWidthRegressor

    make = InfiniteWidthClassifier if problem.classes else InfiniteWidthRegressor
    relu, erf = jax.nn.relu, jax.lax.erf
    networks: dict[str, Any] = {
        "mlp, relu, depth 1": Factory(zoo.mlp, depth=1, nonlinearity=relu, varb=0.1),
        "mlp, relu, depth 3": Factory(zoo.mlp, depth=3, nonlinearity=relu, varb=0.1),
        "mlp, erf, depth 2": Factory(zoo.mlp, depth=2, nonlinearity=erf, varb=0.1),
    }
    found = {
        f"{name}: {kernel.upper()}": make(network, kernel=kernel)
        for name, network in networks.items()
        for kernel in ("nngp", "ntk")
    }
    if problem.sequence:
        sequences: dict[str, Any] = {"rnn over rows": zoo.rnn, "transformer over rows": zoo.transformer}
        for name, network in sequences.items():
            found[f"{name}: NTK"] = make(Factory(network, varb=0.1), kernel="ntk", input_shape=problem.sequence)
        convolutional = Factory(zoo.cnn, depth=3, varb=0.1, size=problem.sequence)
        found["cnn, relu, depth 3: NTK"] = make(convolutional, kernel="ntk", input_shape=(*problem.sequence, 1))
    scale = 1 / problem.X.shape[1]
    grid = {"C": [1, 10, 100], "gamma": [0.1 * scale, 0.3 * scale, scale, 3 * scale]}
    kernel = ConstantKernel(1.0) * RBF(np.sqrt(problem.X.shape[1]), (1e-1, 1e3))
    if problem.classes:
        found["SVM, RBF"] = CalibratedClassifierCV(GridSearchCV(SVC(), grid, cv=3), cv=3, ensemble=False)
        found["GP, RBF"] = GaussianProcessClassifier(kernel)
    else:
        found["SVM, RBF"] = GridSearchCV(SVR(), grid, cv=3)
        noisy = kernel + WhiteKernel(1.0)
        found["GP, RBF"] = GaussianProcessRegressor(noisy, normalize_y=True)
    return found


def scores(
    data: Sequence[str] = DATA,
    splits: int = 3,
    started: Callable[[str, str], None] = lambda d, m: None,
    known: Collection[Score] = (),
) -> Iterator[Score]:
    """Fit every model to every split of every data set.

    Args:
        data: names of data sets, of `DATA`.
        splits: random splits into training and test data, the same for all models.
        started: told the data set and the model before each fit.
        known: scores that are there already; they come in their turn, and nothing is fitted for them.
    """
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    have = {(score.data, score.model, score.split): score for score in known}
    for name in data:
        problem = _problem(name)
        for model, estimator in models(problem).items():
            for split in range(splits):
                if (name, model, split) in have:
                    yield have[name, model, split]
                    continue
                started(name, model)
                X, new, y, truth = train_test_split(
                    problem.X,
                    problem.y,
                    train_size=problem.train,
                    random_state=split,
                    stratify=problem.y if problem.classes else None,
                )
                shift, unit = (0.0, 1.0) if problem.classes else (y.mean(), y.std())
                if not problem.classes and model.startswith("SVM"):  # whose epsilon is in units of the targets
                    y, truth = (y - shift) / unit, (truth - shift) / unit
                fitted = make_pipeline(StandardScaler(), estimator).fit(X, y)
                yield Score(name, model, split, *_judged(fitted, new, truth, problem))


def _judged(fitted: Any, new: np.ndarray, truth: np.ndarray, problem: _Problem) -> tuple[float, float]:
    """Accuracy or R2, and the mean log-likelihood, from one pass over the test data."""
    from sklearn.metrics import r2_score

    if problem.classes:
        probability = fitted.predict_proba(new)
        labels = np.searchsorted(fitted.classes_, truth)
        likelihood = np.log(np.maximum(probability[np.arange(len(truth)), labels], 1e-300))
        return float((probability.argmax(1) == labels).mean()), float(likelihood.mean())
    try:
        mean, deviation = fitted.predict(new, return_std=True)
    except TypeError:  # an SVM has no deviation
        return float(r2_score(truth, fitted.predict(new))), math.nan
    # scikit-learn's WhiteKernel is part of its deviation already
    variance = deviation**2 + getattr(fitted[-1], "noise_variance_", 0.0)
    likelihood = -((truth - mean) ** 2) / variance / 2 - np.log(2 * np.pi * variance) / 2
    return float(r2_score(truth, mean)), float(likelihood.mean())


# --- kept in a file, so that a stopped run goes on ---------------------------------------------------------


def append(path: Path, score: Score) -> None:
    """Add a score to a .csv file."""
    with path.open("a", newline="") as file:
        csv.writer(file).writerow(astuple(score))


def read(path: Path) -> list[Score]:
    """The scores in a .csv file; none if there is no file, and not a line that was cut off.

    Raises:
        ValueError: it is a file of something else.
    """
    if not path.exists():
        return []
    found = []
    text = path.read_text()
    lines = text.splitlines(keepends=True)
    for line in csv.reader(line for line in lines if line.endswith("\n")):
        try:
            data, model, split, quality, likelihood = line
            found.append(Score(data, model, int(split), float(quality), float(likelihood)))
        except ValueError:
            raise ValueError(f"{path} does not hold scores of this table: {','.join(line):.60}") from None
    if lines and not lines[-1].endswith("\n"):
        path.write_text("".join(lines[:-1]))
    return found


# --- the table ---------------------------------------------------------------------------------------------


def heading(data: str) -> str:
    """The first lines of the table of a data set."""
    quality = "R2" if data == "diabetes" else "accuracy"
    return f"**{data}**\n\n| model | {quality} (± over splits) | log-likelihood |\n|---|---|---|\n"


def row(mine: Sequence[Score], best: tuple[str, str] = ("", "")) -> str:
    """The line of one model; what is as good as the best, as it is written, is bold."""
    quality, likelihood = _written(mine)
    spread = f"{np.std([s.quality for s in mine]):.3f}"
    shown = [
        f"**{value}**" if value and value == top else value
        for value, top in zip((quality, likelihood), best, strict=True)
    ]
    return f"| {mine[0].model} | {shown[0]} ± {spread} | {shown[1]} |\n"


def _written(mine: Sequence[Score]) -> tuple[str, str]:
    likelihood = float(np.mean([s.log_likelihood for s in mine]))
    return f"{np.mean([s.quality for s in mine]):.3f}", "" if math.isnan(likelihood) else f"{likelihood:.3f}"


def markdown(found: Sequence[Score]) -> str:
    """A table for each data set: means over splits, the best of each column in bold."""
    parts = []
    for data in dict.fromkeys(score.data for score in found):
        of_data = [score for score in found if score.data == data]
        rows = [[s for s in of_data if s.model == model] for model in dict.fromkeys(s.model for s in of_data)]
        written = [_written(mine) for mine in rows]
        best = max((q for q, _ in written), key=float), max((e for _, e in written if e), key=float, default="")
        parts.append(heading(data) + "".join(row(mine, best) for mine in rows))
    return "\n".join(parts)
