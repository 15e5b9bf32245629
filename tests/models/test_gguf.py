"""The GGUF reader: what it reads, against the gguf package, and every way a header can lie."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I8,
    I16,
    I64,
    STRING,
    U8,
    U16,
    U32,
    U64,
    Gguf,
    Tensor,
    array,
    floats,
    scalar,
    smallest_model,
    string,
)
from hasten.errors import FormatError, ModelError
from hasten.models.gguf import GgufFile
from hasten.weights.tensors import TYPES_BY_ID


def parse(data: bytes) -> GgufFile:
    return GgufFile.parse(memoryview(data), "test.gguf")


def test_types_are_those_of_the_gguf_package() -> None:
    for kind in TYPES_BY_ID.values():
        assert gguf.GGMLQuantizationType(kind.ggml_id).name == kind.name
        sizes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind.ggml_id)]
        assert (kind.block, kind.block_bytes) == tuple(sizes)


def test_reads_what_the_gguf_package_writes(tmp_path: Path) -> None:
    path = tmp_path / "written.gguf"
    rng = np.random.default_rng(1)
    matrix = rng.standard_normal((6, 64), dtype=np.float32)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    writer.add_token_list(["a", "é", "日本", ""])
    writer.add_token_scores([0.5, -1.0, 2.0, 0.0])
    writer.add_float32("x.float", 1.5)
    writer.add_bool("x.flag", True)
    writer.add_uint64("x.big", 2**63)
    writer.add_int8("x.small", -5)
    writer.add_tensor("a.weight", matrix)
    quantised = gguf.quants.quantize(matrix, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("b.weight", quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = GgufFile.open(path)

    assert (file.version, file.metadata["general.architecture"]) == (3, "llama")
    assert file.metadata["tokenizer.ggml.tokens"] == ["a", "é", "日本", ""]
    assert file.metadata.length("tokenizer.ggml.tokens") == 4
    np.testing.assert_array_equal(file.metadata["tokenizer.ggml.scores"], np.float32([0.5, -1, 2, 0]))
    assert [file.metadata[k] for k in ("x.float", "x.flag", "x.big", "x.small")] == [1.5, True, 2**63, -5]
    a, b = file.tensors["a.weight"], file.tensors["b.weight"]
    assert (a.shape, a.dtype, b.shape, b.dtype) == ((6, 64), "F32", (6, 64), "Q8_0")
    np.testing.assert_array_equal(a.data.view(np.float32).reshape(6, 64), matrix)
    np.testing.assert_array_equal(b.data, quantised.reshape(-1))
    with pytest.raises(ValueError):
        a.data[0] = 1


def test_reads_version_2_and_every_scalar_type() -> None:
    values = {
        U8: 200,
        I8: -3,
        U16: 60_000,
        I16: -9,
        U32: 1 << 31,
        F32: 0.25,
        BOOL: 1,
        U64: 1 << 60,
        I64: -1,
        F64: 0.1,
    }
    entries = [(f"k{kind}", scalar(kind, value)) for kind, value in values.items()]
    file = parse(Gguf([*entries, ("s", scalar(STRING, ""))], version=2).build())
    assert {int(k[1:]): v for k, v in file.metadata.items() if k != "s"} == values
    assert file.metadata["s"] == "" and file.metadata["k7"] is True


def test_strings_are_decoded_only_when_asked_for() -> None:
    bad = "tokenizer.bad"
    file = parse(Gguf([(bad, array(STRING, [b"ok", b"\xff\xfe"]))]).build())  # type: ignore[list-item]
    assert bad in file.metadata and file.metadata.length(bad) == 2
    with pytest.raises(FormatError, match=r"entry 1 of 'tokenizer.bad' is not UTF-8"):
        file.metadata[bad]


BIG = (1 << 64) - 1
LIES: dict[str, tuple[bytes, str]] = {
    "foreign": (b"PK\x03\x04" + b"\0" * 40, "not a GGUF file"),
    "only magic": (b"GGUF", "ends after 0"),
    "version 1": (Gguf(version=1).build(), "GGUF version 1"),
    "big-endian": (b"GGUF\0\0\0\x03" + b"\0" * 16, "big-endian"),
    "no counts": (Gguf().build()[:12], "number of tensors"),
    "tensor count": (Gguf(tensor_count=BIG).build(), f"{BIG} tensors"),
    "tensor count of the size of the file": (Gguf(tensor_count=2).build(), "2 tensors"),
    "more tensors than any model": (Gguf(tensor_count=1 << 18).build() + bytes(64 << 18), "more than"),
    "more metadata than any model": (Gguf(entry_count=1 << 18).build() + bytes(64 << 18), "more than"),
    "entry count": (Gguf(entry_count=1 << 40).build(), "metadata entries"),
    "key length": (
        Gguf(entry_count=1).build()[:24] + struct.pack("<Q", BIG) + b"\0" * 40,
        f"needs {BIG} bytes",
    ),
    "empty key": (Gguf([("", scalar(U8, 1))]).build(), "empty key"),
    "key not UTF-8": (
        Gguf(entry_count=1).build()[:24] + string(b"\xff") + scalar(U8, 1) + b"\0" * 9,
        "not UTF-8",
    ),
    "key twice": (Gguf([("a", scalar(U8, 1)), ("a", scalar(U8, 2))]).build(), "'a' occurs twice"),
    "value type": (Gguf([("a", struct.pack("<I", 13) + b"\0" * 8)]).build(), "value type 13"),
    "boolean of 2": (Gguf([("a", scalar(BOOL, 2))]).build(), "boolean of 2"),
    "array of arrays": (
        Gguf([("a", struct.pack("<IIQ", ARRAY, ARRAY, 1 << 40) + b"\0" * 20)]).build(),
        "arrays in 'a'",
    ),
    "element type": (Gguf([("a", struct.pack("<IIQ", ARRAY, 99, 1) + b"\0" * 20)]).build(), "value type 99"),
    "array count": (Gguf([("a", struct.pack("<IIQ", ARRAY, F64, BIG // 8))]).build(), "entries in 'a'"),
    "string count": (Gguf([("a", struct.pack("<IIQ", ARRAY, STRING, 1 << 61))]).build(), "strings in 'a'"),
    "string in an array": (
        Gguf([("a", struct.pack("<IIQQ", ARRAY, STRING, 2, BIG) + b"\0" * 32)]).build(),
        "a string of 'a'",
    ),
    "last string of an array": (
        Gguf([("a", struct.pack("<IIQQ", ARRAY, STRING, 1, 1 << 20))]).build(),
        "strings of 'a'",
    ),
    "string value": (Gguf([("a", struct.pack("<IQ", STRING, 1 << 62))]).build(), f"needs {1 << 62} bytes"),
    "alignment 0": (Gguf([("general.alignment", scalar(U32, 0))]).build(), "power of two"),
    "alignment 48": (Gguf([("general.alignment", scalar(U32, 48))]).build(), "got 48"),
    "alignment text": (Gguf([("general.alignment", scalar(STRING, "32"))]).build(), "got '32'"),
    "huge alignment": (Gguf([("general.alignment", scalar(U32, 1 << 31))]).build(), "power of two"),
    "no dimensions": (Gguf(tensors=[Tensor("t", [], 0, b"\0" * 64)]).build(), "0 dimensions"),
    "9 dimensions": (Gguf(tensors=[Tensor("t", [1] * 9, 0, b"\0" * 64)]).build(), "9 dimensions"),
    "empty tensor": (Gguf(tensors=[Tensor("t", [4, 0], 0, b"\0" * 32)]).build(), r"shape is \[0, 4\]"),
    "overflowing dimensions": (
        Gguf(tensors=[Tensor("t", [1 << 32, 1 << 32], 0, b"\0" * 32)]).build(),
        "truncated or its header is wrong",
    ),
    "ragged blocks": (Gguf(tensors=[Tensor("t", [33], 8, b"\0" * 68)]).build(), "blocks of 32 do not divide"),
    "known foreign type": (
        Gguf(tensors=[Tensor("t", [256], 28, b"\0" * 66)]).build(),
        r"type 28 \(F64\)",
    ),
    "unknown type": (Gguf(tensors=[Tensor("t", [32], 1000, b"\0" * 66)]).build(), r"type 1000 \(unknown\)"),
    "misaligned": (Gguf(tensors=[Tensor("t", [2], 0, b"\0" * 32, offset=4)]).build(), "starts at 4"),
    "offset": (
        Gguf(tensors=[Tensor("t", [2], 0, b"\0" * 8, offset=BIG - 31)]).build(),
        "the data, which has",
    ),
    "tensor twice": (Gguf(tensors=[floats("t", 2), floats("t", 2)]).build(), "'t' occurs twice"),
    "overlap": (
        Gguf(tensors=[floats("a", 16), Tensor("b", [2], 0, b"", offset=32)]).build(),
        "'a' and 'b' overlap",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_an_error_that_says_so(lie: str) -> None:
    data, message = LIES[lie]
    with pytest.raises(FormatError, match=message):
        parse(data)


def test_an_unsupported_type_lists_the_supported_ones() -> None:
    with pytest.raises(FormatError) as caught:
        parse(LIES["unknown type"][0])
    assert all(kind.name in (caught.value.hint or "") for kind in TYPES_BY_ID.values())


def test_every_truncation_is_an_error() -> None:
    data = smallest_model().build()
    whole = parse(data)
    last = max(t.data.ctypes.data + len(t.data) for t in whole.tensors.values())
    used = last - np.frombuffer(data, np.uint8).ctypes.data  # padding behind the last tensor is not needed
    for length in range(used):
        with pytest.raises(FormatError):
            parse(data[:length])
    parse(data[:used])


def test_empty_missing_and_folder(tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(FormatError, match="0 bytes"):
        GgufFile.open(tmp_path / "empty.gguf")
    with pytest.raises(ModelError, match="no file"):
        GgufFile.open(tmp_path / "missing.gguf")
    with pytest.raises(ModelError, match="is a folder"):
        GgufFile.open(tmp_path)


@pytest.mark.parametrize(
    ("number", "hint"), [(31, "in Q4_0,"), (33, "in Q4_0,"), (36, "in IQ4_NL,"), (40, "requantise the model")]
)
def test_a_type_that_is_not_read_is_told_what_to_take(number: int, hint: str) -> None:
    with pytest.raises(FormatError, match=f"has type {number} ") as caught:
        parse(Gguf(tensors=[Tensor("t", [32], number, b"\0" * 32)]).build())
    assert hint in (caught.value.hint or "")
