"""Reading a GGUF header field by field, never past the end of the file."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from hasten.errors import FormatError

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS: dict[int, np.dtype[Any]] = {
    kind: np.dtype(code)
    for kind, code in {
        0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4",
        _BOOL: "?", 10: "<u8", 11: "<i8", 12: "<f8",
    }.items()
}  # fmt: skip
_MAX_COUNT = 1 << 24  # entries of an array, keys, tensors; the largest vocabularies have 2^18


@dataclass(frozen=True)
class StringArray:
    """An array of strings that has been measured and not decoded."""

    data: memoryview
    name: str  # of the file
    start: int  # where its first length is
    count: int

    def __len__(self) -> int:
        return self.count

    def decode(self, key: str) -> list[str]:
        """All strings.

        Raises:
            FormatError: one is not UTF-8.
        """
        data, at, unpack, strings = self.data, self.start, _U64.unpack_from, []
        try:
            for _ in range(self.count):
                first = at + 8
                at = first + unpack(data, at)[0]
                strings.append(str(data[first:at], "utf-8"))
        except UnicodeDecodeError as error:
            raise FormatError(f"{self.name}: entry {len(strings)} of {key!r} is not UTF-8") from error
        return strings


class GgufCursor:
    """A position in a GGUF header. Every read checks what is left before it looks."""

    def __init__(self, data: memoryview, name: str) -> None:
        self.data = data
        self.name = name
        self.position = 0

    @property
    def left(self) -> int:
        """Bytes behind the position."""
        return len(self.data) - self.position

    def error(self, what: str, hint: str | None = None) -> FormatError:
        """A FormatError that names the file."""
        return FormatError(f"{self.name}: {what}", hint=hint)

    def skip(self, count: int, what: str) -> int:
        """Move on by `count` bytes; returns where they start."""
        if count > self.left:
            raise self.error(
                f"{what} needs {count} bytes at {self.position}, but the file ends after {self.left}: "
                "it is truncated or its header is wrong",
                hint="download it again, or compare its size with the original",
            )
        start = self.position
        self.position += count
        return start

    def u32(self, what: str) -> int:
        """An unsigned 32-bit number."""
        return int(_U32.unpack_from(self.data, self.skip(4, what))[0])

    def u64(self, what: str) -> int:
        """An unsigned 64-bit number."""
        return int(_U64.unpack_from(self.data, self.skip(8, what))[0])

    def string(self, what: str) -> str:
        """A string: its length in 64 bits, then UTF-8."""
        length = self.u64(f"the length of {what}")
        start = self.skip(length, what)
        try:
            return str(self.data[start : start + length], "utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8") from error

    def count(self, what: str, least_bytes: int, most: int = _MAX_COUNT) -> int:
        """A 64-bit count of things that take at least `least_bytes` each, checked against what is left."""
        count = self.u64(f"the number of {what}")
        if count > _MAX_COUNT or count * least_bytes > self.left:
            raise self.error(
                f"the header says {count} {what}, which cannot fit the {self.left} bytes behind it",
                hint="download it again: the file is truncated or damaged",
            )
        if count > most:
            raise self.error(f"the header says {count:,} {what}, more than {most:,}")
        return count

    def value(self, key: str) -> Any:
        """A metadata value: a plain Python value, a NumPy array or a StringArray."""
        kind = self.u32(f"the type of {key!r}")
        if kind == _STRING:
            return self.string(f"the value of {key!r}")
        if kind == _ARRAY:
            return self._array(key)
        return self._numbers(key, kind, 1)[0].item()

    def _array(self, key: str) -> Any:
        kind = self.u32(f"the element type of {key!r}")
        if kind == _ARRAY:
            raise self.error(f"metadata {key!r} is an array of arrays, which is not supported")
        if kind == _STRING:
            return self._strings(key, self.count(f"strings in {key!r}", 8))
        size = self._scalar(key, kind).itemsize
        return self._numbers(key, kind, self.count(f"entries in {key!r}", size))

    def _scalar(self, key: str, kind: int) -> np.dtype[Any]:
        if kind not in _SCALARS:
            raise self.error(f"metadata {key!r} has value type {kind}; types 0 to 12 exist")
        return _SCALARS[kind]

    def _numbers(self, key: str, kind: int, count: int) -> np.ndarray[Any, Any]:
        dtype = self._scalar(key, kind)
        start = self.skip(count * dtype.itemsize, f"the value of {key!r}")
        raw = np.frombuffer(self.data, np.uint8, count * dtype.itemsize, start)
        if kind == _BOOL and count and int(raw.max()) > 1:
            raise self.error(f"metadata {key!r} holds a boolean of {int(raw.max())}; 0 or 1 belongs there")
        return raw.view(dtype)

    def _strings(self, key: str, count: int) -> StringArray:
        """Measure an array of strings: the one loop over a vocabulary that opening a file costs (~30 ms)."""
        data, unpack, at = self.data, _U64.unpack_from, self.position
        try:
            for _ in range(count):
                at += 8 + unpack(data, at)[0]
        except (struct.error, OverflowError) as error:
            raise self.error(f"a string of {key!r} at byte {at} ends past the end of the file") from error
        array = StringArray(data, self.name, self.position, count)
        self.skip(at - self.position, f"the strings of {key!r}")
        return array
