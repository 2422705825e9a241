"""Inference, against formulas written out, refits, integration in time and trained networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.stats

import anywidth as aw
from anywidth import predict, zoo
from anywidth.predict import cg


def rbf(X, Y, length=1.0):
    return np.exp(-((X[:, None] - Y[None]) ** 2).sum(-1) / (2 * length**2))


def coupled(X, Y):
    """A kernel with outputs of shape (2,): different length scales, and correlated."""
    A, B = np.array([[1.0, 0.3], [0.3, 0.5]]), np.array([[0.2, -0.1], [-0.1, 0.7]])
    return rbf(X, Y)[..., None, None] * A + rbf(X, Y, 0.5)[..., None, None] * B


def both_kernels(nngp, ntk):
    return aw.Kernels(nngp, ntk, aw.Errors(np.zeros(()), np.zeros(())))


def flat(K):
    if K.ndim == 2:
        return K
    n, m, s, t = K.shape
    return K.transpose(0, 2, 1, 3).reshape(n * s, m * t)


KERNELS = {"one output": rbf, "two outputs": coupled}


@pytest.fixture
def rng():
    return np.random.default_rng(11)


@pytest.fixture(params=KERNELS)
def problem(request, rng):
    """Training inputs and targets in three columns, new inputs, and a kernel."""
    k = KERNELS[request.param]
    X, new = rng.normal(size=(9, 2)), rng.normal(size=(4, 2))
    outputs = k(X, X).shape[2:3]
    return k, X, rng.normal(size=(9, *outputs, 3)), new


def written_out(k, X, y, new, noise):
    """Mean and covariance by the textbook's formula."""
    s = flat(k(X, X)).shape[0] // len(X)
    A = flat(k(X, X)) + np.diag(np.repeat(np.broadcast_to(noise, len(X)), s))
    C = flat(k(new, X))
    mean = C @ np.linalg.solve(A, y.reshape(len(A), -1))
    return mean, flat(k(new, new)) - C @ np.linalg.solve(A, C.T), A


@pytest.mark.parametrize("noise", [0.1, np.linspace(0.05, 0.5, 9)], ids=["one noise", "a noise each"])
@pytest.mark.parametrize("solver", ["cholesky", "cg"])
def test_posterior(problem, noise, solver):
    k, X, y, new = problem
    gp = predict.posterior(k(X, X), y, noise, solver=solver, tolerance=1e-11)
    mean, covariance, _ = written_out(k, X, y, new, noise)
    close = {"rtol": 1e-8, "atol": 1e-9}
    assert gp.solver == solver
    assert gp.jitter == 0
    assert gp.weights.shape == y.shape
    assert gp.mean(k(new, X)).shape == (4, *y.shape[1:])
    np.testing.assert_allclose(gp.mean(k(new, X)).reshape(mean.shape), mean, **close)
    np.testing.assert_allclose(flat(gp.covariance(k(new, X), k(new, new))), covariance, **close)
    prior = np.diag(flat(k(new, new))).reshape(4, *y.shape[1:-1])
    variance = gp.variance(k(new, X), prior)
    assert variance.shape == prior.shape
    np.testing.assert_allclose(variance.ravel(), np.diag(covariance), **close)


def test_log_marginal_likelihood(problem):
    k, X, y, new = problem
    _, _, A = written_out(k, X, y, new, 0.2)
    found = predict.log_marginal_likelihood(k(X, X), y, 0.2)
    for column in range(3):
        expected = scipy.stats.multivariate_normal(np.zeros(len(A)), A).logpdf(y[..., column].ravel())
        assert found[column] == pytest.approx(expected, rel=1e-12)


def test_leave_one_out_is_leaving_one_out(problem):
    k, X, y, _ = problem
    found = predict.leave_one_out(k(X, X), y, 0.2)
    for i in range(len(X)):
        rest = np.arange(len(X)) != i
        mean, covariance, _ = written_out(k, X[rest], y[rest], X[i : i + 1], 0.2)
        covariance = covariance + 0.2 * np.eye(len(covariance))
        np.testing.assert_allclose(found.mean[i].reshape(mean.shape), mean, rtol=1e-9)
        np.testing.assert_allclose(found.variance[i].ravel(), np.diag(covariance), rtol=1e-9)
        for c in range(3):
            density = scipy.stats.multivariate_normal(mean[:, c], covariance).logpdf(y[i, ..., c].ravel())
            assert found.log_density[i, c] == pytest.approx(density, rel=1e-9)


def test_fit_noise_is_the_likeliest(rng):
    X = rng.normal(size=(60, 1))
    K = rbf(X, X)
    L = np.linalg.cholesky(K + 1e-10 * np.eye(60))
    y = (L @ rng.normal(size=(60, 2)) + 0.3 * rng.normal(size=(60, 2))) * np.array([1.0, 10.0])
    fit = predict.fit_noise(K, y)

    def evidence(noise, scale):
        each = [predict.log_marginal_likelihood(scale[c] * K, y[:, c], scale[c] * noise) for c in (0, 1)]
        return np.array(each)

    np.testing.assert_allclose(evidence(fit.noise, fit.scale), fit.log_marginal_likelihood, rtol=1e-8)
    for noise, scale in ((1.02, [1, 1]), (0.98, [1, 1]), (1, [1.02, 1]), (1, [1, 0.98])):
        assert evidence(fit.noise * noise, fit.scale * scale).sum() < fit.log_marginal_likelihood.sum()


# --- training ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("time", [0.0, 0.3, 5.0, np.inf])
def test_gradient_flow(problem, noise, time):
    """Against the matrix exponential, and outputs at a time as a linear map of those at initialisation."""
    k, X, y, new = problem
    ntk, nngp = (lambda A, B: 2 * k(A, B)), k
    both = both_kernels(nngp(X, X), ntk(X, X))
    cross = both_kernels(nngp(new, X), ntk(new, X))
    flow = predict.gradient_flow(both, y, noise)
    T = flat(both.ntk) + noise * np.eye(flat(both.ntk).shape[0])
    decay = np.zeros_like(T) if np.isinf(time) else scipy.linalg.expm(-time * T)
    B = flat(cross.ntk) @ np.linalg.solve(T, np.eye(len(T)) - decay)
    np.testing.assert_allclose(flow.mean(cross, time).reshape(len(B), -1), B @ y.reshape(len(T), -1), atol=1e-9)
    joint = np.block([[flat(nngp(new, new)), flat(cross.nngp)], [flat(cross.nngp).T, flat(both.nngp)]])
    linear = np.hstack([np.eye(len(B)), -B])
    expected = linear @ joint @ linear.T
    found = flow.covariance(cross, nngp(new, new), time)
    np.testing.assert_allclose(flat(found), expected, atol=1e-8)
    prior = np.diag(flat(nngp(new, new))).reshape(4, *y.shape[1:-1])
    np.testing.assert_allclose(flow.variance(cross, prior, time).ravel(), np.diag(expected), atol=1e-8)
    trained = predict.gradient_flow(both.ntk, y, noise).training_mean(time)
    np.testing.assert_allclose(trained, flow.mean(both.ntk, time), atol=1e-9)


def test_the_end_of_training_is_the_posterior_mean(rng):
    X, new = rng.normal(size=(40, 3)), rng.normal(size=(7, 3))
    ntk = aw.ntk(zoo.mlp(3, 2, jax.lax.erf, varb=0.1))
    K, cross, y = aw.gram(ntk, X), aw.gram(ntk, new, X), rng.normal(size=40)
    for noise in (0.0, 1e-2):
        flow = predict.gradient_flow(K, y, noise)
        np.testing.assert_allclose(flow.mean(cross), predict.posterior(K, y, noise).mean(cross), rtol=1e-8, atol=1e-8)
    assert predict.gradient_flow(K, y).training_mean() == pytest.approx(y, abs=1e-8)


def test_duplicates_are_no_trouble_to_training(rng):
    X = np.repeat(rng.normal(size=(10, 2)), 2, axis=0)
    y = rng.normal(size=20)
    flow = predict.gradient_flow(rbf(X, X), y)
    for time in (1.0, 1e6, np.inf):
        assert np.isfinite(flow.mean(rbf(X, X), time)).all()
    averages = np.repeat(y.reshape(10, 2).mean(1), 2)
    np.testing.assert_allclose(flow.training_mean(), averages, atol=1e-7)


def test_max_learning_rate(rng):
    X = rng.normal(size=(30, 2))
    T, y = rbf(X, X), rng.normal(size=30)
    flow = predict.gradient_flow(T, y, 0.1)
    assert predict.max_learning_rate(T, 0.1) == pytest.approx(float(flow.max_learning_rate), rel=1e-9)
    assert predict.max_learning_rate(T[:1, :1]) == pytest.approx(2.0)

    def descend(rate):
        f, theta = np.zeros(30), np.zeros(30)  # outputs T theta, and the decay of theta
        for _ in range(2000):
            theta = theta - rate * (f - y + 0.1 * theta)
            f = T @ theta
        return np.abs(f - np.asarray(flow.training_mean())).max()

    assert descend(0.99 * flow.max_learning_rate) < 1e-3
    assert descend(1.01 * flow.max_learning_rate) > 1e3


def test_trained_networks_have_this_mean_and_variance(key):
    """Two hundred networks of width 512, trained by gradient descent."""
    net = zoo.mlp(2, 1, jax.lax.erf, varb=0.1)
    X, new = jnp.array([[1.0, 0.2], [-0.5, 1.0], [0.3, -1.2]]), jnp.array([[0.5, 0.5], [-1.0, -1.0]])
    y, time, steps, seeds = jnp.array([0.5, -1.0, 1.0]), 2.0, 100, 200

    def trained(key):
        params = net.sample(key, 512)

        def outputs(p, x):
            return jax.vmap(lambda e: net.apply(p, e))(x)

        def loss(p):
            return ((outputs(p, X) - y) ** 2).sum() / 2

        def step(p, _):
            return jax.tree.map(lambda a, g: a - time / steps * g, p, jax.grad(loss)(p)), None

        return outputs(jax.lax.scan(step, params, length=steps)[0], new)

    found = jax.jit(jax.vmap(trained))(jax.random.split(key, seeds))
    kernel = aw.kernels(net)
    flow = predict.gradient_flow(aw.gram(kernel, X), y)
    cross = aw.gram(kernel, new, X)
    mean, variance = flow.mean(cross, time), flow.variance(cross, predict.diagonal(aw.nngp(net), new), time)
    standard_error = np.sqrt(variance / seeds)
    assert (np.abs(found.mean(0) - mean) < 4 * standard_error + 0.02).all()
    np.testing.assert_allclose(found.var(0), variance, rtol=4 * np.sqrt(2 / seeds))


# --- numerics ---------------------------------------------------------------------------------------------


def test_float32_with_duplicates_at_depth_10(rng):
    X = rng.normal(size=(1000, 16)).astype(np.float32)
    X = np.concatenate([X, X])
    K = aw.gram(aw.kernels(zoo.mlp(16, 10)), X)
    for kernel in K:
        assert kernel.dtype == np.float32
        gp = predict.posterior(kernel, X[:, 0])
        assert np.isfinite(gp.weights).all()
        assert 0 < gp.jitter < 1e-4 * np.diagonal(kernel).mean()
        assert f"jitter={gp.jitter:.3g}" in repr(gp)
        np.testing.assert_allclose(gp.mean(kernel[:50]), X[:50, 0], atol=0.02)
        assert np.isfinite(gp.log_marginal_likelihood())


def test_jitter_is_the_smallest_that_works(rng):
    X = np.repeat(rng.normal(size=(8, 2)), 2, axis=0)
    K = rbf(X, X) - 1e-7 * np.eye(16)
    jitter = float(predict.posterior(K, np.ones(16)).jitter)
    assert 0.99e-7 < jitter < 4e-7
    assert np.isfinite(np.linalg.cholesky(K + jitter * np.eye(16))).all()


@pytest.mark.parametrize("traced", ["kernel", "noise", "y"])
def test_gradients_of_the_log_marginal_likelihood(rng, traced):
    X = rng.normal(size=(12, 2))
    noise, y = jnp.asarray(0.1), jnp.asarray(rng.normal(size=12))
    direction = {
        "kernel": jnp.asarray(rbf(X, X, 0.3)),
        "noise": jnp.asarray(1.0),
        "y": jnp.asarray(rng.normal(size=12)),
    }[traced]

    def f(t):
        moved = {"kernel": jnp.asarray(rbf(X, X)), "noise": noise, "y": y}
        moved[traced] = moved[traced] + t * direction
        return predict.log_marginal_likelihood(moved["kernel"], moved["y"], moved["noise"])

    h = 1e-5
    assert jax.grad(f)(0.0) == pytest.approx(float((f(h) - f(-h)) / (2 * h)), rel=1e-6)
    if traced != "kernel":
        return
    second = float((f(1e-3) - 2 * f(0.0) + f(-1e-3)) / 1e-6)
    assert jax.jit(jax.hessian(f))(0.0) == pytest.approx(second, rel=1e-3)
    assert jax.jit(jax.jacfwd(f))(0.0) == pytest.approx(float(jax.grad(f)(0.0)), rel=1e-9)


def network(theta):
    """A traced number for each way in which one can enter."""

    def init(n):
        return {
            "u": aw.Normal((n, 2), var=jnp.exp(theta["log_varu"])),
            "b": aw.Normal((n,), var=theta["varb"]),
            "v": aw.Normal((n,), var=theta["varv"] / n),
        }

    def apply(p, x):
        h = p["u"] @ (x * theta["stretch"]) + p["b"]
        return p["v"] @ jax.nn.relu(theta["gain"] * h)

    return aw.Network(init, apply)


THETA = {"log_varu": 0.2, "varb": 0.3, "varv": 1.5, "stretch": 0.8, "gain": 0.7}


def test_hyperparameters_of_a_network_have_gradients(rng):
    X, y = jnp.asarray(rng.normal(size=(6, 2))), rng.normal(size=6)

    def f(theta):
        kernel = aw.nngp(network(theta))
        K = jax.vmap(jax.vmap(kernel, (None, 0)), (0, None))(X, X)
        return predict.log_marginal_likelihood(K, y, 0.1)

    theta = {name: jnp.asarray(value) for name, value in THETA.items()}
    f = jax.jit(f)
    gradient = jax.grad(f)(theta)
    for name in THETA:
        h = 1e-4
        up, down = ({**theta, name: theta[name] + sign * h} for sign in (1, -1))
        assert gradient[name] == pytest.approx(float((f(up) - f(down)) / (2 * h)), rel=1e-5), name
    concrete = aw.nngp(network(THETA))
    K = [[concrete(x, z) for z in X] for x in X[:2]]
    np.testing.assert_allclose(K, jax.vmap(jax.vmap(concrete, (None, 0)), (0, None))(X[:2], X), rtol=1e-10)


# --- stores -----------------------------------------------------------------------------------------------


@pytest.fixture(params=["zarr", "memmap"])
def store(request, tmp_path):
    """Keeps an array where it is read lazily."""

    def keep(name, K):
        if request.param == "memmap":
            np.save(tmp_path / f"{name}.npy", K)
            return np.load(tmp_path / f"{name}.npy", mmap_mode="r")
        zarr = pytest.importorskip("zarr")
        found = zarr.create_array(tmp_path / name, shape=K.shape, dtype=K.dtype, chunks=(64, 64, *K.shape[2:]))
        found[...] = K
        return found

    return keep


@pytest.mark.parametrize("name", KERNELS)
def test_conjugate_gradients_from_a_store(rng, store, name, monkeypatch):
    k, n = KERNELS[name], 150
    X, new = rng.normal(size=(n, 2)), rng.normal(size=(70, 2))
    K, cross = k(X, X), k(new, X)
    # blocks smaller than the matrix
    monkeypatch.setattr("anywidth.predict.matrices._BLOCK", 90 * 90 * K[0, 0].nbytes)
    y = rng.normal(size=(n, *K.shape[2:3], 4))
    exact = predict.posterior(K, y, 1e-3)
    gp = predict.posterior(store("K", K), y, 1e-3, solver="cg", rank=50)
    reference = np.abs(exact.weights).max()
    np.testing.assert_allclose(gp.weights, exact.weights, atol=1e-6 * reference)
    np.testing.assert_allclose(gp.mean(store("C", cross)), exact.mean(cross), atol=1e-6)
    prior = np.ones((70, *K.shape[2:3]))
    np.testing.assert_allclose(gp.variance(store("D", cross), prior), exact.variance(cross, prior), atol=1e-6)
    assert predict.max_learning_rate(store("T", K)) == pytest.approx(predict.max_learning_rate(K), rel=1e-9)
    dense = predict.posterior(store("E", K), y, 1e-3)
    assert dense.solver == "cholesky"
    np.testing.assert_allclose(dense.mean(store("F", cross)), exact.mean(cross), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("solver", ["cholesky", "cg"])
def test_a_damaged_store_is_said(rng, tmp_path, solver):
    pytest.importorskip("zarr")
    X = rng.normal(size=(150, 3))
    kernel = aw.nngp(zoo.mlp(3, 1))
    K, cross = aw.gram(kernel, X, store=tmp_path / "K.zarr"), aw.gram(kernel, X[:70], X, store=tmp_path / "C.zarr")
    expected = predict.posterior(K, X[:, 0], 0.1, solver=solver).mean(cross)
    for name, (first, second) in {"K": ("2", "0"), "cross": ("0", "0")}.items():
        chunk = tmp_path / f"{name[0].upper()}.zarr" / "c" / first / second
        good = chunk.read_bytes()
        chunk.write_bytes(good[:50] + bytes([good[50] ^ 16]) + good[51:])
        with pytest.raises(aw.StoreError, match=rf"{name} cannot be read from its store .*anywidth info --check"):
            predict.posterior(K, X[:, 0], 0.1, solver=solver).mean(cross)
        chunk.write_bytes(good)
    np.testing.assert_array_equal(predict.posterior(K, X[:, 0], 0.1, solver=solver).mean(cross), expected)


def test_the_preconditioner_helps(rng):
    X = rng.normal(size=(400, 2))
    b = rng.normal(size=(400, 2))
    fast, slow = (predict.conjugate_gradients(rbf(X, X), b, 1e-3, rank=rank) for rank in (100, 0))
    assert fast.iterations < 20 < 60 < slow.iterations
    assert max(fast.residual, slow.residual) <= 1e-8
    for found in (fast, slow):
        np.testing.assert_allclose((rbf(X, X) + 1e-3 * np.eye(400)) @ found.x, b, atol=1e-6)


def test_a_matrix_that_does_not_fit_is_streamed(rng, monkeypatch):
    X = rng.normal(size=(50, 2))
    monkeypatch.setattr("anywidth.predict.gp.free_memory", lambda: 1000)
    assert predict.posterior(rbf(X, X), np.ones(50), 0.1).solver == "cg"
    with pytest.raises(MemoryError, match=r"58\.6 KiB"):
        predict.posterior(rbf(X, X), np.ones(50), 0.1, solver="cholesky")
    monkeypatch.setattr("anywidth.predict.flow.free_memory", lambda: 1000)
    with pytest.raises(MemoryError, match="same mean"):
        predict.gradient_flow(rbf(X, X), np.ones(50))


def test_conjugate_gradients_say_when_they_fail(rng):
    X = rng.normal(size=(200, 2))
    with pytest.raises(cg.NotConvergedError, match="after 3 iterations"):
        predict.conjugate_gradients(rbf(X, X), rng.normal(size=200), 1e-6, iterations=3, rank=5)
    assert predict.conjugate_gradients(rbf(X, X), np.zeros(200), 0.1).iterations == 0


# --- what is refused --------------------------------------------------------------------------------------

GOOD = rbf(np.arange(4.0)[:, None], np.arange(4.0)[:, None])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: predict.posterior(both_kernels(GOOD, GOOD), np.ones(4)), TypeError, r"K\.nngp or K\.ntk"),
        (lambda: predict.posterior([[1.0]], np.ones(1)), TypeError, "nested list"),
        (lambda: predict.posterior(GOOD.astype(int), np.ones(4)), TypeError, "int64"),
        (lambda: predict.posterior(GOOD[:3], np.ones(3)), ValueError, r"\(N, N\)"),
        (lambda: predict.posterior(GOOD[0], np.ones(4)), ValueError, r"\(4,\)"),
        (lambda: predict.posterior(GOOD, np.ones(5)), ValueError, r"y must have shape \(4, ...\).*\(5,\)"),
        (lambda: predict.posterior(GOOD, np.array([1, 2, 3, np.nan])), ValueError, "y has entries"),
        (lambda: predict.posterior(GOOD * np.nan, np.ones(4)), ValueError, "K has entries"),
        (lambda: predict.posterior(GOOD, np.ones(4), -0.1), ValueError, "not negative"),
        (lambda: predict.posterior(GOOD, np.ones(4), np.ones(3)), ValueError, "one for each of the 4"),
        (lambda: predict.posterior(GOOD, np.ones(4), solver="lu"), ValueError, "'lu'"),
        (lambda: predict.posterior(-GOOD, np.ones(4)), ValueError, "not positive semidefinite"),
        (lambda: predict.posterior(GOOD, np.ones(4)).mean(GOOD[:, :3]), ValueError, "4 training examples"),
        (lambda: predict.posterior(GOOD, np.ones(4)).variance(GOOD, GOOD), ValueError, "diagonal"),
        (lambda: predict.posterior(GOOD, np.ones(4)).covariance(GOOD, GOOD[:3, :3]), ValueError, "4 new"),
        (lambda: predict.posterior(GOOD, np.ones(4), solver="cg").leave_one_out(), ValueError, "Cholesky"),
        (lambda: predict.fit_noise(GOOD, np.zeros(4)), ValueError, "y is zero"),
        (lambda: predict.gradient_flow(GOOD, np.ones(4)).covariance(GOOD, GOOD), ValueError, "both kernels"),
        (lambda: predict.gradient_flow(GOOD, np.ones(4)).mean(GOOD, -1.0), ValueError, "negative"),
        (lambda: predict.gradient_flow(GOOD, np.ones(4), np.ones(4)), ValueError, "one number"),
        (lambda: jax.jit(lambda K: predict.posterior(K, np.ones(4), solver="cg").mean(K))(GOOD), ValueError, "jit"),
    ],
)
def test_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_posterior_can_be_traced(rng):
    X, new, y = rng.normal(size=(9, 2)), rng.normal(size=(4, 2)), rng.normal(size=9)
    expected = predict.posterior(rbf(X, X), y, 0.1).mean(rbf(new, X))
    found = jax.jit(lambda K, C, y, noise: predict.posterior(K, y, noise).mean(C))(rbf(X, X), rbf(new, X), y, 0.1)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_diagonal(rng):
    tokens = aw.Network(
        lambda n: {"u": aw.Normal((3, n)), "v": aw.Normal((n,))},
        lambda p, x: jax.nn.relu(x @ p["u"]) @ p["v"] / jnp.sqrt(p["v"].size),
    )
    kernel = aw.kernels(tokens)
    X = rng.normal(size=(300, 2, 3))
    found = predict.diagonal(kernel, X)
    assert found.ntk.shape == (300, 2)
    for i in (0, 255, 256, 299):
        np.testing.assert_allclose(found.nngp[i], np.diagonal(kernel(X[i], X[i]).nngp), rtol=1e-12)
        np.testing.assert_allclose(found.ntk[i], np.diagonal(kernel(X[i], X[i]).ntk), rtol=1e-12)
    pooled = aw.nngp(aw.Network(tokens.init, lambda p, x: tokens.apply(p, x).mean()))
    lengths = [rng.normal(size=(t, 3)) for t in (2, 4, 2, 3)]
    np.testing.assert_allclose(predict.diagonal(pooled, lengths), [pooled(x, x) for x in lengths], rtol=1e-12)
    with pytest.raises(ValueError, match="different shapes"):
        predict.diagonal(aw.nngp(tokens), lengths)
