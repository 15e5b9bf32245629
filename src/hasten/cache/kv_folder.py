"""The folder of the disk tier: which files are there, how much they take, which of them go.

    FOLDER/<format version>-<fingerprint>/<first byte of the key>/<key>

Keys in hexadecimal. Several processes may share a folder without a lock: each looks what the others did when
it scans, and a file that vanished is a miss. Only files that look like ours are counted or removed.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from hasten.cache.kv_entry import (
    FORMAT_VERSION,
    HEADER_BYTES,
    BadEntry,
    Bytes,
    fingerprint_digest,
    read_entry,
    read_header,
    write_entry,
)
from hasten.cache.shelf import Shelf
from hasten.core import CachePolicy

_GROUP = re.compile(r"\d{1,6}-[A-Za-z0-9_-]{1,200}")  # one model's files
_SHARD = re.compile(r"[0-9a-f]{2}")
_NAME = re.compile(r"(?:[0-9a-f]{2}){1,32}")
_TEMPORARY = re.compile(r"\.[0-9a-f]+\.(\d+)-[0-9a-f]+\.tmp")
_ORPHANED_S = 5.0  # a temporary file of a dead process goes after that: another machine's processes look dead
_FORGOTTEN_S = 3600.0  # any temporary file

log = logging.getLogger(__name__)


class KvFolder:
    """One model's pages in a folder that it may share with other models and processes.

    `holds`, `read` and `drop` are for any thread, the rest for one.
    """

    def __init__(self, folder: Path, limit_bytes: int, fingerprint: str, policy: CachePolicy) -> None:
        self.root = folder
        self.limit_bytes = limit_bytes
        digest = fingerprint_digest(fingerprint)
        safe = re.fullmatch(r"[A-Za-z0-9_-]{1,200}", fingerprint)
        self._own = folder / f"{FORMAT_VERSION}-{fingerprint if safe else digest.hex()}"
        self._fingerprint = digest
        self.shelf = Shelf(limit_bytes, policy)
        self.foreign_bytes = 0
        self._foreign: list[
            tuple[float, str, int]
        ] = []  # heap of (when used, path, bytes): other models' files

    def path(self, key: bytes) -> Path:
        """Where a page is or would be."""
        name = key.hex()
        return self._own / name[:2] / name

    def holds(self, key: bytes) -> bool:
        """Whether a page's file is there, whoever wrote it."""
        return key in self.shelf or self.path(key).is_file()

    def read(self, key: bytes, out: Bytes) -> None:
        """Read a page into uint8 [page_bytes]. Raises as `read_entry`."""
        read_entry(self.path(key), self._fingerprint, key, out)

    def drop(self, key: bytes, reason: str) -> None:
        """Remove a page that is not what it should be, and log it; a folder in its place goes if empty."""
        path = self.path(key)
        log.warning("dropped a damaged page of the KV cache", extra={"path": str(path), "reason": reason})
        _remove(path)

    def store(self, key: bytes, data: Bytes, cost: float, parent: bytes) -> bool:
        """Write a page, others making room for it first; False: it is larger than the limit.

        Raises:
            OSError: the system refuses.
        """
        need = HEADER_BYTES + data.nbytes
        if need > self.limit_bytes:
            return False
        self.shelf.remove(key)  # it is replaced, and must not be the one that makes room
        self._make_room(need)
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        size = write_entry(path, self._fingerprint, key, data, cost, parent)
        self.shelf.insert(key, size, cost, parent, time.time())
        return True

    def touch(self, key: bytes) -> None:
        """A page was read: other processes see it by the file's time."""
        self.shelf.touch(key, time.time())
        with contextlib.suppress(OSError):
            os.utime(self.path(key))

    def scan(self) -> None:
        """Look what is there: new files, vanished ones, other models', leftovers of processes that died."""
        found: list[tuple[float, bytes, int]] = []
        self._foreign = []
        for group in _folders(self.root, _GROUP):
            own = group.name == self._own.name
            for shard in _folders(group.path, _SHARD):
                for entry in _files(shard.path):
                    self._sort(entry, own, found)
        heapq.heapify(self._foreign)
        self.foreign_bytes = sum(size for _, _, size in self._foreign)
        self._reconcile(found)
        self._make_room(0)

    def _sort(self, entry: os.DirEntry[str], own: bool, found: list[tuple[float, bytes, int]]) -> None:
        try:
            state = entry.stat(follow_symlinks=False)
        except OSError:  # gone since
            return
        if _TEMPORARY.fullmatch(entry.name):
            _remove_leftover(entry, state.st_mtime)
        elif _NAME.fullmatch(entry.name) and not own:
            self._foreign.append((state.st_mtime, entry.path, state.st_size))
        elif _NAME.fullmatch(entry.name):
            found.append((state.st_mtime, bytes.fromhex(entry.name), state.st_size))

    def _reconcile(self, found: list[tuple[float, bytes, int]]) -> None:
        there = {key for _, key, _ in found}
        for key in self.shelf.oldest_first():
            if key not in there:
                self.shelf.remove(key)
        for used, key, size in sorted(found):
            if key in self.shelf:
                if used > self.shelf.used(key):  # by another process
                    self.shelf.touch(key, used)
                continue
            try:
                header = read_header(self.path(key))
            except (BadEntry, PermissionError) as reason:
                self.drop(key, str(reason))
                continue
            except OSError:
                continue
            parent = b"" if header.parent == key else header.parent
            self.shelf.insert(key, size, header.cost, parent, used)

    def _make_room(self, need: int) -> None:
        """Remove files until `need` more bytes fit: other models' first where they are the longest unused."""
        while self.shelf.bytes + self.foreign_bytes + need > self.limit_bytes:
            oldest = self.shelf.oldest
            if self._foreign and (oldest is None or self._foreign[0][0] <= oldest):
                _, path, size = heapq.heappop(self._foreign)
                self.foreign_bytes -= size
                _remove(Path(path))
                _remove_empty(Path(path).parent)
                continue
            key = self.shelf.pop()
            if key is None:
                return
            _remove(self.path(key))


def _folders(path: Path | str, names: re.Pattern[str]) -> Iterator[os.DirEntry[str]]:
    yield from (e for e in _entries(path) if names.fullmatch(e.name) and e.is_dir(follow_symlinks=False))


def _files(path: str) -> Iterator[os.DirEntry[str]]:
    yield from (entry for entry in _entries(path) if entry.is_file(follow_symlinks=False))


def _entries(path: Path | str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except OSError:  # not made yet, or removed by somebody
        return []


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        try:
            path.unlink()
        except (IsADirectoryError, PermissionError):
            path.rmdir()


def _remove_empty(shard: Path) -> None:
    with contextlib.suppress(OSError):  # not empty
        shard.rmdir()
        shard.parent.rmdir()


def _remove_leftover(entry: os.DirEntry[str], written: float) -> None:
    match = _TEMPORARY.fullmatch(entry.name)
    assert match is not None
    age = time.time() - written
    if age > _FORGOTTEN_S or (age > _ORPHANED_S and not _alive(int(match.group(1)))):
        _remove(Path(entry.path))


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
