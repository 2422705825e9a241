"""Gram matrices on disk: a zarr array that any process can go on filling, at any time, after anything.

The state of a store is its chunk files and nothing else. A chunk is one tile: the raw numbers and their CRC-32C, the
codecs `bytes` and `crc32c` of zarr v3, so that zarr reads it and detects damage by itself. What the matrix is
(`Header`) is written once, in the attributes of the array. There is no journal, no list of finished tiles, nothing to
repair: a tile is done if its chunks check out. `filling.py` writes them.
"""

import contextlib
import errno
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anywidth.errors import StoreError
from anywidth.memory import readable

__all__ = [
    "CLAIMS",
    "Header",
    "arrays",
    "checksum",
    "chunks",
    "count",
    "create",
    "fill_value",
    "flush",
    "open_gram",
    "read_header",
    "whole",
]

CLAIMS = ".claims"  # a file to lock, in the directory of the first array
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
    done, total = count(Path(path), header)
    if done < total:
        raise StoreError(
            f"the store {path} is not finished: {done} of its {total} chunks are written. The call of gram that began "
            "it goes on from there."
        )
    return _named(arrays(Path(path), header))


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
    except Exception as error:  # zarr has many, and a header may be of any form
        raise StoreError(
            f"{path} exists, and is not a store of Gram matrices. Nothing in it was touched; choose another path."
        ) from error


def fill_value(dtype: np.dtype) -> Any:
    """What reads where nothing is written: not a number, where there is such a thing."""
    return np.nan if dtype.kind in "fc" else 0


def _zarr() -> Any:
    try:
        import zarr
    except ImportError:
        raise ImportError('store= needs zarr: pip install "anywidth[zarr]"') from None
    return zarr


def create(path: Path, header: Header) -> None:
    """Everything but the numbers, in a directory of another name that is renamed when it is whole.

    Raises:
        OSError: if it cannot be written, or the disk has not enough room for the numbers.
    """
    zarr = _zarr()
    _room(path, header)
    from zarr.codecs import Crc32cCodec

    parent = path.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_created(path, error) from None
    for left in parent.glob(f".{path.name}.*.new"):  # by a process that was killed here
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 3600:
                shutil.rmtree(left, ignore_errors=True)
    temporary = parent / f".{path.name}.{uuid.uuid4().hex}.new"
    try:
        temporary.mkdir()
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
                fill_value=fill_value(np.dtype(dtype)),
                zarr_format=3,
                attributes=attributes if not name else None,
                dimension_names=["x", "y", *[f"output_{k}" for k in range(len(shape) - 2)]],
            )
        (temporary / next(iter(header.arrays)) / CLAIMS).touch()
        for directory, _, files in os.walk(temporary):
            for name in (*files, "."):
                flush(Path(directory) / name)
        os.rename(temporary, path)
        flush(parent)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST) and read_header(path) is not None:
            return  # another process was faster
        raise _not_created(path, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _not_created(path: Path, error: OSError) -> OSError:
    return OSError(error.errno, f"the store cannot be created: {error.strerror}", str(path))


def flush(path: Path) -> None:
    """A file, or the names in a directory, to the disk, where there is such a thing."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _room(path: Path, header: Header) -> None:
    near = path.absolute().parent
    while not near.exists():
        near = near.parent
    if header.size > (free := shutil.disk_usage(near).free):
        raise OSError(
            errno.ENOSPC, f"the store takes {readable(header.size)}, and the disk has {readable(free)} free", str(path)
        )


def arrays(path: Path, header: Header) -> dict[str, Any]:
    """The arrays by name, opened for reading."""
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


def chunks(path: Path, header: Header) -> Iterator[tuple[str, Path]]:
    """The files of the chunks that are written, each with the name of its array."""
    for name in header.arrays:
        for directory, _, files in os.walk(path / name / "c"):
            yield from ((name, Path(directory) / file) for file in files if file.isdigit())


def whole(path: Path, size: int) -> bool:
    """Whether the file of a chunk of so many bytes is there and checks out."""
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        if error.errno != errno.EIO:  # a bad sector: written anew, it goes elsewhere
            raise
        return False
    return len(raw) == size and checksum(memoryview(raw)[:-4]) == raw[-4:]


def checksum(data: Any) -> bytes:
    """The CRC-32C, as the codec of zarr writes it."""
    import google_crc32c

    return google_crc32c.value(bytes(data) if isinstance(data, memoryview) else data).to_bytes(4, "little")


def count(path: Path, header: Header) -> tuple[int, int]:
    """Chunks that are written, and chunks there are."""
    done = sum(1 for _ in chunks(path, header))
    return done, len(header.arrays) * header.grid[0] * header.grid[1]
