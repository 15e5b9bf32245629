"""Families: one table, a tree of each kind of model, and a made-up family that is one file and one entry."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hasten.core import Attention, Block, FeedForward, ModelSpec, Norms, Rotary, as_json, dense
from hasten.errors import ModelError
from hasten.models import families
from hasten.models.families import FAMILIES, hf_spec
from hasten.models.families.family import Family, Fields, Flags
from hasten.models.open import open_model
from hasten.weights.plan import config_from, config_json
from specs import flat_of, spec
from tiny_models import TINY


def of_tiny(name: str) -> ModelSpec:
    return hf_spec(json.loads(TINY[name].config().to_json_string()), name)


@pytest.mark.parametrize("name", TINY)
def test_flat_configurations_of_before_mean_the_same_model(name: str) -> None:
    """Every kind of model, with the biases that the stored tensors tell."""
    found = of_tiny(name)
    flat = as_json(flat_of(found))
    assert config_from(json.dumps(flat).encode(), "x", found.parameter_shapes()) == found
    assert config_from(json.dumps(config_json(found)).encode(), "x") == found


def test_a_made_up_family_is_one_file_and_one_entry(
    tmp_path: Path, tiny_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tensors are called as Llama's, and the layers with a window come from a key of its own."""

    def slides(fields: Fields, layers: int) -> Flags:
        return tuple(i < fields.integer("first_local_layers") for i in range(layers))

    made_up = Family("lookback", "LookbackForCausalLM", "lookback", theta=5000.0, sliding=slides)
    monkeypatch.setitem(families.FAMILIES, made_up.name, made_up)
    folder = tmp_path / "lookback"
    folder.mkdir()
    llama = tiny_folder("llama")
    for file in llama.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    values = json.loads((folder / "config.json").read_text())
    for key in ("rope_theta", "rope_parameters", "rope_scaling"):
        values.pop(key, None)
    values |= {"model_type": "lookback", "sliding_window": 5, "first_local_layers": 1}
    (folder / "config.json").write_text(json.dumps(values))
    source = open_model(folder)
    blocks = source.config.blocks
    assert [block.mixer.window for block in blocks] == [5, None, None]
    assert source.config.architecture == "lookback" and blocks[2].mixer.rotary == Rotary(16, 5000.0)
    assert source.tensors.keys() == open_model(llama).tensors.keys()


def test_consecutive_equal_blocks_are_one_object() -> None:
    gemma = of_tiny("gemma3")
    assert gemma.blocks[0] is gemma.blocks[1] and gemma.blocks[0] != gemma.blocks[-2]
    shorter = replace(gemma, blocks=(gemma.blocks[0], replace(gemma.blocks[0])))
    assert shorter.blocks[0] is shorter.blocks[1]


def test_every_parameter_of_a_file_is_in_the_tree(tiny_folder: Any) -> None:
    for name in ("llama-odd", "qwen3", "gemma3", "olmo2"):
        source = open_model(tiny_folder(name))
        shapes = source.config.parameter_shapes()
        assert {key: tensor.shape for key, tensor in source.tensors.items()} == shapes
        biases = {key.split(".")[2] for key in shapes if key.endswith(".bias")}
        assert biases == set(source.config.blocks[0].biases)


def test_experts_are_stored_all_and_read_as_chosen() -> None:
    """Mixtral's shape: 8 experts of which 2 are chosen; and one that every token goes through besides."""
    mixer = Attention(4, 2, 16, rotary=Rotary(16))
    ways = FeedForward(96, "experts", experts=8, chosen=2, shared=1)
    model = ModelSpec("mixed", 100, 64, 128, (Block(mixer, ways),) * 3)
    attention, expert, head = 64 * 64 * 2 + 32 * 64 * 2, 3 * 96 * 64, 100 * 64
    assert model.weights_stored == 3 * (attention + 9 * expert + 8 * 64) + head
    assert model.weights_read == 3 * (attention + 3 * expert + 8 * 64) + head
    assert model.linear_shapes()["layers.2.experts.7.down"] == (64, 96)
    plain = replace(model, blocks=(Block(mixer, FeedForward(96, "plain")),) * 3)
    assert plain.weights_stored == plain.weights_read == 3 * (attention + 2 * 96 * 64) + head


MIXER = Attention(4, 2, 16, rotary=Rotary(16))
WAYS = FeedForward(96)
BEYOND: list[tuple[Block | None, dict[str, Any], str]] = [
    (Block(replace(MIXER, mask="full"), WAYS), {}, "attention without a causal mask"),
    (Block(replace(MIXER, sinks=True), WAYS), {}, "attention sinks"),
    (Block(replace(MIXER, kv_from=0), WAYS), {}, "layers that share keys and values"),
    (Block(replace(MIXER, heads=8), WAYS), {}, "blocks of different shapes"),
    (Block(MIXER, WAYS, cross=MIXER), {}, "cross attention"),
    (Block(MIXER, WAYS, Norms(eps=1e-5)), {}, "norms with another epsilon than the final norm's"),
    (Block(MIXER, WAYS, Norms(kind="layer")), {}, "layer norms"),
    (
        Block(replace(MIXER, window=9, rotary=Rotary(8)), WAYS),
        {},
        "layers that turn different numbers of dimensions",
    ),
    (Block(MIXER, FeedForward(96, "plain")), {}, "feed-forward layers without a gate"),
    (Block(MIXER, FeedForward(96, "experts", experts=4, chosen=2)), {}, "a mixture of experts"),
    (None, {"encoder": spec("llama", 9, 64, 96, 1, 4, 2, 16, 128)}, "an encoder"),
]


@pytest.mark.parametrize(("second", "more", "name"), BEYOND, ids=[name for *_, name in BEYOND])
def test_what_no_engine_runs_is_refused_by_name(
    second: Block | None, more: dict[str, Any], name: str
) -> None:
    first = Block(MIXER, WAYS)
    model = ModelSpec("llama", 100, 64, 128, (first, second or first), **more)
    with pytest.raises(
        ModelError, match=f"the engine does not run {name}, which this llama model has"
    ) as caught:
        dense(model, "the engine")
    assert caught.value.hint
    assert dense(replace(model, blocks=(first, first), encoder=None), "the engine")


def test_the_table_is_complete() -> None:
    """Every family opens by its own name, and no two read the same model_type."""
    types = [kind for family in FAMILIES.values() for kind in family.model_types or (family.name,)]
    assert len(types) == len(set(types)) and all(name == family.name for name, family in FAMILIES.items())
    assert {TINY[name].model_type for name in TINY} <= set(types)
    assert np.all([family.hf_class.endswith("ForCausalLM") for family in FAMILIES.values()])
