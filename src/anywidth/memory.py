"""How much memory is free, and numbers of bytes as people write them."""

import operator
import re
from pathlib import Path

import jax

__all__ = ["free_memory", "parse_bytes", "readable"]

_FALLBACK = 2 * 1024**3


def free_memory() -> int:
    """Bytes free on JAX's default device; 2 GiB if that cannot be found out."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return min([size for size in (_system(), _container()) if size is not None], default=_FALLBACK)
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))
    return _FALLBACK


def readable(size: float) -> str:
    """A number of bytes for a person: `readable(3e9)` is "2.8 GiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"


def parse_bytes(size: int | str) -> int:
    """A number of bytes: an integer, or a string such as "1 GiB", "500MB", "2e9".

    Raises:
        ValueError: if it is not one, or not positive.
    """
    if isinstance(size, str):
        found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*(?:([kmgt]?)(i?)b?)\s*", size.lower())
        try:
            number = float(found[1]) if found else 0.0
        except ValueError:
            number = 0.0
        step = 1024 if found and found[3] else 1000
        value = int(number * step ** " kmgt".index(found[2] or " ")) if found else 0
    else:
        value = operator.index(size)
    if value <= 0:
        raise ValueError(f"a number of bytes is wanted, such as 2_000_000_000 or '2 GB', not {size!r}")
    return value


def _system() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass  # not Linux
    return None


def _container() -> int | None:
    """What a container's limit (cgroup v2) leaves; /proc/meminfo shows the machine's memory inside it."""
    base = Path("/sys/fs/cgroup")
    try:
        limit = int((base / "memory.max").read_text())  # "max", hence ValueError, where there is no limit
        return max(limit - int((base / "memory.current").read_text()), 0)
    except (OSError, ValueError):
        return None
