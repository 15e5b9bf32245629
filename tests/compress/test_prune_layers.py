"""Whole layers: which go, that the model without them is right, and the repair of the one before a gap."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hasten.compress.prune.layers import influence, kept_layers
from hasten.compress.torch_model import changed, tensor_values
from hasten.errors import UsageError
from hasten.models.open import open_folder
from hasten.models.source import Source
from prune_models import distance, taken, text


def without_effect(source: Source, layer: int) -> Source:
    """The model with a layer that adds nothing to its hidden state."""
    names = [f"layers.{layer}.{name}" for name in ("o", "down", "o.bias", "down.bias")]
    zeros = {n: torch.zeros(source.tensors[n].shape) for n in names if n in source.tensors}
    return changed(source, zeros)


@pytest.mark.parametrize("repair", [False, True])
@pytest.mark.parametrize(("name", "layer"), [("smollm3", 3), ("gemma3", 2), ("qwen2-sliding", 0)])
def test_a_layer_without_effect_goes_without_a_trace(
    name: str, layer: int, repair: bool, tiny_folder: Callable[..., Path]
) -> None:
    """Also where layers differ: rotated or not, sliding or not. With repair there is nothing to fit."""
    source = without_effect(open_folder(tiny_folder(name)), layer)
    config = source.config
    pruned, parts = taken("layers", source, 1 / len(config.blocks), text(), repair)
    left = [i for i in range(len(config.blocks)) if i != layer]
    assert [part.kept for part in parts] == [int(i in left) for i in range(len(config.blocks))]
    assert len(pruned.config.blocks) == len(left)
    assert pruned.config.blocks == tuple(config.blocks[i] for i in left)
    assert distance(pruned, source, text(1).ids[0]) < 0.03


@pytest.mark.parametrize("name", ["llama", "qwen2", "llama-odd", "smollm3"])
def test_repair_adds_what_the_missing_layers_did(name: str, tiny_folder: Callable[..., Path]) -> None:
    source = open_folder(tiny_folder(name))
    cut, _ = taken("layers", source, 0.5, text(), repair=False)
    repaired, parts = taken("layers", source, 0.5, text(), repair=True)
    fitted = [part for part in parts if part.error_after is not None]
    assert fitted and all(part.error_after < part.error_before for part in fitted)
    ids = text(1).ids[0]
    assert distance(repaired, source, ids) < distance(cut, source, ids)


def test_influence_is_one_minus_the_cosine(tiny_folder: Callable[..., Path]) -> None:
    source = without_effect(open_folder(tiny_folder("qwen3")), 1)
    found = influence(source, text(), lambda done: None)
    assert found[1] == pytest.approx(0.0, abs=1e-5)
    assert found[0] > 0.01 and found[2] > 0.01


def test_a_normed_mlp_is_not_repaired(tiny_folder: Callable[..., Path]) -> None:
    source = open_folder(tiny_folder("gemma3"))
    repaired, parts = taken("layers", source, 0.3, text(), repair=True)
    assert all(part.error_after is None for part in parts)
    kept = [i for i, part in enumerate(parts) if part.kept]
    for place, index in enumerate(kept):
        ours, theirs = repaired.tensors[f"layers.{place}.down"], source.tensors[f"layers.{index}.down"]
        assert torch.equal(tensor_values(ours), tensor_values(theirs))


def test_an_amount_that_leaves_or_takes_nothing_is_refused(tiny_folder: Callable[..., Path]) -> None:
    config = open_folder(tiny_folder("llama")).config
    for amount, message in ((0.9, "leaves no layer"), (0.1, "takes no layer out")):
        with pytest.raises(UsageError, match=message) as refused:
            kept_layers(config, amount)
        low, high = (float(word) for word in refused.value.hint.split() if word[0] == "0")
        assert kept_layers(config, low) == 2
        assert kept_layers(config, high) == 1


def test_a_gap_at_the_start_is_crossed_and_the_next_one_repaired(tiny_folder: Callable[..., Path]) -> None:
    """The first layer and one in the middle go: only the one before the second gap can be fitted."""
    source = without_effect(open_folder(tiny_folder("smollm3")), 0)
    repaired, parts = taken("layers", source, 0.4, text(), repair=True)
    assert parts[0].kept == 0 and sum(part.kept for part in parts) == 3
    other = next(i for i in range(1, 5) if not parts[i].kept)
    assert [i for i, part in enumerate(parts) if part.error_after is not None] == [other - 1]
    cut, _ = taken("layers", source, 0.4, text(), repair=False)
    ids = text(1).ids[0]
    assert distance(repaired, source, ids) < distance(cut, source, ids)
