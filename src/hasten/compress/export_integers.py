"""Which integer type of a graph format carries a layout, and a matrix's rows in it.

4 bits go as i4 or u4, 5, 6 and 8 as i8 or u8, bf16 as bf16: every value is kept. A symmetric layout is signed
and has no zero point; one with a minimum is unsigned, and its minimum stays a number of its own, because no
integer zero point gives it: x (s u + m) = x (s u) + (sums of x by group) m.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hasten.core import Format
from hasten.weights.packed import PackedLinear, bf16_bits, integers, row_pieces

Halves = npt.NDArray[np.float16]


def carrier(layout: Format) -> str:
    """i4, u4, i8, u8 or bf16."""
    if layout.bits == 16:
        return "bf16"
    return ("i" if layout.symmetric else "u") + ("4" if layout.bits == 4 else "8")


def group_of(linear: PackedLinear) -> int:
    """Inputs that share a scale; a matrix of fewer inputs than its layout's group has one."""
    return min(linear.layout.group, linear.cols)


@dataclass(frozen=True)
class Parameters:
    """fp16 [rows, groups] of a matrix: scales, and minimums where the layout has them."""

    scales: Halves
    minimums: Halves | None


def parameters(linear: PackedLinear) -> Parameters:
    """Scales and minimums of a whole matrix of integers."""
    found = [integers(linear, first, count) for first, count in row_pieces(linear)]
    minimums = [one.minimums for one in found if one.minimums is not None]
    return Parameters(
        np.concatenate([one.scales for one in found]), np.concatenate(minimums) if minimums else None
    )


def quants(linear: PackedLinear) -> Iterator[tuple[slice, npt.NDArray[np.generic]]]:
    """(rows, values) of a matrix, some rows at a time: int8, uint8 or bf16's bits, [rows, cols]."""
    for first, count in row_pieces(linear):
        rows = slice(first, first + count)
        if linear.layout.bits == 16:
            yield rows, bf16_bits(linear, first, count)
        else:
            found = integers(linear, first, count)
            yield rows, found.signed if linear.layout.symmetric else found.codes


def pairs(values: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    """4-bit values, two a byte, the first lowest; an odd one out has a zero beside it. uint8, flat."""
    u = np.ascontiguousarray(values).reshape(-1).view(np.uint8) & np.uint8(15)
    if len(u) % 2:
        u = np.append(u, np.uint8(0))
    return np.asarray(u[::2] | (u[1::2] << np.uint8(4)), np.uint8)


def widened(linears: Mapping[str, PackedLinear], stored: Mapping[str, str]) -> tuple[int, int]:
    """(matrices, bytes more) where integers go to a wider type than their own bits."""
    wide = [
        linears[name] for name, kind in stored.items() if kind[1:] == "8" and linears[name].layout.bits < 8
    ]
    return len(wide), sum(x.rows * x.cols * (8 - x.layout.bits) // 8 for x in wide)
