"""GGUF files, versions 2 and 3: metadata and tensors, strictly checked, nothing copied.

Every length, count and offset of the header is compared with the size of the file before it is used, so a
header that lies costs an error and not memory. Arrays stay where they are until someone asks for them: a
vocabulary of 150,000 entries is measured and not decoded.

Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from hasten.errors import FormatError
from hasten.models.gguf_cursor import GgufCursor, StringArray
from hasten.models.mapped import map_file
from hasten.models.source import SourceTensor
from hasten.models.tensor_type import FOREIGN_NAMES, TYPES_BY_ID, TensorType

MAGIC = b"GGUF"
_MAX_DIMS = 4  # ggml's GGML_MAX_DIMS
_MIN_ENTRY_BYTES = 8 + 1 + 4 + 1  # key length, one letter, type, value
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8  # name length, one letter, dims, one dim, type, offset
_MAX_ENTRIES = 1 << 17  # of metadata, an array counting one; usual are some fifty
_MAX_TENSORS = 1 << 17  # seconds of work; files of the largest models have some thousand
_MAX_ALIGNMENT = 1 << 20


class GgufMetadata(Mapping[str, Any]):
    """Metadata by key.

    Strings are str, numbers int, float or bool, arrays of strings list[str] (decoded when first asked for),
    arrays of numbers read-only NumPy arrays of the file's type.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if isinstance(value, StringArray):
            value = self._values[key] = value.decode(key)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:  # without decoding
        return key in self._values

    def length(self, key: str) -> int | None:
        """Entries of an array, without decoding it; None if the key is missing or holds no array."""
        value = self._values.get(key)
        return len(value) if isinstance(value, (StringArray, list, np.ndarray)) else None


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file's header; tensors carry the file's own names and are views of its bytes."""

    name: str
    version: int
    metadata: GgufMetadata
    tensors: dict[str, SourceTensor]

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Map and read a file.

        Raises:
            ModelError: the file is missing or may not be read.
            FormatError: as `parse`.
        """
        return cls.parse(map_file(path), str(path))

    @classmethod
    def parse(cls, data: memoryview, name: str) -> GgufFile:
        """Read a header from a file's bytes.

        Args:
            data: the whole file, bytes.
            name: what errors call it.

        Raises:
            FormatError: the bytes are no GGUF file of version 2 or 3, contradict themselves, or hold a tensor
                type that is not supported.
        """
        cursor = GgufCursor(data, name)
        version = _version(cursor)
        tensor_count = cursor.count("tensors", _MIN_TENSOR_BYTES, _MAX_TENSORS)
        entry_count = cursor.count("metadata entries", _MIN_ENTRY_BYTES, _MAX_ENTRIES)
        metadata = GgufMetadata(_metadata(cursor, entry_count))
        tensors = _tensors(cursor, tensor_count, _alignment(cursor, metadata))
        return cls(name, version, metadata, tensors)


def _version(cursor: GgufCursor) -> int:
    found = bytes(cursor.data[:4])
    if found != MAGIC:
        raise cursor.error(
            f"not a GGUF file: it starts with {found!r} where {MAGIC!r} belongs",
            hint="give a .gguf file, or the folder of a safetensors model",
        )
    cursor.skip(4, "the magic number")
    version = cursor.u32("the version")
    if version in (2, 3):
        return version
    if version.to_bytes(4, "big") in (b"\x02\0\0\0", b"\x03\0\0\0"):
        raise cursor.error("a big-endian GGUF file", hint="convert it: gguf_convert_endian.py FILE little")
    raise cursor.error(
        f"GGUF version {version}; versions 2 and 3 are supported",
        hint="convert the original model again with a current convert_hf_to_gguf.py",
    )


def _metadata(cursor: GgufCursor, count: int) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for index in range(count):
        key = cursor.string(f"the key of metadata entry {index}")
        if not key:
            raise cursor.error(f"metadata entry {index} has an empty key")
        if key in values:
            raise cursor.error(f"metadata key {key!r} occurs twice")
        values[key] = cursor.value(key)
    return values


def _alignment(cursor: GgufCursor, metadata: GgufMetadata) -> int:
    alignment = metadata.get("general.alignment", 32)
    is_power = (
        isinstance(alignment, int) and 0 < alignment <= _MAX_ALIGNMENT and alignment & (alignment - 1) == 0
    )
    if not is_power:
        raise cursor.error(
            f"general.alignment must be a power of two up to {_MAX_ALIGNMENT}, got {alignment!r}"
        )
    return int(alignment)


@dataclass(frozen=True)
class _Info:
    """A tensor as its header entry says; `offset` is from the start of the data section."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    offset: int

    @property
    def end(self) -> int:
        return self.offset + self.type.bytes_of(self.shape)


def _tensors(cursor: GgufCursor, count: int, alignment: int) -> dict[str, SourceTensor]:
    infos = [_info(cursor, index, alignment) for index in range(count)]
    start = -(-cursor.position // alignment) * alignment
    _check_extents(cursor, infos, start)
    whole = np.frombuffer(cursor.data, np.uint8)
    tensors: dict[str, SourceTensor] = {}
    for info in infos:
        if info.name in tensors:
            raise cursor.error(f"tensor {info.name!r} occurs twice")
        data = whole[start + info.offset : start + info.end]
        tensors[info.name] = SourceTensor(info.name, info.shape, info.type.name, data)
    return tensors


def _info(cursor: GgufCursor, index: int, alignment: int) -> _Info:
    name = cursor.string(f"the name of tensor {index}")
    dims = cursor.u32(f"the dimensions of tensor {name!r}")
    if not 1 <= dims <= _MAX_DIMS:
        raise cursor.error(f"tensor {name!r} has {dims} dimensions; 1 to {_MAX_DIMS} are possible")
    shape = tuple(cursor.u64(f"a dimension of tensor {name!r}") for _ in range(dims))[::-1]
    if 0 in shape:
        raise cursor.error(f"tensor {name!r} is empty: its shape is {list(shape)}")
    kind = _type(cursor, name, cursor.u32(f"the type of tensor {name!r}"))
    if shape[-1] % kind.block:
        raise cursor.error(
            f"tensor {name!r} has rows of {shape[-1]} values, "
            f"which {kind.name}'s blocks of {kind.block} do not divide"
        )
    offset = cursor.u64(f"the offset of tensor {name!r}")
    if offset % alignment:
        raise cursor.error(
            f"tensor {name!r} starts at {offset}, which is no multiple of the alignment {alignment}"
        )
    return _Info(name, shape, kind, offset)


def _type(cursor: GgufCursor, name: str, number: int) -> TensorType:
    if number not in TYPES_BY_ID:
        known = FOREIGN_NAMES.get(number, "unknown")
        raise cursor.error(
            f"tensor {name!r} has type {number} ({known}), which is not supported",
            hint=f"supported types: {', '.join(kind.name for kind in TYPES_BY_ID.values())}; requantise the "
            "model to one of them",
        )
    return TYPES_BY_ID[number]


def _check_extents(cursor: GgufCursor, infos: list[_Info], start: int) -> None:
    available = max(0, len(cursor.data) - start)
    for info in infos:
        if info.end > available:
            raise cursor.error(
                f"tensor {info.name!r} needs bytes {info.offset} to {info.end} of the data, "
                f"which has {available}: the file is truncated or its header is wrong",
                hint="download it again, or compare its size with the original",
            )
    for before, after in pairwise(sorted(infos, key=lambda info: info.offset)):
        if after.offset < before.end:
            raise cursor.error(f"tensors {before.name!r} and {after.name!r} overlap in the file")


__all__ = ["MAGIC", "FormatError", "GgufFile", "GgufMetadata"]
