"""What the engine adds: to a kernel written by hand, to compile times, to `import jax`."""

import statistics
import subprocess
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import anywidth as aw
from anywidth import zoo


def by_hand(X, Y):
    """The NTK of a relu MLP of 3 hidden layers, weights of variance 2, readout of variance 1."""
    c = 2 * X @ Y.T / X.shape[1]
    scale = jnp.sqrt(2 * (X**2).mean(1))[:, None] * jnp.sqrt(2 * (Y**2).mean(1))
    rho, ntk = jnp.clip(c / scale, -1, 1), c / 2
    for layer in range(3):
        angle = jnp.arccos(rho)
        slope, rho = (np.pi - angle) / np.pi, (jnp.sqrt(1 - rho**2) + (np.pi - angle) * rho) / np.pi
        ntk = ntk * slope / (2 if layer == 2 else 1) + scale * rho / 2
        rho = jnp.clip(rho, -1, 1)
    return ntk


def test_relu_mlp(benchmark, held):
    """CPU time on 2000 x 2000 points in R^784, in float32."""
    X, Y = np.random.default_rng(0).standard_normal((2, 2000, 784)).astype(np.float32)
    kernel, hand = aw.ntk(zoo.mlp(784, 3)), jax.jit(by_hand)
    engine = lambda: np.asarray(aw.gram(kernel, X, Y))  # noqa: E731
    np.testing.assert_allclose(engine(), hand(X, Y), atol=1e-4)
    benchmark.pedantic(engine, rounds=1)
    held(cpu_seconds(engine), cpu_seconds(lambda: np.asarray(hand(X, Y))), 1.5)


@pytest.mark.parametrize("kind", ["ntk", "kernels"])
def test_gram_of_a_tile(benchmark, held, kind):
    """CPU time of `gram` against one jitted vmap(vmap(kernel)), on one tile of the size that it chooses in float32."""
    X, Y = np.random.default_rng(0).standard_normal((2, 1024, 64)).astype(np.float32)
    kernel = getattr(aw, kind)(zoo.mlp(64, 3))
    plain = jax.jit(jax.vmap(jax.vmap(kernel.values, (None, 0)), (0, None)))
    gram = partial(aw.gram, kernel, X, Y, progress=False)
    ratios = []
    for _ in range(31):  # turn by turn, so that what else the machine does falls on both
        taken = cpu_seconds(lambda: jax.block_until_ready(jax.tree.leaves(gram())), 1)
        ratios.append(taken / cpu_seconds(lambda: jax.block_until_ready(plain(X, Y)), 1))
    benchmark.pedantic(lambda: None, rounds=1)
    held(statistics.median(ratios[1:]), 1.0, 1.1)


def cpu_seconds(function, rounds=5):
    used = []
    for _ in range(rounds):
        start = time.process_time()
        function()
        used.append(time.process_time() - start)
    return min(used)


def compile_seconds(kernel, *specs):
    """CPU time to trace and compile."""
    start = time.process_time()
    jax.jit(lambda x, y: kernel(x, y)).lower(*specs).compile()
    return time.process_time() - start


def specs(*shape):
    return [jax.ShapeDtypeStruct(shape, jnp.float64)] * 2


def rnn_ntk():
    return aw.ntk(zoo.rnn(3, varw=1.0, varu=2.0, varb=0.2))


def test_compile_time_does_not_grow_with_length(benchmark, held):
    compile_seconds(rnn_ntk(), *specs(7, 3))  # warms what is shared
    short = statistics.median(compile_seconds(rnn_ntk(), *specs(8, 3)) for _ in range(3))
    long = statistics.median(compile_seconds(rnn_ntk(), *specs(256, 3)) for _ in range(3))
    benchmark.pedantic(lambda: None, rounds=1)
    held(long, short, 1.3)


def test_compile_time_does_not_grow_with_examples(benchmark, held):
    def over(n):
        def kernel(X, Y):
            pair = rnn_ntk()
            return jax.vmap(lambda x: jax.vmap(lambda y: pair(x, y))(Y))(X)

        return compile_seconds(kernel, *specs(n, 8, 3))

    over(3)
    few = statistics.median(over(4) for _ in range(3))
    many = statistics.median(over(400) for _ in range(3))
    benchmark.pedantic(lambda: None, rounds=1)
    held(many, few, 1.3)


@pytest.mark.parametrize(
    ("net", "shape", "at_most"),
    [
        (lambda: zoo.rnn(3), (8, 3), 5.0),
        (lambda: zoo.transformer(3, 2), (8, 3), 6.0),
        (lambda: zoo.mlp(8, 3, jnp.tanh), (8,), 10.0),
        (lambda: zoo.batchnorm_mlp(8, 2), (8, 8), 12.0),
    ],
    ids=["rnn", "transformer", "tanh", "batchnorm"],
)
def test_compile_time(benchmark, held, net, shape, at_most):
    """Seconds of CPU time: what a user waits for once for each network and shape."""
    taken = compile_seconds(aw.ntk(net()), *specs(*shape))
    benchmark.pedantic(lambda: None, rounds=1)
    held(taken, 1.0, at_most)


def test_import(benchmark, held):
    """`import anywidth` takes less than a second more than `import jax`."""

    def cpu(module):
        code = f"import time; start = time.process_time(); import {module}; print(time.process_time() - start)"
        runs = [
            subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)
        ]
        return min(float(run.stdout) for run in runs)

    benchmark.pedantic(lambda: None, rounds=1)
    held(cpu("anywidth") - cpu("jax"), 1.0, 1.0)
