"""The batched torch layer against the plain decoder, on every architecture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import tiny_models
from hasten.compress.calibration import cut
from hasten.compress.torch_model import Positions, changed, layer_forward, layer_weights, tensor_values
from hasten.errors import UsageError
from hasten.models.open import open_folder
from hasten.models.source import Source
from hasten.runtime.reference import ReferenceDecoder

NAMES = sorted(tiny_models.TINY)


def hidden(source: Source, ids: np.ndarray) -> torch.Tensor:
    """All layers one after another, as calibration runs them: float32 [B, T, E] before the final norm."""
    config = source.config
    x = tensor_values(source.tensors["embed"])[torch.as_tensor(ids).long()] * config.embedding.scale
    positions = Positions.of(config, ids.shape[1])
    for index in range(len(config.blocks)):
        x = layer_forward(config, index, layer_weights(source, index), x, positions)
    return x


@pytest.mark.parametrize("name", NAMES)
def test_layers_equal_the_reference_decoder(name: str, tmp_path: Path) -> None:
    source = open_folder(tiny_models.save_folder(tiny_models.TINY[name], tmp_path))
    ids = np.random.default_rng(0).integers(0, tiny_models.VOCAB - 1, (2, 40)).astype(np.int32)
    tensors = {key: tensor_values(tensor).numpy() for key, tensor in source.tensors.items()}
    reference = ReferenceDecoder(source.config, tensors)
    norm = tensor_values(source.tensors["final_norm"])
    ours = torch.nn.functional.rms_norm(hidden(source, ids), norm.shape, norm, source.config.final_norm.eps)
    for row, sequence in enumerate(ids):
        np.testing.assert_allclose(ours[row], reference.hidden(sequence), rtol=2e-4, atol=2e-4)


def test_changed_tensors_are_read_anew_and_keep_their_type(tmp_path: Path) -> None:
    source = open_folder(tiny_models.save_folder(tiny_models.TINY["qwen2"], tmp_path))
    calls = []

    def twice() -> torch.Tensor:
        calls.append(1)
        return tensor_values(source.tensors["layers.0.q"]) * 2

    kept = torch.full(source.tensors["layers.0.o"].shape, 0.5, dtype=torch.bfloat16)
    new = changed(source, {"layers.0.q": twice, "layers.0.o": kept})
    assert not calls
    torch.testing.assert_close(tensor_values(new.tensors["layers.0.q"]), twice())
    assert len(calls) == 2
    assert new.tensors["layers.0.o"].dtype == "BF16"
    assert (tensor_values(new.tensors["layers.0.o"]) == 0.5).all()
    assert new.tensors["layers.1.q"] is source.tensors["layers.1.q"]


def test_calibration_is_cut_into_windows_and_too_little_is_refused(tmp_path: Path) -> None:
    tokenizer = open_folder(tiny_models.save_folder(tiny_models.TINY["qwen2"], tmp_path)).tokenizer()
    found = cut("words", "some words and more of them. " * 200, tokenizer, tokens=4096, length=256)
    assert found.ids.shape == (16, 256)
    again = cut("words", "some words and more of them. " * 200, tokenizer, tokens=4096, length=256)
    assert found.sha256 == again.sha256
    with pytest.raises(UsageError, match="too few") as refused:
        cut("words", "few", tokenizer)
    assert refused.value.hint is not None
    with pytest.raises(UsageError, match="0 tokens"):
        cut("nothing", "", tokenizer)
