"""Half-quadratic quantisation against rounding to nearest, and against its plain twin."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hasten.compress.quantise.hqq import POWER, TURNS, hqq
from hasten.compress.torch_model import made_tensor, tensor_values
from hasten.core import Format
from hasten.errors import ModelError, UsageError
from hasten.models.open import open_model
from hasten.weights.codec import Encoded
from hasten.weights.packed import integers, pack_linear

LAYOUTS = [Format.of(b, g, s) for b in (8, 6, 5, 4) for g in (32, 64, 128) for s in (True, False)]


def heavy_tailed(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    """Student's t with 4 degrees of freedom: the outliers that real matrices have."""
    values = np.random.default_rng(seed).standard_t(4, (rows, cols)) * 0.02
    return torch.from_numpy(values.astype(np.float32))


def nearest(weight: torch.Tensor, layout: Format) -> Encoded:
    return integers(pack_linear(made_tensor("w", tuple(weight.shape), weight), layout))


def lost(weight: torch.Tensor, found: Encoded, power: float = POWER) -> float:
    error = np.abs(weight.numpy().astype(np.float64) - found.values())
    return float((error**power).sum())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_it_beats_rounding_to_nearest_in_its_own_measure(layout: Format) -> None:
    weight = heavy_tailed(48, 256)
    found, plain = hqq(weight, layout), nearest(weight, layout)
    assert found.codes.shape == (48, 256)
    assert found.scales.shape == (48, 256 // layout.group)
    assert found.codes.dtype == np.uint8
    assert found.scales.dtype == np.float16
    assert (found.minimums is None) == layout.symmetric
    assert int(found.codes.max()) < 1 << layout.bits
    least = 1.0 if layout.symmetric else 0.999 if layout.bits == 8 else 0.98  # symmetric scales were searched
    assert lost(weight, found) < least * lost(weight, plain)
    assert lost(weight, found, 2.0) <= lost(weight, plain, 2.0) * (1 + 1e-6)


def plain_hqq(w: np.ndarray, scale: float, minimum: float, layout: Format) -> tuple[float, float, float]:
    """One group, one number after the other, in float64: (least error, scale, minimum)."""
    low = -(1 << (layout.bits - 1)) if layout.symmetric else 0
    high = low + (1 << layout.bits) - 1
    low += layout.symmetric and layout.bits == 8
    best, beta, limit = (np.inf, scale, minimum), 10.0, np.inf
    for _ in range(TURNS + 1):
        levels = [min(max(round((v - minimum) / scale), low), high) for v in w]
        errors = [(v - minimum) / scale - q for v, q in zip(w, levels, strict=True)]
        total = sum(abs(e * scale) ** POWER for e in errors)
        squares = sum((e * scale) ** 2 for e in errors)
        if total >= best[0] or squares > limit:
            break
        limit = squares if limit == np.inf else limit  # the first's
        best = (total, scale, minimum)
        kept = [np.sign(e) * max(0.0, abs(e) - max(abs(e), 1e-8) ** (POWER - 1) / beta) for e in errors]
        aim = [v - k * scale for v, k in zip(w, kept, strict=True)]
        if layout.symmetric:
            scale = np.dot(levels, aim) / np.dot(levels, levels)
        else:
            scale = np.polyfit(levels, aim, 1)[0]
        scale = float(np.float16(scale))
        if not layout.symmetric:
            minimum = float(np.float16(np.mean(aim) - scale * np.mean(levels)))
        beta *= 1.01
    return best


@pytest.mark.parametrize(
    "layout", [Format.of(4), Format.of(4, 64, False), Format.of(6, 32, False), Format.of(8)], ids=str
)
def test_it_equals_its_plain_twin(layout: Format) -> None:
    """Group by group; a group alone stops at its first turn that is no better, as the twin does."""
    same = 0
    for seed in range(12):
        weight = heavy_tailed(1, layout.group, seed)
        start, found = nearest(weight, layout), hqq(weight, layout)
        minimum = 0.0 if start.minimums is None else float(start.minimums[0, 0])
        total, scale, low = plain_hqq(
            weight[0].numpy().astype(float), float(start.scales[0, 0]), minimum, layout
        )
        assert lost(weight, found) == pytest.approx(total, rel=0.01)
        same += scale == float(found.scales[0, 0]) and (
            found.minimums is None or low == float(found.minimums[0, 0])
        )
    assert same >= 10  # a level on the edge may fall to either side in float32


def test_levels_are_the_nearest_to_what_is_stored() -> None:
    weight, layout = heavy_tailed(16, 128), Format.of(4, 32, False)
    found = hqq(weight, layout)
    for change in (-1, 1):
        moved = np.clip(found.codes.astype(int) + change, 0, 15).astype(np.uint8)
        other = Encoded(layout, moved, found.scales, found.minimums)
        error, others = (np.abs(weight.numpy() - i.values()) for i in (found, other))
        assert (error <= others + 1e-7).all()


@pytest.mark.parametrize("layout", [Format.of(4), Format.of(4, 32, False), Format.of(8)], ids=str)
def test_groups_of_one_value(layout: Format) -> None:
    """Zeros, constants and what vanishes in fp16 stay what they were, to the rounding of nearest."""
    weight = torch.zeros(5, 64)
    weight[1], weight[2], weight[3, ::2], weight[4, 7] = 0.5, 1e-9, 1e-6, 3.0
    found = hqq(weight, layout)
    assert np.isfinite(found.values()).all()
    assert lost(weight, found) <= lost(weight, nearest(weight, layout)) * 1.0001
    np.testing.assert_array_equal(found.values()[0], 0)


def test_narrow_matrices_are_one_group() -> None:
    weight = heavy_tailed(7, 12)
    found = hqq(weight, Format.of(4))
    assert found.codes.shape == (7, 12)
    assert found.scales.shape == (7, 1)
    assert lost(weight, found) <= lost(weight, nearest(weight, Format.of(4)))


def test_many_rows_are_solved_as_few() -> None:
    weight = heavy_tailed(700, 768)  # several chunks
    whole, part = hqq(weight, Format.of(4, 64, False)), hqq(weight[650:], Format.of(4, 64, False))
    agree = (whole.scales[650:] == part.scales).mean()
    assert agree > 0.99  # a chunk stops when none of its groups gains


def test_bad_input_is_refused() -> None:
    with pytest.raises(UsageError, match=r"layers\.0\.q has 96 inputs, which groups of 64"):
        hqq(torch.zeros(4, 96), Format.of(4, 64), "layers.0.q")
    broken = torch.zeros(4, 64)
    broken[2, 3] = torch.nan
    with pytest.raises(ModelError, match=r"layers\.0\.q"):
        hqq(broken, Format.of(4), "layers.0.q")


@pytest.mark.demo
@pytest.mark.parametrize("layout", [Format.of(4, 32, False), Format.of(4)], ids=str)
def test_the_demo_model_gains(layout: Format) -> None:
    weight = tensor_values(open_model("demo").tensors["layers.3.v"])
    least = 1.0 if layout.symmetric else 0.97
    assert lost(weight, hqq(weight, layout)) < least * lost(weight, nearest(weight, layout))
