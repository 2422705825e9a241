"""Tiles on a dask cluster: the same numbers, and a killed worker loses nothing."""

import os
import signal
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

import anywidth as aw
from anywidth.zoo import mlp

distributed = pytest.importorskip("distributed")

X = np.random.default_rng(0).normal(size=(150, 3))


def scalar(x, y):
    return jnp.tanh(jnp.sum(x) * jnp.sum(y)) + jnp.sum(jnp.cos(x)) * jnp.sum(jnp.cos(y))


@pytest.fixture(scope="module")
def client():
    """Workers that are threads of this process: quick to start, and nothing to kill."""
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=False, dashboard_address=":0", memory_limit=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("stored", [False, True])
def test_the_same_numbers(client, tmp_path, mixed, stored):
    data = [x[: 2 + i % 2] for i, x in enumerate(X[:60])] if mixed else X
    found = aw.gram(scalar, data, client=client, store=tmp_path / "K.zarr" if stored else None)
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found[...], aw.gram(scalar, data, store=tmp_path / "here.zarr")[...])


def test_an_error_of_the_kernel_is_the_users(client):
    def shaped(x, y):
        if threading.current_thread() is threading.main_thread():
            return x @ y
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        aw.gram(shaped, X, client=client, memory="10 MB")


def test_what_is_no_client_is_refused():
    with pytest.raises(TypeError, match="Client, not str"):
        aw.gram(scalar, X, client="tcp://127.0.0.1:8786")


@pytest.mark.long
def test_a_killed_worker_loses_nothing(tmp_path):
    points = np.random.default_rng(1).normal(size=(4000, 16)).astype(np.float32)
    kernel = aw.kernels(mlp(16, 2))
    expected = aw.gram(kernel, points, store=tmp_path / "here.zarr")  # of the same tiles
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        distributed.Client(cluster) as client,
    ):
        victim = next(iter(client.run(os.getpid).values()))
        killed = threading.Event()

        def kill_when_under_way():
            while len([p for p in (tmp_path / "K.zarr").rglob("c/*/*") if p.suffix != ".part"]) < 10:
                time.sleep(0.01)
            os.kill(victim, signal.SIGKILL)
            killed.set()

        thread = threading.Thread(target=kill_when_under_way)
        thread.start()
        found = aw.gram(kernel, points, client=client, store=tmp_path / "K.zarr")
        thread.join()
        assert killed.is_set()
        assert victim not in client.run(os.getpid).values()
    np.testing.assert_array_equal(found.nngp[...], expected.nngp[...])
    np.testing.assert_array_equal(found.ntk[...], expected.ntk[...])
