"""Packed matrices as blocks of GGUF tensors: which type carries a layout, and its bytes.

Integer layouts keep their integers, scales and minimums:

    4 bits  Q4_0, with a minimum Q4_1      6 and 8 bits  Q8_0 (more bytes for 6 bits, the same values)
    5 bits  Q5_0, with a minimum Q5_1      bf16          BF16

A group of 64 or 128 becomes blocks of 32 that repeat its scale. What no type carries (groups of 16, 6 or 8
bits with a minimum) is rounded to F16, and rows that blocks of 32 do not divide go as F32, exactly.

Source: ggml's block structures and dequantize_row functions (ggml-common.h, ggml-quants.c).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from hasten.core import Format
from hasten.weights.codec import Encoded
from hasten.weights.packed import PackedLinear, bf16_bits, integers
from hasten.weights.tensors import TYPES

BLOCK = 32
Bytes = npt.NDArray[np.uint8]
_BY_BITS = {4: "Q4_0", 5: "Q5_0", 6: "Q8_0", 8: "Q8_0"}
_WITH_MINIMUM = {4: "Q4_1", 5: "Q5_1"}
_BITS = {"Q4_0": 4, "Q5_0": 5, "Q8_0": 8}
_HALF_MAX = 65504.0


def carrier(layouts: Sequence[Format], cols: int) -> str:
    """The smallest GGUF type that carries all of some layouts; several where a tensor is made of several.

    Exact, but for "F16": see `is_exact`.
    """
    if all(layout.bits == 16 for layout in layouts):
        return "BF16"
    if cols % BLOCK:
        return "F32"
    blocked = all(layout.bits != 16 and layout.group % BLOCK == 0 for layout in layouts)
    most = max(layout.bits for layout in layouts)
    if blocked and all(layout.symmetric for layout in layouts):
        return _BY_BITS[most]
    if blocked and not any(layout.symmetric for layout in layouts) and len({x.bits for x in layouts}) == 1:
        return _WITH_MINIMUM.get(most, "F16")
    return "F16"


def is_exact(kind: str) -> bool:
    """Whether a type of `carrier` keeps every value; float ones must be measured."""
    return kind != "F16"


def row_bytes(kind: str, cols: int) -> int:
    """Bytes of one row."""
    return TYPES[kind].bytes_of((1, cols))


def encoded(linear: PackedLinear, kind: str, first: int, count: int) -> tuple[Bytes, float, float]:
    """Rows of a matrix as bytes of a GGUF tensor.

    Args:
        kind: what `carrier` gave.
        first: a multiple of 16.

    Returns:
        (uint8 [rows, row_bytes], squared rounding error, squared values)

    Raises:
        OverflowError: a value does not fit F16.
    """
    if linear.layout.bits == 16:
        bits = bf16_bits(linear, first, count)
        if kind == "BF16":
            return bits.view(np.uint8), 0.0, 0.0
        return _floats((bits.astype(np.uint32) << 16).view(np.float32), kind)
    found = integers(linear, first, count)
    if kind in ("F16", "F32"):
        return _floats(found.values(), kind)
    return (_with_minimum if found.minimums is not None else _symmetric)(found, kind), 0.0, 0.0


def _floats(values: npt.NDArray[np.float32], kind: str) -> tuple[Bytes, float, float]:
    if kind == "F32":
        return np.ascontiguousarray(values).view(np.uint8), 0.0, 0.0
    if np.abs(values).max(initial=0.0) > _HALF_MAX:
        raise OverflowError
    rounded = values.astype(np.float16)
    error = rounded.astype(np.float64) - values
    return rounded.view(np.uint8), float(np.square(error).sum()), float(np.square(values, dtype=float).sum())


def _blocks(found: Encoded, kind: str) -> tuple[Bytes, npt.NDArray[np.int64]]:
    """Empty blocks uint8 [rows, blocks, bytes], and the group that each block lies in."""
    rows, cols = found.codes.shape
    count = cols // BLOCK
    return np.empty((rows, count, TYPES[kind].block_bytes), np.uint8), (
        np.arange(count) * BLOCK // found.layout.group
    )


def _put(blocks: Bytes, at: int, values: npt.NDArray[np.generic]) -> int:
    """Copy values [rows, blocks, n] to bytes `at` on; gives where they end."""
    data = np.ascontiguousarray(values).view(np.uint8)
    blocks[..., at : at + data.shape[-1]] = data
    return at + int(data.shape[-1])


def _symmetric(found: Encoded, kind: str) -> Bytes:
    """d, then d * (u - zero): Q8_0 as int8, Q4_0 and Q5_0 unsigned with zeros of 8 and 16."""
    blocks, group = _blocks(found, kind)
    at = _put(blocks, 0, found.scales[:, group, None])
    quants = found.signed.reshape(*blocks.shape[:2], BLOCK)
    if kind == "Q8_0":
        _put(blocks, at, quants)
    else:
        _put_low(blocks, at, (quants + (1 << (_BITS[kind] - 1))).astype(np.uint8), kind == "Q5_0")
    return blocks.reshape(len(blocks), -1)


def _with_minimum(found: Encoded, kind: str) -> Bytes:
    """d, m, then d * u + m."""
    assert found.minimums is not None
    blocks, group = _blocks(found, kind)
    at = _put(blocks, 0, found.scales[:, group, None])
    at = _put(blocks, at, found.minimums[:, group, None])
    _put_low(blocks, at, found.codes.reshape(*blocks.shape[:2], BLOCK), kind == "Q5_1")
    return blocks.reshape(len(blocks), -1)


def _put_low(blocks: Bytes, at: int, u: Bytes, has_fifth: bool) -> None:
    """The fifth bits as one little-endian word of 32, then nibbles: value j low and value j + 16 high."""
    if has_fifth:
        at = _put(blocks, at, np.packbits(u >> 4, axis=-1, bitorder="little"))
    low = u & 15
    _put(blocks, at, low[..., : BLOCK // 2] | (low[..., BLOCK // 2 :] << 4))
