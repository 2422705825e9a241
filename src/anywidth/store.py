"""Gram matrices on disk: a zarr array that any process can go on filling, at any time, after anything.

The state of a store is its chunk files and nothing else. A chunk is one tile: the raw numbers and their CRC-32C, the
codecs `bytes` and `crc32c` of zarr v3, so that zarr reads it and detects damage by itself. It is written under
another name, flushed to the disk and renamed, so a file of the right name is whole, unless the machine or the disk
failed, which the checksum shows. What the matrix is (`Header`) is written once, in the attributes of the array.
There is no journal, no list of finished tiles, nothing to repair: a tile is done if its chunks check out.
"""

import contextlib
import errno
import itertools
import os
import shutil
import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from anywidth.claims import Claims
from anywidth.errors import StoreError
from anywidth.evaluate import transposed
from anywidth.memory import readable
from anywidth.plan import Tile
from anywidth.progress import Advance

__all__ = ["QUEUE", "GramStore", "Header", "open_gram", "read_header"]

QUEUE = 6  # tiles being written at a time: flushing one is slow, flushing several is hardly slower
_WRITERS = 4
_CLAIMS = ".claims"
_KEY = "anywidth"


@dataclass(frozen=True)
class Header:
    """What a store holds.

    Args:
        identity: what it is the Gram matrix of, as in `identity.py`: readable names to JSON values.
        arrays: for each array, by its name ("" for a kernel that returns one array), its shape and dtype.
        tile: examples on each side of a tile.
        symmetric: whether one triangle was computed, and mirrored.
    """

    identity: Mapping[str, Any]
    arrays: Mapping[str, tuple[tuple[int, ...], str]]
    tile: tuple[int, int]
    symmetric: bool

    @property
    def grid(self) -> tuple[int, int]:
        """Chunks along each side."""
        shape = next(iter(self.arrays.values()))[0]
        return -(-shape[0] // self.tile[0]), -(-shape[1] // self.tile[1])

    @property
    def size(self) -> int:
        """Bytes on disk when finished."""
        return sum(self.chunk_bytes(name) for name in self.arrays) * self.grid[0] * self.grid[1]

    def chunk(self, name: str) -> tuple[int, ...]:
        """The shape of a chunk."""
        return (*self.tile, *self.arrays[name][0][2:])

    def chunk_bytes(self, name: str) -> int:
        """Bytes of a chunk's file."""
        return int(np.prod(self.chunk(name))) * np.dtype(self.arrays[name][1]).itemsize + 4


def open_gram(path: str | os.PathLike[str]) -> Any:
    """Open a finished store that `gram` wrote, lazily.

    Returns:
        What `gram` returned: a read-only `zarr.Array`, of which slices are NumPy arrays, or `Kernels` of them (a dict
        for kernels of another kind).

    Raises:
        StoreError: if there is no such store, or if it is not finished.
    """
    header = read_header(Path(path))
    if header is None:
        raise StoreError(f"there is no store at {path}")
    done, total = _count(Path(path), header)
    if done < total:
        raise StoreError(
            f"the store {path} is not finished: {done} of its {total} chunks are written. The call of gram that began "
            "it goes on from there."
        )
    return _named(_arrays(Path(path), header))


def read_header(path: Path) -> Header | None:
    """What a store holds; None if there is nothing at all at `path`.

    Raises:
        StoreError: if what is there is not a store of `gram`.
    """
    zarr = _zarr()
    if "://" in str(path) or str(path).startswith(("s3:/", "gs:/", "http:/", "https:/")):
        raise StoreError(f"a store is a directory on a local or mounted file system, not {path}")
    if not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir())):
        return None
    try:
        found = dict(zarr.open(path, mode="r").attrs)[_KEY]
        arrays = {name: (tuple(shape), dtype) for name, shape, dtype in found["arrays"]}
        return Header(found["identity"], arrays, tuple(found["tile"]), found["symmetric"])
    except Exception as error:
        raise StoreError(
            f"{path} exists, and is not a store of Gram matrices ({type(error).__name__}: {error}). Nothing in it was "
            "touched; choose another path."
        ) from None


class GramStore:
    """A store being filled. A context manager: leaving it waits for what is being written.

    Args:
        path: the directory.
        header: what it must hold; it is created if there is nothing.

    Raises:
        StoreError: if something else is there.
        OSError: if it cannot be written to, or the disk has not enough room.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self.path, self.header = path, header
        if read_header(path) is None:
            _room(path, header)
            _create(path, header)
        self._roots = {name: path / name for name in header.arrays}
        self._claims: Claims | None
        try:
            self._claims = Claims(next(iter(self._roots.values())) / _CLAIMS)
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
        return _arrays(self.path, self.header)

    def todo(self, tiles: Iterable[Tile], advance: Advance) -> Iterator[Tile | None]:
        """The tiles that are not there, each claimed; None when all that is left is being done by other processes.

        Whoever gets None should finish what it has in hand, for others may be waiting for that, and ask again.
        """
        busy: deque[Tile] = deque()
        for tile in itertools.chain(tiles, [None]):
            if tile is not None:
                if (ours := self._take(tile, advance)) is None:
                    busy.append(tile)
                elif ours:
                    yield tile
        while busy:
            waited = True
            for _ in range(len(busy)):
                tile = busy.popleft()
                if (ours := self._take(tile, advance)) is None:
                    busy.append(tile)
                else:
                    waited = False
                    if ours:
                        yield tile
            if waited:
                yield None

    def _take(self, tile: Tile, advance: Advance) -> bool | None:
        """Whether the tile is to be computed, here; None if another process is at it."""
        number = self._number(tile)
        if self._claims is not None and not self._claims.take(number):
            return None
        if all(self._valid(name, index) for name in self.header.arrays for index in _places(tile)):
            if self._claims is not None:
                self._claims.release(number)
            self.done += 1
            advance(tile.pairs, found=True)
            return False
        if self._claims is None:
            raise PermissionError(
                errno.EACCES, "this store is not finished, and it cannot be written to", str(self.path)
            )
        return True

    def put(self, tile: Tile, leaves: Sequence[np.ndarray], advance: Advance) -> None:
        """Write a tile that was claimed, in the background."""
        while len(self._pending) >= QUEUE:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(self._write_tile, tile, leaves, advance))

    def idle(self) -> None:
        """Write what is left to write, for others may be waiting for it, and give them time."""
        while self._pending:
            self._pending.popleft().result()
        time.sleep(0.1)

    def _write_tile(self, tile: Tile, leaves: Sequence[np.ndarray], advance: Advance) -> None:
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
        advance(tile.pairs)

    def _write(self, name: str, index: tuple[int, int], values: np.ndarray) -> None:
        shape, dtype = self.header.chunk(name), np.dtype(self.header.arrays[name][1])
        little = dtype.newbyteorder("<")
        if values.shape == shape:
            chunk = np.ascontiguousarray(values, little)
        else:  # at the edge
            chunk = np.full(shape, _fill(dtype), little)
            chunk[: values.shape[0], : values.shape[1]] = values
        target = self._file(name, index)
        assert self._claims is not None
        # Claimed by us alone, hence a name that is never left over; without claims, a name of our own.
        temporary = target.with_name(target.name + (".part" if self._claims.exclusive else f".{os.getpid()}.part"))
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb", buffering=0) as file:
                _all(file, chunk.reshape(-1).view(np.uint8).data)
                _all(file, memoryview(_checksum(chunk)))
                os.fsync(file.fileno())
            os.replace(temporary, target)
            _flush(target.parent)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise

    def _valid(self, name: str, index: tuple[int, int]) -> bool:
        try:
            raw = self._file(name, index).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            if error.errno != errno.EIO:  # a bad sector: written anew, it goes elsewhere
                raise
            return False
        return len(raw) == self.header.chunk_bytes(name) and _checksum(memoryview(raw)[:-4]) == raw[-4:]

    def _file(self, name: str, index: tuple[int, int]) -> Path:
        outputs = len(self.header.arrays[name][0]) - 2
        return self._roots[name].joinpath("c", *map(str, index), *["0"] * outputs)

    def _number(self, tile: Tile) -> int:
        return tile.index[0] * self.header.grid[1] + tile.index[1]


def _all(file: Any, data: Any) -> None:
    while len(data):
        data = data[file.write(data) :]


def _flush(directory: Path) -> None:
    """The names in a directory to the disk, where there is such a thing."""
    if os.name == "posix":
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _checksum(data: Any) -> bytes:
    import google_crc32c

    return google_crc32c.value(bytes(data) if isinstance(data, memoryview) else data).to_bytes(4, "little")


def _places(tile: Tile) -> Iterator[tuple[int, int]]:
    yield tile.index
    if tile.mirrored:
        yield tile.index[::-1]


def _fill(dtype: np.dtype) -> Any:
    """What reads where nothing is written: not a number, where there is such a thing."""
    return np.nan if dtype.kind in "fc" else 0


def _zarr() -> Any:
    try:
        import zarr
    except ImportError:
        raise ImportError('store= needs zarr: pip install "anywidth[zarr]"') from None
    return zarr


def _create(path: Path, header: Header) -> None:
    """Everything but the numbers, in a directory of another name that is renamed when it is whole."""
    zarr = _zarr()
    from zarr.codecs import Crc32cCodec

    parent = path.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob(f".{path.name}.*.new"):  # by a process that was killed here
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 3600:
                shutil.rmtree(left, ignore_errors=True)
    temporary = parent / f".{path.name}.{uuid.uuid4().hex}.new"
    temporary.mkdir()
    try:
        attributes = {
            _KEY: {
                "identity": dict(header.identity),
                "arrays": [[name, list(shape), dtype] for name, (shape, dtype) in header.arrays.items()],
                "tile": list(header.tile),
                "symmetric": header.symmetric,
            }
        }
        if "" not in header.arrays:
            zarr.create_group(temporary, zarr_format=3, attributes=attributes)
        for name, (shape, dtype) in header.arrays.items():
            zarr.create_array(
                temporary,
                name=name or None,
                shape=shape,
                chunks=header.chunk(name),
                dtype=dtype,
                compressors=[Crc32cCodec()],
                fill_value=_fill(np.dtype(dtype)),
                zarr_format=3,
                attributes=attributes if not name else None,
                dimension_names=["x", "y", *[f"output_{k}" for k in range(len(shape) - 2)]],
            )
        (temporary / next(iter(header.arrays)) / _CLAIMS).touch()
        os.rename(temporary, path)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST) and read_header(path) is not None:
            return  # another process was faster
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _room(path: Path, header: Header) -> None:
    near = path.absolute().parent
    while not near.exists():
        near = near.parent
    if header.size > (free := shutil.disk_usage(near).free):
        raise OSError(
            errno.ENOSPC, f"the store takes {readable(header.size)}, and the disk has {readable(free)} free", str(path)
        )


def _arrays(path: Path, header: Header) -> dict[str, Any]:
    zarr = _zarr()
    return {name: zarr.open_array(path / name, mode="r") for name in header.arrays}


def _named(arrays: dict[str, Any]) -> Any:
    from anywidth.kernels import Errors, Kernels

    if set(arrays) == {""}:
        return arrays[""]
    names = set(arrays)
    if not {"nngp", "ntk"} <= names <= {"nngp", "ntk", "error.nngp", "error.ntk"}:
        return arrays
    zero = np.zeros((), arrays["nngp"].dtype)
    error = Errors(*(arrays.get(f"error.{kind}", zero) for kind in ("nngp", "ntk")))
    return Kernels(arrays["nngp"], arrays["ntk"], error)


def _count(path: Path, header: Header) -> tuple[int, int]:
    """Chunks that are written, and chunks there are."""
    done = 0
    for name in header.arrays:
        for _, _, files in os.walk(path / name / "c"):
            done += sum(file.isdigit() for file in files)
    return done, len(header.arrays) * header.grid[0] * header.grid[1]
