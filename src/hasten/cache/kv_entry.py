"""One page of keys and values as a file: a header that says what it is, then the bytes.

Little-endian. Header (152 bytes): magic, format version, header size, SHA-256 of the model's fingerprint, the
page's key and its parent's (at most 32 bytes each, lengths first), seconds it took to compute, payload bytes,
XXH64 of the payload, XXH64 of the header up to here. Nothing else is in the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hasten import _native
from hasten.cache.store import beside

FORMAT_VERSION = 1
MOST_KEY_BYTES = 32
_MAGIC = b"HASTENKV"
_FIELDS = struct.Struct("<8sII32sHH4x32s32sdQQ")
_HASH = struct.Struct("<Q")
HEADER_BYTES = _FIELDS.size + _HASH.size

Bytes = npt.NDArray[np.uint8]


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
