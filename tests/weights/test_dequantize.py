"""Stored blocks to floats and the search for infinities, against the gguf package."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

import ggml_blocks as blocks
from ggml_blocks import check_finite, dequantize
from hasten.errors import ModelError
from hasten.weights.tensors import TYPES, SourceTensor


def random_tensor(name: str, rows: int = 5, columns: int = 512) -> SourceTensor:
    """Random bytes in every block, with fp16 numbers that are finite."""
    kind = TYPES[name]
    rng = np.random.default_rng(list(name.encode()))
    data = rng.integers(0, 256, (rows, columns // kind.block, kind.block_bytes), dtype=np.uint8)
    if name in ("F32", "F16", "BF16"):
        values = rng.standard_normal((rows, columns)).astype(np.float32)
        packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType[name])
        data = np.ascontiguousarray(packed).view(np.uint8)
    else:
        for at in SCALES[name]:
            scales = rng.standard_normal(data.shape[:2]).astype(np.float16)
            data[..., at : at + 2] = scales[..., None].view(np.uint8)
    return SourceTensor(name, (rows, columns), name, data.reshape(-1))


SCALES = {
    "Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q2_K": [80, 82], "Q3_K": [108],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0],
}  # fmt: skip


def twin(tensor: SourceTensor) -> np.ndarray:
    kind = gguf.GGMLQuantizationType[tensor.dtype]
    if tensor.dtype in ("F32", "F16"):
        return (
            tensor.data.view("<f4" if tensor.dtype == "F32" else "<f2")
            .reshape(tensor.shape)
            .astype(np.float32)
        )
    return gguf.quants.dequantize(tensor.data.reshape(tensor.rows, -1), kind)


@pytest.mark.parametrize("name", blocks.TWINS)
def test_equals_the_gguf_package_bit_for_bit(name: str) -> None:
    tensor = random_tensor(name)
    values = dequantize(tensor)
    assert values.dtype == np.float32 and values.shape == tensor.shape
    np.testing.assert_array_equal(values, twin(tensor))


def test_chunks_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_CHUNK_BLOCKS", 3)
    tensor = random_tensor("Q4_K")
    np.testing.assert_array_equal(dequantize(tensor), twin(tensor))


def test_rows_are_reordered_and_the_offset_added() -> None:
    plain = random_tensor("Q8_0")
    order = np.array([3, 0, 4, 1, 2])
    moved = SourceTensor("t", plain.shape, "Q8_0", plain.data, row_order=order, offset=1.0)
    np.testing.assert_array_equal(dequantize(moved), twin(plain)[order] + np.float32(1))


def test_a_part_is_its_rows() -> None:
    plain = random_tensor("Q6_K")
    part = plain.part("part", 1, 3)
    assert (part.name, part.shape) == ("part", (3, 512))
    np.testing.assert_array_equal(dequantize(part), twin(plain)[1:4])


@pytest.mark.parametrize("name", blocks.TWINS)
def test_finite_passes_and_what_is_not_is_found(name: str) -> None:
    tensor = random_tensor(name)
    check_finite(tensor)
    kind = TYPES[name]
    block = 512 // kind.block * 2 + 512 // kind.block - 1  # the last block of row 2
    places = SCALES.get(name, [0])
    for at in places:
        for bad in (np.inf, -np.inf, np.nan):
            data = tensor.data.copy()
            width = np.float32 if name == "F32" else np.float16
            number = np.frombuffer(width(bad).tobytes(), np.uint8)
            if name == "BF16":
                number = np.frombuffer(np.float32(bad).tobytes()[2:], np.uint8)
            first = block * kind.block_bytes + at
            data[first : first + len(number)] = number
            broken = SourceTensor("layers.0.q", tensor.shape, name, data)
            with pytest.raises(ModelError, match=r"'layers.0.q' is not finite: 1 .* row 2, column"):
                check_finite(broken)


def test_the_row_named_is_the_tensor_s_own() -> None:
    data = np.zeros((4, 2), np.float32)
    data[3, 1] = np.nan
    order = np.array([0, 3, 1, 2])
    with pytest.raises(ModelError, match="row 1, column 1"):
        check_finite(SourceTensor("q", (4, 2), "F32", data.view(np.uint8).reshape(-1), row_order=order))
