"""Types of GGUF files that weights are rounded to: k-quants, llama.cpp's mixtures, one step from a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_export_gguf import stored

import hasten
from hasten import _native
from hasten.core import Recipe
from hasten.errors import DiskError, UsageError
from hasten.export import FORMATS, Target, export, target
from hasten.export.gguf import FILE_TYPES, _Tensor
from hasten.loading import convert
from hasten.models.open import open_model
from specs import changed
from tiny_artifacts import make, values_of
from tiny_models import TINY, save_folder

K_QUANTS = {"Q4_K": 0.073, "Q5_K": 0.0375, "Q6_K": 0.0175}
"""Relative error of normally distributed weights, at most; without a search for scales it is more."""


def read_back(values: np.ndarray, kind: str, threads: int = 1) -> np.ndarray:
    data = _native.quantize_ggml(values, kind, threads)
    return _native.dequantize_ggml(data.reshape(-1), kind, values.size, 1).reshape(values.shape)


@pytest.mark.parametrize("kind", K_QUANTS)
def test_k_quants_are_near(kind: str) -> None:
    values = np.random.default_rng(3).normal(0, 0.02, (9, 512)).astype(np.float32)
    found = read_back(values, kind)
    assert np.linalg.norm(found - values) < K_QUANTS[kind] * np.linalg.norm(values)
    np.testing.assert_array_equal(found, read_back(values, kind, 3))


@pytest.mark.parametrize("kind", K_QUANTS)
def test_k_quants_of_values_that_are_not_spread(kind: str) -> None:
    rng = np.random.default_rng(4)
    near = {"Q4_K": 0.05, "Q5_K": 0.03, "Q6_K": 0.025}[kind]
    kinds = {
        "zeros": np.zeros(256),
        "one value": np.full(256, 0.5),
        "one negative value": np.full(256, -0.5),
        "all above zero": rng.uniform(0.5, 1.0, 256),
        "all below zero": rng.uniform(-1.0, -0.5, 256),
        "groups of very different sizes": rng.uniform(0.5, 1.0, 256) * np.repeat(2.0 ** -np.arange(8), 32),
        "tiny": rng.uniform(0.5, 1.0, 256) * 1e-3,
    }
    for name, values in kinds.items():
        wanted = values.astype(np.float32)[None]
        found = read_back(wanted, kind)
        assert np.abs(found - wanted).max() <= near * np.abs(wanted).max(), name


@pytest.mark.parametrize("kind", K_QUANTS)
def test_k_quants_of_k_quants_stay(kind: str) -> None:
    """Values that a type holds are found again, nearly all of them."""
    values = read_back(np.random.default_rng(5).normal(size=(8, 256)).astype(np.float32), kind)
    assert np.linalg.norm(read_back(values, kind) - values) < 0.3 * K_QUANTS[kind] * np.linalg.norm(values)


def test_what_is_no_k_quant_is_refused() -> None:
    values = np.zeros((2, 256), np.float32)
    for kind in ("Q3_K", "Q8_0", "nonsense"):
        with pytest.raises(ValueError, match=r"not written|unknown dtype"):
            _native.quantize_ggml(values, kind, 1)
    with pytest.raises(ValueError, match="multiple of 256"):
        _native.quantize_ggml(values[:, :64].copy(), "Q4_K", 1)


def test_the_registry_and_the_exporter_know_the_same_types() -> None:
    assert set(FORMATS["gguf"].types) == set(FILE_TYPES)


def test_better_types_lie_where_llama_cpp_has_them(tiny_folder) -> None:
    """Layers as llama.cpp's own files of 24 layers have them."""
    spec = changed(open_model(tiny_folder("llama")).config, num_layers=24)

    def better(type: str, part: str) -> list[int]:
        kinds = [FILE_TYPES[type].kind_of(_Tensor(f"blk.{i}.{part}.weight", "", (), 1, 1), spec)
                 for i in range(24)]  # fmt: skip
        return [i for i, kind in enumerate(kinds) if kind != FILE_TYPES[type].kind]

    most = [0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23]
    assert better("q4_k_m", "attn_v") == better("q5_k_m", "ffn_down") == most
    assert better("q4_k_s", "attn_v") == [0, 1, 2, 3] and better("q4_k_s", "ffn_down") == [0, 1, 2]
    assert better("q4_k_m", "attn_q") == better("q5_k_s", "attn_v") == []


@pytest.mark.parametrize("type", FILE_TYPES)
def test_every_type_from_a_folder_in_one_step(type: str, tmp_path: Path) -> None:
    source = save_folder(TINY["llama-wide"], tmp_path / "source")
    written = convert(source, f"gguf:{type}", tmp_path / "out.gguf")
    values, kinds = stored(written.path)
    kind = FILE_TYPES[type].kind
    assert kinds["layers.1.q"] == kinds["layers.0.gate"] == kind and kinds["head"] == FILE_TYPES[type].head
    assert {one.tensor for one in written.rounding} == (
        set() if type == "bf16" else {f"{one}.weight" for one in gguf_names()}
    )
    floats = hasten.load(source, "bf16", store=False).packed.linears
    for key, linear in floats.items():
        wanted = values_of(linear)
        off = np.linalg.norm(values[key] - wanted) / np.linalg.norm(wanted)
        assert off == 0 if type == "bf16" else 0 < off < 0.1, key
    assert open_model(written.path).metadata["general.file_type"] == FILE_TYPES[type].number


def gguf_names() -> list[str]:
    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    return ["token_embd", "output", *(f"blk.{layer}.{part}" for layer in (0, 1) for part in parts)]


def test_rows_that_blocks_do_not_divide_fall_back_and_it_is_told(tmp_path: Path) -> None:
    source = save_folder(TINY["qwen2"], tmp_path / "source")  # 64 wide, 96 in the middle
    written = convert(source, "gguf:q4_k_m", tmp_path / "out.gguf")
    _, kinds = stored(written.path)
    assert kinds["layers.0.q"] == "Q5_0" and kinds["embed"] == "Q8_0"  # which is the head
    assert any("blocks of q4_k_m do not divide: they are Q5_0, Q8_0" in note for note in written.notes)


def test_values_that_a_type_holds_are_copied(tmp_path: Path) -> None:
    first = convert(save_folder(TINY["llama-wide"], tmp_path / "source"), "gguf:q8_0", tmp_path / "a.gguf")
    again = convert(first.path, "gguf:q8_0", tmp_path / "b.gguf")
    assert again.is_exact and not again.rounding
    for key, values in stored(first.path)[0].items():
        np.testing.assert_array_equal(values, stored(again.path)[0][key], err_msg=key)


def test_an_artifact_is_rounded_too(tmp_path: Path) -> None:
    """A pruned or distilled model, say, that was kept in bf16."""
    written = export(make(tmp_path, "llama-wide", Recipe.parse("bf16")), "gguf:q6_k", tmp_path / "out.gguf")
    assert written.carried == {"Q6_K": 16}


def test_a_recipe_behind_the_colon(tmp_path: Path) -> None:
    source = save_folder(TINY["llama-wide"], tmp_path / "source")
    written = convert(source, "gguf:w4-head8", tmp_path / "out.gguf")
    assert written.is_exact and written.carried == {"Q4_0": 14, "Q8_0": 2}
    folder = convert(source, "compressed-tensors:w8", tmp_path / "folder")
    assert "int8-g32" in folder.carried


def test_target() -> None:
    assert target("gguf") == Target("gguf")
    assert target("GGUF:Q4-K-M") == target("gguf:q4_k_m") == Target("gguf", type="q4_k_m")
    assert target("gguf:q5_k") == target("gguf:q5_k_m")  # as llama.cpp reads it
    assert target("gptq:w4-g128") == Target("gptq", recipe="w4-g128")
    assert target("gguf:mix:1%") == Target("gguf", recipe="mix:1%")


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("ggfu", "did you mean gguf?"),
        ("ggfu:q4_0", "did you mean gguf?"),
        ("q4_k_m", "did you mean gguf:q4_k_m?"),
        ("gguf:q4_k_n", "did you mean q4_k_m?"),
        ("gguf:Q3_K_M", "did you mean q"),
        ("gptq:q4_k_m", "w4-g128"),
        ("tflite", "formats: gguf, compressed-tensors"),
    ],
)
def test_an_unknown_target_is_refused_with_the_nearest(text: str, hint: str) -> None:
    with pytest.raises(UsageError) as refused:
        target(text)
    assert hint in (refused.value.hint or "")


def test_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is not even looked for."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model-q8_0.gguf").write_bytes(b"precious")
    with pytest.raises(DiskError, match=r"model-q8_0\.gguf is there already"):
        convert("none/model", "gguf:q8_0")
    artifact = make(tmp_path, "llama", Recipe.parse("w4"))
    with pytest.raises(UsageError, match="packed already") as refused:
        convert(artifact, "gguf:w8")
    assert str(tmp_path / "source") in (refused.value.hint or "")
