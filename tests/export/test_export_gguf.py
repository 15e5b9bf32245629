"""GGUF files we write, read back by our reader: every value, logits bit for bit, the tokenizer."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hasten
from hasten import _native
from hasten.core import Format, Recipe
from hasten.errors import DiskError, TokenizerError, UsageError
from hasten.export import Loss, export
from hasten.export.gguf import carrier, encoded
from hasten.models.artifact import load_artifact, save
from hasten.models.open import open_model
from hasten.models.tokenizer import Tokenizer
from hasten.weights.packed import integers, pack_model
from tiny_artifacts import make, mixed, packed, values_of
from tiny_gguf import write_gguf
from tiny_models import TINY, prompts, save_folder
from tiny_tokenizers import CHAT_TEMPLATE, byte_level, sentencepiece_model

ROUND_TRIP = [
    *("llama", "llama-linear", "llama-llama3", "llama-yarn", "llama-wide", "mistral-full", "qwen2"),
    *("qwen3", "qwen3-yarn", "gemma3", "phi3", "smollm", "smollm3", "olmo2"),
]


def stored(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(values float32, GGUF type) of every parameter of a file."""
    source = open_model(path)
    values, kinds = {}, {}
    for name, tensor in source.tensors.items():
        count = int(np.prod(tensor.shape))
        flat = _native.dequantize_ggml(tensor.data, tensor.dtype, count, 1).reshape(tensor.shape)
        values[name] = flat if tensor.row_order is None else flat[tensor.row_order]
        kinds[name] = tensor.dtype
    return values, kinds


@pytest.mark.parametrize("name", ROUND_TRIP)
def test_every_architecture_keeps_values_and_logits(name: str, tmp_path: Path) -> None:
    folder = make(tmp_path, name, Recipe.parse("w5-head8"))
    written = export(folder, "gguf", tmp_path / "out.gguf")
    assert written.is_exact and not written.rounding
    values, _ = stored(written.path)
    artifact = load_artifact(folder)
    for key, linear in artifact.packed.linears.items():
        np.testing.assert_array_equal(values[key], values_of(linear), err_msg=key)
    for key, vector in artifact.packed.vectors.items():
        np.testing.assert_array_equal(values[key], vector, err_msg=key)
    ours, theirs = hasten.load(folder), hasten.load(written.path, store=False)
    for prompt in prompts(3):
        a, b = (m.logits(np.array(prompt, np.int32)) for m in (ours, theirs))
        if "llama3" in name or "yarn" in name:  # frequencies go through float32 factors
            np.testing.assert_allclose(a, b, rtol=0, atol=0.02 * float(a.std()))
        else:
            np.testing.assert_array_equal(a, b)


def test_a_mixture_of_all_widths(tmp_path: Path) -> None:
    folder = make(tmp_path, "llama-wide", mixed())
    written = export(folder, "gguf", tmp_path / "out.gguf")
    values, kinds = stored(written.path)
    found = [kinds[f"layers.0.{part}"] for part in ("q", "k", "v", "o", "gate", "up", "down")]
    assert found == ["Q4_0", "Q5_0", "Q8_0", "Q8_0", "Q4_1", "Q5_1", "BF16"]
    assert kinds["layers.1.q"] == "Q4_0" and written.is_exact
    for key, linear in load_artifact(folder).packed.linears.items():
        np.testing.assert_array_equal(values[key], values_of(linear), err_msg=key)


def test_fused_tensors_take_a_type_that_carries_all(tmp_path: Path) -> None:
    folder = make(tmp_path, "phi3", mixed("w4", {"layers.0.k": Format.of(6), "layers.1.up": Format.of(16)}))
    written = export(folder, "gguf", tmp_path / "out.gguf")
    values, kinds = stored(written.path)
    assert [kinds[f"layers.0.{part}"] for part in "qkv"] == ["Q8_0"] * 3
    assert [kinds[f"layers.1.{part}"] for part in ("gate", "up")] == ["F16"] * 2
    (rounded,) = written.rounding
    assert rounded.tensor == "blk.1.ffn_up.weight" and rounded.relative_error < 3e-4
    for key, linear in load_artifact(folder).packed.linears.items():
        if not key.startswith("layers.1."):
            np.testing.assert_array_equal(values[key], values_of(linear), err_msg=key)


@pytest.mark.parametrize(
    ("layout", "cols", "kind"),
    [
        (Format.of(4), 64, "Q4_0"),
        (Format.of(4, 128), 128, "Q4_0"),
        (Format.of(4, symmetric=False), 64, "Q4_1"),
        (Format.of(5, 64), 64, "Q5_0"),
        (Format.of(5, 64, False), 128, "Q5_1"),
        (Format.of(6), 32, "Q8_0"),
        (Format.of(8), 96, "Q8_0"),
        (Format.of(16), 64, "BF16"),
        (Format.of(16), 30, "BF16"),
        (Format.of(8, symmetric=False), 64, "F16"),
        (Format.of(6, 16), 64, "F16"),
        (Format.of(4, 64), 44, "F32"),
    ],
    ids=str,
)
def test_every_layout_has_a_type(layout: Format, cols: int, kind: str) -> None:
    linear = packed(layout, 21, cols)
    assert carrier([layout], cols) == kind
    loss = Loss()
    data = encoded(linear, kind, 0, linear.rows, loss)
    found = _native.dequantize_ggml(data.reshape(-1), kind, 21 * cols, 1).reshape(21, cols)
    if kind == "F16":
        np.testing.assert_allclose(found, values_of(linear), rtol=2**-11, atol=1e-7)
        assert 0 < loss.relative < 2**-11
    elif layout.bits == 16 or layout.symmetric:
        np.testing.assert_array_equal(found, values_of(linear))
    else:  # scale * u + minimum may be one operation or two
        np.testing.assert_allclose(found, integers(linear).values(), rtol=0, atol=1e-6)


def test_the_tokenizer_and_template_come_along(tmp_path: Path) -> None:
    written = export(make(tmp_path, "qwen2", Recipe.parse("w8")), "gguf", tmp_path / "out.gguf")
    tokenizer = open_model(written.path).tokenizer()
    ours = Tokenizer.load(tmp_path / "qwen2.hasten")
    for text in ("the man in the inn", "<|end|>user: hi", "\u4f60 a\n\n b"):
        assert tokenizer.encode(text) == ours.encode(text)
    assert tokenizer.fields.chat_templates == {"default": CHAT_TEMPLATE}
    assert tokenizer.eos_ids == ours.eos_ids and tokenizer.special_ids == ours.special_ids


def with_tokenizer(folder: Path, tokenizer: Any, settings: dict[str, Any], name: str = "llama") -> Path:
    """A tiny model whose folder holds another tokenizer; its embedding is as large as that needs."""
    tiny = TINY[name]
    size = tokenizer.get_vocab_size() + 3
    wide = replace(tiny, settings={**tiny.settings, "vocab_size": size, "eos_token_id": 2})
    place = save_folder(wide, folder / "source")
    tokenizer.save(str(place / "tokenizer.json"))
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    source = open_model(place)
    return save(folder / "other.hasten", pack_model(source, Recipe.parse("w4")), source, {})


def test_a_sentencepiece_tokenizer(tmp_path: Path) -> None:
    folder = save_folder(
        replace(TINY["llama"], settings={**TINY["llama"].settings, "vocab_size": 700, "eos_token_id": 2}),
        tmp_path / "source",
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    plain = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    (folder / "tokenizer.model").write_bytes(sentencepiece_model("bpe", 700, byte_fallback=True, **plain))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    source = open_model(folder)
    artifact = save(tmp_path / "sp.hasten", pack_model(source, Recipe.parse("w4")), source, {})
    written = export(artifact, "gguf", tmp_path / "out.gguf")
    copy, ours = open_model(written.path).tokenizer(), Tokenizer.load(artifact)
    for text in ("The quick brown fox", "a  b\u00e9\u4f60", "def f():\n    return 1"):
        assert copy.encode(text) == ours.encode(text)
        assert copy.decode(copy.encode(text)) == ours.decode(ours.encode(text))


def test_a_pre_tokenizer_without_a_name_is_refused(tmp_path: Path) -> None:
    artifact = with_tokenizer(tmp_path, byte_level(r"[a-z]+|\s+"), {"eos_token": None})
    with pytest.raises(TokenizerError, match="no known name stands for splitting by"):
        export(artifact, "gguf", tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("llama-dynamic", "rope scaling of the kind dynamic"),
        ("mistral", "mixer.window"),
        ("qwen2-sliding", "mixer.window"),
        ("gemma3-capped", "mixer.(scale|softcap|window)"),
        ("phi3-sliding", "mixer.window"),
        ("llama-yarn-mscale", "rope frequencies"),
    ],
)
def test_what_the_format_cannot_say_is_refused(name: str, what: str, tmp_path: Path) -> None:
    folder = make(tmp_path, name, Recipe.parse("w8"))
    with pytest.raises(UsageError, match=what) as refused:
        export(folder, "gguf", tmp_path / "out.gguf")
    assert "gguf cannot carry" in refused.value.message and refused.value.hint
    assert not (tmp_path / "out.gguf").exists()


def test_an_artifact_out_of_a_gguf_file_goes_back(tmp_path: Path) -> None:
    write_gguf(TINY["llama-wide"], tmp_path / "in.gguf", "Q4_0")
    source = open_model(tmp_path / "in.gguf")
    folder = save(tmp_path / "a.hasten", pack_model(source, Recipe("source")), source, {})
    written = export(folder, "gguf", tmp_path / "out.gguf")
    first, second = stored(tmp_path / "in.gguf"), stored(written.path)
    for key, values in first[0].items():
        np.testing.assert_array_equal(values, second[0][key], err_msg=key)


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    folder = make(tmp_path, "llama", Recipe.parse("w4"))
    out = tmp_path / "out.gguf"
    out.write_bytes(b"precious")
    with pytest.raises(DiskError, match="is there already"):
        export(folder, "gguf", out)
    assert out.read_bytes() == b"precious"
    export(folder, "gguf", out, force=True)
    assert open_model(out).config.architecture == "llama"
    with pytest.raises(UsageError, match="is a folder"):
        export(folder, "gguf", tmp_path)


def test_int8_keys_and_values_are_told(tmp_path: Path) -> None:
    written = export(make(tmp_path, "llama", Recipe.parse("w4-kv8")), "gguf", tmp_path / "out.gguf")
    assert any("keys and values" in note for note in written.notes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3", "phi3", "smollm3", "olmo2"])
def test_llama_cpp_says_the_same(name: str, tmp_path: Path) -> None:
    python = os.environ.get("HASTEN_PEER_PYTHON")
    if not python:
        pytest.skip("HASTEN_PEER_PYTHON names no interpreter that has llama_cpp")
    folder = make(tmp_path, name, Recipe.parse("bf16"))
    written = export(folder, "gguf", tmp_path / "out.gguf")
    ids, text = prompts(1)[0], "the man in the inn<|end|> and so on"
    (tmp_path / "ids.json").write_text(json.dumps({"ids": ids, "texts": [text]}))
    script = Path(__file__).parent / "peer_logits.py"
    places = [str(written.path), str(tmp_path / "ids.json"), str(tmp_path / "out.npy")]
    done = subprocess.run([python, str(script), "llama", *places], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    ours, theirs = hasten.load(folder).logits(np.array(ids, np.int32)), np.load(tmp_path / "out.npy")
    assert np.abs(ours - theirs).max() < 0.1 * ours.std()
    assert json.loads(done.stdout.splitlines()[-1])["tokens"] == [
        Tokenizer.load(folder).encode(text, add_special=False)
    ]
