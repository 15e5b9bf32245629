"""Every format encoded and decoded in NumPy: the plain twin of the native packer, and the only one of tables.

Slow and short. The native packer (native/pack.cpp) must give the same codes and scales, bit for bit.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hasten.weights import Format
from hasten.weights.tensors import Bytes

Floats = npt.NDArray[np.float32]
_VANISHING = 2.0**-26  # a group of integers below this is stored as zeros
_ROWS = 64  # of a table format that are encoded at once
_REBIAS = (127 - 7) << 3  # of an exponent above three bits of fraction: float32's zero and e4m3's
_LEAST_NORMAL = (127 - 6) << 23  # bits of 2^-6
_SCALE_TYPES: dict[str, np.dtype[Any]] = {
    "fp16": np.dtype("<f2"),
    "fp32": np.dtype("<f4"),
    "e8m0": np.dtype("u1"),
}


@dataclass(frozen=True)
class Encoded:
    """Rows of a matrix in a format: a code a weight, and the numbers that blocks of weights share."""

    layout: Format
    codes: npt.NDArray[Any]  # [rows, cols], uint8; uint16 for bf16
    scales: npt.NDArray[Any]  # [blocks down, blocks along]; fp16, fp32, or uint8 exponents; empty for bf16
    minimums: npt.NDArray[np.float16] | None = None  # as scales, where the format has them

    @property
    def signed(self) -> npt.NDArray[np.int8]:
        """code - 2^(bits-1), int8 [rows, cols]; for symmetric integers."""
        assert self.layout.is_integer and self.minimums is None
        return (self.codes.astype(np.int16) - (1 << (self.layout.bits - 1))).astype(np.int8)

    def values(self) -> Floats:
        """What they mean: float32 [rows, cols]."""
        kind, (rows, cols) = self.layout, self.codes.shape
        if kind.bits == 16:
            floats: Floats = (self.codes.astype(np.uint32) << 16).view(np.float32)
            return floats
        values: Floats
        if kind.table:
            values = np.array(kind.table, np.float32)[self.codes]
        else:
            values = self.codes.astype(np.float32)
            values -= np.float32(1 << (kind.bits - 1) if kind.symmetric else 0)
        values *= _spread(_scale_values(self.scales, kind), kind, rows, cols)
        if self.minimums is not None:
            values += _spread(self.minimums.astype(np.float32), kind, rows, cols)
        return values


def encode(values: Floats, kind: Format, threads: int | None = None) -> Encoded:
    """Round a matrix to a format, each value to the nearest; finite values only.

    Args:
        values: float32 [rows, cols].
        kind: the format. Integers of 4, 5, 6 bits look for the scale that leaves the least squared error.
        threads: that encode a table format; None: one.
    """
    if kind.bits == 16:
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
        codes = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return Encoded(kind, codes, np.zeros((len(values), 0), np.float16))
    if kind.table:
        return _encode_table(np.ascontiguousarray(values, np.float32), kind, threads)
    cols = values.shape[1]
    padded = -(-cols // kind.group) * kind.group
    x = np.pad(np.asarray(values, np.float32), ((0, 0), (0, padded - cols)))
    x = x.reshape(len(x), -1, kind.group)
    return _encode_symmetric(x, cols, kind) if kind.symmetric else _encode_asymmetric(x, cols, kind)


def to_bytes(found: Encoded) -> Bytes:
    """A table format in an artifact: codes row by row, two of 4 bits a byte, low first; then the scales."""
    codes: npt.NDArray[Any] = found.codes.astype(np.uint8)
    if found.layout.bits == 4:
        codes = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
        codes = codes[:, ::2] | codes[:, 1::2] << 4
    assert found.layout.table
    return np.concatenate([codes.reshape(-1), np.ascontiguousarray(found.scales).reshape(-1).view(np.uint8)])


def from_bytes(data: Bytes, kind: Format, rows: int, cols: int) -> Encoded:
    """The inverse of `to_bytes`."""
    row_bytes = -(-cols * kind.bits // 8)
    codes: npt.NDArray[Any] = data[: rows * row_bytes].reshape(rows, row_bytes)
    if kind.bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(rows, -1)[:, :cols]
    scales = data[rows * row_bytes :].copy().view(_SCALE_TYPES[kind.scale]).reshape(kind.blocks(rows, cols))
    return Encoded(kind, codes, scales)


def scale_to_half(scale: Floats) -> npt.NDArray[np.float16]:
    """fp16 of a scale. A subnormal is rounded up: rounded down it would clip the group's largest weight."""
    magnitude = np.minimum(np.abs(scale), np.float32(65504))
    small = (np.ceil(magnitude * 2.0**24) * 2.0**-24).astype(np.float16)
    near = np.where(magnitude < 2.0**-14, small, magnitude.astype(np.float16))
    return np.asarray(np.copysign(near, scale) + np.float16(0), np.float16)


def search_scale(x: Floats, bits: int) -> Floats:
    """The scale of each group that leaves the least squared error among twelve, as native/pack.cpp finds it.

    Args:
        x: [..., group], summed in the native order.
        bits: of the integers.
    """
    n = 1 << (bits - 1)
    peak = np.take_along_axis(x, np.abs(x).argmax(-1)[..., None], -1)[..., 0]
    unit = np.where(np.abs(peak) < _VANISHING, np.float32(0), _reciprocal(peak))
    best, best_gain = np.zeros_like(peak), np.zeros_like(peak)
    for landing in _candidates(bits):
        xq, qq = np.zeros_like(peak), np.zeros_like(peak)
        for j in range(x.shape[-1]):
            q = np.clip(np.rint(x[..., j] * (unit * landing)), -n, n - 1).astype(np.float32)
            xq += x[..., j] * q
            qq += q * q
        scale = xq * _reciprocal(qq)
        gain = scale * xq
        best = np.where(gain > best_gain, scale, best)
        best_gain = np.maximum(gain, best_gain)
    return np.asarray(best, np.float32)


def _encode_symmetric(x: Floats, cols: int, kind: Format) -> Encoded:
    n = 1 << (kind.bits - 1)
    if kind.bits == 8:
        peak = np.abs(x).max(-1)
        scale = np.where(peak < _VANISHING, np.float32(0), peak / np.float32(127))
    else:
        scale = search_scale(x, kind.bits)
    half = scale_to_half(scale)
    steps = np.rint(x * _reciprocal(half.astype(np.float32))[..., None])
    q = np.clip(steps, -127 if kind.bits == 8 else -n, n - 1)
    return Encoded(kind, (q + n).astype(np.uint8).reshape(len(x), -1)[:, :cols], half)


def _encode_asymmetric(x: Floats, cols: int, kind: Format) -> Encoded:
    levels = np.float32((1 << kind.bits) - 1)
    valid = (np.arange(x.shape[1] * kind.group) < cols).reshape(x.shape[1:])
    low = np.where(valid, x, np.inf).min(-1).astype(np.float32)
    high = np.where(valid, x, -np.inf).max(-1).astype(np.float32)
    minimums = low.astype(np.float16)
    least = minimums.astype(np.float32)
    span = np.maximum(high - least, np.float32(0))
    half = scale_to_half(np.where(span < _VANISHING, np.float32(0), span / levels))
    steps = np.rint((x - least[..., None]) * _reciprocal(half.astype(np.float32))[..., None])
    codes = np.clip(steps, 0, levels).astype(np.uint8)
    return Encoded(kind, codes.reshape(len(x), -1)[:, :cols], half, minimums)


def _encode_table(values: Floats, kind: Format, threads: int | None) -> Encoded:
    rows, cols = values.shape
    table = np.array(kind.table, np.float32)
    largest = float(np.nanmax(table))
    peaks = _block_peaks(np.abs(values), kind)
    if kind.scale == "e8m0":  # the peak's power of two, less the largest element's (MX 1.0, section 6.3)
        exponent = np.frexp(np.maximum(peaks, np.float32(2.0**-126)))[1] - math.frexp(largest)[1]
        scales = np.clip(exponent + 127, 0, 254).astype(np.uint8)
    else:
        scales = np.where(peaks > 0, peaks / np.float32(largest), np.float32(1)).astype(np.float32)
    order = np.argsort(table, kind="stable")[: int(np.isfinite(table).sum())]  # numbers before NaN
    order = order[np.append(True, np.diff(table[order]) > 0)]  # one of the two zeros
    codes = np.empty((rows, cols), np.uint8)
    spread = _spread(_scale_values(scales, kind), kind, rows, cols)

    def some(first: int) -> None:
        scaled = values[first : first + _ROWS] / spread[first : first + _ROWS]
        is_e4m3 = kind.name.startswith("fp8-e4m3")
        found = e4m3_codes(scaled) if is_e4m3 else order[_nearest(scaled, table[order], order)]
        codes[first : first + _ROWS] = found

    with ThreadPoolExecutor(threads or 1) as pool:  # NumPy lets others run while it computes
        list(pool.map(some, range(0, rows, _ROWS)))
    return Encoded(kind, codes, scales)


def e4m3_codes(values: Floats) -> npt.NDArray[np.uint8]:
    """The nearest e4m3 code of each value up to 448 in magnitude, a tie to the even code; 0 for -0 too.

    Faster than a search in the table: the bits of a float are rounded to three of its fraction, and
    its exponent counts from another zero. Below 2^-6 codes are multiples of 2^-9.
    """
    bits = values.view(np.uint32)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    small = np.rint(np.minimum(np.abs(values), np.float32(2.0**-6)) * np.float32(2.0**9)).astype(np.uint32)
    rounded = magnitude + np.uint32(0x7FFFF) + ((magnitude >> np.uint32(20)) & np.uint32(1))
    codes = np.minimum((rounded >> np.uint32(20)) - np.uint32(_REBIAS), np.uint32(0x7E))
    codes = np.where(magnitude < np.uint32(_LEAST_NORMAL), small, codes)
    codes |= np.where(codes > 0, (bits >> np.uint32(24)) & np.uint32(0x80), np.uint32(0))
    return codes.astype(np.uint8)


def _nearest(values: Floats, numbers: Floats, codes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Where in sorted `numbers` the nearest of each value is; a tie goes to the even code (IEEE 754)."""
    above = np.clip(np.searchsorted(numbers, values), 1, len(numbers) - 1)
    low, high = values - numbers[above - 1], numbers[above] - values
    is_up = (high < low) | ((high == low) & (codes[above] % 2 == 0))
    return np.asarray(np.where(is_up, above, above - 1), np.int64)


def _block_peaks(magnitudes: Floats, kind: Format) -> Floats:
    """The largest of each block: [blocks down, blocks along]."""
    rows, cols = magnitudes.shape
    down, along = kind.blocks(rows, cols)
    high, wide = kind.rows or rows, kind.group or cols
    padded = np.pad(magnitudes, ((0, down * high - rows), (0, along * wide - cols)))
    return np.asarray(padded.reshape(down, high, along, wide).max(axis=(1, 3)), np.float32)


def _scale_values(scales: npt.NDArray[Any], kind: Format) -> Floats:
    if kind.scale == "e8m0":  # 255 is NaN
        return np.where(scales == 255, np.nan, 2.0 ** (scales.astype(np.float64) - 127)).astype(np.float32)
    return scales.astype(np.float32)


def _spread(numbers: Floats, kind: Format, rows: int, cols: int) -> Floats:
    """A number a block to a number a weight: [rows, cols], or [rows, 1] where all inputs share it."""
    down = np.repeat(numbers, kind.rows or rows, axis=0)[:rows]
    return np.repeat(down, kind.group, axis=1)[:, :cols] if kind.group else down


def _reciprocal(values: Floats) -> Floats:
    return np.where(values == 0, np.float32(0), np.float32(1) / np.where(values == 0, np.float32(1), values))


def _candidates(bits: int) -> list[np.float32]:
    """Where the largest magnitude of a group may land, in steps."""
    n = np.float32(1 << (bits - 1))
    below = [-(n - np.float32(0.9) + np.float32(0.36) * np.float32(i)) for i in range(6)]
    return below + [n - np.float32(1.7) + np.float32(0.32) * np.float32(i) for i in range(6)]
