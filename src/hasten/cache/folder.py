"""A folder that appears whole or not at all: what an artifact is written with."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from hasten.cache.store import beside, explained, sync_folder
from hasten.errors import DiskError

_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100  # fcntl.h


@contextlib.contextmanager
def new_folder(path: str | Path, marker: str | None = None) -> Iterator[Path]:
    """Fill a fresh folder, then put it at `path` in one step; what was there stays until then.

    Leaving the block with an exception (a full disk, Ctrl-C) removes the new folder and keeps the old one.
    On Linux the two are exchanged by one system call; elsewhere there is an instant in which `path` is absent
    and the old folder lies beside it under a hidden name.

    Args:
        path: where the folder shall be.
        marker: a file that an existing folder must hold to be replaced; None replaces any folder.

    Yields:
        The folder to fill.

    Raises:
        DiskError: full, read-only or forbidden disk, or `path` is something that must not be replaced.
    """
    target = Path(os.path.realpath(path))
    refuse_foreign(target, marker)
    fresh = beside(target)
    with explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh.mkdir()
        try:
            yield fresh
            sync_folder(fresh)
            _put(fresh, target)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)  # after an exchange this is the old one
        sync_folder(target.parent)


def refuse_foreign(target: Path, marker: str | None) -> None:
    """Say it where something stands at `target` that no folder with `marker` in it may replace.

    Raises:
        DiskError: it is a file, or a folder with other things in it.
    """
    if not target.exists():
        return
    strange = not target.is_dir() or (
        marker is not None and any(target.iterdir()) and not (target / marker).exists()
    )
    if strange:
        raise DiskError(
            f"{target} exists and is not a folder that may be replaced"
            + (f" (no {marker} in it)" if marker else ""),
            hint="choose another --out DIR, or move it away",
        )


def _put(fresh: Path, target: Path) -> None:
    if not target.exists():
        fresh.rename(target)
    elif not _exchange(fresh, target):
        old = beside(target, "old")
        target.rename(old)
        try:
            fresh.rename(target)
        except OSError:
            old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names at once; False where the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2  # glibc 2.28, musl 1.2.5
    except AttributeError:
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0)
