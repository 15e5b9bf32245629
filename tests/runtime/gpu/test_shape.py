"""What the persistent kernel is built from: defines of a model, what is refused, what fits."""

from __future__ import annotations

import dataclasses
import re

import pytest

from hasten.core import ModelSpec
from hasten.errors import UsageError
from hasten.runtime.gpu.driver import Device
from hasten.runtime.gpu.shape import (
    PRODUCTS,
    Shape,
    TileLayout,
    Tuning,
    WeightFormat,
    kernel_source,
    layer_flags,
    matrix_shape,
)
from specs import changed, spec

H200 = Device("NVIDIA H200", (9, 0), 132, 232448)
BF16 = WeightFormat("bf16")
LLAMA = spec(
    architecture="llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=4,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    context_length=8192,
)


def shape(config: ModelSpec = LLAMA, fmt: WeightFormat = BF16, **tuning: int) -> Shape:
    return Shape(config, dict.fromkeys(PRODUCTS, fmt), tuning=Tuning(**tuning))  # type: ignore[arg-type]


def test_every_name_the_kernel_asks_for_is_defined() -> None:
    text = re.sub(r"//.*", "", kernel_source())
    kinds = r"constexpr \w+|int|bool|enum \{|,|#define|template <u32|u32|COMPILE_TIME int"
    own = set(re.findall(rf"(?:{kinds}) ([A-Z][A-Z0-9_]+)\b", text))
    own |= set(re.findall(r"\b([A-Z][A-Z0-9_]+) = ", text))
    asked = set(re.findall(r"\b[A-Z][A-Z0-9_]*_[A-Z0-9_]+\b", text)) - own
    defined = set(shape().defines()) | {"SLOTS"}
    assert not asked - defined
    assert {"WARPS", "SLOT_BYTES", "QKV_TYPE", "ROTARY"} <= defined


@pytest.mark.parametrize(
    ("change", "name", "value"),
    [
        ({"qk_norm": "full"}, "QK_NORM", 2),
        ({"norm_placement": "post"}, "NORM_BEFORE", 0),
        ({"norm_placement": "sandwich"}, "NORM_AFTER", 1),
        ({"activation": "gelu_tanh"}, "GELU", 1),
        ({"rotary_dim": 96}, "ROTARY", 96),
        ({"attention_softcap": 50.0}, "ATTENTION_CAP", "50.0f"),
        ({"norm_eps": 1e-5}, "NORM_EPS", "1e-05f"),
        ({"query_scale": 0.0625}, "SCORE_SCALE", "0.0625f"),
    ],
)
def test_a_models_variation_points_reach_the_kernel(change: dict, name: str, value: object) -> None:
    assert shape().defines()[name] != value
    assert shape(changed(LLAMA, **change)).defines()[name] == value


def test_biases_reach_the_kernel() -> None:
    with_biases = Shape(LLAMA, dict.fromkeys(PRODUCTS, BF16), frozenset("qkv"))
    assert with_biases.defines()["BIAS_QKV"] == 1
    assert with_biases.defines()["BIAS_O"] == 0


def test_layer_flags_say_what_slides_and_what_rotates() -> None:
    config = changed(
        LLAMA,
        sliding_window=7,
        sliding_layers=(True, False, True, False),
        rope_layers=(True, True, False, False),
    )
    assert layer_flags(config) == [3, 2, 1, 0]
    assert shape(config).defines()["LAYER_FLAGS"] == "3,2,1,0"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_kv_heads": 3}, "do not divide"),
        ({"num_kv_heads": 2}, "16 query heads share"),
        ({"head_dim": 22}, "multiple of 8"),
        ({"head_dim": 264}, "head size"),
        ({"rotary_dim": 63}, "even"),
        ({"hidden_size": 4095}, "even"),
        ({"intermediate_size": 28672}, "28672 inputs"),
    ],
)
def test_what_it_cannot_hold_is_refused_by_name(change: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        shape(changed(LLAMA, **change))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kind": "int3"}, "unknown"),
        ({"kind": "int4"}, "group"),
        ({"kind": "int4", "group": 48}, "48"),
        ({"kind": "bf16", "group": 32}, "no scales"),
        ({"kind": "fp8", "group": 128, "minimum": True}, "minimum"),
    ],
)
def test_formats_that_do_not_exist_are_refused(values: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        WeightFormat(**values)


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8, 16, 32])
def test_splits_of_all_heads_fit_the_grid(kv_heads: int) -> None:
    config = changed(LLAMA, num_heads=32 if kv_heads > 4 else kv_heads * 8, num_kv_heads=kv_heads)
    splits = shape(config).splits
    assert splits * kv_heads <= 128
    assert splits in (1, 2, 4, 8, 16, 32)


@pytest.mark.parametrize("warps", [8, 16])
@pytest.mark.parametrize("fmt", [BF16, WeightFormat("int4", 128), WeightFormat("int8", 32)], ids=str)
def test_stages_fit_their_slots_and_cover_the_tile(fmt: WeightFormat, warps: int) -> None:
    for name in PRODUCTS:
        layout = TileLayout(fmt, matrix_shape(LLAMA, name), Tuning(warps=warps))
        assert sum(layout.stage_steps) == layout.steps
        assert all(layout.stage_bytes(n) <= 17408 for n in layout.stage_steps)
        assert all(layout.stage_bytes(n) % 16 == 0 for n in layout.stage_steps)
        assert all(n % layout.unit_steps == 0 for n in layout.stage_steps if fmt.group)


def test_the_ring_fits_beside_the_rest() -> None:
    assert 8 <= shape().slots(H200) <= 12
    assert shape(slots=4).slots(H200) == 4
    small = dataclasses.replace(H200, shared_bytes=64 * 1024)
    with pytest.raises(UsageError, match="shared memory"):
        shape().slots(small)
