"""Folders under way: hidden beside what they will become, and told from what a killed process left behind."""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from hasten.cache.store import explained

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_YOUNG_S = 60.0  # one this young may belong to a process that has not locked it yet
_SCRATCH = "hasten-scratch-"
_OLD_S = 3600.0  # a single file is not locked, and written within this


@contextlib.contextmanager
def stage(store: Path) -> Iterator[Path]:
    """A hidden folder in `store`, locked while it is filled, gone with all that is still in it afterwards.

    Raises:
        DiskError: full, read-only or forbidden disk.
    """
    fresh = store / f".{secrets.token_hex(8)}.tmp"
    with explained(fresh):
        fresh.mkdir(parents=True)
    lock = _lock(fresh)
    try:
        yield fresh
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def scratch() -> Path:
    """A folder for files that are not kept, gone with this process.

    A process that is killed leaves its own, so each call first removes what processes that are gone have
    left: theirs are not locked.

    Raises:
        DiskError: the folder for temporary files is full or cannot be written.
    """
    store = Path(tempfile.gettempdir())
    for left in store.glob(f"{_SCRATCH}????????"):
        if left.is_dir() and not left.is_symlink() and _is_own(left) and _is_left(left):
            shutil.rmtree(left, ignore_errors=True)
    with explained(store / _SCRATCH):
        folder = Path(tempfile.mkdtemp(prefix=_SCRATCH))
    lock = _lock(folder)

    def end() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)

    atexit.register(end)
    return folder


def _is_own(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return not hasattr(os, "getuid") or path.stat().st_uid == os.getuid()
    return False


def vanish(path: Path) -> None:
    """Remove a folder that others may be reading: it is gone under its name at once, then file by file.

    Raises:
        OSError: it may not be removed.
    """
    gone = path.parent / f".{secrets.token_hex(8)}.old"
    with contextlib.suppress(FileNotFoundError):
        path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def clean(store: Path) -> list[Path]:
    """Remove what killed processes left in `store`; what was removed."""
    return [
        path for kind in ("tmp", "old") for path in store.glob(f".*.{kind}") if _is_left(path) and _gone(path)
    ]


def _lock(folder: Path) -> int | None:
    """Held until the descriptor is closed or the process gone, however it goes; None: no locks here."""
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _is_left(path: Path) -> bool:
    try:
        age = time.time() - path.stat().st_mtime
        if not path.is_dir() or fcntl is None:
            return age > _OLD_S
    except OSError:  # gone meanwhile
        return False
    if age < _YOUNG_S:
        return False
    with contextlib.suppress(OSError):
        if (lock := _lock(path)) is not None:
            os.close(lock)
            return True
    return False


def _gone(path: Path) -> bool:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
    return not path.exists()
