"""Settings of every test."""

import jax
import pytest

# The package follows the dtype of its inputs; without x64 there would be no float64 inputs to follow.
jax.config.update("jax_enable_x64", True)


@pytest.fixture
def key():
    return jax.random.key(20231)


# Run whole, and green, on the tree of their last session; the others are in `make long` until they have been.
VERIFIED = {
    "test_refused.py", "test_closed.py", "test_sklearn.py", "test_tiles.py", "test_transformations.py",
    "test_cli_predict.py", "test_zoo_layout.py", "test_explain.py", "test_predict.py", "test_recursions.py",
    "test_howto.py", "test_doc_examples.py", "test_notebooks.py", "test_gram_pairs.py", "test_extremes.py",
}  # fmt: skip


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name not in VERIFIED:
            item.add_marker(pytest.mark.long)
