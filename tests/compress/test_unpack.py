"""Integers out of packed matrices mean what the native unpacker says."""

from __future__ import annotations

import numpy as np
import pytest

from hasten import _native
from hasten.compress.pack import PackedLinear, packed_bytes
from hasten.compress.unpack import bf16_bits, integers, row_pieces
from hasten.core import Layout

LAYOUTS = [Layout(b, g, s) for b in (8, 6, 5, 4) for g in (16, 32, 64, 128) for s in (True, False)]


def packed(layout: Layout, rows: int, cols: int, seed: int = 1) -> PackedLinear:
    values = np.random.default_rng(seed).normal(size=(rows, cols)).astype(np.float32)
    data = np.zeros(packed_bytes(rows, cols, layout), np.uint8)
    stored = (layout.bits, layout.group, layout.symmetric)
    _native.pack(values.view(np.uint8).reshape(-1), "F32", rows, cols, *stored, data)
    return PackedLinear(layout, rows, cols, data)


def native_values(linear: PackedLinear) -> np.ndarray:
    layout = linear.layout
    stored = (layout.bits, layout.group, layout.symmetric)
    return _native.unpack(linear.data, linear.rows, linear.cols, *stored)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", [(37, 256), (16, 128), (5, 12)])
def test_every_layout(layout: Layout, shape: tuple[int, int]) -> None:
    linear = packed(layout, *shape)
    found = integers(linear)
    assert found.u.max() < 1 << layout.bits
    np.testing.assert_allclose(found.values(), native_values(linear), rtol=0, atol=1e-6)
    if layout.symmetric:  # a product of 11 and 7 bits: exact
        np.testing.assert_array_equal(found.values(), native_values(linear))


def test_bf16() -> None:
    linear = packed(Layout(16), 21, 34)
    values = (bf16_bits(linear).astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(values, native_values(linear))


def test_pieces_are_the_whole() -> None:
    linear = packed(Layout(5), 70, 64)
    pieces = row_pieces(linear, 64 * 20)
    assert len(pieces) > 2
    whole = integers(linear)
    for name in ("u", "scales"):
        parts = [getattr(integers(linear, *piece), name) for piece in pieces]
        np.testing.assert_array_equal(np.concatenate(parts), getattr(whole, name))
