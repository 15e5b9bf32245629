"""Roundings against NumPy, and tiles read back as the kernel reads them, lane by lane."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hasten.errors import ModelError
from hasten.runtime.gpu.shape import TileLayout, Tuning, WeightFormat
from hasten.runtime.gpu.tiles import Weights, interleaved, rounded, tiled

FORMATS = [
    WeightFormat("bf16"),
    WeightFormat("fp8"),
    WeightFormat("int8"),
    WeightFormat("int8", 32),
    WeightFormat("int8", 64, minimum=True),
    WeightFormat("int4", 32),
    WeightFormat("int4", 128),
    WeightFormat("int4", 64, minimum=True),
]


def matrix(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 0.1


def lane_words(warp_bytes: np.ndarray, lane: int) -> np.ndarray:
    """A lane's 32-bit words of a stage: 16-byte pieces, then one of 8, then one of 4 (take_stage)."""
    words = warp_bytes.view(np.uint32)
    count = len(words) // 32
    pieces = [words[j * 128 + lane * 4 : j * 128 + lane * 4 + 4] for j in range(count // 4)]
    at = count // 4 * 128
    if count & 2:
        pieces.append(words[at + lane * 2 : at + lane * 2 + 2])
        at += 64
    if count & 1:
        pieces.append(words[at + lane : at + lane + 1])
    return np.concatenate(pieces)


def decoded(words: np.ndarray, kind: str) -> np.ndarray:
    """8 weights of one step, without scale or offset, in the order of their columns (operand)."""
    if kind == "bf16":
        return torch.from_numpy(words.view(np.int16).copy()).view(torch.bfloat16).float().numpy()
    if kind == "fp8":
        return torch.from_numpy(words.view(np.uint8).copy()).view(torch.float8_e4m3fn).float().numpy()
    if kind == "int8":
        return words.view(np.uint8).astype(np.float32)
    nibbles = [(int(words[0]) >> (4 * place)) & 15 for place in range(8)]
    return np.array([nibbles[place] for place in (0, 4, 1, 5, 2, 6, 3, 7)], np.float32)


def read_back(tiles: np.ndarray, layout: TileLayout, offset: int) -> np.ndarray:
    """The padded matrix that the kernel would multiply with, float32."""
    warps, kind = layout.tuning.warps, layout.format.kind
    whole = np.zeros((layout.tiles * 8, warps * layout.steps * 32), np.float32)
    for tile, data in enumerate(tiles):
        at, first = 0, 0
        for steps in layout.stage_steps:
            stage = data[at : at + layout.stage_bytes(steps)]
            at, size = at + layout.stage_bytes(steps), steps * layout.step_words * 128
            units = steps // layout.unit_steps if layout.numbers else 0
            if layout.has_row_scales:
                row_scales = stage[-32:].view(np.float32)
                stage = stage[:-32]
            numbers = stage[warps * size :].view(np.float16).astype(np.float32)
            numbers = numbers.reshape(warps, 8, units, layout.numbers) if units else numbers
            for warp in range(warps):
                for lane in range(32):
                    words = lane_words(stage[warp * size : (warp + 1) * size], lane)
                    for step in range(steps):
                        values = decoded(
                            words[step * layout.step_words : (step + 1) * layout.step_words], kind
                        )
                        values = values - offset
                        if units:
                            own = numbers[warp, lane // 4, step // layout.unit_steps]
                            values = values * own[0] + (own[1] if len(own) > 1 else 0)
                        if layout.has_row_scales:
                            values = values * row_scales[lane // 4]
                        column = (warp * layout.steps + first + step) * 32 + lane % 4 * 8
                        whole[tile * 8 + lane // 4, column : column + 8] = values
            first += steps
    return whole


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize(("warps", "slot"), [(8, 17408), (16, 17408), (8, 6144)])
def test_the_kernel_reads_what_was_stored(fmt: WeightFormat, warps: int, slot: int) -> None:
    rows, cols = 19, 1408  # neither whole tiles nor whole steps of all warps
    weights = rounded(matrix(rows, cols), fmt)
    layout = TileLayout(fmt, (rows, cols), Tuning(warps=warps, slot_bytes=slot))
    tiles = tiled(weights, layout)
    assert tuple(tiles.shape) == (layout.tiles, layout.tile_bytes)
    whole = read_back(tiles.numpy(), layout, weights.offset)
    expected = weights.values().numpy()
    np.testing.assert_allclose(whole[:rows, :cols], expected, rtol=1e-6, atol=1e-7)
    assert not whole[rows:].any() and not whole[:, cols:].any()


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_roundings_are_the_nearest(fmt: WeightFormat) -> None:
    values = matrix(6, 256, seed=3)
    w = rounded(values, fmt)
    error = np.abs(w.values().numpy() - values.numpy())
    if fmt.kind in ("bf16", "fp8"):
        largest = np.abs(values.numpy()) * (2.0**-8 if fmt.kind == "bf16" else 2.0**-4)
        floor = 0 if w.scales is None else w.scales.numpy()[:, None] * 2.0**-10
        assert (error <= largest * 1.001 + floor).all()
        return
    scales = w.scales.float() if fmt.group else w.scales[:, None]  # type: ignore[union-attr,index]
    step = scales.repeat_interleave(256 // scales.shape[1], 1).numpy()  # type: ignore[union-attr]
    slack = 0.02 * (16 if fmt.kind == "int4" else 256)  # scales and minimums are rounded to fp16
    assert (error <= step * (0.5 + slack * 2.0**-6) + 1e-4).all()


def test_symmetric_integers_are_numpys() -> None:
    values = matrix(5, 128, seed=1)
    w = rounded(values, WeightFormat("int4", 32))
    grouped = values.numpy().reshape(5, 4, 32)
    scales = (np.abs(grouped).max(2) * np.float32(1 / 7)).astype(np.float16)
    codes = np.clip(np.rint(grouped / scales.astype(np.float32)[..., None]), -8, 7) + 8
    np.testing.assert_array_equal(w.codes.numpy(), codes.reshape(5, 128).astype(np.uint8))
    np.testing.assert_array_equal(w.scales.numpy(), scales)  # type: ignore[union-attr]


def test_gate_and_up_take_turns() -> None:
    gate, up = torch.zeros(3, 16, dtype=torch.uint8), torch.ones(3, 16, dtype=torch.uint8)
    assert interleaved(gate, up)[:, 0].tolist() == [0, 1, 0, 1, 0, 1]


def test_groups_must_be_whole() -> None:
    with pytest.raises(ModelError, match="whole groups"):
        rounded(matrix(4, 72), WeightFormat("int4", 32))


def test_a_layout_of_another_shape_is_refused() -> None:
    layout = TileLayout(WeightFormat("bf16"), (8, 64), Tuning())
    with pytest.raises(ModelError, match="layout"):
        tiled(Weights(WeightFormat("bf16"), torch.zeros(8, 32, dtype=torch.bfloat16)), layout)
