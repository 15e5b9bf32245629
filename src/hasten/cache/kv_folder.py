"""The files of the disk tier: one page of keys and values each, in a folder that processes share.

    FOLDER/<format version>-<fingerprint>/<first byte of the key>/<key>

Keys in hexadecimal. Several processes may share a folder without a lock: each looks what the others did when
it scans, and a file that vanished is a miss. Only files that look like ours are counted or removed.

A file is a header and the page's bytes, little-endian. Header (152 bytes): magic, format version, header
size, SHA-256 of the model's fingerprint, the page's key and its parent's (at most 32 bytes each, lengths
first), seconds it took to compute, payload bytes, XXH64 of the payload, XXH64 of the header up to here.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import logging
import os
import re
import stat
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hasten import _native
from hasten.cache.policy import Shelf
from hasten.cache.store import beside
from hasten.core import CachePolicy

FORMAT_VERSION = 1
MOST_KEY_BYTES = 32
_MAGIC = b"HASTENKV"
_FIELDS = struct.Struct("<8sII32sHH4x32s32sdQQ")
_HASH = struct.Struct("<Q")
HEADER_BYTES = _FIELDS.size + _HASH.size

Bytes = npt.NDArray[np.uint8]

_GROUP = re.compile(r"\d{1,6}-[A-Za-z0-9_-]{1,200}")  # one model's files
_SHARD = re.compile(r"[0-9a-f]{2}")
_NAME = re.compile(r"(?:[0-9a-f]{2}){1,32}")
_TEMPORARY = re.compile(r"\.[0-9a-f]+\.(\d+)-[0-9a-f]+\.tmp")
_ORPHANED_S = 5.0  # a temporary file of a dead process goes after that: another machine's processes look dead
_FORGOTTEN_S = 3600.0  # any temporary file

log = logging.getLogger(__name__)


class BadEntry(Exception):
    """A file that is not the page it should be; the text says why. It is a miss, never an error of a user."""


@dataclass(frozen=True)
class Header:
    """What a page's file says of itself."""

    fingerprint: bytes  # SHA-256
    key: bytes
    parent: bytes  # empty: unknown
    cost: float  # seconds to compute the page
    payload_bytes: int
    payload_hash: int

    def pack(self) -> bytes:
        """The header's bytes."""
        raw = _FIELDS.pack(
            _MAGIC,
            FORMAT_VERSION,
            HEADER_BYTES,
            self.fingerprint,
            len(self.key),
            len(self.parent),
            self.key,
            self.parent,
            self.cost,
            self.payload_bytes,
            self.payload_hash,
        )
        return raw + _HASH.pack(xxh64(np.frombuffer(raw, np.uint8)))

    @staticmethod
    def unpack(raw: bytes) -> Header:
        """Raises BadEntry where a bit is not as it was written."""
        if len(raw) != HEADER_BYTES:
            raise BadEntry(f"{len(raw)} bytes of header, {HEADER_BYTES} expected")
        magic, version, size, fingerprint, key_bytes, parent_bytes, key, parent, cost, payload, checksum = (
            _FIELDS.unpack_from(raw)
        )
        if magic != _MAGIC:
            raise BadEntry("no page of keys and values")
        if _HASH.unpack_from(raw, _FIELDS.size)[0] != xxh64(np.frombuffer(raw[: _FIELDS.size], np.uint8)):
            raise BadEntry("the header's checksum is wrong")
        if version != FORMAT_VERSION or size != HEADER_BYTES:
            raise BadEntry(f"format version {version}, {FORMAT_VERSION} expected")
        return Header(fingerprint, key[:key_bytes], parent[:parent_bytes], cost, payload, checksum)


def xxh64(data: Bytes) -> int:
    """XXH64, seed 0, of uint8 [n], n > 0. On the calling thread, the interpreter lock released."""
    return _native.checksums(data, data.size)[0]


def fingerprint_digest(fingerprint: str) -> bytes:
    """What a header keeps of a fingerprint of any length: 32 bytes."""
    return hashlib.sha256(fingerprint.encode()).digest()


def write_entry(path: Path, fingerprint: bytes, key: bytes, data: Bytes, cost: float, parent: bytes) -> int:
    """Write a page so that readers see no file or a whole one; its bytes on disk.

    No fsync: it would cost more than computing the page, and what a power cut tears the checksums find.
    Only the owner may read it: keys and values tell what was said.

    Raises:
        OSError: the system refuses; nothing is left behind.
    """
    header = Header(fingerprint, key, parent, cost, data.nbytes, xxh64(data)).pack()
    temporary = beside(path)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            for part in (memoryview(header), data.data):
                while part:
                    part = part[file.write(part) :]
        os.replace(temporary, path)  # noqa: PTH105
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    return HEADER_BYTES + data.nbytes


def read_entry(path: Path, fingerprint: bytes, key: bytes, out: Bytes) -> None:
    """Read a page straight into `out`, uint8 [page_bytes], which holds anything after an error.

    Raises:
        FileNotFoundError: there is none.
        BadEntry: damaged, or another page, model or size.
        OSError: it cannot be read.
    """
    # O_NONBLOCK: a named pipe in its place must not hold up the engine
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode):
            raise BadEntry("not a file")
        if state.st_size != HEADER_BYTES + out.nbytes:
            raise BadEntry(f"{state.st_size} bytes, {HEADER_BYTES + out.nbytes} expected")
        raw = bytearray(HEADER_BYTES)
        if os.readv(descriptor, [raw, out.data]) != state.st_size:
            raise BadEntry("it ends early")
    finally:
        os.close(descriptor)
    header = Header.unpack(bytes(raw))
    if header.key != key:
        raise BadEntry(f"it holds page {header.key.hex()}")
    if header.fingerprint != fingerprint:
        raise BadEntry("it is of another model")
    if header.payload_bytes != out.nbytes or header.payload_hash != xxh64(out):
        raise BadEntry("the checksum is wrong")


def read_header(path: Path) -> Header:
    """A page's header alone.

    Raises:
        BadEntry: damaged, or the file is not as long as its header says.
        OSError: it cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        size = os.fstat(descriptor).st_size
        header = Header.unpack(os.read(descriptor, HEADER_BYTES))
    finally:
        os.close(descriptor)
    if size != HEADER_BYTES + header.payload_bytes:
        raise BadEntry(f"{size} bytes, {HEADER_BYTES + header.payload_bytes} expected")
    return header


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
