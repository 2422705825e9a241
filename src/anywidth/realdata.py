"""How infinitely wide networks predict on real data: the data sets that come with scikit-learn, and usual baselines.

A network's numbers are those of `anywidth.sklearn` as they come: noise and scale by marginal likelihood, nothing else
tuned. The baselines are tuned: the SVM by cross-validation over C and gamma, the length scale (and noise) of the
Gaussian process with an RBF kernel by marginal likelihood.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from anywidth import zoo

__all__ = ["DATA", "Score", "markdown", "models", "scores"]

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
    data: Sequence[str] = DATA, splits: int = 3, started: Callable[[str, str], None] = lambda d, m: None
) -> Iterator[Score]:
    """Fit every model to every split of every data set.

    Args:
        data: names of data sets, of `DATA`.
        splits: random splits into training and test data, the same for all models.
        started: told the data set and the model before each fit.
    """
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    for name in data:
        problem = _problem(name)
        for model, estimator in models(problem).items():
            for split in range(splits):
                started(name, model)
                X, new, y, truth = train_test_split(
                    problem.X,
                    problem.y,
                    train_size=problem.train,
                    random_state=split,
                    stratify=problem.y if problem.classes else None,
                )
                if not problem.classes and model.startswith("SVM"):
                    shift, unit = y.mean(), y.std()
                    fitted = make_pipeline(StandardScaler(), estimator).fit(X, (y - shift) / unit)
                    yield Score(name, model, split, float(fitted.score(new, (truth - shift) / unit)), float("nan"))
                    continue
                fitted = make_pipeline(StandardScaler(), estimator).fit(X, y)
                likelihood = _likelihood(fitted, new, truth, problem)
                yield Score(name, model, split, float(fitted.score(new, truth)), likelihood)


def _likelihood(fitted: Any, new: np.ndarray, truth: np.ndarray, problem: _Problem) -> float:
    if problem.classes:
        probability = fitted.predict_proba(new)[np.arange(len(truth)), np.searchsorted(fitted.classes_, truth)]
        return float(np.log(np.maximum(probability, 1e-300)).mean())
    mean, deviation = fitted.predict(new, return_std=True)
    # scikit-learn's WhiteKernel is part of its deviation already
    variance = deviation**2 + getattr(fitted[-1], "noise_variance_", 0.0)
    return float((-((truth - mean) ** 2) / variance / 2 - np.log(2 * np.pi * variance) / 2).mean())


def markdown(found: Sequence[Score]) -> str:
    """A table for each data set: means over splits, the best of each column in bold."""
    parts = []
    for data in dict.fromkeys(score.data for score in found):
        rows = []
        for model in dict.fromkeys(score.model for score in found if score.data == data):
            mine = [s for s in found if (s.data, s.model) == (data, model)]
            rows.append((model, [s.quality for s in mine], float(np.mean([s.log_likelihood for s in mine]))))
        best = max(np.mean(q) for _, q, _ in rows), np.nanmax([e for _, _, e in rows])
        lines = [
            f"**{data}**\n",
            f"| model | {'R2' if data == 'diabetes' else 'accuracy'} (± over splits) | log-likelihood |",
            "|---|---|---|",
        ]
        for model, quality, evidence in rows:
            value = f"{np.mean(quality):.3f}"
            value = f"**{value}**" if value == f"{best[0]:.3f}" else value
            shown = "" if np.isnan(evidence) else f"{evidence:.3f}"
            shown = f"**{shown}**" if shown == f"{best[1]:.3f}" else shown
            lines.append(f"| {model} | {value} ± {np.std(quality):.3f} | {shown} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"
