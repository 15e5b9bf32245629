"""The fingerprint: one for the same bits however they were loaded, another for anything that differs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hasten
from hasten.core import EngineOptions, Recipe
from hasten.engine.loaded import fingerprint
from hasten.engine.model import LanguageModel, load_packed
from hasten.models.artifact import save
from hasten.models.open import open_model
from hasten.weights.packed import PackedLinear, pack_model

OPTIONS = EngineOptions(threads=1, context=64, max_sequences=1)


def packed(folder: Path, recipe: str = "w4") -> LanguageModel:
    source = open_model(folder)
    return load_packed(pack_model(source, Recipe.parse(recipe), 1), source, OPTIONS)


def artifact(folder: Path, to: Path) -> Path:
    source = open_model(folder)
    return save(to, pack_model(source, Recipe.parse("w4"), 1), source, {})


def test_packed_now_or_read_from_an_artifact(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    made = artifact(tiny_folder("qwen3"), tmp_path / "a.hasten")
    loaded = hasten.load(made, options=EngineOptions(threads=2, context=32))
    assert all(linear.checksum for linear in loaded.packed.linears.values())
    assert fingerprint(loaded) == fingerprint(packed(tiny_folder("qwen3"))) == fingerprint(loaded)


def test_an_artifact_without_checksums_of_tensors(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    made = artifact(tiny_folder("qwen3"), tmp_path / "a.hasten")
    plan = json.loads((made / "plan.json").read_text())
    plan["schema_version"] = 1  # the first artifacts had neither these nor a sum of the description
    del plan["artifact"]["tensors"], plan["artifact"]["sha256"]
    (made / "plan.json").write_text(json.dumps(plan))
    assert fingerprint(hasten.load(made, options=OPTIONS)) == fingerprint(packed(tiny_folder("qwen3")))


def test_anything_else_is_another(
    tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_folder("qwen3")
    model = packed(folder)
    seen = {fingerprint(model), fingerprint(packed(folder, "w8")), fingerprint(packed(folder, "w4-kv8"))}
    seen.add(fingerprint(packed(tiny_folder("llama"))))

    other = Path(shutil.copytree(folder, tmp_path / "other"))  # another chat template
    settings: dict[str, Any] = json.loads((other / "tokenizer_config.json").read_text())
    settings["chat_template"] += " "
    (other / "tokenizer_config.json").write_text(json.dumps(settings))
    seen.add(fingerprint(packed(other)))

    old = model.packed.linears["layers.1.up"]  # one bit of one matrix
    data = old.data.copy()
    data[17] ^= 1
    model.replace("layers.1.up", PackedLinear(old.layout, old.rows, old.cols, data))
    seen.add(fingerprint(model))
    norm = model.packed.vectors["layers.0.attn_norm"]
    model.packed.vectors["layers.0.attn_norm"] = norm + np.float32(1e-3)
    seen.add(fingerprint(model))
    monkeypatch.setattr(hasten, "__version__", "0.0")
    seen.add(fingerprint(model))
    monkeypatch.setattr(model.executor, "name", "other")
    seen.add(fingerprint(model))
    assert len(seen) == 9
