"""What stored blocks mean, in NumPy: the plain twin of the native unpacker.

Source: ggml's block structures and dequantize_row functions (ggml/src/ggml-common.h, ggml-quants.c). Each
function takes blocks as uint8 [n, block_bytes] and gives float32 [n, block]. Quants are unsigned in memory; a
plane of n-bit fields is unpacked with `_fields`, lowest bits first.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from hasten.errors import ModelError
from hasten.weights.tensors import TYPES, SourceTensor

Blocks = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

_IQ4_NL = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32
)
_CHUNK_BLOCKS = 1 << 16  # keeps intermediates in tens of MB


def dequantize(tensor: SourceTensor) -> Floats:
    """A tensor's values: float32 of its shape, rows in the tensor's order, its offset added.

    Costs four bytes a value, and a copy where rows are reordered.
    """
    kind = TYPES[tensor.dtype]
    blocks = tensor.data.reshape(-1, kind.block_bytes)
    values = np.empty((len(blocks), kind.block), dtype=np.float32)
    unpack = _UNPACK.get(tensor.dtype) or (_gguf if kind.ggml_id >= 0 else _own)(tensor.dtype)
    for first in range(0, len(blocks), _CHUNK_BLOCKS):
        values[first : first + _CHUNK_BLOCKS] = unpack(blocks[first : first + _CHUNK_BLOCKS])
    shaped = values.reshape(tensor.shape)
    if tensor.row_order is not None:
        shaped = shaped[tensor.row_order]
    if tensor.offset:
        shaped += np.float32(tensor.offset)
    return shaped


def _gguf(dtype: str) -> Callable[[Blocks], Floats]:
    """The gguf package's own, for types whose grids nobody writes twice."""
    import gguf

    def unpack(blocks: Blocks) -> Floats:
        with np.errstate(all="ignore"):
            found: Floats = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[dtype])
        return found

    return unpack


def _half(blocks: Blocks, at: int) -> Floats:
    """The fp16 at byte `at` of each block, [n, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _fields(plane: Blocks, bits: int) -> Blocks:
    """Unpack [..., m] bytes to [..., 8 / bits, m]: all lowest fields first, then all next ones."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return (plane[..., None, :] >> shifts) & np.uint8((1 << bits) - 1)


def _nibbles(blocks: Blocks, at: int) -> Floats:
    """16 bytes at `at` as 32 values: low nibbles, then high ones."""
    return _fields(blocks[:, at : at + 16], 4).reshape(-1, 32).astype(np.float32)


def _fifth_bits(blocks: Blocks, at: int) -> Floats:
    """The 32 bits at `at`, one a value, as 0 or 16."""
    return np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little").astype(np.float32) * 16


def _f32(blocks: Blocks) -> Floats:
    return np.ascontiguousarray(blocks).view(np.float32)


def _f16(blocks: Blocks) -> Floats:
    return np.ascontiguousarray(blocks).view("<f2").astype(np.float32)


def _bf16(blocks: Blocks) -> Floats:
    return (np.ascontiguousarray(blocks).view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)


def _q8_0(blocks: Blocks) -> Floats:
    """d[fp16] q[32 x int8]: d q."""
    return _half(blocks, 0) * blocks[:, 2:].view(np.int8)


def _q4_0(blocks: Blocks) -> Floats:
    """d q[32 x 4 bits]: d (q - 8)."""
    return _half(blocks, 0) * (_nibbles(blocks, 2) - 8)


def _q4_1(blocks: Blocks) -> Floats:
    """d m q[32 x 4 bits]: d q + m."""
    return _half(blocks, 0) * _nibbles(blocks, 4) + _half(blocks, 2)


def _q5_0(blocks: Blocks) -> Floats:
    """d high[32 bits] q[32 x 4 bits]: d (q + 16 high - 16)."""
    return _half(blocks, 0) * (_nibbles(blocks, 6) + _fifth_bits(blocks, 2) - 16)


def _q5_1(blocks: Blocks) -> Floats:
    """d m high[32 bits] q[32 x 4 bits]: d (q + 16 high) + m."""
    return _half(blocks, 0) * (_nibbles(blocks, 8) + _fifth_bits(blocks, 4)) + _half(blocks, 2)


def _iq4_nl(blocks: Blocks) -> Floats:
    """d q[32 x 4 bits]: d table[q], a table of 16 unevenly spaced values."""
    return _half(blocks, 0) * _IQ4_NL[_fields(blocks[:, 2:18], 4).reshape(-1, 32)].astype(np.float32)


def _q2_k(blocks: Blocks) -> Floats:
    """scales[16: 4 bits scale, 4 bits minimum] q[256 x 2 bits] d dmin: d s q - dmin m in groups of 16."""
    scales = blocks[:, :16]
    quants = _fields(blocks[:, 16:80].reshape(-1, 2, 32), 2).reshape(-1, 16, 16)  # [n, 2, 4, 32]
    scale = _half(blocks, 80) * (scales & 15).astype(np.float32)
    minimum = _half(blocks, 82) * (scales >> 4).astype(np.float32)
    return (scale[..., None] * quants - minimum[..., None]).reshape(-1, 256)


def _q3_k(blocks: Blocks) -> Floats:
    """high[256 bits] q[256 x 2 bits] scales[16 x 6 bits] d: d (s - 32) (q + 4 high - 4) in groups of 16."""
    high = _fields(blocks[:, :32], 1).reshape(-1, 16, 16)  # bit j of byte i belongs to value 32 j + i
    quants = _fields(blocks[:, 32:96].reshape(-1, 2, 32), 2).reshape(-1, 16, 16)
    low = _fields(blocks[:, 96:104], 4).reshape(-1, 16)
    top = _fields(blocks[:, 104:108], 2).reshape(-1, 16)
    scale = _half(blocks, 108) * ((low | top << 4).astype(np.float32) - 32)
    values = (quants | high << 2).astype(np.float32) - 4
    return (scale[..., None] * values).reshape(-1, 256)


def _scales_and_minimums(packed: Blocks) -> tuple[Blocks, Blocks]:
    """The 12 bytes of Q4_K and Q5_K: eight scales and eight minimums of 6 bits, each uint8 [n, 8]."""
    first, second, mixed = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([first & 63, mixed & 15 | first >> 6 << 4], axis=1)
    minimums = np.concatenate([second & 63, mixed >> 4 | second >> 6 << 4], axis=1)
    return scales, minimums


def _with_minimums(blocks: Blocks, quants: Blocks) -> Floats:
    """d s q - dmin m in groups of 32, quants [n, 8, 32]; d, dmin and scales as Q4_K and Q5_K have them."""
    scales, minimums = _scales_and_minimums(blocks[:, 4:16])
    scale = _half(blocks, 0) * scales
    minimum = _half(blocks, 2) * minimums
    return (scale[..., None] * quants - minimum[..., None]).reshape(-1, 256)


def _q4_k(blocks: Blocks) -> Floats:
    """d dmin scales[12] q[256 x 4 bits]."""
    return _with_minimums(blocks, _fields(blocks[:, 16:144].reshape(-1, 4, 32), 4).reshape(-1, 8, 32))


def _q5_k(blocks: Blocks) -> Floats:
    """d dmin scales[12] high[256 bits] q[256 x 4 bits]."""
    high = _fields(blocks[:, 16:48], 1)  # [n, 8, 32]
    low = _fields(blocks[:, 48:176].reshape(-1, 4, 32), 4).reshape(-1, 8, 32)
    return _with_minimums(blocks, low | high << np.uint8(4))


def _q6_k(blocks: Blocks) -> Floats:
    """q[256 x 4 bits] high[256 x 2 bits] scales[16 x int8] d: d s (q + 16 high - 32) in groups of 16."""
    low = _fields(blocks[:, :128].reshape(-1, 2, 64), 4).reshape(-1, 16, 16)
    high = _fields(blocks[:, 128:192].reshape(-1, 2, 32), 2).reshape(-1, 16, 16)
    scale = _half(blocks, 208) * blocks[:, 192:208].view(np.int8)
    values = (low | high << np.uint8(4)).astype(np.float32) - 32
    return (scale[..., None] * values).reshape(-1, 256)


def _own(dtype: str) -> Callable[[Blocks], Floats]:
    """S and A: scale[fp32], in A minimum[fp32], u[group x uint8] (see tensor_type.py)."""
    middle = np.float32(1 << (int(dtype[1]) - 1))

    def symmetric(blocks: Blocks) -> Floats:
        return _f32(blocks[:, :4]) * (blocks[:, 4:].astype(np.float32) - middle)

    def asymmetric(blocks: Blocks) -> Floats:
        return _f32(blocks[:, :4]) * blocks[:, 8:].astype(np.float32) + _f32(blocks[:, 4:8])

    return symmetric if dtype[0] == "S" else asymmetric


_UNPACK: dict[str, Callable[[Blocks], Floats]] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
}
TWINS = tuple(_UNPACK)
"""GGUF types that are written out here."""


_SCALES: dict[str, tuple[int, ...]] = {  # where a block's fp16 numbers are; its integers are always finite
    "Q8_0": (0,),
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
}


def check_finite(tensor: SourceTensor) -> None:
    """Refuse a tensor with an infinity or a NaN.

    Reads every value of a float tensor, only the scales of a quantised one.

    Raises:
        ModelError: there is one; the tensor and the first place are named.
    """
    bad = _not_finite(tensor)
    if not bad.any():
        return
    at = int(np.argmax(bad)) * TYPES[tensor.dtype].block
    row, column = divmod(at, int(np.prod(tensor.shape[1:], dtype=np.int64)))
    if tensor.row_order is not None:
        row = int(np.flatnonzero(tensor.row_order == row)[0])
    raise ModelError(
        f"tensor {tensor.name!r} is not finite: {int(bad.sum())} infinities or NaNs, the first in row {row}, "
        f"column {column}",
        hint="the checkpoint is damaged or its training diverged: get it again from its source",
    )


def _not_finite(tensor: SourceTensor) -> npt.NDArray[np.bool_]:
    """One flag a value of a float tensor, one a block of a quantised one."""
    data = np.ascontiguousarray(tensor.data)
    if tensor.dtype == "F32":
        flags = ~np.isfinite(data.view("<f4"))
        return np.asarray(flags, np.bool_)
    if tensor.dtype in ("F16", "BF16"):
        exponent = np.uint16(0x7C00 if tensor.dtype == "F16" else 0x7F80)  # all ones: infinity or NaN
        return np.asarray((data.view("<u2") & exponent) == exponent, np.bool_)
    blocks = data.reshape(-1, TYPES[tensor.dtype].block_bytes)
    if tensor.dtype not in _SCALES:  # our own: fp32 in front of the integers
        numbers = np.ascontiguousarray(blocks[:, : 4 if tensor.dtype[0] == "S" else 8]).view("<f4")
        return np.asarray(~np.isfinite(numbers).all(axis=1), np.bool_)
    bad = np.zeros(len(blocks), dtype=np.bool_)
    for at in _SCALES[tensor.dtype]:
        high = blocks[:, at + 1]  # little-endian: sign, exponent and the mantissa's upper bits
        bad |= (high & 0x7C) == 0x7C
    return bad
