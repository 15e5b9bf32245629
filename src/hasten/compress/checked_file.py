"""Bytes in a file with a checksum behind them: XXH64 of each 4 MiB, at memory speed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from hasten import _native
from hasten.cache import write_atomic
from hasten.cache.reading import read_array

_PIECE = 1 << 22
_SUM = 8  # bytes of the checksum that ends a file


def checksum(data: npt.NDArray[Any]) -> bytes:
    """Of contiguous data: 8 bytes."""
    found = np.array(_native.checksums(data, _PIECE, 0), np.uint64)
    return hashlib.sha256(found.tobytes()).digest()[:_SUM]


def write_checked(path: Path, data: npt.NDArray[np.uint8]) -> None:
    """Write a file whole or not at all.

    Raises:
        DiskError: full, read-only or forbidden disk; the file before is untouched.
    """

    def put(file: BinaryIO) -> None:
        file.write(data.data)
        file.write(checksum(data))

    write_atomic(path, put)


def is_whole(path: Path, size: int | None = None) -> bool:
    """Whether a file is as it was written, of `size` bytes before the checksum where that is known."""
    try:
        if size is not None and path.stat().st_size != size + _SUM:
            return False
        data = read_array(path)
    except OSError:
        return False
    return data.size >= _SUM and data[-_SUM:].tobytes() == checksum(data[:-_SUM])
