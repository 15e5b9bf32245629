"""Packed matrices back to what is stored in them: integers, scales and minimums, row by row.

The inverse of native/block.h in NumPy, for writers of other formats; `native/pack.h` gives float values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hasten.compress.pack import PackedLinear
from hasten.core import Layout

PANEL = 16
"""Rows that lie together in the packed layout."""

Bytes = npt.NDArray[np.uint8]
Halves = npt.NDArray[np.float16]


@dataclass(frozen=True)
class Integers:
    """Rows of an integer matrix: value = scale * (u - 2^(bits-1)), or scale * u + minimum."""

    layout: Layout
    u: Bytes  # [rows, cols], below 2^bits
    scales: Halves  # [rows, groups]
    minimums: Halves | None  # [rows, groups]

    @property
    def signed(self) -> npt.NDArray[np.int8]:
        """u - 2^(bits-1), int8 [rows, cols]; for symmetric layouts."""
        assert self.minimums is None
        return (self.u.astype(np.int16) - (1 << (self.layout.bits - 1))).astype(np.int8)

    def values(self) -> npt.NDArray[np.float32]:
        """What they mean, float32 [rows, cols]."""
        cols, group = self.u.shape[1], self.layout.group
        scales = np.repeat(self.scales.astype(np.float32), group, axis=1)[:, :cols]
        if self.minimums is None:
            return scales * self.signed.astype(np.float32)
        minimums = np.repeat(self.minimums.astype(np.float32), group, axis=1)[:, :cols]
        return scales * self.u.astype(np.float32) + minimums


def integers(linear: PackedLinear, first: int = 0, count: int | None = None) -> Integers:
    """The integers of some rows of a matrix.

    Args:
        linear: of 8 bits or fewer.
        first: a multiple of 16.
        count: rows; None takes all that follow.

    Costs about six times the rows' unpacked bytes while it works.
    """
    layout = linear.layout
    assert layout.bits != 16 and first % PANEL == 0
    rows = linear.rows - first if count is None else min(count, linear.rows - first)
    group, quants = layout.group, layout.group * (8 if layout.bits == 8 else layout.bits) // 8 * PANEL
    block = quants + 2 * PANEL * (1 if layout.symmetric else 2)
    blocks = _panels(linear, first, rows).reshape(-1, _padded(linear) // group, block)
    u = _unpacked(blocks[..., :quants], layout)  # [panels, blocks, group, 16]
    flat = u.transpose(0, 3, 1, 2).reshape(len(blocks) * PANEL, -1)[:rows, : linear.cols]
    groups = -(-linear.cols // group)

    def halves(at: int) -> Halves:
        found = np.ascontiguousarray(blocks[..., at : at + 2 * PANEL]).view(np.float16)
        return np.ascontiguousarray(found.transpose(0, 2, 1).reshape(-1, found.shape[1])[:rows, :groups])

    minimums = None if layout.symmetric else halves(quants + 2 * PANEL)
    return Integers(layout, np.ascontiguousarray(flat), halves(quants), minimums)


def bf16_bits(linear: PackedLinear, first: int = 0, count: int | None = None) -> npt.NDArray[np.uint16]:
    """Some rows of a bf16 matrix as bits, uint16 [rows, cols]; `first` as in `integers`."""
    assert linear.layout.bits == 16 and first % PANEL == 0
    rows = linear.rows - first if count is None else min(count, linear.rows - first)
    pairs = _panels(linear, first, rows).view(np.uint16).reshape(-1, _padded(linear) // 2, PANEL, 2)
    flat = pairs.transpose(0, 2, 1, 3).reshape(len(pairs) * PANEL, -1)
    return np.ascontiguousarray(flat[:rows, : linear.cols])


def row_pieces(linear: PackedLinear, weights: int = 1 << 22) -> list[tuple[int, int]]:
    """(first, count) of rows that cover a matrix, each of about `weights` weights."""
    step = max(1, weights // (linear.cols * PANEL)) * PANEL
    return [(first, min(step, linear.rows - first)) for first in range(0, linear.rows, step)]


def _padded(linear: PackedLinear) -> int:
    multiple = 32 if linear.layout.bits == 16 else max(32, linear.layout.group)
    return -(-linear.cols // multiple) * multiple


def _panels(linear: PackedLinear, first: int, rows: int) -> Bytes:
    panel_bytes = linear.data.size // -(-linear.rows // PANEL)
    return linear.data[first // PANEL * panel_bytes : -(-(first + rows) // PANEL) * panel_bytes]


def _unpacked(data: Bytes, layout: Layout) -> Bytes:
    """[panels, blocks, bytes] -> u [panels, blocks, group, 16]."""
    bits, group = layout.bits, layout.group
    lead = data.shape[:2]
    if bits == 8:
        return data.reshape(*lead, group // 4, PANEL, 4).swapaxes(-1, -2).reshape(*lead, group, PANEL)
    plane = data[..., : 8 * group].reshape(*lead, group // 8, 1, PANEL, 4)
    u = np.concatenate([plane & 15, plane >> 4], axis=3)  # [.., group / 8, 2, 16, 4]
    u = u.swapaxes(-1, -2).reshape(*lead, group, PANEL)
    rest = data[..., 8 * group :]
    if bits == 5:
        high = np.unpackbits(rest.reshape(*lead, group // 4, 8), axis=-1, bitorder="little")
        u |= high.reshape(*lead, group // 4, PANEL, 4).swapaxes(-1, -2).reshape(*lead, group, PANEL) << 4
    if bits == 6:
        packed = rest.reshape(*lead, group // 16, 1, PANEL, 4)
        shifts = np.arange(0, 8, 2, dtype=np.uint8).reshape(4, 1, 1)
        pairs = ((packed >> shifts) & 3).swapaxes(-1, -2)  # [.., group / 16, 4, 4, 16]
        u |= pairs.reshape(*lead, group, PANEL) << 4
    return u
