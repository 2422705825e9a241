"""Tiles of a Gram matrix on the workers of a `dask.distributed` cluster.

The kernel and the pieces of the data are tasks of their own: the scheduler keeps them, sends each once to a worker
that needs it, and makes them again if that worker is lost. Tiles come back to the client, which alone writes, so the
workers need neither a common file system nor the memory for more than a tile.
"""

import time
from typing import Any

import numpy as np

from anywidth import _compat
from anywidth.grams.evaluate import Job, assemble, launch
from anywidth.grams.plan import Panel, Tile

__all__ = ["run"]

_ATTEMPTS = 5  # at a tile, each on a worker that died of it or was lost with it


def run(client: Any, job: Job) -> None:
    """Compute the tiles of a job on a cluster, a few more at a time than it has threads.

    Args:
        client: a `dask.distributed.Client`.
        job: what to compute; its kernel goes to the workers by cloudpickle.

    Raises:
        TypeError: if `client` is not a (synchronous) dask client.
        RuntimeError: if a tile was lost with its worker five times.
    """
    try:
        from distributed import Client, wait
        from distributed.scheduler import KilledWorker
    except ImportError:
        raise ImportError('client= needs dask.distributed: pip install "anywidth[dask]"') from None
    if not isinstance(client, Client) or client.asynchronous:
        raise TypeError(f"client= takes a dask.distributed.Client, not {type(client).__name__}")
    settings = tuple(_compat.settings())
    shared = client.submit(_same, job.kernel, pure=False)
    held: dict[Panel, list[Any]] = {}

    def futures(side: int, panel: Panel) -> list[Any]:
        if panel not in held:
            held[panel] = [client.submit(_same, job.examples(side, piece), pure=False) for piece in panel.pieces]
        return held[panel]

    def submit(tile: Tile) -> Any:
        left, right = futures(0, tile.rows), futures(1, tile.cols)
        return client.submit(_tile, shared, tile, list(job.ranks), left, right, settings, pure=False, retries=2)

    running: dict[Any, tuple[Tile, int]] = {}

    def collect(future: Any) -> None:
        tile, attempts = running.pop(future)
        error = future.exception() if future.status == "error" else None
        if error is not None and not isinstance(error, KilledWorker):
            raise error
        if future.status == "finished":
            try:
                leaves = future.result()
            except (OSError, RuntimeError):  # lost with its worker before it was fetched
                pass
            else:
                job.put(tile, leaves)
                return
        if attempts == _ATTEMPTS:
            raise RuntimeError(
                f"a tile was lost {_ATTEMPTS} times with the worker that computed it. Are the workers out of memory? "
                "Pass a smaller memory= to gram, or give the workers more."
            ) from error
        running[submit(tile)] = tile, attempts + 1

    try:
        todo = iter(job.tiles)
        exhausted = False
        while running or not exhausted:
            slots = 2 + 2 * sum(client.nthreads().values()) if client.status == "running" else 2
            nothing = False
            while not exhausted and not nothing and len(running) < slots:
                try:
                    tile = next(todo)
                except StopIteration:
                    exhausted = True
                    break
                if tile is None:
                    nothing = True
                else:
                    running[submit(tile)] = tile, 1
            if running:
                try:
                    done = wait(list(running), timeout=1, return_when="FIRST_COMPLETED").done
                except TimeoutError:
                    continue
                for future in done:
                    collect(future)
            elif nothing:
                job.idle()
                time.sleep(0.05)
    finally:
        client.cancel([*running])


def _same(value: Any) -> Any:
    return value


def _tile(
    kernel: Any, tile: Tile, ranks: list[int], left: list[Any], right: list[Any], settings: tuple[Any, ...]
) -> list[np.ndarray]:
    """On a worker: compute a tile, with the client's settings of JAX."""
    with _compat.under(_compat.Settings(*settings)):
        return [np.ascontiguousarray(leaf) for leaf in assemble(tile, ranks, launch(kernel, tile, left, right))]
