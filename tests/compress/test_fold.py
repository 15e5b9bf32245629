"""Folding scales into what makes an input leaves a layer's output alone, on every architecture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny_models
from hasten.compress.quantise import fold, foldable, obstacle, shared_scales
from hasten.compress.torch_model import Positions, layer_forward, layer_weights
from hasten.core import READERS
from hasten.models.open import open_folder
from hasten.models.source import Source

NAMES = sorted(tiny_models.TINY)


def opened(name: str, folder: Path) -> Source:
    return open_folder(tiny_models.save_folder(tiny_models.TINY[name], folder))


def random_scales(count: int, seed: int) -> torch.Tensor:
    """From 1/8 to 8: as far as a search goes."""
    return torch.exp2(torch.rand(count, generator=torch.Generator().manual_seed(seed)) * 6 - 3)


@pytest.mark.parametrize("name", NAMES)
def test_the_output_stays(name: str, tmp_path: Path) -> None:
    source = opened(name, tmp_path)
    config, weights = source.config, layer_weights(source, 1)
    positions = Positions.of(config, 24)
    x = torch.randn(2, 24, config.width, generator=torch.Generator().manual_seed(3))
    before = layer_forward(config, 1, weights, x, positions)
    folded = dict(weights)
    for seed, group in enumerate(READERS):
        if foldable(config, group):
            scales = random_scales(weights[READERS[group][0]].shape[1], seed)
            folded = fold(folded, config, group, scales)
            assert not torch.equal(folded[READERS[group][0]], weights[READERS[group][0]])
            after = layer_forward(config, 1, folded, x, positions)
            torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert set(folded) == set(weights)


def test_what_does_not_fold_says_why(tmp_path: Path) -> None:
    config = opened("olmo2", tmp_path).config
    assert [foldable(config, group) for group in READERS] == [False, True, False, True]
    assert "no norm before gate and up" in (obstacle(config, "gate_up") or "")
    with pytest.raises(AssertionError):
        fold({}, config, "qkv", torch.ones(64))


def test_query_heads_share_the_scales_of_their_kv_head(tmp_path: Path) -> None:
    source = opened("llama", tmp_path)
    config, weights = source.config, layer_weights(source, 0)
    scales = random_scales(weights["o"].shape[1], 5)
    heads = shared_scales(weights, config, "o", scales).reshape(
        config.blocks[0].mixer.kv_heads,
        config.blocks[0].mixer.heads // config.blocks[0].mixer.kv_heads,
        config.blocks[0].mixer.head_dim,
    )
    torch.testing.assert_close(heads[:, 0], heads[:, 1])
    wanted = scales.reshape(heads.shape).prod(1).sqrt()
    torch.testing.assert_close(heads[:, 0], wanted)
    assert not torch.allclose(heads[0], heads[1])
    assert torch.equal(shared_scales(weights, config, "down", scales), scales)


def test_a_layer_with_fewer_heads_and_channels_folds(tmp_path: Path) -> None:
    """Pruned to one KV head with its two query heads, and to 50 channels: shapes are read off the weights."""
    source = opened("qwen2", tmp_path)
    config, whole = source.config, layer_weights(source, 1)
    rows = {"q": 32, "q.bias": 32, "k": 16, "k.bias": 16, "v": 16, "v.bias": 16, "gate": 50, "up": 50}
    weights = {name: value[: rows.get(name, len(value))].clone() for name, value in whole.items()}
    weights |= {"o": whole["o"][:, :32].clone(), "down": whole["down"][:, :50].clone()}
    x = torch.randn(1, 9, config.width, generator=torch.Generator().manual_seed(3))
    positions, folded = Positions.of(config, 9), weights
    for seed, group in enumerate(READERS):
        scales = random_scales(weights[READERS[group][0]].shape[1], seed)
        folded = fold(folded, config, group, scales)
    before, after = (layer_forward(config, 1, w, x, positions) for w in (weights, folded))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_types_stay_and_nothing_given_is_written_to(tmp_path: Path) -> None:
    source = opened("llama-odd", tmp_path)  # biases everywhere
    weights = {name: value.bfloat16() for name, value in layer_weights(source, 0).items()}
    kept = {name: value.clone() for name, value in weights.items()}
    folded = fold(weights, source.config, "down", torch.full((100,), 2.0))
    assert all(torch.equal(weights[name], kept[name]) for name in kept)
    assert {value.dtype for value in folded.values()} == {torch.bfloat16}
    changed = {name for name in kept if folded[name] is not weights[name]}
    assert changed == {"down", "up", "up.bias"}
    assert torch.equal(folded["up.bias"], weights["up.bias"] / 2)
