"""Times of neural-tangents 0.6.5, in an environment of its own (see tests/reference/neural_tangents_kernels.py).

Prints one JSON object: for every benchmark the least of wall and CPU time of its kernel, compiled, in seconds.
"""

import json
import sys
import time

import jax
import numpy as np
from neural_tangents import stax


def conv():
    return stax.Conv(1, (3, 3), padding="SAME", W_std=2**0.5, b_std=None, parameterization="ntk")


def mlp(depth, phi, w_std):
    layers = [stax.Dense(1, w_std, None, parameterization="ntk"), phi()] * depth
    return stax.serial(*layers, stax.Dense(1, 1.0, None, parameterization="ntk"))[2]


def cnn():
    layers = [conv(), stax.Relu()] * 3
    return stax.serial(*layers, stax.GlobalAvgPool(), stax.Dense(1, 1.0, None, parameterization="ntk"))[2]


BENCHMARKS = {
    "cnn": lambda: (cnn(), (20, 16, 16, 3)),
    "mlp_3_relu": lambda: (mlp(3, stax.Relu, 2**0.5), (2000, 100)),
    "mlp_3_erf": lambda: (mlp(3, stax.Erf, 1.0), (2000, 100)),
    "mlp_10_relu": lambda: (mlp(10, stax.Relu, 2**0.5), (2000, 100)),
    "mlp_10_erf": lambda: (mlp(10, stax.Erf, 1.0), (2000, 100)),
}


def main(names):
    out = {}
    for name in names or BENCHMARKS:
        kernel, shape = BENCHMARKS[name]()
        rng = np.random.default_rng(0)
        x, y = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
        compiled = jax.jit(lambda x, y, kernel=kernel: kernel(x, y, "ntk"))
        value = jax.block_until_ready(compiled(x, y))
        least = float("inf")
        for _ in range(3):
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(compiled(x, y))
            least = min(least, time.perf_counter() - wall, time.process_time() - cpu)
        out[name] = {"seconds": least, "sum": float(np.asarray(value, np.float64).sum())}
    print(json.dumps(out))


if __name__ == "__main__":
    main(sys.argv[1:])
