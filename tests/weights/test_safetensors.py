"""The safetensors reader and sharded checkpoints: against the safetensors package, and every lie."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from hasten.errors import FormatError, ModelError
from hasten.models.open import INDEX, open_checkpoint
from hasten.weights.tensors import open_safetensors, parse_safetensors


def raw(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(shape: Any, first: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, end]}


def test_reads_what_the_safetensors_package_writes(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    arrays = {
        "a": rng.standard_normal((3, 5)).astype(np.float32),
        "b": rng.standard_normal(7).astype(np.float16),
    }
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "pt"})
    tensors = open_safetensors(tmp_path / "x.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in tensors.items()} == {"a": ((3, 5), "F32"), "b": ((7,), "F16")}
    for name, values in arrays.items():
        np.testing.assert_array_equal(tensors[name].data, values.reshape(-1).view(np.uint8))


def test_reads_bf16_and_an_empty_file_of_no_tensors() -> None:
    data = raw({"__metadata__": {}, "t": entry([2], 0, 4, "BF16")}, b"\x80\x3f\x00\x40")
    assert parse_safetensors(memoryview(data), "x")["t"].dtype == "BF16"
    assert parse_safetensors(memoryview(raw({})), "x") == {}


LIES: dict[str, tuple[bytes, str]] = {
    "too short": (b"\0" * 9, "has 9 bytes"),
    "foreign": (b"PK\x03\x04" + b"\0" * 40, "not a safetensors file"),
    "a GGUF file": (b"GGUF\x03\0\0\0" + b"\0" * 40, "a GGUF file"),
    "header length": (raw({}, length=1 << 63), "its header would be"),
    "header past the end": (raw({}, length=3), "its header would be 3 bytes"),
    "no brace": (raw(b"[1, 2, 3]  "), "start with b'\\['"),
    "not JSON": (raw(b'{"a": }   '), "is no JSON"),
    "not UTF-8": (raw(b'{"\xff": 1}  '), "is no JSON"),
    "nested to death": (raw(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), "is no JSON"),
    "huge number": (raw(b'{"a": ' + b"9" * 5000 + b"}"), "is no JSON"),
    "more tensors than any model": (
        raw(b"{" + b",".join(b'"%d":{"data_offsets":[0,0]}' % i for i in range(140_000)) + b"}"),
        "140,000 tensors, more than",
    ),
    "name twice": (raw(b'{"a": 1, "b": 2, "a": 3}'), "names 'a' twice"),
    "entry no object": (raw({"a": 3}), "is no object"),
    "no type": (raw({"a": {"shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4), "type None"),
    "type": (raw({"a": entry([1], 0, 8, "I64")}, b"\0" * 8), "type 'I64', which is not supported"),
    "type of another type": (raw({"a": entry([1], 0, 8, ["F32"])}, b"\0" * 8), "not supported"),
    "shape no list": (raw({"a": entry(4, 0, 16)}, b"\0" * 16), "has the shape 4"),
    "negative shape": (raw({"a": entry([-1], 0, 4)}, b"\0" * 4), r"has the shape \[-1\]"),
    "fractional shape": (raw({"a": entry([1.0], 0, 4)}, b"\0" * 4), r"has the shape \[1.0\]"),
    "boolean shape": (raw({"a": entry([True], 0, 4)}, b"\0" * 4), r"has the shape \[True\]"),
    "overflowing shape": (raw({"a": entry([1 << 40, 1 << 40], 0, 4)}, b"\0" * 4), "takes"),
    "one offset": (
        raw({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, b"\0" * 4),
        "data offsets",
    ),
    "negative offset": (raw({"a": entry([1], -4, 0)}, b"\0" * 4), "data offsets"),
    "backwards": (raw({"a": entry([1], 4, 0)}, b"\0" * 4), "takes 4 bytes"),
    "wrong size": (raw({"a": entry([3], 0, 8)}, b"\0" * 8), "takes 12 bytes"),
    "past the end": (raw({"a": entry([4], 0, 16)}, b"\0" * 12), "the file has 12"),
    "overlap": (raw({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"\0" * 12), "'a' and 'b' overlap"),
    "hole": (raw({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"\0" * 12), "leave 4 bytes between"),
    "hole at the start": (raw({"a": entry([1], 4, 8)}, b"\0" * 8), "leave 4 bytes"),
    "bytes behind": (raw({"a": entry([1], 0, 4)}, b"\0" * 8), "'the end of the file' leave 4"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_an_error_that_says_so(lie: str) -> None:
    data, message = LIES[lie]
    with pytest.raises(FormatError, match=message):
        parse_safetensors(memoryview(data), "test.safetensors")


def test_every_truncation_is_an_error() -> None:
    data = raw({"a": entry([2, 3], 0, 24), "b": entry([2], 24, 32)}, bytes(range(32)))
    for length in range(len(data)):
        with pytest.raises(FormatError):
            parse_safetensors(memoryview(data[:length]), "test.safetensors")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "one.safetensors")
    save_file({"b": np.ones(2, np.float32)}, tmp_path / "two.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    return tmp_path


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards_are_joined(shards: Path) -> None:
    checkpoint = open_checkpoint(shards)
    assert sorted(checkpoint.tensors) == ["a", "b"]
    assert [file.name for file in checkpoint.files] == ["one.safetensors", "two.safetensors"]


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}, "'c' is not in two"),
        ({"a": "one.safetensors", "b": "one.safetensors"}, "'b' is not in one"),
        ({"a": "two.safetensors", "b": "two.safetensors"}, "'a' is not in two"),
        ({"a": "one.safetensors", "b": "../two.safetensors"}, "no name of a file beside it"),
        ({"a": "one.safetensors", "b": "gone.safetensors"}, "no file"),
        ({"a": 3}, "must map tensor names"),
        ([], "must map tensor names"),
    ],
)
def test_an_index_that_lies_is_an_error(shards: Path, weight_map: Any, message: str) -> None:
    write_index(shards, weight_map)
    with pytest.raises(ModelError, match=message):
        open_checkpoint(shards)


def test_tensors_that_the_index_gives_to_another_file_are_left_out(
    shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = {name: bytes(tensor.data) for name, tensor in open_checkpoint(shards).tensors.items()}
    stray = {"b": np.ones(2, np.float32), "a": np.full(2, 7.0, np.float32), "c": np.ones(2, np.float32)}
    save_file(stray, shards / "two.safetensors")
    found = open_checkpoint(shards).tensors
    assert found.keys() == before.keys() and bytes(found["a"].data) == before["a"]
    assert "the index does not name 2 tensors (a in two.safetensors, c in two.safetensors)" in caplog.text


def test_folders_without_one_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no \.safetensors file"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match=r"only pytorch_model\.bin"):
        open_checkpoint(tmp_path)
    for name in ("a", "b"):
        save_file({name: np.zeros(1, np.float32)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ModelError, match=r"2 \.safetensors files and no"):
        open_checkpoint(tmp_path)
