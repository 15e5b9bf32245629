"""Key scales: what they are, that attention cannot see them, and that an int8 cache gains from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import tiny_models
from hasten.core import EngineOptions, Recipe
from hasten.engine.model import load_packed
from hasten.models.open import open_folder
from hasten.models.rope import key_scales, key_shifts, rotations
from hasten.models.source import Source
from hasten.runtime import cpu
from hasten.weights.packed import PackedModel, pack_model, values_of


def packed_as(recipe: str, name: str, folder: Path) -> tuple[Source, PackedModel]:
    source = open_folder(tiny_models.save_folder(tiny_models.TINY[name], folder))
    return source, pack_model(source, Recipe.parse(recipe), 1)


def scales_of(packed: PackedModel) -> dict[str, np.ndarray]:
    shifts = key_shifts(packed.config, packed.vectors)
    return key_scales(packed.config, lambda name: values_of(packed.linears[name]), packed.vectors, shifts)


@pytest.mark.parametrize("name", sorted(tiny_models.TINY))
def test_they_are_powers_of_two_equal_where_dimensions_turn_together(name: str, tmp_path: Path) -> None:
    _, packed = packed_as("bf16-kv8", name, tmp_path)
    config, found = packed.config, scales_of(packed)
    assert len(found) == len(config.blocks)
    for layer, mixer in enumerate(block.mixer for block in config.blocks):
        scale = found[f"layers.{layer}.key_scale"].reshape(mixer.kv_heads, mixer.head_dim)
        assert (np.frexp(scale)[0] == 0.5).all()
        if mixer.rotary is not None:
            half = mixer.rotary.dim // 2
            np.testing.assert_array_equal(scale[:, :half], scale[:, half : 2 * half])


@pytest.mark.parametrize("name", sorted(tiny_models.TINY))
def test_attention_cannot_see_them(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With bf16 keys a power of two changes no bit."""
    source, packed = packed_as("bf16", name, tmp_path)
    ids = tiny_models.prompts()[0][: source.config.context]
    plain = load_packed(packed, source, EngineOptions(threads=1)).logits(ids)
    monkeypatch.setattr(cpu, "key_shifts", lambda *_: {**key_shifts(*_), **uneven(packed)})
    np.testing.assert_array_equal(load_packed(packed, source, EngineOptions(threads=1)).logits(ids), plain)


def uneven(packed: PackedModel) -> dict[str, np.ndarray]:
    """Random powers of two, equal in each pair."""
    config, rng = packed.config, np.random.default_rng(0)
    half, found = rotations(config)[0].dim // 2, {}
    for layer, mixer in enumerate(block.mixer for block in config.blocks):
        scale = np.exp2(rng.integers(-3, 4, (mixer.kv_heads, mixer.head_dim))).astype(np.float32)
        scale[:, half : 2 * half] = scale[:, :half]
        found[f"layers.{layer}.key_scale"] = scale.reshape(-1)
    return found


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_uneven_keys_do_not_spoil_an_int8_cache(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys whose dimensions differ by up to 2^5, and queries that make up for it: the same model."""
    source, packed = packed_as("bf16-kv8", name, tmp_path)
    ids = tiny_models.prompts()[0]
    exact = load_packed(pack_model(source, Recipe.parse("bf16"), 1), source).logits(ids)

    def distance(scales: object) -> float:
        monkeypatch.setattr(cpu, "key_scales", scales)
        found = load_packed(packed, source, EngineOptions(threads=1)).logits(ids)
        return float(np.abs(found - exact).mean())

    rough = {key: 1 / value for key, value in uneven(packed).items()}
    assert distance(key_scales) < 0.6 * distance(lambda *_: rough)
    assert distance(key_scales) < 1.2 * distance(lambda *_: {})


@pytest.mark.parametrize("size", [1e30, 1e-30, 3e38])
def test_no_size_of_weights_overflows(size: float, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    _, packed = packed_as("bf16-kv8", "qwen2", tmp_path)
    vectors = {name: np.full_like(value, size) for name, value in packed.vectors.items()}
    shifts = key_shifts(packed.config, vectors)
    found = key_scales(
        packed.config, lambda name: np.full_like(values_of(packed.linears[name]), size), vectors, shifts
    )
    assert all(np.isfinite(scale).all() for scale in found.values())
    assert not recwarn.list
