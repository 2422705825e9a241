"""Estimators under scikit-learn's own checks and tools."""

import pickle
import warnings

import jax
import numpy as np
import pytest

pytest.importorskip("sklearn")
from sklearn.base import clone
from sklearn.datasets import load_digits, make_classification
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, WhiteKernel
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import anywidth as aw
from anywidth import predict, zoo
from anywidth.sklearn import Factory, InfiniteWidthClassifier, InfiniteWidthKernel, InfiniteWidthRegressor


@parametrize_with_checks([InfiniteWidthRegressor(noise=0.01), InfiniteWidthClassifier(noise=0.01)])
def test_scikit_learns_checks(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def wave():
    rng = np.random.default_rng(5)
    X = rng.uniform(-2, 2, size=(60, 2))
    return X, np.sin(1.5 * X[:, 0]) + 0.3 * X[:, 1] + 0.05 * rng.normal(size=60)


SMOOTH = Factory(zoo.mlp, depth=2, nonlinearity=jax.lax.erf, varb=0.5)


def test_regression(wave):
    X, y = wave
    model = InfiniteWidthRegressor(SMOOTH, kernel="nngp").fit(X[:40], y[:40])
    mean, std = model.predict(X[40:], return_std=True)
    assert model.score(X[40:], y[40:]) > 0.85
    wrong = (y[40:] - mean) / np.sqrt(std**2 + model.noise_variance_)
    assert 0.5 < np.sqrt((wrong**2).mean()) < 2
    assert model.noise_variance_ < 0.05
    assert model.jitter_ == 0


@pytest.mark.long
def test_the_numbers_are_those_of_predict(wave):
    X, y = wave
    Y = np.stack([y, 100 * y**2 + 7], 1)
    model = InfiniteWidthRegressor(SMOOTH, noise=0.02).fit(X[:40], Y[:40])
    kernel = aw.ntk(SMOOTH(2))
    targets = (Y[:40] - Y[:40].mean(0)) / Y[:40].std(0)
    gp = predict.posterior(aw.gram(kernel, X[:40]), targets, 0.02)
    cross = aw.gram(kernel, X[40:], X[:40])
    mean, std = model.predict(X[40:], return_std=True)
    assert mean.shape == std.shape == (20, 2)
    np.testing.assert_allclose(mean, gp.mean(cross) * Y[:40].std(0) + Y[:40].mean(0), rtol=1e-9)
    variance = gp.variance(cross, predict.diagonal(kernel, X[40:]))
    np.testing.assert_allclose(std, np.sqrt(variance)[:, None] * Y[:40].std(0), rtol=1e-9)
    expected = gp.log_marginal_likelihood().sum() - 40 * np.log(Y[:40].std(0)).sum()
    assert model.log_marginal_likelihood_ == pytest.approx(float(expected), rel=1e-10)


def test_automatic_noise_is_the_likeliest(wave):
    X, y = wave
    model = InfiniteWidthRegressor(SMOOTH, normalize_y=False).fit(X, y)
    K = aw.gram(aw.ntk(SMOOTH(2)), X) * model.scale_[0]
    found = [float(predict.log_marginal_likelihood(K, y, model.noise_variance_ * f)) for f in (0.97, 1, 1.03)]
    assert found[1] == max(found)
    assert model.log_marginal_likelihood_ == pytest.approx(found[1], rel=1e-9)


@pytest.mark.parametrize("classes", [2, 3])
def test_classification(classes):
    X, y = make_classification(
        200,
        5,
        n_informative=4,
        n_redundant=0,
        n_classes=classes,
        n_clusters_per_class=1,
        flip_y=0.1,
        class_sep=2.0,
        random_state=1,
    )
    labels = np.array(["cat", "dog", "eel"])[y]
    model = make_pipeline(StandardScaler(), InfiniteWidthClassifier(kernel="nngp")).fit(X[:120], labels[:120])
    probability = model.predict_proba(X[120:])
    np.testing.assert_allclose(probability.sum(1), 1, rtol=1e-12)
    assert (model.classes_[probability.argmax(1)] == model.predict(X[120:])).all()
    assert model.score(X[120:], labels[120:]) > 0.8
    assert -np.log(probability[np.arange(80), y[120:]]).mean() < 0.6


def test_probabilities_of_the_largest_of_several_gaussians():
    from anywidth.sklearn.estimators import _largest

    means = np.array([[0.0, 1.0, -0.5, 0.2], [3.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    draws = means[:, None] + np.random.default_rng(0).normal(size=(3, 200_000, 4))
    counted = np.stack([np.bincount(d.argmax(1), minlength=4) for d in draws]) / 200_000
    np.testing.assert_allclose(_largest(means), counted, atol=4e-3)
    np.testing.assert_allclose(_largest(means)[2], 0.25, rtol=1e-10)


def test_grid_search_over_the_network(wave):
    X, y = wave
    model = make_pipeline(StandardScaler(), InfiniteWidthRegressor(Factory(zoo.mlp, varb=0.1)))
    grid = {
        "infinitewidthregressor__network__depth": [1, 2],
        "infinitewidthregressor__network__nonlinearity": [jax.nn.relu, jax.lax.erf],
        "infinitewidthregressor__kernel": ["nngp"],
    }
    search = GridSearchCV(model, grid, cv=2, error_score="raise").fit(X, y)
    assert search.best_params_["infinitewidthregressor__network__nonlinearity"] is jax.lax.erf
    scores = search.cv_results_["mean_test_score"]
    assert len(set(np.round(scores, 6))) == 4


def readout(n):
    return {"u": aw.Normal((n, 2)), "v": aw.Normal((n,))}


def forward(p, x):
    return p["v"] @ jax.nn.relu(p["u"] @ x) * p["v"].size ** -0.5


@pytest.mark.parametrize(
    "network", [None, SMOOTH, zoo.mlp, aw.Network(readout, forward)], ids=["none", "factory", "function", "network"]
)
def test_pickled_models_predict_the_same(wave, network):
    X, y = wave
    model = InfiniteWidthRegressor(network, noise=0.1).fit(X, y)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.predict(X, return_std=True), model.predict(X, return_std=True))
    assert clone(model).get_params()["network"] == model.network


def test_what_cannot_be_pickled_says_what_to_do(wave):
    X, y = wave
    model = InfiniteWidthRegressor(zoo.mlp(2), noise=0.1).fit(X, y)
    assert np.isfinite(model.predict(X)).all()
    with pytest.raises(TypeError, match=r"Factory\(zoo\.mlp, depth=2\)"):
        pickle.dumps(model)
    with pytest.raises(TypeError, match=r"Factory\(zoo\.mlp, depth=2\)"):
        pickle.dumps(InfiniteWidthKernel(zoo.mlp(2)))


def test_precision_is_the_estimators_own(wave):
    X, y = wave
    with jax.enable_x64(False):
        model = InfiniteWidthRegressor(noise=0.1).fit(X, y)
        assert model.factor_.dtype == np.float64
        assert InfiniteWidthRegressor(noise=0.1, dtype="float32").fit(X, y).factor_.dtype == np.float32
        assert InfiniteWidthKernel()(X).dtype == np.float64
    np.testing.assert_allclose(InfiniteWidthRegressor(noise=0.1).fit(X, y).predict(X), model.predict(X), rtol=1e-12)


def test_rows_are_folded_into_sequences():
    X, y = load_digits(n_class=2, return_X_y=True)
    model = InfiniteWidthClassifier(Factory(zoo.rnn), input_shape=(8, 8), noise=0.01).fit(X[:30] / 16, y[:30])
    assert model.score(X[30:60] / 16, y[30:60]) > 0.9
    with pytest.raises(ValueError, match="64 features"):
        InfiniteWidthClassifier(Factory(zoo.rnn), input_shape=(8, 7)).fit(X[:30], y[:30])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"kernel": "rbf"}, ValueError, "'rbf'"),
        ({"noise": -1.0}, ValueError, "-1.0"),
        ({"noise": "guess"}, ValueError, "'guess'"),
        ({"dtype": "float16"}, ValueError, "'float16'"),
        ({"network": 3}, TypeError, "int"),
        ({"network": Factory(zoo.rnn, pool="none"), "input_shape": (2, 1)}, ValueError, r"output of shape \(2,\)"),
    ],
)
def test_refused(wave, change, error, words):
    with pytest.raises(error, match=words):
        InfiniteWidthRegressor(**change).fit(*wave)


def test_factories():
    factory = Factory(zoo.mlp, depth=2)
    assert factory(3) is factory(3)
    assert factory(3) is not factory(4)
    assert repr(factory) == "Factory(mlp, depth=2)"
    assert factory.get_params()["varw"] == 2.0
    assert clone(factory) == factory
    assert factory.set_params(varw=1.0).options == {"depth": 2, "varw": 1.0}
    for call in (lambda: Factory(zoo.mlp, width=3), lambda: factory.set_params(width=3)):
        with pytest.raises(TypeError, match="mlp has no option 'width'; it has depth, nonlinearity"):
            call()


# --- the kernel object ------------------------------------------------------------------------------------


def test_digits_against_scikit_learns_own_process():
    """All 1797 images, to 1e-8."""
    X, y = load_digits(return_X_y=True)
    X, targets = X / 16, np.eye(10)[y] - 0.1
    factory = Factory(zoo.mlp, depth=2, varb=0.1)
    kernel = aw.nngp(factory(64))
    gp = predict.posterior(aw.gram(kernel, X), targets, 1e-2)
    theirs = GaussianProcessRegressor(InfiniteWidthKernel(factory), alpha=1e-2, optimizer=None).fit(X, targets)
    new = X[::60] + 0.1 * np.random.default_rng(0).normal(size=X[::60].shape)
    mean, std = theirs.predict(new, return_std=True)
    cross = aw.gram(kernel, new, X)
    np.testing.assert_allclose(gp.mean(cross), mean, rtol=0, atol=1e-8)
    np.testing.assert_allclose(gp.variance(cross, predict.diagonal(kernel, new)), std[:, 0] ** 2, rtol=0, atol=1e-8)
    assert float(gp.log_marginal_likelihood().sum()) == pytest.approx(theirs.log_marginal_likelihood_value_, rel=1e-10)


def test_kernels_combine_and_are_tuned(wave):
    X, y = wave
    kernel = InfiniteWidthKernel(
        Factory(zoo.mlp, nonlinearity=jax.lax.erf, varb=0.1), tune={"varw": (1e-1, 1e2), "varb": (1e-3, 1e2)}
    )
    both = ConstantKernel(1.0) * kernel + WhiteKernel(0.1)
    start = GaussianProcessRegressor(both, optimizer=None).fit(X, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # it may end at a bound
        model = GaussianProcessRegressor(both).fit(X, y)
    learned = model.kernel_.k1.k2.network.options
    assert learned["varw"] != 2.0
    assert kernel.network.options == {"nonlinearity": jax.lax.erf, "varb": 0.1}
    assert model.log_marginal_likelihood_value_ > start.log_marginal_likelihood_value_ + 10
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_allclose(again.predict(X), model.predict(X), rtol=1e-12)


@pytest.mark.parametrize("which", ["nngp", "ntk"])
def test_gradients_in_theta(wave, which):
    X = wave[0][:5]
    kernel = InfiniteWidthKernel(Factory(zoo.mlp, varb=0.1), which, {"varw": (0.1, 10), "varb": (0.01, 10)})
    K, gradient = kernel(X, eval_gradient=True)
    np.testing.assert_allclose(K, InfiniteWidthKernel(Factory(zoo.mlp, varb=0.1), which)(X), rtol=1e-12)
    np.testing.assert_allclose(np.diagonal(K), kernel.diag(X), rtol=1e-12)
    np.testing.assert_allclose(K[:, 2:], kernel(X, X[2:]), rtol=1e-12)
    for i in range(2):
        step = 1e-5 * np.eye(2)[i]
        up, down = (kernel.clone_with_theta(kernel.theta + s)(X) for s in (step, -step))
        np.testing.assert_allclose(gradient[..., i], (up - down) / 2e-5, rtol=1e-6, atol=1e-9)


def test_kernels_refuse(wave):
    with pytest.raises(ValueError, match="Factory"):
        InfiniteWidthKernel(zoo.mlp, tune={"varw": (1, 2)})(wave[0])
    with pytest.raises(ValueError, match=r"'varb'.*None"):
        InfiniteWidthKernel(Factory(zoo.mlp), tune={"varb": (1, 2)})(wave[0])
    with pytest.raises(ValueError, match="Y is None"):
        InfiniteWidthKernel()(wave[0], wave[0], eval_gradient=True)
