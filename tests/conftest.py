"""Settings of every test."""

import os

import jax
import pytest

# The package follows the dtype of its inputs; without x64 there would be no float64 inputs to follow.
jax.config.update("jax_enable_x64", True)


# To compile takes most of the time of the tests, and a third of that is LLVM's optimisation, which these do without.
# What is compared to its last digits or between processes, and what takes long to run, is compiled as users compile it.
QUICKLY = {
    "test_doc_examples", "test_empirical", "test_explain", "test_finite", "test_heads", "test_howto",
    "test_loops", "test_modules", "test_neural_tangents", "test_notebooks", "test_predict", "test_rates",
    "test_recursions", "test_reference", "test_refused", "test_simulation", "test_sklearn",
    "test_windows", "test_zoo_images", "test_zoo_layout",
}  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    jax.config.update("jax_disable_most_optimizations", item.path.stem in QUICKLY)


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """What several tests compile is compiled once in a run, whichever process runs them."""
    here = tmp_path_factory.getbasetemp()
    shared = here.parent if "PYTEST_XDIST_WORKER" in os.environ else here
    folder = str(shared / "compiled")
    settings = {"jax_compilation_cache_dir": folder, "jax_persistent_cache_min_compile_time_secs": 0.2}
    if jax.config.jax_compilation_cache_dir is None:
        for name, value in settings.items():
            jax.config.update(name, value)
            os.environ[name.upper()] = str(value)  # for the processes that tests start


@pytest.fixture
def key():
    return jax.random.key(20231)
