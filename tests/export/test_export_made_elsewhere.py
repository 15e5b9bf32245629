"""Exports of weights that other methods made: quantised checkpoints, pruned and rotated models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_export_graph import PEERS, near, plain, run
from test_export_hf import check_values

import hasten
from hasten.compress.prune import prune
from hasten.compress.quantise.rotate import rotate
from hasten.core import Recipe
from hasten.export import FORMATS, export
from hasten.models.artifact import save
from hasten.models.open import open_model
from hasten.recipe import Pruning
from hasten.weights.packed import pack_model
from prune_models import text
from quantized_folders import Packing, quantised_folder
from tiny_artifacts import make, mixed
from tiny_models import TINY, prompts, save_folder


def check(artifact: Path, to: str, tmp_path: Path) -> None:
    """An export holds the artifact's values: by the engine that reads it, or value by value."""
    written = export(artifact, to, tmp_path / f"out{FORMATS[to].suffix}")
    ids = prompts()[0]
    if to in PEERS:
        decoder = plain(artifact)
        assert near(run(PEERS[to](written.path, decoder.config), ids, (7,)), decoder.logits(ids))
    elif to == "gguf":
        ours, theirs = hasten.load(artifact), hasten.load(written.path, store=False)
        np.testing.assert_array_equal(ours.logits(np.array(ids)), theirs.logits(np.array(ids)))
    else:
        check_values(written.path, artifact, {one.tensor for one in written.rounding})


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("packing", [Packing("gptq"), Packing("awq", symmetric=False)], ids=str)
def test_a_quantised_checkpoint(packing: Packing, to: str, tmp_path: Path) -> None:
    floats = save_folder(TINY["llama-wide"], tmp_path / "source", "float32")
    quantised_folder(floats, tmp_path / "quantised", packing)
    source = open_model(tmp_path / "quantised")
    check(save(tmp_path / "a.hasten", pack_model(source, Recipe("source")), source, {}), to, tmp_path)


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("kind", ["ffn", "heads", "layers", "rotated"])
def test_another_shape(kind: str, to: str, tmp_path: Path) -> None:
    source = open_model(save_folder(TINY["qwen2"], tmp_path / "source"))
    if kind == "rotated":
        changed = rotate(source)
    else:
        amount = {"ffn": 0.34, "heads": 0.5, "layers": 0.34}[kind]
        changed = prune(source, Pruning(kind, amount, repair=False), text()).source
    assert kind == "rotated" or changed.config != source.config
    packed = pack_model(changed, Recipe.parse("w4-head8"))
    check(save(tmp_path / "a.hasten", packed, changed, {}), to, tmp_path)


@pytest.mark.parametrize("recipe", [Recipe.parse("w4"), mixed("w4")], ids=["w4", "mixture"])
def test_compressed_tensors_own_library_reads_the_config(recipe: Recipe, tmp_path: Path) -> None:
    """vLLM reads it with this class."""
    from compressed_tensors.quantization import (
        QuantizationConfig,
    )  # at the top every worker would wait for it

    written = export(make(tmp_path, "llama-wide", recipe), "compressed-tensors", tmp_path / "out").path
    values = json.loads((written / "config.json").read_text())["quantization_config"]
    read = QuantizationConfig.model_validate(values)
    assert read.format == "pack-quantized" and read.quantization_status == "compressed"
    for group in read.config_groups.values():
        assert group.weights is not None and group.weights.symmetric and group.input_activations is None
        assert group.weights.num_bits in (4, 8) and group.weights.group_size == 32
