"""compressed-tensors and GPTQ folders we write: every value by plain twins of their readers, and the peer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

import hasten
from hasten.core import Format, Recipe
from hasten.errors import DiskError, UsageError
from hasten.export import export
from hasten.models.artifact import load_artifact
from hasten.models.families import FAMILIES, hf_spec
from hasten.models.rope import rotations
from hasten.models.tokenizer import Tokenizer
from hasten.runtime.reference import ReferenceDecoder
from tiny_artifacts import make, mixed, values_of
from tiny_models import TINY, prompts

# llama-odd is left out: its 66 columns make every layer floats
NAMES = sorted(set(TINY) - {"llama-odd"})


def unpacked(words: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """int32 words -> unsigned values, the lowest bits first, along an axis."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    moved = np.moveaxis(words.view(np.uint32), axis, -1)
    values = (moved[..., None] >> shifts) & ((1 << bits) - 1)
    return np.moveaxis(values.reshape(*moved.shape[:-1], -1), -1, axis)


def values_in(folder: Path) -> dict[str, np.ndarray]:
    """Every module's weight float32 [rows, cols] by its name in the file, as the format's reader has it."""
    config = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    tensors = {name: t.float().numpy() if t.is_floating_point() else t.numpy()
               for name, t in load_file(folder / "model.safetensors").items()}  # fmt: skip
    found = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind in ("weight", "bias"):
            found[name] = tensor
        elif kind == "weight_packed":
            rows, cols = tensors[f"{module}.weight_shape"]
            bits = 32 * tensor.shape[1] // int(cols)
            q = unpacked(tensor, bits, 1).astype(np.float32) - (1 << (bits - 1))
            scales = tensors[f"{module}.weight_scale"]
            found[f"{module}.weight"] = q * np.repeat(scales, cols // scales.shape[1], axis=1)
            assert found[f"{module}.weight"].shape == (rows, cols)
        elif kind == "qweight":
            bits = config["bits"]
            u = unpacked(tensor, bits, 0).astype(np.float32)
            zeros = unpacked(tensors[f"{module}.qzeros"], bits, 1).astype(np.float32) + 1
            group = tensors[f"{module}.g_idx"]
            found[f"{module}.weight"] = ((u - zeros[group]) * tensors[f"{module}.scales"][group]).T
    return found


def check_values(folder: Path, artifact: Path, inexact: set[str]) -> None:
    """Every parameter of the artifact is in the folder, exactly but for the named modules."""
    packed = load_artifact(artifact).packed
    table = FAMILIES[packed.config.architecture].hf_names
    expected: dict[str, np.ndarray] = {name: values_of(linear) for name, linear in packed.linears.items()}
    expected |= packed.vectors
    for name, values in values_in(folder).items():
        parts = table.parts(name)
        assert parts is not None, name
        if packed.config.architecture == "gemma3" and name.endswith("norm.weight"):
            values = values + np.float32(1)
        whole = np.concatenate([expected.pop(part) for part in parts])
        if name in inexact:
            np.testing.assert_allclose(values, whole, rtol=2**-11, atol=1e-7, err_msg=name)
        else:
            np.testing.assert_array_equal(values, whole, err_msg=name)
    assert not expected


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_keeps_its_values(name: str, format: str, tmp_path: Path) -> None:
    folder = make(tmp_path, name, Recipe.parse("w4-head8"))
    written = export(folder, format, tmp_path / "out")
    rounded = {one.tensor for one in written.rounding}
    assert rounded <= {"lm_head.weight", "model.embed_tokens.weight"}
    assert all(0 < one.relative_error < 2**-11 for one in written.rounding)
    check_values(written.path, folder, rounded)
    values = json.loads((written.path / "config.json").read_text())
    assert values.pop("quantization_config")["quant_method"] == format
    read, ours = hf_spec(values, "config.json"), load_artifact(folder).packed.config
    assert [block.mixer.rotary is None for block in read.blocks] == [
        block.mixer.rotary is None for block in ours.blocks
    ]
    assert rotations(read)[0].scaling.kind == rotations(ours)[0].scaling.kind


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
def test_a_mixture(format: str, tmp_path: Path) -> None:
    layers = {
        "layers.0.q": Format.of(4), "layers.0.k": Format.of(4, 64), "layers.0.v": Format.of(4, 128),
        "layers.0.o": Format.of(6), "layers.0.down": Format.of(5, 64),
        "layers.1.q": Format.of(4), "layers.1.k": Format.of(5), "layers.1.v": Format.of(8),
        "layers.1.gate": Format.of(4, symmetric=False), "layers.1.up": Format.of(4),
        "layers.1.o": Format.of(16), "layers.1.down": Format.of(4),
    }  # fmt: skip
    folder = make(tmp_path, "llama-wide", mixed("w4", layers))
    written = export(folder, format, tmp_path / "out")
    rounded = {one.tensor for one in written.rounding}
    assert {"model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"} <= rounded
    assert "model.layers.1.self_attn.o_proj.weight" not in rounded  # bf16 as it is
    check_values(written.path, folder, rounded)
    config = json.loads((written.path / "config.json").read_text())["quantization_config"]
    if format == "gptq":
        assert (config["bits"], config["group_size"]) == (8, 32)
        assert r"-:^model\.layers\.1\.mlp\.gate_proj$" in config["dynamic"]
        return
    found = {target: (g["weights"]["num_bits"], g["weights"]["group_size"])
             for g in config["config_groups"].values() for target in g["targets"]}  # fmt: skip
    assert {found[f"model.layers.0.self_attn.{p}_proj"] for p in "qkv"} == {(4, 32)}
    assert {found[f"model.layers.1.self_attn.{p}_proj"] for p in "qkv"} == {(8, 32)}  # engines fuse them
    assert found["model.layers.0.mlp.down_proj"] == (8, 64)
    assert found["model.layers.1.mlp.down_proj"] == (4, 32)
    assert config["ignore"][0] == "lm_head" and "model.layers.1.self_attn.o_proj" in config["ignore"]


def test_a_model_of_floats_is_a_plain_folder(tmp_path: Path) -> None:
    folder = make(tmp_path, "qwen3", Recipe.parse("bf16"))
    written = export(folder, "compressed-tensors", tmp_path / "out")
    assert written.is_exact and set(written.carried) == {"BF16"}
    assert "quantization_config" not in json.loads((written.path / "config.json").read_text())
    ours, theirs = hasten.load(folder), hasten.load(written.path, store=False)
    ids = np.array(prompts(1)[0], np.int32)
    np.testing.assert_array_equal(ours.logits(ids), theirs.logits(ids))


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    folder = make(tmp_path, "qwen2", Recipe.parse("w8"))
    written = export(folder, "compressed-tensors", tmp_path / "out")
    ours, copy = Tokenizer.load(folder), Tokenizer.from_folder(written.path)
    assert copy.encode("the man<|end|>") == ours.encode("the man<|end|>")
    assert copy.fields.chat_templates == ours.fields.chat_templates
    assert "hasten" not in json.loads((written.path / "tokenizer_config.json").read_text())


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    folder = make(tmp_path, "llama", Recipe.parse("w4"))
    out = tmp_path / "out"
    export(folder, "gptq", out)
    with pytest.raises(DiskError, match="is there already"):
        export(folder, "gptq", out)
    export(folder, "compressed-tensors", out, force=True)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["format"] == "pack-quantized"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(DiskError, match="may be replaced"):
        export(folder, "gptq", tmp_path / "mine", force=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    with pytest.raises(UsageError, match="is an artifact"):
        export(folder, "gptq", folder, force=True)


def test_other_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown format"):
        export(tmp_path / "none.hasten", "awq", tmp_path / "out")


def peer(tmp_path: Path, written: Path, which: str, python: str) -> tuple[np.ndarray, dict[str, Any]]:
    asked = {
        "ids": prompts(1)[0],
        "texts": ["the man in"],
        "messages": [{"role": "user", "content": "an inn"}],
    }
    (tmp_path / "ids.json").write_text(json.dumps(asked))
    script = Path(__file__).parent / "peer_logits.py"
    places = [str(written), str(tmp_path / "ids.json"), str(tmp_path / "out.npy")]
    done = subprocess.run([python, str(script), which, *places], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return np.load(tmp_path / "out.npy"), json.loads(done.stdout.splitlines()[-1])


def plain_logits(folder: Path, rounded: set[str]) -> np.ndarray:
    """The plain decoder's on the artifact's own values, but for those the format rounds to float16."""
    packed = load_artifact(folder).packed
    table = FAMILIES[packed.config.architecture].hf_names
    held = {key: values_of(linear) for key, linear in packed.linears.items()}
    for part in (part for name in rounded for part in table.parts(name) or ()):
        held[part] = held[part].astype(np.float16).astype(np.float32)
    return ReferenceDecoder(packed.config, {**held, **packed.vectors}).logits(prompts(1)[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "smollm3", "olmo2"])
def test_transformers_says_the_same(name: str, tmp_path: Path) -> None:
    folder = make(tmp_path, name, Recipe.parse("w8"))
    written = export(folder, "compressed-tensors", tmp_path / "out")
    theirs, said = peer(tmp_path, written.path, "transformers", sys.executable)
    ours, tokenizer = plain_logits(folder, {one.tensor for one in written.rounding}), Tokenizer.load(folder)
    assert np.abs(ours - theirs).max() < 2e-4 * ours.std()
    assert said["tokens"] == [tokenizer.encode("the man in")]
    assert said["prompt"] == tokenizer.apply_chat([{"role": "user", "content": "an inn"}])


@pytest.mark.slow
def test_transformers_reads_a_mixture(tmp_path: Path) -> None:
    folder = make(tmp_path, "llama-wide", mixed("w4"))
    written = export(folder, "compressed-tensors", tmp_path / "out")
    theirs, _ = peer(tmp_path, written.path, "transformers", sys.executable)
    ours = plain_logits(folder, {one.tensor for one in written.rounding})
    assert np.abs(ours - theirs).max() < 2e-4 * ours.std()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [Recipe.parse("w4"), Recipe.parse("w8-g128"), mixed("w4")], ids=str)
def test_gptqmodel_says_the_same(recipe: Recipe, tmp_path: Path) -> None:
    python = os.environ.get("HASTEN_GPTQ_PYTHON")
    if not python:
        pytest.skip("HASTEN_GPTQ_PYTHON names no interpreter that has gptqmodel")
    folder = make(tmp_path, "llama-wide", recipe)
    written = export(folder, "gptq", tmp_path / "out")
    theirs, said = peer(tmp_path, written.path, "gptqmodel", python)
    ours = plain_logits(folder, {one.tensor for one in written.rounding})
    assert "TorchLinear" in said["kinds"]
    assert np.abs(ours - theirs).max() < 0.02 * ours.std()  # float16 activations
