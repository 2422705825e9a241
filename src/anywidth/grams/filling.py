"""Filling a store: which tiles are missing, and how one is written so that it is there whole or not at all.

A chunk is written under another name, flushed to the disk and renamed, so a file of the right name is whole, unless
the machine or the disk failed, which its checksum shows. A tile is claimed (`claims.py`) before it is looked at, so no
two processes write the same file.
"""

import contextlib
import errno
import itertools
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from anywidth.grams.claims import Claims
from anywidth.grams.evaluate import transposed
from anywidth.grams.plan import Tile
from anywidth.grams.progress import Meter
from anywidth.grams.store import CLAIMS, Header, arrays, checksum, fill_value, flush, whole

__all__ = ["QUEUE", "GramStore"]

QUEUE = 6  # tiles being written at a time: flushing one is slow, flushing several is hardly slower
_WRITERS = 4


class GramStore:
    """A store being filled. A context manager: leaving it waits for what is being written.

    Args:
        path: its directory.
        header: what it holds.

    Raises:
        BlockingIOError: if this process is filling it already.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self.path, self.header = path, header
        self._roots = {name: path / name for name in header.arrays}
        self._claims: Claims | None
        try:
            self._claims = Claims(next(iter(self._roots.values())) / CLAIMS)
        except PermissionError:
            self._claims = None
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
            self._claims = None
        self._pool = ThreadPoolExecutor(_WRITERS, thread_name_prefix="gram-store")
        self._pending: deque[Future[None]] = deque()
        self.done = 0  # tiles known to be written

    def __enter__(self) -> "GramStore":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            while self._pending:
                future = self._pending.popleft()
                if kind is None:
                    future.result()
                else:
                    future.exception()
        finally:
            self._pool.shutdown()
            if self._claims is not None:
                self._claims.close()

    def arrays(self) -> dict[str, Any]:
        """The arrays by name, opened for reading."""
        return arrays(self.path, self.header)

    def todo(self, tiles: Iterable[Tile], meter: Meter) -> Iterator[Tile | None]:
        """The tiles that are not there, each claimed; None when all that is left is being done by other processes.

        Whoever gets None should finish what it has in hand, for others may be waiting for that, and ask again.
        """
        busy: deque[Tile] = deque()
        for tile in itertools.chain(tiles, [None]):
            if tile is not None:
                if (ours := self._take(tile, meter)) is None:
                    busy.append(tile)
                elif ours:
                    yield tile
        while busy:
            waited = True
            for _ in range(len(busy)):
                tile = busy.popleft()
                if (ours := self._take(tile, meter)) is None:
                    busy.append(tile)
                else:
                    waited = False
                    if ours:
                        yield tile
            if waited:
                yield None

    def _take(self, tile: Tile, meter: Meter) -> bool | None:
        """Whether the tile is to be computed, here; None if another process is at it."""
        number = self._number(tile)
        if self._claims is not None and not self._claims.take(number):
            return None
        if all(self._valid(name, index) for name in self.header.arrays for index in _places(tile)):
            if self._claims is not None:
                self._claims.release(number)
            self.done += 1
            meter.advance(tile.pairs, found=True)
            return False
        if self._claims is None:
            raise PermissionError(
                errno.EACCES, "this store is not finished, and it cannot be written to", str(self.path)
            )
        return True

    def put(self, tile: Tile, leaves: Sequence[np.ndarray], meter: Meter) -> None:
        """Write a tile that was claimed, in the background."""
        while len(self._pending) >= QUEUE:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(self._write_tile, tile, leaves, meter))

    def idle(self) -> None:
        """Write what is left to write, for others may be waiting for it, and give them time."""
        while self._pending:
            self._pending.popleft().result()
        time.sleep(0.1)

    def _write_tile(self, tile: Tile, leaves: Sequence[np.ndarray], meter: Meter) -> None:
        try:
            for name, values in zip(self.header.arrays, leaves, strict=True):
                self._write(name, tile.index, values)
                if tile.mirrored:
                    self._write(name, tile.index[::-1], transposed(values, (values.ndim - 2) // 2))
        except OSError as error:
            if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
                raise OSError(
                    error.errno,
                    f"the disk is full. {self.done} tiles are written and safe: make room, and the same call goes on "
                    "from there",
                    str(self.path),
                ) from None
            raise
        assert self._claims is not None
        self._claims.release(self._number(tile))
        self.done += 1
        meter.advance(tile.pairs)

    def _write(self, name: str, index: tuple[int, int], values: np.ndarray) -> None:
        shape, dtype = self.header.chunk(name), np.dtype(self.header.arrays[name][1])
        little = dtype.newbyteorder("<")
        if values.shape == shape:
            chunk = np.ascontiguousarray(values, little)
        else:  # at the edge
            chunk = np.full(shape, fill_value(dtype), little)
            chunk[: values.shape[0], : values.shape[1]] = values
        target = self._file(name, index)
        assert self._claims is not None
        # Claimed by us alone, hence a name that is never left over; without claims, a name of our own.
        temporary = target.with_name(target.name + (".part" if self._claims.exclusive else f".{os.getpid()}.part"))
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb", buffering=0) as file:
                _all(file, chunk.reshape(-1).view(np.uint8).data)
                _all(file, memoryview(checksum(chunk)))
                os.fsync(file.fileno())
            os.replace(temporary, target)
            flush(target.parent)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise

    def _valid(self, name: str, index: tuple[int, int]) -> bool:
        return whole(self._file(name, index), self.header.chunk_bytes(name))

    def _file(self, name: str, index: tuple[int, int]) -> Path:
        outputs = len(self.header.arrays[name][0]) - 2
        return self._roots[name].joinpath("c", *map(str, index), *["0"] * outputs)

    def _number(self, tile: Tile) -> int:
        return tile.index[0] * self.header.grid[1] + tile.index[1]


def _all(file: Any, data: Any) -> None:
    while len(data):
        data = data[file.write(data) :]


def _places(tile: Tile) -> Iterator[tuple[int, int]]:
    yield tile.index
    if tile.mirrored:
        yield tile.index[::-1]
