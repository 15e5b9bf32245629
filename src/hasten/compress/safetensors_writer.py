"""A safetensors file written tensor by tensor: none but the one at hand is in memory.

Source: the format's description, https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from hasten.cache import write_atomic

_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "I64": 8}
_ALIGN = 8


@dataclass(frozen=True)
class Entry:
    """One tensor: `pieces` gives its bytes in order, as arrays, when they are needed."""

    name: str
    dtype: str  # the format's name: F16, BF16, I32 ...
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[npt.NDArray[Any]]]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * _BYTES[self.dtype]


def write(path: Path, entries: Sequence[Entry], progress: Callable[[int, int], None]) -> None:
    """Write a file; `progress` is called with (done, total) tensors.

    Raises:
        DiskError: full, read-only or forbidden disk.
    """
    ordered = sorted(entries, key=lambda entry: -_BYTES[entry.dtype])  # so that all are aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for entry in ordered:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [at, at + entry.bytes],
        }
        at += entry.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGN)

    def put(file: BinaryIO) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for done, entry in enumerate(ordered):
            progress(done, len(ordered))
            size = 0
            for piece in entry.pieces():
                data = np.ascontiguousarray(piece)
                size += data.nbytes
                file.write(data.reshape(-1).view(np.uint8).data)
            assert size == entry.bytes, entry.name

    write_atomic(path, put)
