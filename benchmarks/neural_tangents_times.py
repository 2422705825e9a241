"""Times of neural-tangents 0.6.5, in an environment of its own (see tests/reference/neural_tangents_kernels.py).

Prints one JSON object: for every benchmark the least of wall and CPU time of its kernel, compiled, in seconds; the sum
of the kernel, and its sum with weights that depend on the entry, to compare it with ours.
"""

import itertools
import json
import sys
import time

import jax
import neural_tangents as nt
import numpy as np
from jax._src import source_info_util
from jax.interpreters import ad
from neural_tangents import stax

# Its structured derivatives look for these where jax 0.4.38 has them no more.
ad.config, ad.source_info_util = jax.config, source_info_util


def conv():
    return stax.Conv(1, (3, 3), padding="SAME", W_std=2**0.5, b_std=None, parameterization="ntk")


def mlp(depth, phi, w_std):
    layers = [stax.Dense(1, w_std, None, parameterization="ntk"), phi()] * depth
    return stax.serial(*layers, stax.Dense(1, 1.0, None, parameterization="ntk"))[2]


def cnn():
    layers = [conv(), stax.Relu()] * 3
    return stax.serial(*layers, stax.GlobalAvgPool(), stax.Dense(1, 1.0, None, parameterization="ntk"))[2]


def empirical():
    """784-512-512-10, relu, for 100 x 100 examples and all 10 x 10 outputs, by its fastest method."""
    sizes, rng = (784, 512, 512, 10), np.random.default_rng(1)
    weights = [jax.numpy.asarray(rng.normal(size=shape), np.float32) for shape in itertools.pairwise(sizes)]
    layers = [stax.Dense(n, 1.0, None, parameterization="ntk") for n in sizes[1:]]
    _, apply, _ = stax.serial(layers[0], stax.Relu(), layers[1], stax.Relu(), layers[2])
    params = [(weights[0], None), (), (weights[1], None), (), (weights[2], None)]
    method = nt.NtkImplementation.STRUCTURED_DERIVATIVES
    kernel = nt.empirical_ntk_fn(apply, trace_axes=(), vmap_axes=0, implementation=method)
    return kernel, (params,)


def infinite(kernel):
    return lambda x, y: kernel(x, y, "ntk"), ()


BENCHMARKS = {
    "cnn": lambda: (infinite(cnn()), (20, 16, 16, 3)),
    "mlp_3_relu": lambda: (infinite(mlp(3, stax.Relu, 2**0.5)), (2000, 100)),
    "mlp_3_erf": lambda: (infinite(mlp(3, stax.Erf, 1.0)), (2000, 100)),
    "mlp_10_relu": lambda: (infinite(mlp(10, stax.Relu, 2**0.5)), (2000, 100)),
    "mlp_10_erf": lambda: (infinite(mlp(10, stax.Erf, 1.0)), (2000, 100)),
    "empirical": lambda: (empirical(), (100, 784)),
}


def main(names):
    out = {}
    for name in names or BENCHMARKS:
        (kernel, more), shape = BENCHMARKS[name]()
        rng = np.random.default_rng(0)
        x, y = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
        compiled = jax.jit(kernel)  # the parameters are arguments: as constants they are folded, for minutes
        value = np.asarray(compiled(x, y, *more), np.float64)
        least = float("inf")
        for _ in range(3):
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(compiled(x, y, *more))
            least = min(least, time.perf_counter() - wall, time.process_time() - cpu)
        weighted = value.ravel() @ np.cos(np.arange(value.size))
        out[name] = {"seconds": least, "sum": value.sum(), "weighted": weighted, "shape": value.shape}
    print(json.dumps(out))


if __name__ == "__main__":
    main(sys.argv[1:])
