"""NumPy twins of the native helpers: slow and short, from the descriptions of layout and methods alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

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


def scale_to_half(scale: np.ndarray) -> np.ndarray:
    """fp16, subnormal magnitudes rounded up so that they never clip the largest weight."""
    magnitude = np.minimum(np.abs(scale), np.float32(65504))
    small = (np.ceil(magnitude * 2.0**24) * 2.0**-24).astype(np.float16)
    return np.copysign(
        np.where(magnitude < 2.0**-14, small, magnitude.astype(np.float16)), scale
    ) + np.float16(0)


def reciprocal(values: np.ndarray) -> np.ndarray:
    return np.where(values == 0, np.float32(0), np.float32(1) / np.where(values == 0, np.float32(1), values))


def candidates(bits: int) -> list[np.float32]:
    """Where the largest magnitude of a group may land, in steps."""
    n = np.float32(1 << (bits - 1))
    below = [-(n - np.float32(0.9) + np.float32(0.36) * np.float32(i)) for i in range(6)]
    above = [n - np.float32(1.7) + np.float32(0.32) * np.float32(i) for i in range(6)]
    return below + above


def search_scale(x: np.ndarray, bits: int) -> np.ndarray:
    """Best scale of each group by least squares; x float32 [..., group], summed in the native order."""
    n = 1 << (bits - 1)
    peak = np.take_along_axis(x, np.abs(x).argmax(-1)[..., None], -1)[..., 0]
    unit = np.where(np.abs(peak) < 2.0**-26, np.float32(0), reciprocal(peak))
    best = np.zeros_like(peak)
    best_gain = np.zeros_like(peak)
    for c in candidates(bits):
        xq = np.zeros_like(peak)
        qq = np.zeros_like(peak)
        for j in range(x.shape[-1]):
            q = np.clip(np.rint(x[..., j] * (unit * c)), -n, n - 1).astype(np.float32)
            xq += x[..., j] * q
            qq += q * q
        scale = xq * reciprocal(qq)
        gain = scale * xq
        best = np.where(gain > best_gain, scale, best)
        best_gain = np.maximum(gain, best_gain)
    return best


def quantise(values: np.ndarray, fmt: Format) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """u [rows, cols] padded, fp16 scale and minimum [rows, groups], from float32 [rows, cols]."""
    rows, cols = values.shape
    x = pad(values, -(-rows // PANEL) * PANEL, fmt.padded_cols(cols))
    x = x.reshape(x.shape[0], -1, fmt.group)
    valid = (np.arange(x.shape[1] * fmt.group) < cols).reshape(x.shape[1:])
    if not fmt.symmetric:
        return _quantise_asymmetric(x, valid, fmt)
    n = 1 << (fmt.bits - 1)
    if fmt.bits == 8:
        peak = np.abs(x).max(-1)
        scale = np.where(peak < 2.0**-26, np.float32(0), peak / np.float32(127))
    else:
        scale = search_scale(x, fmt.bits)
    half = scale_to_half(scale)
    steps = np.rint(x * reciprocal(half.astype(np.float32))[..., None])
    q = np.clip(steps, -127 if fmt.bits == 8 else -n, n - 1)
    return (q + n).reshape(x.shape[0], -1).astype(np.uint8), half, None


def _quantise_asymmetric(
    x: np.ndarray, valid: np.ndarray, fmt: Format
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    levels = (1 << fmt.bits) - 1
    used = valid.any(-1)
    low = np.where(used, np.where(valid, x, np.inf).min(-1), 0).astype(np.float32)
    high = np.where(used, np.where(valid, x, -np.inf).max(-1), 0).astype(np.float32)
    minimum = low.astype(np.float16)
    m = minimum.astype(np.float32)
    span = np.maximum(high - m, np.float32(0))
    half = scale_to_half(np.where(span < 2.0**-26, np.float32(0), span / np.float32(levels)))
    u = np.clip(np.rint((x - m[..., None]) * reciprocal(half.astype(np.float32))[..., None]), 0, levels)
    return np.where(valid, u, 0).reshape(x.shape[0], -1).astype(np.uint8), half, minimum


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
