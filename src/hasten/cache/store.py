"""Files that are written whole or not at all, their digests, and JSON records that know when they are stale.

A crash, a full disk or Ctrl-C at any point leaves the file that was there before, never half of the new one.

`Deferred` is work, such as writing a packed model, that is put off until nobody is likely to wait for it.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import hashlib
import json
import logging
import os
import secrets
import shutil
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from hasten.cache.reading import open_raw, read_file
from hasten.core import SCHEMA_VERSION, as_json
from hasten.errors import DiskError, HastenError

_CHUNK_BYTES = 1 << 20
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}
_SHAPE = {errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP}
_BROKEN = {errno.EIO}
_TIDY_S = 5.0  # a disk that hangs is not waited for longer

_log = logging.getLogger("hasten.cache")
_pending: set[Deferred] = set()


def cache_dir() -> Path:
    """The folder everything that can be made again is kept in; it may not exist yet.

    `HASTEN_CACHE` if set, else the platform's cache folder: `$XDG_CACHE_HOME/hasten` or `~/.cache/hasten`,
    `~/Library/Caches/hasten` on macOS.

    Raises:
        DiskError: no home folder is known.
    """
    chosen = os.environ.get("HASTEN_CACHE")
    try:
        if chosen:
            return Path(chosen).expanduser().absolute()
        return _platform_cache_dir() / "hasten"
    except RuntimeError as error:
        raise DiskError(
            "no cache folder: this user has no home folder",
            hint="export HASTEN_CACHE=/a/folder/you/may/write",
        ) from error


def _platform_cache_dir() -> Path:
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return named if named.is_absolute() else Path.home() / ".cache"  # a relative one is ignored: XDG


def write_atomic(path: str | Path, data: bytes | memoryview | Callable[[BinaryIO], object]) -> Path:
    """Write a file so that readers see the old bytes or all of the new ones.

    A temporary file beside it, flushed to the disk, then renamed over it. Folders on the way are made; a link
    is followed. Costs one fsync of the file and one of its folder.

    Args:
        path: the file.
        data: its bytes, or a function that writes them to the binary file it is given.

    Returns:
        `path`.

    Raises:
        DiskError: the disk is full, read-only or not ours; the old file is as it was.
    """
    target = Path(os.path.realpath(path))
    temporary = beside(target)
    with explained(target):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:  # the system lets nobody make a folder there, such as below /proc
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), error.filename) from error
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            with os.fdopen(descriptor, "wb") as file:
                if callable(data):
                    data(file)
                else:
                    file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)  # noqa: PTH105
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        sync_folder(target.parent)
    return Path(path)


def beside(target: Path, kind: str = "tmp") -> Path:
    """A name in the same folder (so on the same disk) that nothing else uses."""
    return target.parent / f".{target.name[:200]}.{os.getpid()}-{secrets.token_hex(4)}.{kind}"


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut, where the system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of a network file system
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explained(target: Path) -> Iterator[None]:
    """Turn the system's refusals to write `target` into a DiskError; errors of other files pass."""
    try:
        yield
    except OSError as error:
        named = target if error.filename is None else Path(os.fsdecode(error.filename))
        ours = named.is_relative_to(target.parent) or target.is_relative_to(named)
        if error.errno not in _FULL | _FORBIDDEN | _SHAPE | _BROKEN or not ours:
            raise
        free = free_bytes(target)
        left = "unknown" if free is None else f"{free / 1e6:,.0f} MB"
        kept = " What was there before is untouched." if target.exists() else ""
        said = f"cannot write {target}: {os.strerror(error.errno or 0)} ({left} free there).{kept}"
        raise DiskError(said, hint=_next(error)) from error


def _next(error: OSError) -> str:
    if error.errno in _FULL:
        return "free some space there, or choose another disk with --out DIR or HASTEN_CACHE=DIR"
    if error.errno in _FORBIDDEN:
        return "choose a folder you may write with --out DIR or HASTEN_CACHE=DIR"
    if error.errno in _SHAPE:
        return "choose another name: something of another kind is there, or the name is too long"
    return "check the disk (dmesg), or choose another one with --out DIR or HASTEN_CACHE=DIR"


def why_not_writable(folder: Path) -> str | None:
    """Why nothing can be written below a folder, there or not yet; None where it seems that one can.

    Asked for before sizes are compared: a file system that is read-only often has no free space either, and
    more space would not help.
    """
    there = next((one for one in (folder, *folder.parents) if one.exists()), None)
    if there is None or os.access(there, os.W_OK | os.X_OK):
        return None
    if not there.is_dir():
        return f"{there} is not a folder"
    try:
        is_read_only = bool(os.statvfs(there).f_flag & os.ST_RDONLY)
    except OSError:
        is_read_only = False
    return f"{there} {'is on a read-only file system' if is_read_only else 'may not be written by this user'}"


def free_bytes(path: Path) -> int | None:
    """Bytes this user may still write on the disk `path` is or would be on; None if unknown."""
    for folder in (path, *path.parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(folder).free
    return None


def digest(path: str | Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits. Reads it once, in 1 MiB pieces.

    Raises:
        OSError: the file cannot be read.
    """
    state = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with open_raw(path) as file:
        while count := file.readinto(buffer):
            state.update(buffer[:count])
    return state.hexdigest()


def write_json(path: str | Path, value: Any) -> Path:
    """Write plain values or any noun of `hasten.core` as JSON, atomically. Infinity and NaN are refused.

    Raises:
        DiskError: as `write_atomic`.
        ValueError: a number that JSON has no form for: use None for unknown.
    """
    text = json.dumps(as_json(value), indent=2, ensure_ascii=False, allow_nan=False)
    return write_atomic(path, (text + "\n").encode())


def read_json(path: str | Path) -> Any | None:
    """The value in a JSON file, or None where it is missing, torn or no JSON: to a cache these are misses."""
    try:
        return json.loads(read_file(path))
    except (OSError, ValueError, RecursionError):
        return None


def write_record(path: str | Path, key: Mapping[str, Any], value: Any) -> Path:
    """Keep `value` with what it was made from (`key`) and a checksum of both.

    Raises:
        DiskError: the disk is full, read-only or not ours; an older record is as it was.
    """
    kept = {"schema_version": SCHEMA_VERSION, "key": as_json(key), "value": as_json(value)}
    return write_json(path, {**kept, "sha256": _checksum(kept)})


def read_record(path: str | Path, key: Mapping[str, Any]) -> Any | None:
    """The value kept under exactly this `key`, or None: missing, torn, altered, other key or version."""
    record = _whole(path)
    return record.get("value") if record is not None and record.get("key") == _plain(key) else None


def is_whole_record(path: str | Path) -> bool:
    """Whether a file is a record as it was written, whatever its key."""
    return _whole(path) is not None


def _whole(path: str | Path) -> dict[str, Any] | None:
    record = read_json(path)
    if not isinstance(record, dict):
        return None
    found = record.pop("sha256", None)
    if record.get("schema_version") != SCHEMA_VERSION or found != _checksum(record):
        return None
    return record


def _plain(key: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(as_json(key)))


def _checksum(kept: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


class GivenUp(BaseException):
    """Raised inside work that is given up, so that it leaves nothing half done behind."""


class Deferred:
    """One piece of work for a thread of its own, at low priority.

    It begins when `owner` is gone, when the process ends, when `flush` is called, or after `delay_s`,
    whichever is first. The process waits for it; Ctrl-C while it waits gives the work up: `GivenUp` is
    raised inside it. What the work raises otherwise is logged.

    Args:
        work: what to do.
        owner: who used the machine so far; only watched.
        delay_s: seconds.
    """

    def __init__(self, work: Callable[[], object], owner: object, delay_s: float = 20.0) -> None:
        self._work: Callable[[], object] | None = work
        self._delay_s = delay_s
        self._go = threading.Event()
        self._ended = threading.Event()  # join() takes a thread for dead once it was interrupted
        weakref.finalize(owner, self._go.set).atexit = False
        self._thread = threading.Thread(target=self._run, name="hasten-deferred", daemon=True)
        _pending.add(self)
        self._thread.start()

    def _run(self) -> None:
        self._go.wait(self._delay_s)
        if sys.platform == "linux":  # there a thread has its own priority
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        try:
            work = self._work
            if work is not None:
                work()
        except GivenUp:
            pass
        except HastenError as error:
            _log.warning("%s", error.message)
        except Exception as error:  # noqa: BLE001  nobody else is there to hear of it
            _log.warning("work put off failed: %s: %s", type(error).__name__, error)
        finally:
            self._work = None
            _pending.discard(self)
            self._ended.set()

    def finish(self) -> None:
        """Do it now, and return when it is done."""
        self._go.set()
        while not self._ended.wait(0.1):  # a signal that comes just before a wait begins does not end it
            pass

    def give_up(self) -> None:
        """End it at its next line of Python, and return when it has tidied up, or after some seconds."""
        self._work = None
        self._go.set()
        thread = ctypes.c_ulong(self._thread.ident or 0)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(GivenUp))
        until = time.monotonic() + _TIDY_S
        while not self._ended.is_set() and (left := until - time.monotonic()) > 0:
            with contextlib.suppress(KeyboardInterrupt):
                self._ended.wait(left)


def flush() -> None:
    """Do all work that was put off, and return when it is done. Ctrl-C gives it up.

    Raises:
        KeyboardInterrupt: it was given up; none of it runs any more.
    """
    try:
        for deferred in tuple(_pending):
            deferred.finish()
    except KeyboardInterrupt:
        for deferred in tuple(_pending):
            deferred.give_up()
        raise


def _at_exit() -> None:
    with contextlib.suppress(KeyboardInterrupt):
        flush()


atexit.register(_at_exit)
