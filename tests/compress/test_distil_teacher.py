"""The teacher's states on disk: computed once, checked, gone on with after a kill."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny_models
from hasten.compress import distil as module
from hasten.compress.calibration import Calibration
from hasten.compress.distil import CachedTeacher, cached_teacher, live_teacher
from hasten.compress.torch_model import changed, tensor_values
from hasten.errors import DiskError, ModelError
from hasten.models.open import open_folder
from hasten.models.source import Source
from hasten.runtime.reference import ReferenceDecoder
from hasten.weights.tensors import SourceTensor
from specs import changed as spec_changed

CPU = torch.device("cpu")
TEXT = Calibration("noise", np.random.default_rng(0).integers(0, 262, (7, 16)).astype(np.int32))
EVERY = np.arange(7)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("teacher")
    return open_folder(tiny_models.save_folder(tiny_models.TINY["qwen2"], folder))


@pytest.fixture(autouse=True)
def two_windows_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_TOKENS", 32)


def kept(source: Source, folder: Path, dtype: torch.dtype = torch.float32) -> CachedTeacher:
    return cached_teacher(source, TEXT, folder, dtype, CPU, batch_tokens=32)


def without_layers(source: Source) -> Source:
    """The same model, whose layers give their bytes to a digest and then no more."""

    def closed(tensor: SourceTensor) -> SourceTensor:
        data, reads = tensor.data, [0]

        def read() -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
            reads[0] += 1
            assert reads[0] == 1, f"{tensor.name} was read"
            return data

        return replace(tensor, data=read)  # type: ignore[arg-type]

    layers = {k: closed(t) if k.startswith("layers.") else t for k, t in source.tensors.items()}
    return replace(source, tensors=layers)


def test_states_and_logits_are_the_reference_decoders(source: Source, tmp_path: Path) -> None:
    tensors = {key: tensor_values(tensor).numpy() for key, tensor in source.tensors.items()}
    reference = ReferenceDecoder(source.config, tensors)
    found = kept(source, tmp_path)
    rows = np.array([5, 0, 6])
    states = found.hidden(rows)
    assert states.shape == (3, 16, source.config.width)
    for row, state in zip(rows, states, strict=True):
        wanted = reference.hidden(TEXT.ids[row])
        np.testing.assert_allclose(state, wanted, rtol=2e-4, atol=2e-4)
        np.testing.assert_allclose(found.logits(state), reference.logits_of(wanted), rtol=1e-3, atol=1e-3)
    live = live_teacher(source, TEXT, torch.float32, CPU)
    torch.testing.assert_close(live.hidden(rows), states)


def test_a_second_time_no_layer_is_read(source: Source, tmp_path: Path) -> None:
    first = kept(source, tmp_path).hidden(EVERY)
    torch.testing.assert_close(kept(without_layers(source), tmp_path).hidden(EVERY), first, rtol=0, atol=0)
    with pytest.raises(AssertionError, match="was read"):
        kept(without_layers(source), tmp_path / "elsewhere")


def test_bf16_states_are_kept_as_bf16(source: Source, tmp_path: Path) -> None:
    exact, half = kept(source, tmp_path), kept(source, tmp_path, torch.bfloat16)
    assert half.hidden(EVERY).dtype == torch.bfloat16
    assert half.shards[0] != exact.shards[0]
    assert half.shards[0].stat().st_size < 0.51 * exact.shards[0].stat().st_size
    torch.testing.assert_close(half.hidden(EVERY).float(), exact.hidden(EVERY), rtol=0.1, atol=0.1)


def test_only_what_is_missing_or_damaged_is_made_again(source: Source, tmp_path: Path) -> None:
    found = kept(source, tmp_path)
    states = found.hidden(EVERY)
    assert len(found.shards) == 4
    whole = found.shards[0].stat().st_mtime_ns
    found.shards[1].unlink()
    found.shards[2].write_bytes(found.shards[2].read_bytes()[:-9])
    data = bytearray(found.shards[3].read_bytes())
    data[17] ^= 1
    found.shards[3].write_bytes(data)
    again = kept(source, tmp_path)
    torch.testing.assert_close(again.hidden(EVERY), states, rtol=0, atol=0)
    assert found.shards[0].stat().st_mtime_ns == whole


def test_a_run_that_was_killed_goes_on(source: Source, tmp_path: Path) -> None:
    def kill(done: int, total: int) -> None:
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_teacher(source, TEXT, tmp_path, torch.float32, CPU, step=kill)
    assert len(list(tmp_path.rglob("*.states"))) == 2
    told: list[tuple[int, int]] = []
    cached_teacher(source, TEXT, tmp_path, torch.float32, CPU, step=lambda *at: told.append(at))
    assert told == [(4, 7), (6, 7), (7, 7)]


def test_other_values_or_text_are_another_teacher(source: Source) -> None:
    other = changed(source, {"layers.1.o": tensor_values(source.tensors["layers.1.o"]) * 1.001})
    assert other.content != source.content
    assert replace(source, name="renamed").content == source.content
    assert replace(source, config=spec_changed(source.config, rope_theta=1.0)).content != source.content
    assert TEXT.sha256 != Calibration("noise", TEXT.ids[::-1]).sha256


def test_states_that_are_not_finite_are_refused(source: Source, tmp_path: Path) -> None:
    bad = tensor_values(source.tensors["layers.1.o"])
    bad[0, 0] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        kept(changed(source, {"layers.1.o": bad}), tmp_path)
    assert not list(tmp_path.rglob("*.states"))


def test_a_full_disk_is_said(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match="No space left") as refused:
        kept(source, tmp_path)
    assert refused.value.hint
    monkeypatch.undo()
    monkeypatch.setattr(module, "SHARD_TOKENS", 32)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    kept(source, tmp_path)
