"""GGUF block formats against the `gguf` package, and what repacking keeps of them."""

from __future__ import annotations

import numpy as np
import pytest
import twins
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from twins import Format

from hasten import _native

SPREAD = ["IQ1_M", "MXFP4"]  # a scale in pieces, and one that is a power of two in a byte
QUANTISED = [
    *("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"),
    *("IQ3_XXS", "IQ3_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_S", "TQ1_0", "TQ2_0", *SPREAD),
]
FLOATS = ["F32", "F16", "BF16"]
EXACT = {"BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "TQ1_0", "TQ2_0"}
SCALE_AT = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
    "Q4_1": (0, 2),
    "Q5_1": (0, 2),
}


def random_blocks(
    name: str, rows: int, cols: int, *, largest: float | None = 0.02, seed: int = 0
) -> np.ndarray:
    """Random bytes [rows, bytes]; fp16 scales within +-largest, or any bits at all for None."""
    values, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (rows * cols // values, size), dtype=np.uint8)
    if largest is not None:
        if name in FLOATS:
            w = (rng.standard_normal((rows, cols)) * 0.05).astype(np.float32)
            data = {"F32": w, "F16": w.astype(np.float16), "BF16": twins.to_bf16(w)}[name]
            return data.view(np.uint8).reshape(rows, -1)
        if name == "MXFP4":
            blocks[:, 0] = rng.integers(110, 124, len(blocks))
        if name == "IQ1_M":
            d = rng.uniform(-largest, largest, len(blocks)).astype(np.float16).view(np.uint16)
            for i in range(4):  # a nibble in the highest of each of four numbers of 16 bits
                blocks[:, 49 + 2 * i] = blocks[:, 49 + 2 * i] & 15 | (d >> 4 * i & 15) << 4
        for at in () if name in SPREAD else SCALE_AT.get(name, (0,)):
            scales = (rng.uniform(-largest, largest, (len(blocks), 1))).astype(np.float16)
            blocks[:, at : at + 2] = scales.view(np.uint8)
    return blocks.reshape(rows, -1)


def reference(name: str, data: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return quants.dequantize(data, GGMLQuantizationType[name]).astype(np.float32)


def repack(
    name: str, data: np.ndarray, cols: int, **options: object
) -> tuple[np.ndarray, Format, tuple[float, float]]:
    bits, group, symmetric, _ = _native.ggml_layout(name)
    out = np.full(_native.packed_bytes(len(data), cols, bits, group, symmetric), 0xA5, np.uint8)
    loss = _native.pack_ggml(data.ravel(), name, len(data), cols, out, **options)
    return out, Format(bits, group, symmetric), loss


@pytest.mark.parametrize("name", QUANTISED + FLOATS)
@pytest.mark.parametrize("largest", [0.02, None], ids=["sane", "any bits"])
def test_dequantize_to_the_bit(name: str, largest: float | None) -> None:
    data = random_blocks(name, 7, 512, largest=largest)
    values = _native.dequantize_ggml(data.ravel(), name, 7 * 512)
    np.testing.assert_array_equal(values, reference(name, data).ravel())


@pytest.mark.parametrize("name", ["Q8_0", "Q6_K", "BF16"])
def test_dequantize_over_many_pieces(name: str) -> None:
    data = random_blocks(name, 700, 256)
    values = _native.dequantize_ggml(data.ravel(), name, 700 * 256, threads=3)
    np.testing.assert_array_equal(values, reference(name, data).ravel())


@pytest.mark.parametrize("name", QUANTISED + FLOATS)
@pytest.mark.parametrize("rows, cols", [(16, 256), (37, 768), (1, 256)])
def test_repacked_values(name: str, rows: int, cols: int) -> None:
    data = random_blocks(name, rows, cols)
    packed, fmt, (max_error, relative) = repack(name, data, cols)
    values = _native.unpack(packed, rows, cols, fmt.bits, fmt.group, fmt.symmetric)
    wanted = reference(name, data)
    assert _native.ggml_layout(name)[3] == (name in EXACT)
    if name in EXACT:
        np.testing.assert_array_equal(values, wanted)
        assert (max_error, relative) == (0, 0)
        return
    error = values.astype(np.float64) - wanted
    assert max_error == pytest.approx(np.abs(error).max(), rel=1e-3)
    assert relative == pytest.approx(
        np.sqrt((error**2).sum() / (wanted.astype(np.float64) ** 2).sum()), rel=1e-3
    )
    assert (relative > 0 or name == "MXFP4") and relative < (2e-3 if name != "F32" else 3e-3)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q5_0", "IQ4_NL"])
@pytest.mark.parametrize("cols", [32, 96, 896])
def test_repacked_bytes_equal_the_layout(name: str, cols: int) -> None:
    data = random_blocks(name, 21, cols)
    packed, fmt, _ = repack(name, data, cols)
    scale = np.ascontiguousarray(data.reshape(21, cols // 32, -1)[..., :2]).view(np.float16)[..., 0]
    step = np.where(scale == 0, 1, scale).astype(np.float32)[..., None]
    q = np.rint(reference(name, data).reshape(21, -1, 32) / step).reshape(21, cols)
    u = twins.pad(q, 32, cols) + fmt.zero
    np.testing.assert_array_equal(packed, twins.lay_out(u, twins.pad(scale, 32, cols // 32), None, fmt))


@pytest.mark.parametrize("name", ["Q4_0", "Q6_K", "Q4_K", "F16"])
def test_row_order(name: str) -> None:
    data = random_blocks(name, 40, 256)
    order = np.random.default_rng(5).permutation(40)
    packed, _, _ = repack(name, data, 256, row_order=order)
    np.testing.assert_array_equal(packed, repack(name, np.ascontiguousarray(data[order]), 256)[0])


def test_q8_0_keeps_its_lowest_value() -> None:
    data = random_blocks("Q8_0", 16, 32)
    data[3, 2:] = 0x80
    packed, fmt, _ = repack("Q8_0", data, 32)
    values = _native.unpack(packed, 16, 32, fmt.bits, fmt.group, fmt.symmetric)
    np.testing.assert_array_equal(values, reference("Q8_0", data))


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q8_0"])
def test_subnormal_scales_are_kept(name: str) -> None:
    data = random_blocks(name, 16, 64, largest=4e-5)
    packed, fmt, _ = repack(name, data, 64)
    values = _native.unpack(packed, 16, 64, fmt.bits, fmt.group, fmt.symmetric)
    np.testing.assert_array_equal(values, reference(name, data))


@pytest.mark.parametrize("name", [name for name in QUANTISED if name not in SPREAD])
@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7E00], ids=["inf", "-inf", "nan"])
def test_scales_that_are_not_finite_are_named(name: str, bits: int) -> None:
    data = random_blocks(name, 20, 512)
    _, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    at = size + SCALE_AT.get(name, (0,))[-1]
    data[18, at : at + 2] = np.array([bits], np.uint16).view(np.uint8)
    with pytest.raises(_native.PackError, match="block 1 of row 18"):
        repack(name, data, 512)


@pytest.mark.parametrize("name", ["Q3_K", "Q4_K", "Q6_K"])
def test_products_beyond_fp16_are_an_error(name: str) -> None:
    data = np.full_like(random_blocks(name, 16, 256), 0x3F)
    for at in SCALE_AT[name]:
        data[:, at : at + 2] = np.array([60000], np.float16).view(np.uint8)
    with pytest.raises(_native.PackError, match="too large"):
        repack(name, data, 256)


@pytest.mark.parametrize("name", ["Q5_0", "Q6_K"])
def test_quantising_a_gguf_tensor_again(name: str) -> None:
    """`pack` reads every dtype: the same bytes as from the dequantised floats."""
    data = random_blocks(name, 20, 256)
    size = _native.packed_bytes(20, 256, 4)
    direct, by_float = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
    _native.pack(data.ravel(), name, 20, 256, 4, 32, True, direct)
    _native.pack(reference(name, data).view(np.uint8).ravel(), "F32", 20, 256, 4, 32, True, by_float)
    np.testing.assert_array_equal(direct, by_float)


def test_sizes_are_checked() -> None:
    data = random_blocks("Q4_0", 4, 64).ravel()
    with pytest.raises(ValueError, match="unknown dtype"):
        _native.dequantize_ggml(data, "Q9_9", 256)
    with pytest.raises(ValueError, match="multiple of 32"):
        _native.dequantize_ggml(data, "Q4_0", 250)
    with pytest.raises(ValueError, match="bytes"):
        _native.dequantize_ggml(data[:-1], "Q4_0", 256)
    with pytest.raises(ValueError, match="multiple of 256"):
        _native.pack_ggml(data, "Q6_K", 4, 64, np.zeros(10, np.uint8))
