"""Who computes which tile: locks that a process holds on numbers, and that die with it.

A claim on tile k is a lock on byte k of a file that nobody reads or writes (a POSIX record lock, which works on network
file systems too). The system releases it when the process ends in whatever way, so nothing is ever left over. Where
there are no such locks every claim is granted: tiles may then be computed twice, and are still written whole.
"""

import errno
import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None  # type: ignore[assignment]

__all__ = ["Claims"]

_OPEN: set[tuple[int, int]] = set()  # files in use by this process, within which such locks exclude nothing


class Claims:
    """Claims through one file, which must exist.

    Raises:
        BlockingIOError: if this process has the file open already (another thread is computing into the store).
    """

    def __init__(self, path: Path) -> None:
        status = path.stat()
        self._key = (status.st_dev, status.st_ino)
        if self._key in _OPEN:
            raise BlockingIOError(errno.EWOULDBLOCK, "this process is computing into this store already", str(path))
        self._file = os.open(path, os.O_RDWR)
        _OPEN.add(self._key)
        self.exclusive = False  # whether a claim excludes other processes
        if fcntl is not None:
            try:
                fcntl.lockf(self._file, fcntl.LOCK_SH, 1, 2**40)
                self.exclusive = True
            except OSError:
                pass  # a file system without locks

    def take(self, number: int) -> bool:
        """Claim a number; False if another process has it."""
        if not self.exclusive:
            return True
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise
        return True

    def release(self, number: int) -> None:
        """Give a number back."""
        if self.exclusive:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, number)

    def close(self) -> None:
        """Give everything back."""
        if self._key in _OPEN:
            _OPEN.discard(self._key)
            os.close(self._file)
