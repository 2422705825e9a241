"""Settings of every test."""

import jax
import pytest

# The package follows the dtype of its inputs; without x64 there would be no float64 inputs to follow.
jax.config.update("jax_enable_x64", True)


@pytest.fixture
def key():
    return jax.random.key(20231)
