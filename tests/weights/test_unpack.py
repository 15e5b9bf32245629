"""Integers out of packed matrices mean what the native unpacker says."""

from __future__ import annotations

import numpy as np
import pytest

from hasten.core import Format
from hasten.weights.packed import bf16_bits, integers, row_pieces
from tiny_artifacts import packed, values_of

LAYOUTS = [Format.of(b, g, s) for b in (8, 6, 5, 4) for g in (16, 32, 64, 128) for s in (True, False)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", [(37, 256), (16, 128), (5, 12)])
def test_every_layout(layout: Format, shape: tuple[int, int]) -> None:
    linear = packed(layout, *shape)
    found = integers(linear)
    assert found.codes.max() < 1 << layout.bits
    np.testing.assert_allclose(found.values(), values_of(linear), rtol=0, atol=1e-6)
    if layout.symmetric:  # a product of 11 and 7 bits: exact
        np.testing.assert_array_equal(found.values(), values_of(linear))


def test_bf16() -> None:
    linear = packed(Format.of(16), 21, 34)
    values = (bf16_bits(linear).astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(values, values_of(linear))


def test_pieces_are_the_whole() -> None:
    linear = packed(Format.of(5), 70, 64)
    pieces = row_pieces(linear, 64 * 20)
    assert len(pieces) > 2
    whole = integers(linear)
    for name in ("codes", "scales"):
        parts = [getattr(integers(linear, *piece), name) for piece in pieces]
        np.testing.assert_array_equal(np.concatenate(parts), getattr(whole, name))
