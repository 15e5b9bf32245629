"""Models quantised layer by layer: what comes out, and that it can be stopped anywhere."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_models
from hasten import _native
from hasten.compress.calibration import Calibration, work_key
from hasten.compress.quantise.layerwise import CalibratedLinears, quantise
from hasten.compress.quantise.statistics import HEAD, StagedLayer, Statistics, settle
from hasten.compress.stream import Stream, stream_weights
from hasten.compress.torch_model import changed, tensor_values, write_state
from hasten.core import Format, Recipe
from hasten.engine.model import LanguageModel, load_packed
from hasten.errors import DiskError, ModelError, UsageError
from hasten.models.artifact import load_artifact, save
from hasten.models.open import open_folder
from hasten.models.source import Source
from hasten.weights import FORMATS
from hasten.weights.packed import PackedModel, pack_linear, pack_model

METHODS = ("w4-hqq", "w4-gptq", "w4-awq", "w4-awq-gptq", "w4-best")


def opened(name: str, folder: Path) -> Source:
    return open_folder(tiny_models.save_folder(tiny_models.TINY[name], folder))


def text(seed: int = 0, count: int = 12) -> Calibration:
    ids = np.random.default_rng(seed).integers(0, tiny_models.VOCAB - 1, (count, 64)).astype(np.int32)
    return Calibration("random", ids)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def divergence(source: Source, packed: PackedModel) -> float:
    """Mean KL to the source in bf16 on tokens that no method has seen."""
    reference = load_packed(pack_model(source, Recipe.parse("bf16")), source)
    model = load_packed(packed, source)
    ids = text(seed=9, count=6).ids

    def log_probabilities(one: LanguageModel) -> np.ndarray:
        logits = np.concatenate([one.logits(row) for row in ids]).astype(np.float64)
        return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)

    p, q = log_probabilities(reference), log_probabilities(model)
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


def vector(source: Source, name: str) -> np.ndarray:
    return tensor_values(source.tensors[name]).numpy()


def same(one: PackedModel, other: PackedModel) -> bool:
    linears = all(np.array_equal(one.linears[n].data, other.linears[n].data) for n in one.linears)
    return linears and all(np.array_equal(one.vectors[n], other.vectors[n]) for n in one.vectors)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_closer_than_rounding(name: str, tmp_path: Path) -> None:
    source = opened("qwen2", tmp_path)
    recipe = replace(Recipe.parse(name), head=Format.of(8))
    found = quantise(source, recipe, text())
    assert set(found.linears) == {n for n, t in source.tensors.items() if len(t.shape) == 2}
    assert {n: str(one.layout) for n, one in found.linears.items() if n != "embed"} == {
        n: str(recipe.layout_for(n)) for n in found.linears if n != "embed"
    }
    plain = divergence(source, pack_model(source, Recipe.parse("w4-head8")))
    limit = {"w4-hqq": 1.05, "w4-best": 0.8}.get(name, 0.95)
    assert divergence(source, found) < limit * plain


@pytest.mark.parametrize("name", ["llama", "gemma3", "olmo2", "qwen3", "phi3"])
@pytest.mark.parametrize("method", ["awq-gptq", "best"])
def test_every_architecture_keeps_its_output(name: str, method: str, tmp_path: Path) -> None:
    source = opened(name, tmp_path)
    recipe = replace(Recipe.parse("w6-head8"), method=method)  # 4 bits make noise of some of these
    plain = divergence(source, pack_model(source, Recipe.parse("w6-head8")))
    assert divergence(source, quantise(source, recipe, text())) < 1.3 * plain  # a wrong fold: ten times


@pytest.mark.parametrize("method", ["hqq", "awq-gptq", "best"])
def test_small_floats_among_integers_are_rounded_to_the_nearest(method: str, tmp_path: Path) -> None:
    """Commands refuse such a recipe; no method may take 8-bit floats for integers all the same."""
    source = opened("qwen2", tmp_path)
    names = {"layers.0.o": "fp8-e4m3", "layers.1.up": "mxfp4", "embed": "mxfp4"}
    layers = {name: FORMATS[layout] for name, layout in names.items()}
    found = quantise(source, Recipe("r", Format.of(4), layers=layers, method=method), text())
    assert {name: one.layout.name for name, one in found.linears.items() if one.layout.table} == names
    for name in ("embed",) if "awq" in method else names:  # AWQ scales the others first
        wanted = pack_linear(source.tensors[name], layers[name])
        assert np.array_equal(found.linears[name].data, wanted.data), name


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", ["rtn", "hqq", "awq", "gptq", "awq-gptq", "best"])
def test_layers_narrower_than_their_group(method: str, symmetric: bool, tmp_path: Path) -> None:
    """64 and 96 inputs under groups of 128: one group holds a row, filled up as plain rounding does."""
    source = opened("qwen2", tmp_path)
    assert max(cols for _, cols in source.config.linear_shapes().values()) < 128
    recipe = replace(Recipe("r", Format.of(4, 128, symmetric), Format.of(8, 128, symmetric)), method=method)
    plain = divergence(source, pack_model(source, replace(recipe, method="rtn")))
    found = quantise(source, recipe, text())
    for name, one in found.linears.items():
        assert (one.rows, one.cols) == source.tensors[name].shape
        assert one.bytes == one.layout.bytes_of(one.rows, one.cols)
    assert divergence(source, found) < 1.1 * plain
    folder = save(tmp_path / "m.hasten", found, source, {})
    assert same(load_artifact(folder).packed, found)


def test_other_weights_are_other_work(tmp_path: Path) -> None:
    """In an F32 file of what was bf16, half the bytes are 0: a sample of every 16th would see nothing."""
    folder = tiny_models.save_folder(tiny_models.TINY["llama-wide"], tmp_path)
    tensors = load_file(folder / "model.safetensors")
    rounded = {name: tensor.bfloat16().float() for name, tensor in tensors.items()}
    keys = set()
    for turn in range(2):
        rounded["model.layers.0.self_attn.q_proj.weight"] *= 1 - 2 * turn  # the signs
        save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})
        source = open_folder(folder)
        assert source.tensors["layers.0.q"].dtype == "F32"
        keys.add(Statistics(source, text()).folder.name)
        assert work_key(source, text(), "x") == work_key(open_folder(folder), text(), "x")
        assert work_key(source, text(), "x") not in {
            work_key(source, None, "x"),
            work_key(source, text(), "y"),
        }
    assert len(keys) == 2


def test_a_model_is_read_once_for_its_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = opened("qwen2", tmp_path)
    read: list[int] = []
    real = _native.checksums
    monkeypatch.setattr(
        "hasten.weights.tensors._native",
        SimpleNamespace(checksums=lambda data, *more: read.append(data.size) or real(data, *more)),
    )
    quantise(source, Recipe.parse("w4-best"), text(), folder=tmp_path / "work")
    CalibratedLinears(source, text())
    assert sum(read) == sum(tensor.data.size for tensor in source.tensors.values())


def test_kept_work_of_another_version_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, recipe, work = opened("qwen2", tmp_path), Recipe.parse("w4-best"), tmp_path / "work"
    whole = quantise(source, recipe, text(), folder=work)
    for path in [*work.rglob("*.pt"), *(tmp_path / "cache").rglob("layer-*.pt")]:
        write_state(path, "another 7", {"x": torch.zeros(3)})
    assert same(quantise(source, recipe, text(), folder=work), whole)


def test_a_mixture_keeps_each_layers_layout_and_the_sources_values(tmp_path: Path) -> None:
    source = opened("qwen2", tmp_path)
    layers = {
        "layers.0.down": Format.of(6),
        "layers.1.q": Format.of(16),
        "embed": Format.of(5, symmetric=False),
    }
    recipe = Recipe("mixed", default=None, layers=layers, method="best")
    found = quantise(source, recipe, text())
    plain = pack_model(source, replace(recipe, method="rtn"))
    for name, one in found.linears.items():
        assert one.layout == plain.linears[name].layout, name
        if name not in ("layers.0.down", "embed"):
            np.testing.assert_array_equal(one.data, plain.linears[name].data)
    assert not np.array_equal(found.linears["layers.0.down"].data, plain.linears["layers.0.down"].data)
    assert not np.array_equal(found.linears["embed"].data, plain.linears["embed"].data)


def test_smoothing_goes_with_methods(tmp_path: Path) -> None:
    source = opened("qwen2", tmp_path)
    for method in ("rtn", "gptq", "best"):
        rough, smooth = (replace(Recipe.parse("w8"), method=method, smooth=by) for by in (None, 0.5))
        found = quantise(source, smooth, text())
        assert not np.array_equal(found.vectors["layers.0.attn_norm"], vector(source, "layers.0.attn_norm"))
        assert divergence(source, found) < 2 * divergence(source, quantise(source, rough, text()))


class Stopped(Exception):
    pass


@pytest.mark.parametrize("name", ["w4-best", "w4-gptq"])
@pytest.mark.parametrize("lost", [False, True])
def test_stopped_at_any_layer_it_goes_on_to_the_same_bytes(name: str, lost: bool, tmp_path: Path) -> None:
    source, recipe, work = opened("qwen2", tmp_path), Recipe.parse(name), tmp_path / "work"
    whole = quantise(source, recipe, text())
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    for stop in range(1, len(source.config.blocks) + 2):

        def observer(done: int, total: int, now: str, stop: int = stop) -> None:
            if now.startswith(("layer", "the head")) and done == stop:
                raise Stopped

        if stop <= len(source.config.blocks):
            with pytest.raises(Stopped):
                quantise(source, recipe, text(), observer=observer, folder=work)
        if lost:  # the streams were not written: layers are run again
            for path in work.rglob("streams.pt"):
                path.unlink()
    assert same(quantise(source, recipe, text(), folder=work), whole)
    assert len(list(work.rglob("layer-*.pt"))) == len(source.config.blocks) + 1


def test_what_was_kept_of_another_text_or_model_is_not_used(tmp_path: Path) -> None:
    source, recipe, work = opened("qwen2", tmp_path), Recipe.parse("w4-best"), tmp_path / "work"
    first = quantise(source, recipe, text(), folder=work)
    assert not same(quantise(source, recipe, text(seed=1), folder=work), first)
    halved = {"layers.1.down": tensor_values(source.tensors["layers.1.down"]) / 2}
    assert not same(quantise(changed(source, halved), recipe, text(), folder=work), first)
    assert same(quantise(source, recipe, text(), folder=work), first)
    for path in work.rglob("layer-1.pt"):
        path.write_bytes(path.read_bytes()[:100])  # torn
    assert same(quantise(source, recipe, text(), folder=work), first)


def test_statistics_are_those_of_the_inputs(tmp_path: Path) -> None:
    source = opened("qwen2", tmp_path)
    found = Statistics(source, text())
    found.collect()
    stream = Stream.of(source, text())
    for index in range(len(source.config.blocks)):
        weights = stream_weights(source, index)
        x = StagedLayer(stream, index).inputs("qkv", weights).flatten(0, 1)
        gram = found.layer(index).grams["qkv"]
        torch.testing.assert_close(gram, x.T @ x / len(x), rtol=1e-2, atol=2e-3 * float(gram.abs().max()))
        torch.testing.assert_close(found.layer(index).maxima["qkv"], x.abs().amax(0))
        plain = Stream(stream.name, stream.config, stream.x.clone(), stream.positions)
        settle(StagedLayer(stream, index), weights)
        plain.advance(index, weights)
        torch.testing.assert_close(stream.x, plain.x, rtol=1e-4, atol=1e-4)
    assert found.layer(len(source.config.blocks)).grams[HEAD].shape == (64, 64)


def test_statistics_are_read_once_and_again_where_a_file_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, told = opened("qwen2", tmp_path), []
    first = Statistics(source, text())
    first.collect(lambda done, total, now: told.append(done))
    assert told == [0, 1, 2, 3]
    first.collect(lambda done, total, now: told.append(done))
    assert len(told) == 4
    before = first.layer(1).grams["down"].clone()
    (first.folder / "layer-1.pt").write_bytes(b"torn")
    again = Statistics(source, text())
    again.collect(lambda done, total, now: told.append(done))
    assert told[4:] == [1, 2, 3]
    torch.testing.assert_close(again.layer(1).grams["down"], before)


def test_single_matrices_are_found_once(tmp_path: Path) -> None:
    source = opened("qwen2", tmp_path)
    linears = CalibratedLinears(source, text())
    for name in ("layers.0.q", "layers.2.down", "embed"):
        for layout in (Format.of(4), Format.of(5), Format.of(4, symmetric=False)):
            found = linears.linear(name, layout)
            assert found.layout == layout
            read = CalibratedLinears(source, text()).linear(name, layout)
            np.testing.assert_array_equal(read.data, found.data)
    assert linears.linear("layers.0.q", Format.of(8)).layout == Format.of(8)
    whole = quantise(source, Recipe.parse("w4-gptq"), text())
    for name in ("layers.0.q", "layers.2.down", "embed"):
        np.testing.assert_array_equal(linears.linear(name, Format.of(4)).data, whole.linears[name].data)


@pytest.mark.parametrize("name", ["w4-best", "w4-gptq"])
def test_activations_that_are_not_finite_name_the_layer(name: str, tmp_path: Path) -> None:
    source = opened("qwen2", tmp_path)
    huge = tensor_values(source.tensors["layers.1.gate"]) * 1e38
    with pytest.raises(ModelError, match=r"layers\.1") as refused:
        quantise(changed(source, {"layers.1.gate": huge}), Recipe.parse(name), text())
    assert refused.value.hint


def test_no_text_is_refused(tmp_path: Path) -> None:
    source = opened("qwen2", tmp_path)
    for recipe in (Recipe.parse("w4-gptq"), replace(Recipe.parse("w8"), smooth=0.5)):
        with pytest.raises(UsageError, match="needs calibration text"):
            quantise(source, recipe, None)


def test_a_full_disk_leaves_what_was_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, recipe, work = opened("qwen2", tmp_path), Recipe.parse("w4-best"), tmp_path / "work"
    writes = []

    def full(path: Path, data: object) -> Path:
        writes.append(path)
        if len(writes) > 3:
            raise DiskError(f"{path}: no space left on device", hint="free some space")
        return write_atomic(path, data)  # type: ignore[arg-type]

    from hasten.cache import write_atomic

    monkeypatch.setattr("hasten.compress.torch_model.write_atomic", full)
    with pytest.raises(DiskError):
        quantise(source, recipe, text(), folder=work)
    monkeypatch.undo()
    assert same(quantise(source, recipe, text(), folder=work), quantise(source, recipe, text()))
