"""Our own block types, which carry the integers of quantised folders into the packed layouts."""

from __future__ import annotations

import numpy as np
import pytest

from ggml_blocks import dequantize
from hasten import _native
from hasten.weights.tensors import TYPES, SourceTensor

OWN = [f"{kind}{bits}_{group}" for kind in "SA" for bits in (4, 5, 6, 8) for group in (32, 64, 128)]
ROWS, COLS = 37, 256


def random_tensor(name: str, scale_bits: int = 11) -> SourceTensor:
    """Every integer there is, scales of so many significant bits."""
    bits, group = int(name[1]), TYPES[name].block
    rng = np.random.default_rng(list(name.encode()))
    shape = ROWS, COLS // group, 1 if name[0] == "S" else 2
    numbers = (rng.choice([-1, 1], shape) * rng.uniform(0.002, 0.02, shape)).astype(np.float32)
    mask = np.uint32(0xFFFFFFFF) << np.uint32(24 - scale_bits)
    numbers = (numbers.view(np.uint32) & mask).view(np.float32)
    u = rng.integers(0, 1 << bits, (ROWS, COLS // group, group), dtype=np.uint8)
    u[0, 0, :2] = 0, (1 << bits) - 1
    data = np.concatenate([numbers.view(np.uint8), u], axis=2).reshape(-1)
    return SourceTensor(name, (ROWS, COLS), name, data)


def packed(tensor: SourceTensor, **options: object) -> tuple[np.ndarray, np.ndarray, tuple[float, float]]:
    bits, group, symmetric, _ = _native.ggml_layout(tensor.dtype)
    out = np.full(_native.packed_bytes(ROWS, COLS, bits, group, symmetric), 0xA5, np.uint8)
    loss = _native.pack_ggml(tensor.data, tensor.dtype, ROWS, COLS, out, **options)  # type: ignore[arg-type]
    return out, _native.unpack(out, ROWS, COLS, bits, group, symmetric), loss


@pytest.mark.parametrize("name", OWN)
def test_numpy_and_native_read_the_same(name: str) -> None:
    tensor = random_tensor(name)
    values = _native.dequantize_ggml(tensor.data, name, ROWS * COLS)
    np.testing.assert_array_equal(values.reshape(ROWS, COLS), dequantize(tensor))


@pytest.mark.parametrize("name", OWN)
def test_what_fp16_holds_is_packed_exactly(name: str) -> None:
    tensor = random_tensor(name)
    assert _native.ggml_layout(name) == (int(name[1]), TYPES[name].block, name[0] == "S", False)
    out, values, loss = packed(tensor)
    np.testing.assert_array_equal(values, dequantize(tensor))
    assert loss == (0, 0)
    order = np.random.default_rng(1).permutation(ROWS)
    np.testing.assert_array_equal(packed(tensor, row_order=order)[1], values[order])
    np.testing.assert_array_equal(packed(tensor, threads=3)[0], out)


@pytest.mark.parametrize("name", OWN)
def test_what_it_rounds_is_measured(name: str) -> None:
    tensor = random_tensor(name, scale_bits=24)
    _, values, (largest, relative) = packed(tensor)
    wanted = dequantize(tensor).astype(np.float64)
    assert largest == pytest.approx(np.abs(values - wanted).max(), rel=1e-3)
    assert relative == pytest.approx(np.sqrt(np.sum((values - wanted) ** 2) / np.sum(wanted**2)), rel=1e-3)


def test_a_block_that_fp16_cannot_hold_is_named() -> None:
    tensor = random_tensor("A4_64")
    tensor.data.reshape(ROWS, 4, -1)[20, 3, 4:8] = np.float32([1e6]).view(np.uint8)
    with pytest.raises(_native.PackError, match="block 3 of row 20"):
        packed(tensor)
