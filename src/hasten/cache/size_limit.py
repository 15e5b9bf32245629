"""How much a store may hold, and what goes when it is full."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from hasten.cache.store import free_bytes
from hasten.errors import UsageError

VARIABLE = "HASTEN_CACHE_GB"
_DEFAULT_BYTES = 20_000_000_000


@dataclass(frozen=True)
class Held:
    """Something a store holds."""

    path: Path
    bytes: int
    last_used: float  # seconds since 1970
    in_use: bool = False  # counts, and stays


def chosen_limit() -> int | None:
    """Bytes that `HASTEN_CACHE_GB` allows; None where it is not set.

    Raises:
        UsageError: it is no number from 0 on.
    """
    text = os.environ.get(VARIABLE, "").strip()
    return int(_number(text) * 1e9) if text else None


def limit_bytes(folder: Path, held_bytes: int) -> int:
    """Most that the store in `folder`, which holds `held_bytes` now, may hold.

    What `HASTEN_CACHE_GB` says; else 20 GB, but never more than half of the disk space that would be free
    without the store.

    Raises:
        UsageError: as `chosen_limit`.
    """
    if (chosen := chosen_limit()) is not None:
        return chosen
    free = free_bytes(folder)
    return _DEFAULT_BYTES if free is None else min(_DEFAULT_BYTES, (free + held_bytes) // 2)


def _number(text: str) -> float:
    try:
        value = float(text)
        if 0 <= value < 1e9:
            return value
    except ValueError:
        pass
    raise UsageError(f"{VARIABLE} is {text!r}, not a number of gigabytes", hint=f"export {VARIABLE}=20")


def make_room(held: Iterable[Held], need: int, limit: int, drop: Callable[[Path], object]) -> list[Held]:
    """Drop what was not used for longest until `need` more bytes fit the limit.

    Args:
        held: what is there.
        need: bytes to come; more than `limit` drops nothing, for it would not help.
        limit: bytes.
        drop: removes one.

    Returns:
        What was dropped.
    """
    there = list(held)
    kept = sorted((one for one in there if not one.in_use), key=lambda one: one.last_used)
    gone: list[Held] = []
    total = sum(one.bytes for one in there)
    while need <= limit and kept and total + need > limit:
        oldest = kept.pop(0)
        drop(oldest.path)
        total -= oldest.bytes
        gone.append(oldest)
    return gone


def tree_bytes(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; what vanishes meanwhile counts nothing."""
    total = 0
    with contextlib.suppress(OSError):  # of a folder that goes while it is listed
        for file in path.rglob("*") if path.is_dir() else [path]:
            with contextlib.suppress(OSError):
                if not file.is_symlink() and file.is_file():
                    total += file.stat().st_size
    return total


def last_change(path: Path) -> float:
    """When a file, or anything in a folder, was last changed: seconds since 1970, 0 where there is none."""
    newest = 0.0
    with contextlib.suppress(OSError):  # another process removes it
        for one in [path, *path.rglob("*")] if path.is_dir() else [path]:
            newest = max(newest, one.stat().st_mtime)
    return newest
