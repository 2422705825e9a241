"""What a kernel costs against the number of positions P, read off the compiled program: no clock is involved.

A flattened readout asks for the diagonal over positions alone, so time and memory of a pair are linear in P; pooling
asks for all P^2 pairs of positions. The factors at 4 P are therefore 4 and 16, and another power of P would be seen.
"""

import jax
import jax.numpy as jnp
import pytest

import anywidth as aw
from anywidth import zoo

# name: (network of images of that shape, sizes, the power of P of its cost, numbers kept for each P**power)
COSTS = {
    "flattened": (lambda shape: zoo.cnn(2, 3, size=shape[:2]), (16, 16, 2), 1, 100),
    "strided and flattened": (lambda shape: zoo.cnn(2, 2, strides=2, size=shape[:2]), (16, 16, 2), 1, 100),
    "pooled": (lambda shape: zoo.cnn(2, 3), (12, 12, 2), 2, 40),
    "residual and pooled": (lambda shape: zoo.resnet(2, stages=1), (12, 12, 2), 2, 40),
}


def compiled(net, shape):
    example = jax.ShapeDtypeStruct(shape, jnp.float32)
    program = jax.jit(aw.kernels(net)).lower(example, example).compile()
    return program.cost_analysis()["flops"], program.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("name", COSTS)
def test_cost_against_the_number_of_positions(name):
    net, shape, power, kept = COSTS[name]
    height, width, channels = shape
    small, big = (compiled(net(s), s) for s in (shape, (2 * height, 2 * width, channels)))
    for least, most in zip(small, big, strict=True):
        assert 0.8 * 4**power < most / least < 1.25 * 4**power, (small, big)
    positions = 4 * height * width
    assert big[1] < 4 * kept * positions**power
