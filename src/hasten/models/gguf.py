"""Reading a GGUF header field by field, never past the end of the file."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from hasten.cache.reading import is_there, known_content
from hasten.errors import FormatError, ModelError
from hasten.weights.tensors import (
    CUT_HINT,
    FOREIGN_NAMES,
    TYPES_BY_ID,
    SourceTensor,
    TensorType,
    check_written,
    map_file,
    zeros_at_end,
)

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
_MAX_DEPTH, _MAX_NESTED = 8, 1 << 17  # of arrays in arrays, which no key of a model has


def _strictness(key: str) -> str:
    """How bytes that are no UTF-8 are taken: what a tokenizer or template says must be exact, what a file
    says for people (names, descriptions, tags) need not be."""
    return "strict" if key.startswith("tokenizer.") else "replace"


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
        errors = _strictness(key)
        try:
            for _ in range(self.count):
                first = at + 8
                at = first + unpack(data, at)[0]
                strings.append(str(data[first:at], "utf-8", errors))
        except UnicodeDecodeError as error:
            raise FormatError(f"{self.name}: entry {len(strings)} of {key!r} is not UTF-8") from error
        return strings


class GgufCursor:
    """A position in a GGUF header. Every read checks what is left before it looks."""

    def __init__(self, data: memoryview, name: str) -> None:
        self.data = data
        self.name = name
        self.position = 0
        self._nested = 0  # arrays in arrays so far

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

    def string(self, what: str, errors: str = "strict") -> str:
        """A string: its length in 64 bits, then UTF-8; `errors` as `str` has it."""
        length = self.u64(f"the length of {what}")
        start = self.skip(length, what)
        try:
            return str(self.data[start : start + length], "utf-8", errors)
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
            return self.string(f"the value of {key!r}", _strictness(key))
        if kind == _ARRAY:
            return self._array(key, 0)
        return self._numbers(key, kind, 1)[0].item()

    def _array(self, key: str, depth: int) -> Any:
        kind = self.u32(f"the element type of {key!r}")
        if kind == _ARRAY:  # nothing here reads one; other programs' tables must not be in the way
            if depth == _MAX_DEPTH:
                raise self.error(f"metadata {key!r} nests arrays deeper than {_MAX_DEPTH}")
            self._nested += (count := self.count(f"arrays in {key!r}", 12, _MAX_NESTED))
            if self._nested > _MAX_NESTED:
                raise self.error(f"the metadata holds more than {_MAX_NESTED:,} arrays in arrays")
            parts = (self._array(key, depth + 1) for _ in range(count))
            return [part.decode(key) if isinstance(part, StringArray) else part for part in parts]
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

    def text(self, key: str) -> str | None:
        """A value that is text; None where the key is missing or holds something else."""
        value = self._values.get(key)
        return value if isinstance(value, str) else None

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
            FormatError: as `parse`; or the file was not written to its end.
        """
        data = map_file(path)
        try:
            file = cls.parse(data, str(path))
        except FormatError as error:
            zeros = zeros_at_end(np.frombuffer(data, np.uint8))
            if zeros < len(data) // 20:
                raise
            said = f"{error.message} (its last {zeros:,} bytes at least are zeros)"
            raise FormatError(said, hint=CUT_HINT) from error
        check_written(data, file.tensors, path)
        return file

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
        version = _checked_version(cursor)
        tensor_count = cursor.count("tensors", _MIN_TENSOR_BYTES, _MAX_TENSORS)
        entry_count = cursor.count("metadata entries", _MIN_ENTRY_BYTES, _MAX_ENTRIES)
        metadata = GgufMetadata(_metadata(cursor, entry_count))
        tensors = _tensors(cursor, tensor_count, _alignment(cursor, metadata))
        return cls(name, version, metadata, tensors)


def _checked_version(cursor: GgufCursor) -> int:
    found = bytes(cursor.data[:4])
    if found != MAGIC:
        usual = "", "give a .gguf file, or the folder of a safetensors model"
        what, hint = known_content(cursor.data) or usual
        what = f"not a GGUF file but {what}" if what else "not a GGUF file"
        raise cursor.error(f"{what}: it starts with {found!r} where {MAGIC!r} belongs", hint)
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
    if number in TYPES_BY_ID:
        return TYPES_BY_ID[number]
    known = FOREIGN_NAMES.get(number, "one of ik_llama.cpp alone" if number in _IK_LLAMA else "unknown")
    if number in _REPACKED:
        hint = (
            f"its rows lie in an order that llama.cpp no longer reads: take the file in {_REPACKED[number]}, "
            "or download it again from its publisher"
        )
    else:
        supported = ", ".join(kind.name for kind in TYPES_BY_ID.values())
        hint = f"supported types: {supported}; requantise the model to one of them"
    raise cursor.error(f"tensor {name!r} has type {number} ({known}), which is not supported", hint=hint)


_REPACKED = {31: "Q4_0", 32: "Q4_0", 33: "Q4_0", 36: "IQ4_NL", 37: "IQ4_NL", 38: "IQ4_NL"}
"""The type that each repacked one holds, in another order."""
_IK_LLAMA = range(97, 400)


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


_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.gguf)", re.IGNORECASE)
_MAX_PARTS = 1000
_HELPING = re.compile(r"mmproj|imatrix", re.IGNORECASE)
_PIECE = re.compile(
    r".+(\.gguf[.-](split|part|\d)|[.-]part[-_]?\d+of\d+|\.gguf-split-[a-z]).*", re.IGNORECASE
)


def part_names(name: str) -> tuple[str, ...]:
    """The names of all parts of a split model, first to last, from the name of any; () where it is none.

    gguf-split calls them STEM-00001-of-00003.gguf. A folder in front of the name stays in front of each.
    """
    found = _PART.fullmatch(name)
    if found is None or not 1 < (count := int(found["count"])) <= _MAX_PARTS:
        return ()
    stem, suffix = found["stem"], found["suffix"]
    return tuple(f"{stem}-{number:05d}-of-{count:05d}{suffix}" for number in range(1, count + 1))


def model_name(path: Path) -> str:
    """What a GGUF file is called without its ending, and without the number of a part."""
    found = _PART.fullmatch(path.name)
    return path.stem if found is None or not part_names(path.name) else found["stem"]


def models_of(names: Iterable[str]) -> list[str]:
    """The models among names of GGUF files, each by its first file; files that help a model are left out."""
    firsts = dict.fromkeys((part_names(name) or (name,))[0] for name in sorted(names))
    return [name for name in firsts if not _HELPING.search(name)]


def models_in(folder: Path) -> list[Path]:
    """The GGUF models of a folder by their (first) file; files that help a model, where nothing else is."""
    names = sorted(p.name for p in folder.iterdir() if p.suffix.lower() == ".gguf")
    return [folder / name for name in models_of(names) or names]


def open_parts(path: Path) -> tuple[GgufFile, tuple[Path, ...]]:
    """A model of one file, or of all the parts that lie beside the given one.

    The first part has the metadata; each has tensors of its own, and `split.no`, `split.count`.

    Returns:
        (the model, its files in order)

    Raises:
        ModelError: a part is missing (it is named), or lies under a name that does not say which it is.
        FormatError: as `GgufFile.open`; or the parts do not belong together.
    """
    names = part_names(path.name)
    if not names:
        return _open_single(path), (path,)
    paths = tuple(path.with_name(name) for name in names)
    missing = [part.name for part in paths if not is_there(part)]
    if missing and len(missing) < len(paths):
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ModelError(
            f"{path} is part {names.index(path.name) + 1} of {len(names)} of a model, and beside it "
            f"{len(missing)} of them {'is' if len(missing) == 1 else 'are'} missing: {shown}",
            hint="put all parts into one folder, or download them: hasten pull OWNER/NAME --include "
            f"{model_name(path)}",
        )
    files = [GgufFile.open(part) for part in paths]
    first, tensors = files[0], dict(files[0].tensors)
    for number, file in enumerate(files):
        _check_part(file, number, len(files))
        if number:
            twice = next((name for name in file.tensors if name in tensors), None)
            if twice is not None:
                raise FormatError(f"{file.name}: tensor {twice!r} is in an earlier part too", hint=_OTHER)
            tensors.update(file.tensors)
    total = first.metadata.get("split.tensors.count")
    if isinstance(total, int) and total != len(tensors):
        raise FormatError(
            f"{first.name} says that its parts have {total} tensors, they have {len(tensors)}", hint=_OTHER
        )
    return GgufFile(first.name, first.version, first.metadata, tensors), paths


_OTHER = "the parts are of different models or downloads: download all of them again"


def _open_single(path: Path) -> GgufFile:
    try:
        file = GgufFile.open(path)
    except FormatError as error:
        if _PIECE.fullmatch(path.name):
            raise FormatError(
                f"{path} looks like one piece of a file that was cut by bytes: {error.message}",
                hint=f"join the pieces in order: cat PIECE1 PIECE2 > {path.with_name('MODEL.gguf')}",
            ) from error
        raise
    number, count = (file.metadata.get(f"split.{key}", 0) for key in ("no", "count"))
    if isinstance(count, int) and isinstance(number, int) and count > 1:
        raise ModelError(
            f"{path} is part {number + 1} of {count} of a model, and its name does not say so",
            hint=f"call it NAME-{number + 1:05d}-of-{count:05d}.gguf, the others likewise, side by side",
        )
    return file


def _check_part(file: GgufFile, number: int, count: int) -> None:
    said = tuple(file.metadata.get(f"split.{key}") for key in ("no", "count"))
    if said != (number, count) and said != (None, None):
        raise FormatError(
            f"{file.name} says that it is part {said[0]} (from 0) of {said[1]}, "
            f"its name says {number} of {count}",
            hint=_OTHER,
        )


def other_kind(file: GgufFile) -> ModelError | None:
    """Why a GGUF file is no language model that runs by itself; None where it looks like one.

    Sources: `general.type` in the GGUF specification, and what llama.cpp's tools write into the files that
    help a model (convert_lora_to_gguf.py, tools/mtmd, tools/imatrix, tools/cvector-generator).
    """
    text = file.metadata.text
    kind, architecture = text("general.type"), text("general.architecture")
    if kind == "adapter" or any(name.endswith(".lora_a") for name in file.tensors):
        base = text("general.base_model.0.name") or f"its {architecture or ''} base model".replace("  ", " ")
        return _other(
            file, "a LoRA adapter", f"open {base} with it: hasten generate BASE --adapter {file.name}"
        )
    if kind == "mmproj" or architecture == "clip":
        what = "the projector of a model that sees or hears (mmproj, clip)"
        return _other(file, what, "give the language model's own file; images and sound are not supported")
    if kind == "imatrix" or "imatrix.chunk_count" in file.metadata:
        return _other(file, "an importance matrix (imatrix)", "quantisers read it; give the model's own file")
    if architecture == "controlvector":
        return _other(
            file, "a control vector", "it steers a model and is not supported; give the model's file"
        )
    if kind is not None and kind.lower() not in ("model", ""):
        return _other(file, f"of the type {kind!r}", "give the file of a language model")
    if not file.tensors and "tokenizer.ggml.tokens" in file.metadata:
        return _other(file, "a vocabulary alone: it has no tensors (no weights)", "give the model's own file")
    if architecture is None:
        return _other(file, "of no architecture (general.architecture is missing)", "give a language model")
    return None


def _other(file: GgufFile, what: str, hint: str) -> ModelError:
    return ModelError(f"{file.name} is no language model, it is {what}", hint=hint)
