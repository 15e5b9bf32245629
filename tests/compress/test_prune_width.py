"""Hidden dimensions out of the whole model, and every matrix fitted in turn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from hasten.compress.prune.width import Width, dimension_importance
from hasten.compress.torch_model import changed, tensor_values
from hasten.core import EngineOptions, Recipe
from hasten.engine.model import load_packed
from hasten.errors import UsageError
from hasten.models.open import open_folder
from hasten.models.source import Source
from hasten.recipe import Pruning
from hasten.weights.packed import pack_model
from prune_models import NAMES, taken, text


def logits(source: Source, ids: np.ndarray) -> np.ndarray:
    model = load_packed(pack_model(source, Recipe.parse("bf16"), 1), source, EngineOptions(threads=1))
    return model.logits(ids)


def off(ours: Source, theirs: Source) -> float:
    """Distance of logits, which every width has as many of."""
    ids = text(1).ids[0]
    wanted = logits(theirs, ids)
    return float(np.linalg.norm(logits(ours, ids) - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("gemma3", "olmo2")])
def test_narrow_models_run_and_repair_brings_them_nearer(name: str, tiny_folder: Callable[..., Path]) -> None:
    source = open_folder(tiny_folder(name))
    width = source.config.width
    cut, _ = taken("width", source, 0.4, text(), repair=False)
    repaired, parts = taken("width", source, 0.4, text(), repair=True)
    left = Width().after(source.config, Pruning("width", 0.4)).width
    assert cut.config.width == repaired.config.width == left < width
    assert all(part.error_after < part.error_before for part in parts)
    assert 0 < off(repaired, source) < off(cut, source)


@pytest.mark.parametrize("name", ["gemma3", "olmo2"])
def test_normed_outputs_run_too(name: str, tiny_folder: Callable[..., Path]) -> None:
    source = open_folder(tiny_folder(name))
    repaired, parts = taken("width", source, 0.4, text(), repair=True)
    assert all(part.error_after < part.error_before for part in parts)
    assert np.isfinite(logits(repaired, text(1).ids[0])).all()


@pytest.mark.parametrize("repair", [False, True])
def test_dimensions_that_are_always_zero_go(repair: bool, tiny_folder: Callable[..., Path]) -> None:
    """32 of 64 dimensions hold nothing; norms of the others are told of the smaller width."""
    source = open_folder(tiny_folder("llama"))
    silent = torch.arange(0, 64, 2)
    values = {}
    for name, tensor in source.tensors.items():
        value = tensor_values(tensor)
        if name == "embed":
            value[:, silent] = 0.0
        elif name.endswith((".o", ".down")):
            value[silent] = 0.0
        elif name.endswith("norm"):
            value[silent] = 1.0
        values[name] = value
    source = changed(source, values)
    importance = dimension_importance(source, text(), lambda done: None)
    assert (importance[silent] == 0).all()
    assert (importance[silent + 1] > 0).all()
    pruned, _ = taken("width", source, 0.5, text(), repair)
    assert torch.equal(
        tensor_values(pruned.tensors["embed"]), tensor_values(source.tensors["embed"])[:, silent + 1]
    )
    if repair:  # the root mean square over half as many is sqrt(2) larger, which a fit makes good
        assert off(pruned, source) < 0.2


def test_an_amount_that_leaves_nothing_is_refused(tiny_folder: Callable[..., Path]) -> None:
    config = open_folder(tiny_folder("llama")).config
    with pytest.raises(UsageError, match="leaves no hidden dimension"):
        Width().after(config, Pruning("width", 0.9))
    with pytest.raises(UsageError, match="takes no hidden dimension out"):
        Width().after(config, Pruning("width", 0.1))
