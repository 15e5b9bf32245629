"""Packing against its NumPy twin, to the byte."""

from __future__ import annotations

import numpy as np
import pytest
import twins
from twins import Format

from hasten import _native

FORMATS = [Format(16)] + [
    Format(b, g, s) for b in (8, 6, 5, 4) for g in (16, 32, 64, 128) for s in (True, False)
]


def raw(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.uint8).ravel()


def native_pack(
    values: np.ndarray, fmt: Format, dtype: str = "F32", **options: object
) -> tuple[np.ndarray, tuple[float, float]]:
    rows, cols = values.shape
    out = np.full(_native.packed_bytes(rows, cols, fmt.bits, fmt.group, fmt.symmetric), 0xA5, np.uint8)
    loss = _native.pack(raw(values), dtype, rows, cols, fmt.bits, fmt.group, fmt.symmetric, out, **options)
    return out, loss


def native_unpack(data: np.ndarray, shape: tuple[int, int], fmt: Format) -> np.ndarray:
    return _native.unpack(data, *shape, fmt.bits, fmt.group, fmt.symmetric)


def weights(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    """Weights with outliers, a zero row, a constant row and a row no fp16 scale is fit for."""
    rng = np.random.default_rng(seed)
    w = (rng.standard_normal((rows, cols)) * 0.05).astype(np.float32)
    w[:, :: max(1, cols // 7)] *= 6
    w[0] = 0
    if rows > 3:
        w[1] = 0.1
        w[2] *= 1e-6
        w[3] *= 1e-12
    return w


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(1, 32), (16, 96), (37, 40), (19, 896)])
def test_bytes_equal_the_twin(fmt: Format, shape: tuple[int, int]) -> None:
    w = weights(*shape)
    packed, (squared_error, squares) = native_pack(w, fmt)
    np.testing.assert_array_equal(packed, twins.pack(w, fmt))
    back = native_unpack(packed, shape, fmt)
    np.testing.assert_array_equal(back, twins.unpack(w, fmt))
    error = ((back.astype(np.float64) - w) ** 2).sum()
    assert squared_error == pytest.approx(error, rel=1e-4, abs=1e-12)
    assert squares == pytest.approx((w.astype(np.float64) ** 2).sum(), rel=1e-5)


@pytest.mark.parametrize("bits, most", [(16, 3e-6), (8, 4e-5), (6, 4e-4), (5, 1.7e-3), (4, 7e-3)])
def test_error_of_gaussian_weights(bits: int, most: float) -> None:
    w = np.random.default_rng(1).standard_normal((64, 512)).astype(np.float32)
    _, (squared_error, squares) = native_pack(w, Format(bits))
    assert squared_error / squares < most


def test_search_beats_the_plain_scale() -> None:
    w = np.random.default_rng(2).standard_normal((64, 512)).astype(np.float32)
    _, (squared_error, _) = native_pack(w, Format(4))
    groups = w.reshape(-1, 32)
    scale = np.abs(groups).max(1, keepdims=True) / 7
    plain = ((groups - scale * np.clip(np.rint(groups / scale), -8, 7)) ** 2).sum()
    assert squared_error < 0.75 * plain


@pytest.mark.parametrize(
    "fmt", [Format(16), Format(8), Format(6, 64), Format(5), Format(4, 32, False)], ids=str
)
@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_half_sources_equal_their_float_values(fmt: Format, dtype: str) -> None:
    w = weights(21, 96)
    half = w.astype(np.float16) if dtype == "F16" else twins.to_bf16(w)
    floats = half.astype(np.float32) if dtype == "F16" else twins.from_bf16(half)
    np.testing.assert_array_equal(native_pack(half, fmt, dtype)[0], native_pack(floats, fmt)[0])


def test_bf16_source_is_exact_in_bf16() -> None:
    half = twins.to_bf16(weights(17, 70))
    packed, (squared_error, _) = native_pack(half, Format(16), "BF16")
    assert squared_error == 0
    np.testing.assert_array_equal(native_unpack(packed, (17, 70), Format(16)), twins.from_bf16(half))


@pytest.mark.parametrize("fmt", [Format(16), Format(8), Format(4)], ids=str)
def test_row_order_and_offset(fmt: Format) -> None:
    w = weights(40, 64)
    order = np.random.default_rng(3).permutation(40)
    packed, _ = native_pack(w, fmt, row_order=order, offset=1.0)
    np.testing.assert_array_equal(packed, native_pack(w[order] + np.float32(1), fmt)[0])


def test_threads_do_not_change_anything() -> None:
    w = weights(300, 160)
    one = native_pack(w, Format(4), threads=1)
    four = native_pack(w, Format(4), threads=4)
    np.testing.assert_array_equal(one[0], four[0])
    assert one[1] == four[1]


@pytest.mark.parametrize("fmt", FORMATS[:1] + FORMATS[3::8] + [Format(6, 16)], ids=str)
def test_single_rows(fmt: Format) -> None:
    w = weights(37, 96)
    packed, _ = native_pack(w, fmt)
    whole = native_unpack(packed, (37, 96), fmt)
    ids = np.array([36, 0, 17, 17, 15], np.int32)
    rows = _native.unpack_rows(packed, 37, 96, fmt.bits, fmt.group, fmt.symmetric, ids)
    np.testing.assert_array_equal(rows, whole[ids])
    with pytest.raises(ValueError, match="row 37"):
        _native.unpack_rows(packed, 37, 96, fmt.bits, fmt.group, fmt.symmetric, np.array([37], np.int32))


def test_read_only_input() -> None:
    w = raw(weights(16, 32))
    w.flags.writeable = False
    out = np.zeros(_native.packed_bytes(16, 32, 4), np.uint8)
    _native.pack(w, "F32", 16, 32, 4, 32, True, out)
    out.flags.writeable = False
    assert _native.unpack(out, 16, 32, 4, 32, True).shape == (16, 32)


@pytest.mark.parametrize(
    "bad, word", [(np.nan, "NaN"), (np.inf, "infinite"), (-np.inf, "infinite"), (3e38, "larger")]
)
@pytest.mark.parametrize("fmt", [Format(8), Format(4), Format(4, 32, False)], ids=str)
def test_values_that_cannot_be_packed_are_named(bad: float, word: str, fmt: Format) -> None:
    w = weights(50, 96)
    w[33, 71] = w[33, 80] = w[49, 0] = bad
    with pytest.raises(_native.PackError, match=rf"row 33, column 71 is .*{word}"):
        native_pack(w, fmt)


def test_large_values_that_fit() -> None:
    w = np.full((16, 32), 65000.0, np.float32)
    w[:, ::2] *= -7
    for fmt in (Format(8), Format(6), Format(4)):
        back = native_unpack(native_pack(w, fmt)[0], w.shape, fmt)
        np.testing.assert_allclose(back, w, atol=65504 / 2)
    assert np.isfinite(native_unpack(native_pack(w * 1e30, Format(16))[0], w.shape, Format(16))).all()


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 17},
        {"cols": 64},
        {"bits": 7},
        {"group": 48},
        {"dtype": "Q9_9"},
        {"out": np.zeros(3, np.uint8)},
    ],
    ids=str,
)
def test_sizes_are_checked(change: dict[str, object]) -> None:
    arguments: dict[str, object] = {"weights": raw(weights(16, 32)), "dtype": "F32", "rows": 16, "cols": 32}
    arguments |= {
        "bits": 4,
        "group": 32,
        "symmetric": True,
        "out": np.zeros(_native.packed_bytes(16, 32, 4), np.uint8),
    }
    _native.pack(**arguments)
    with pytest.raises(ValueError):
        _native.pack(**(arguments | change))


def test_row_order_out_of_range() -> None:
    with pytest.raises(ValueError, match="row_order"):
        native_pack(weights(16, 32), Format(8), row_order=np.arange(16) + 1)
