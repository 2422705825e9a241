"""Every benchmark prints its ratio to what it is held against, and fails if it misses what is asked of it."""

import time

import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_compilation_cache_dir", None)  # compile times are those of a first run


def seconds(function, rounds=5):
    """The least of wall and CPU time over some calls: on a machine that others use, wall time counts them too."""
    least = float("inf")
    for _ in range(rounds):
        wall, cpu = time.perf_counter(), time.process_time()
        jax.block_until_ready(function())
        least = min(least, time.perf_counter() - wall, time.process_time() - cpu)
    return least


@pytest.fixture
def held(capsys, request):
    """`held(measured, against, at_most)`: prints the ratio and asserts that it is at most `at_most`."""

    def compare(measured, against, at_most, unit="s"):
        ratio = measured / against
        with capsys.disabled():
            verdict = "" if ratio <= at_most else "  MISSED"
            print(
                f"\n{request.node.name}: {measured:.3g} {unit} against {against:.3g} {unit}, "
                f"ratio {ratio:.3g} (at most {at_most:.3g}){verdict}"
            )
        assert ratio <= at_most

    return compare
