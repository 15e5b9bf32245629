"""Folders of a store: they appear whole, vanish at once, and hold no more than they may.

`new_folder` puts a filled folder in place in one step (artifacts are written with it). `stage` and `scratch`
make hidden folders for work under way; a folder that a killed process left behind is told by its lock, which
nobody holds, and is removed. `make_room` drops what was not used for longest.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import hashlib
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hasten.cache.store import (
    beside,
    cache_dir,
    explained,
    free_bytes,
    read_json,
    read_record,
    sync_folder,
    write_record,
)
from hasten.errors import DiskError, UsageError

_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100  # fcntl.h
_YOUNG_S = 60.0  # one this young may belong to a process that has not locked it yet
_SCRATCH = "hasten-scratch-"
_OLD_S = 3600.0  # a single file is not locked, and written within this
VARIABLE = "HASTEN_CACHE_GB"
_DEFAULT_BYTES = 20_000_000_000


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
        return path.stat().st_uid == os.getuid()
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
    """A lock that is held until the descriptor is closed or the process ends; None: there is none to have."""
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
        if not path.is_dir():
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


def remember_folder(kind: str, folder: Path) -> None:
    """Remember that `folder` holds things of a kind ("kv"); a cache folder that refuses costs nothing."""
    key = {"kind": kind, "path": str(folder.absolute())}
    name = hashlib.sha256(os.fsencode(f"{kind}\0{folder.absolute()}")).hexdigest()[:32]
    with contextlib.suppress(DiskError, OSError):
        path = cache_dir() / "folders" / f"{name}.json"
        if read_record(path, key) is None:
            write_record(path, key, True)


def known_folders(kind: str) -> list[Path]:
    """The remembered folders of a kind that are there.

    Raises:
        DiskError: no cache folder is known.
    """
    found = []
    for path in sorted((cache_dir() / "folders").glob("*.json")):
        record = read_json(path)
        key = record.get("key") if isinstance(record, dict) else None
        if isinstance(key, dict) and key.get("kind") == kind and read_record(path, key) is True:
            found.append(Path(str(key.get("path"))))
    return [folder for folder in found if folder.is_dir()]


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


def entries_in(store: Path) -> list[Path]:
    """The folders in a store, damaged ones too; hidden ones are work under way."""
    try:
        return sorted(p for p in store.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError:
        return []


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
