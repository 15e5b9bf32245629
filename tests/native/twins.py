"""NumPy twins of the native helpers: slow and short, from the descriptions of layout and methods alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hasten.weights import codec
from hasten.weights.codec import encode

PANEL = 16


@dataclass(frozen=True)
class Format:
    """As `PackedFormat` of native/layout.h."""

    bits: int
    group: int = 32
    symmetric: bool = True

    @property
    def zero(self) -> int:
        return 1 << (self.bits - 1) if self.symmetric else 0

    def padded_cols(self, cols: int) -> int:
        multiple = 32 if self.bits == 16 else max(self.group, 32)
        return -(-cols // multiple) * multiple


def pad(matrix: np.ndarray, rows: int, cols: int) -> np.ndarray:
    return np.pad(matrix, ((0, rows - matrix.shape[0]), (0, cols - matrix.shape[1])))


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16, ties to even; finite values only."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def lay_out(u: np.ndarray, scale: np.ndarray, minimum: np.ndarray | None, fmt: Format) -> np.ndarray:
    """Bytes of layout.h from u [rows, cols] (both padded), fp16 scale and minimum [rows, groups]."""
    parts: list[bytes] = []
    for top in range(0, u.shape[0], PANEL):
        for block in range(u.shape[1] // fmt.group):
            q = u[top : top + PANEL, block * fmt.group : (block + 1) * fmt.group].astype(
                np.uint8
            )  # [16, group]
            parts.extend(_planes(q, fmt))
            parts.append(scale[top : top + PANEL, block].astype(np.float16).tobytes())
            if minimum is not None:
                parts.append(minimum[top : top + PANEL, block].astype(np.float16).tobytes())
    return np.frombuffer(b"".join(parts), np.uint8)


def _planes(q: np.ndarray, fmt: Format) -> list[bytes]:
    if fmt.bits == 8:
        return [q[:, i : i + 4].tobytes() for i in range(0, fmt.group, 4)]
    low = q & 15
    planes = [(low[:, j : j + 4] | low[:, j + 4 : j + 8] << 4).tobytes() for j in range(0, fmt.group, 8)]
    if fmt.bits == 5:
        for i in range(0, fmt.group, 4):
            bits = (q[:, i : i + 4] >> 4).ravel()  # bit row*4+t
            planes.append(np.packbits(bits, bitorder="little").tobytes())
    if fmt.bits == 6:
        for c in range(0, fmt.group, 16):
            steps = (q[:, c : c + 16] >> 4).reshape(PANEL, 4, 4)  # [row, step, t]
            planes.append(
                (steps << np.array([0, 2, 4, 6], np.uint8)[:, None]).sum(1).astype(np.uint8).tobytes()
            )
    return planes


def lay_out_bf16(values: np.ndarray) -> np.ndarray:
    """Bytes of layout.h for bits 16; values [rows, cols] unpadded."""
    rows, cols = values.shape
    padded = to_bf16(pad(values, -(-rows // PANEL) * PANEL, Format(16).padded_cols(cols)))
    panels = padded.reshape(-1, PANEL, padded.shape[1] // 2, 2)
    return np.ascontiguousarray(panels.transpose(0, 2, 1, 3)).view(np.uint8).ravel()


def quantise(values: np.ndarray, fmt: Format) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """u [rows, cols] padded, fp16 scale and minimum [rows, groups], from float32 [rows, cols]."""
    rows, cols = values.shape
    padded_rows, padded_cols = -(-rows // PANEL) * PANEL, fmt.padded_cols(cols)
    found = encode(pad(values, padded_rows, cols), codec.Format.of(fmt.bits, fmt.group, fmt.symmetric))
    u = np.pad(found.codes, ((0, 0), (0, padded_cols - cols)), constant_values=fmt.zero)
    groups = padded_cols // fmt.group
    minimums = None if found.minimums is None else pad(found.minimums, padded_rows, groups)
    return u, pad(found.scales, padded_rows, groups), minimums


def pack(values: np.ndarray, fmt: Format) -> np.ndarray:
    if fmt.bits == 16:
        return lay_out_bf16(values)
    return lay_out(*quantise(values, fmt), fmt)


def unpack(values: np.ndarray, fmt: Format) -> np.ndarray:
    """What the packed form of `values` is worth, float32 of the same shape."""
    if fmt.bits == 16:
        return from_bf16(to_bf16(values))
    u, scale, minimum = quantise(values, fmt)
    steps = (u.astype(np.float32) - fmt.zero).reshape(u.shape[0], -1, fmt.group)
    x = scale.astype(np.float32)[..., None] * steps
    if minimum is not None:
        x = x + minimum.astype(np.float32)[..., None]
    return x.reshape(u.shape)[: values.shape[0], : values.shape[1]]
