"""A tensor as its file holds it, the types of number that files store, and safetensors files.

Types are ggml's by their names, the integers of safetensors, and our own.

Source: ggml's `ggml_type` and block structures (ggml/include/ggml.h, ggml-common.h).

Our own hold the matrices of GPTQ, AWQ and compressed-tensors checkpoints, and what calibration finds. They
are called S or A, BITS, _GROUP, and a block is one group: an fp32 scale, in A an fp32 minimum, then u, one
byte a value. S is symmetric, scale * (u - 2^(bits-1)); A is scale * u + minimum.

Safetensors files are read without copying anything and strictly checked, and written tensor by tensor.
Source: the format's description, https://github.com/huggingface/safetensors#format

Downloaders give a file its size first and fill it then; what never came reads as zeros. The header comes
first and is whole, so such a file opens, and the model talks nonsense. Reading all of a file, or its digest,
would cost more than a start may; the end, and the holes that the file system knows of, cost 0.3 ms.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import mmap
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from hasten import _native
from hasten.cache import write_atomic
from hasten.cache.reading import NotAFile, known_content, open_file, open_raw
from hasten.errors import FormatError, ModelError


@dataclass(frozen=True)
class TensorType:
    """A format stores `block` consecutive values of one row in `block_bytes` bytes."""

    name: str
    ggml_id: int  # negative: no type of GGUF files
    block: int  # values
    block_bytes: int

    def bytes_of(self, shape: Sequence[int]) -> int:
        """Bytes of a tensor [..., cols]; cols must be a multiple of `block`."""
        return math.prod(shape) // self.block * self.block_bytes


TYPES: dict[str, TensorType] = {
    t.name: t
    for t in (
        TensorType("F32", 0, 1, 4), TensorType("F16", 1, 1, 2), TensorType("BF16", 30, 1, 2),
        TensorType("Q8_0", 8, 32, 34), TensorType("Q4_0", 2, 32, 18), TensorType("Q4_1", 3, 32, 20),
        TensorType("Q5_0", 6, 32, 22), TensorType("Q5_1", 7, 32, 24), TensorType("Q2_K", 10, 256, 84),
        TensorType("Q3_K", 11, 256, 110), TensorType("Q4_K", 12, 256, 144), TensorType("Q5_K", 13, 256, 176),
        TensorType("Q6_K", 14, 256, 210), TensorType("IQ4_NL", 20, 32, 18),
        TensorType("IQ4_XS", 23, 256, 136), TensorType("IQ3_XXS", 18, 256, 98),
        TensorType("IQ3_S", 21, 256, 110), TensorType("IQ2_XXS", 16, 256, 66),
        TensorType("IQ2_XS", 17, 256, 74), TensorType("IQ2_S", 22, 256, 82), TensorType("IQ1_S", 19, 256, 50),
        TensorType("IQ1_M", 29, 256, 56), TensorType("TQ1_0", 34, 256, 54), TensorType("TQ2_0", 35, 256, 66),
        TensorType("MXFP4", 39, 32, 17),
        # raw parts of quantised checkpoints, and masks that old ones hold: never a parameter by themselves
        TensorType("I8", -1, 1, 1), TensorType("U8", -1, 1, 1), TensorType("BOOL", -1, 1, 1),
        TensorType("F8_E4M3", -1, 1, 1), TensorType("I32", -1, 1, 4), TensorType("I64", -1, 1, 8),
        *(TensorType(f"S{b}_{g}", -1, g, 4 + g) for b in (4, 5, 6, 8) for g in (32, 64, 128)),
        *(TensorType(f"A{b}_{g}", -1, g, 8 + g) for b in (4, 5, 6, 8) for g in (32, 64, 128)),
    )
}  # fmt: skip
"""Every type this program reads."""

TYPES_BY_ID: dict[int, TensorType] = {t.ggml_id: t for t in TYPES.values() if t.ggml_id >= 0}

FOREIGN_NAMES: dict[int, str] = {
    4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4, or I2_S of BitNet", 37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
"""ggml types that exist and are not read, so that an error can name them."""

Bytes = npt.NDArray[np.uint8]
_PIECE_BYTES = 1 << 22  # threads share the work by pieces


class _Data:
    """The bytes of a tensor, or the function that makes them, called anew each time they are read."""

    def __set__(self, tensor: object, value: Bytes | Callable[[], Bytes]) -> None:
        vars(tensor)["_data"] = value

    def __get__(self, tensor: object | None, owner: type) -> Bytes:
        if tensor is None:
            raise AttributeError("data")  # tells dataclass that the field has no default
        value: Bytes | Callable[[], Bytes] = vars(tensor)["_data"]
        return value() if callable(value) else value


@dataclass(frozen=True)
class SourceTensor:
    """One tensor, not converted: a view of the mapped file and what its bytes mean.

    A matrix of a GPTQ, AWQ or compressed-tensors checkpoint is no view: it is made with a function, and
    reading `data` unpacks the file's integers, each time anew, so that an opened model holds nothing twice.
    """

    name: str  # canonical name; in a file reader's hands the file's own name
    shape: tuple[int, ...]  # outermost first: [rows, cols] for matrices
    dtype: str  # a key of TYPES
    data: _Data = _Data()  # uint8 [nbytes], C-contiguous, rows in file order; not to be written to
    row_order: npt.NDArray[np.int64] | None = None  # [rows]: row r of the tensor is row row_order[r] of data
    offset: float = 0.0  # added to every value (Gemma's 1 + weight when the file lacks it)

    @property
    def rows(self) -> int:
        """Rows of a matrix; elements of a vector."""
        return self.shape[0]

    def part(self, name: str, first: int, count: int) -> SourceTensor:
        """`count` rows from `first` under another name, sharing the bytes; before a row order is set."""
        assert self.row_order is None and first >= 0 and first + count <= self.rows
        row_bytes = TYPES[self.dtype].bytes_of(self.shape) // self.rows
        cut = slice(first * row_bytes, (first + count) * row_bytes)
        data = (lambda: self.data[cut]) if self.is_made else self.data[cut]
        return SourceTensor(name, (count, *self.shape[1:]), self.dtype, data, offset=self.offset)

    @cached_property
    def content(self) -> bytes:
        """Digest of type, shape and every byte, 32 bytes: XXH64 of each 4 MiB at memory speed, computed once.

        Of a sample of the bytes it would not do: half the bytes of an F32 tensor that was bf16 are 0.
        """
        data = np.ascontiguousarray(self.data)
        order = b"" if self.row_order is None else self.row_order.tobytes()
        state = hashlib.sha256(f"{self.shape} {self.dtype} {self.offset} {len(order)}".encode() + order)
        sums = _native.checksums(data, _PIECE_BYTES, 0) if data.size else []
        state.update(np.array(sums, np.uint64).tobytes())
        return state.digest()

    @property
    def is_made(self) -> bool:
        """Whether `data` is made when it is read."""
        return callable(vars(self)["_data"])

    def __post_init__(self) -> None:
        assert self.is_made or len(self.data) == TYPES[self.dtype].bytes_of(self.shape), self.name


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
        if path.is_symlink():
            raise ModelError(
                f"{path} is a link to {path.readlink()}, which is not there",
                hint="download the model again: its cache was emptied, or the download was cut off",
            ) from error
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


_log = logging.getLogger("hasten.weights")

CUT_HINT = (
    "the download was cut off after the file had been given its size: delete it and download it again, or "
    "compare its SHA-256 with its source"
)
_CUT_BYTES = 512  # zeros that end a tensor which is not all zeros: where a download stopped
_CUT_SHARE = 0.1  # of a matrix: padding takes less (5 % of a vocabulary, 0.5 % of a feed-forward layer)
_MOST_BYTES = 64 << 20  # looked at from the end: zeros, or it would have ended
_PAGE = 4096  # what of a hole may be a neighbour's
_MOST_HOLES = 1000
_SHOWN = 3


def check_written(data: memoryview, tensors: Mapping[str, SourceTensor], path: Path) -> None:
    """Refuse a file that ends in zeros where weights belong, or has holes there.

    A matrix of zeros alone that ends where its neighbour begins may be meant so: a warning says it.

    Args:
        data: the whole file, mapped.
        tensors: views of it.
        path: the file.

    Raises:
        FormatError: it was not written to its end; tensors are named.
    """
    base = _address(np.frombuffer(data, np.uint8))
    placed = sorted(((_address(tensor.data) - base, tensor) for tensor in tensors.values()), key=_first)
    _check_end(placed, path)
    _check_holes(placed, path, len(data))


def zeros_at_end(data: npt.NDArray[np.uint8], most: int = _MOST_BYTES) -> int:
    """How many bytes are zero at the end: uint8 [bytes]. No more than about `most` are looked at."""
    end, step = len(data), _PAGE
    while end and len(data) - end < most:
        piece = data[max(0, end - step) : end]
        if piece.any():
            return len(data) - end + int(np.argmax(piece[::-1] != 0))
        end, step = end - len(piece), 1 << 20
    return len(data) - end


Placed = list[tuple[int, SourceTensor]]


def _address(data: npt.NDArray[np.uint8]) -> int:
    return int(data.__array_interface__["data"][0])


def _first(placed: tuple[int, SourceTensor]) -> int:
    return placed[0]


def _check_end(placed: Placed, path: Path) -> None:
    empty: list[SourceTensor] = []
    cut, zeros, left = None, 0, _MOST_BYTES
    for _, tensor in reversed(placed):
        zeros = zeros_at_end(tensor.data, left)
        if zeros < len(tensor.data):
            cut = tensor
            break
        empty.append(tensor)
        left -= zeros
        if left <= 0:
            break
    weights = [tensor.name for tensor in empty if _is_weight(tensor)]
    inside = cut is None or zeros >= _CUT_BYTES
    part = cut if cut is not None and _is_weight(cut) and zeros >= _CUT_SHARE * len(cut.data) else None
    if inside and (weights or part is not None):
        whole = sum(len(tensor.data) for tensor in empty) + (zeros if inside else 0)
        names = weights + ([f"the end of {part.name}"] if part is not None else [])
        raise FormatError(
            f"{path}: its last {whole:,} bytes are zeros, {_named(names)} among them", hint=CUT_HINT
        )
    if weights:
        _log.warning("%s: %s: nothing but zeros; %s", path, _named(weights), CUT_HINT)


def _check_holes(placed: Placed, path: Path, size: int) -> None:
    for first, end in _holes(path, size):
        for at, tensor in placed:
            inside = min(end, at + len(tensor.data)) - max(first, at)
            if inside < max(_PAGE, _CUT_SHARE * len(tensor.data)) or not _is_weight(tensor):
                continue
            if inside < len(tensor.data) - 2 * _PAGE:  # else it may be zeros that were written so
                raise FormatError(
                    f"{path}: bytes {first:,} to {end:,} were never written, {tensor.name} is among them",
                    hint=CUT_HINT,
                )


def _holes(path: Path, size: int) -> Iterator[tuple[int, int]]:
    """(first, end) of what has no place on the disk; nothing where the file system does not tell."""
    with open_raw(path) as file:
        end = 0
        for _ in range(_MOST_HOLES):
            try:
                first = os.lseek(file.fileno(), end, os.SEEK_HOLE)
                if first >= size:
                    return
                end = os.lseek(file.fileno(), first, os.SEEK_DATA)
            except OSError:  # there is no data behind the last hole, or no such question
                return
            yield first, end


def _is_weight(tensor: SourceTensor) -> bool:
    """Whether a trained model never has it all zeros: biases and zero points may be."""
    return len(tensor.shape) > 1 and "zero" not in tensor.name


def _named(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
