"""Safetensors files: read without copying anything and strictly checked; written tensor by tensor.

Source: the format's description, https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from hasten.cache import write_atomic
from hasten.cache.reading import NotAFile, known_content, open_file
from hasten.errors import FormatError, ModelError
from hasten.weights.tensors import TYPES, SourceTensor
from hasten.weights.unwritten import check_written

NOT_A_FILE_HINT = "put the file itself there: it is read at many places, and again by the next run"
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_MAX_TENSORS = 1 << 17  # of one file: seconds of work; those of the largest models hold some ten thousand
_MAX_DIMS = 8
_FLOATS = ("F32", "F16", "BF16")
INTEGERS = ("I8", "U8", "I32", "I64", "BOOL", "F8_E4M3")  # and codes: parts of quantised checkpoints, masks
_AGAIN = "download it again: the file is truncated or damaged"
_ALIGN = 8


def map_file(path: Path) -> memoryview:
    """The bytes of a file, read-only and mapped: pages are read from the disk when they are touched.

    The file must not be cut short while it is mapped: the system ends a process that reads past its new end.

    Raises:
        ModelError: there is no such file, it is a folder or a pipe, or it may not be read.
        FormatError: the file is empty.
    """
    try:
        with open_file(path) as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise FormatError(
                    f"{path} is empty (0 bytes)", hint="download it again: the transfer was cut off"
                )
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except FileNotFoundError as error:
        raise ModelError(f"there is no file {path}", hint="check the path: ls " + str(path.parent)) from error
    except IsADirectoryError as error:
        raise ModelError(f"{path} is a folder, not a model file", hint="give the file's own path") from error
    except NotAFile as error:
        raise ModelError(f"cannot read {path}: {error.strerror}", hint=NOT_A_FILE_HINT) from error
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}", hint="check that you may read it: ls -l") from error


def open_safetensors(path: Path, integers: bool = False) -> dict[str, SourceTensor]:
    """Map a file; tensors by the file's own names, in its order.

    Args:
        path: the file.
        integers: whether it may hold I8, U8, I32, I64 and fp8 too, as those of quantised checkpoints do.

    Raises:
        ModelError: the file is missing or may not be read.
        FormatError: as `parse_safetensors`; or the file was not written to its end.
    """
    data = map_file(path)
    tensors = parse_safetensors(data, str(path), integers)
    check_written(data, tensors, path)
    return tensors


def parse_safetensors(data: memoryview, name: str, integers: bool = False) -> dict[str, SourceTensor]:
    """Read a file's bytes.

    Args:
        data: the whole file.
        name: what errors call it.
        integers: whether it may hold those of quantised checkpoints too.

    Raises:
        FormatError: the bytes are no safetensors file, contradict themselves, or hold a type other than F32,
            F16 and BF16 and what `integers` allows.
    """
    types = (*_FLOATS, *INTEGERS) if integers else _FLOATS
    start, header = _header(data, name)
    header.pop("__metadata__", None)
    extents: list[tuple[int, int, str]] = []
    tensors: dict[str, SourceTensor] = {}
    body = np.frombuffer(data, np.uint8)[start:]
    for key, entry in header.items():
        dtype, shape, first, end = _entry(key, entry, len(body), name, types)
        extents.append((first, end, key))
        tensors[key] = SourceTensor(key, shape, dtype, body[first:end])
    _check_extents(sorted(extents), len(body), name)
    return tensors


def _header(data: memoryview, name: str) -> tuple[int, dict[str, Any]]:
    """(where the tensors start, the header)."""
    if len(data) < 10:
        raise FormatError(f"{name}: not a safetensors file: it has {len(data)} bytes", hint=_AGAIN)
    length = int.from_bytes(data[:8], "little")
    if length > min(_MAX_HEADER_BYTES, len(data) - 8) or bytes(data[8:9]) != b"{":
        if (known := known_content(data)) is not None and "safetensors" not in known[0]:
            raise FormatError(f"{name}: not a safetensors file but {known[0]}", hint=known[1])
        raise FormatError(
            f"{name}: not a safetensors file: its header would be {length} bytes of the {len(data) - 8} that "
            f"follow and start with {bytes(data[8:9])!r}",
            hint=_AGAIN,
        )
    count = bytes(data[8 : 8 + length]).count(b'"data_offsets"')
    if count > _MAX_TENSORS:
        raise FormatError(
            f"{name}: the header names {count:,} tensors, more than {_MAX_TENSORS:,}",
            hint="save it in several files: model.save_pretrained(folder, max_shard_size='5GB')",
        )
    try:
        header = json.loads(str(data[8 : 8 + length], "utf-8"), object_pairs_hook=_unique)
    except _Twice as error:
        raise FormatError(f"{name}: the header names {error} twice") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{name}: the header is no JSON: {error!s:.100}", hint=_AGAIN) from error
    return 8 + length, header  # it starts with a brace: an object


class _Twice(Exception):
    """A key that a JSON object has twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise _Twice(repr(next(key for key, count in counts.items() if count > 1)))
    return result


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _entry(
    key: str, entry: Any, available: int, name: str, types: tuple[str, ...]
) -> tuple[str, tuple[int, ...], int, int]:
    """(type, shape, first byte, end) of one tensor, checked against each other and the file."""
    if not isinstance(entry, dict):
        raise FormatError(f"{name}: the entry of tensor {key!r} is no object but {entry!r:.60}")
    dtype, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if dtype not in types:
        raise FormatError(
            f"{name}: tensor {key!r} has type {dtype!r:.40}, which is not supported",
            hint=f"supported types: {', '.join(_FLOATS)}; convert the checkpoint to bf16",
        )
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS or not all(_is_size(n) for n in shape):
        raise FormatError(f"{name}: tensor {key!r} has the shape {shape!r:.60}")
    if not isinstance(span, list) or len(span) != 2 or not all(_is_size(n) for n in span):
        raise FormatError(f"{name}: tensor {key!r} has the data offsets {span!r:.60}")
    first, end = span
    needed = TYPES[dtype].bytes_of(shape)
    if end > available or end - first != needed:
        raise FormatError(
            f"{name}: tensor {key!r} ({dtype} {shape!r:.60}) takes {needed} bytes, its offsets say {first} "
            f"to {end}, and the file has {available}",
            hint=_AGAIN,
        )
    return dtype, tuple(shape), first, end


def _check_extents(extents: list[tuple[int, int, str]], available: int, name: str) -> None:
    """The format allows neither overlaps nor holes nor bytes behind the last tensor."""
    ends: Iterable[tuple[tuple[int, int, str], tuple[int, int, str]]] = pairwise(
        [(0, 0, "the start"), *extents, (available, available, "the end of the file")]
    )
    for (_, end, before), (start, _, after) in ends:
        if start != end:
            what = "overlap" if start < end else f"leave {start - end} bytes between them"
            raise FormatError(f"{name}: {before!r} and {after!r} {what}", hint=_AGAIN)


@dataclass(frozen=True)
class Entry:
    """One tensor: `pieces` gives its bytes in order, as arrays, when they are needed."""

    name: str
    dtype: str  # the format's name: F16, BF16, I32 ...
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[npt.NDArray[Any]]]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * TYPES[self.dtype].block_bytes


def write_safetensors(path: Path, entries: Sequence[Entry], progress: Callable[[int, int], None]) -> None:
    """Write a file; `progress` is called with (done, total) tensors.

    Raises:
        DiskError: full, read-only or forbidden disk.
    """
    ordered = sorted(entries, key=lambda entry: -TYPES[entry.dtype].block_bytes)  # so that all are aligned
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
