"""A rotated model computes what it did, on every architecture that can be rotated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny_models
from hasten.compress.quantise.rotate import head_rotation, orthogonal, residual_rotation, rotate
from hasten.compress.torch_model import changed, tensor_values
from hasten.core import Recipe
from hasten.errors import UsageError
from hasten.models.open import open_folder, open_model
from hasten.models.source import Source
from hasten.runtime.reference import ReferenceDecoder
from hasten.weights.packed import pack_model

REFUSED = ("gemma3", "gemma3-capped", "olmo2")
NAMES = sorted(set(tiny_models.TINY) - set(REFUSED))


def opened(name: str, folder: Path) -> Source:
    return open_folder(tiny_models.save_folder(tiny_models.TINY[name], folder))


def reference(source: Source) -> ReferenceDecoder:
    tensors = {name: tensor_values(tensor).numpy() for name, tensor in source.tensors.items()}
    return ReferenceDecoder(source.config, tensors)


def rough_norms(source: Source) -> Source:
    """With norm weights that differ from channel to channel, so that folding them is seen."""
    rng = torch.Generator().manual_seed(9)
    norms = {name: t for name, t in source.tensors.items() if name.endswith(("attn_norm", "mlp_norm"))}
    norms["final_norm"] = source.tensors["final_norm"]
    return changed(source, {name: torch.rand(t.shape, generator=rng) + 0.25 for name, t in norms.items()})


@pytest.mark.parametrize("name", NAMES)
def test_logits_stay(name: str, tmp_path: Path) -> None:
    source = rough_norms(opened(name, tmp_path))
    rotated = rotate(source, seed=3)
    before, after = reference(source), reference(rotated)
    for prompt in tiny_models.prompts():
        wanted = before.logits(prompt)
        np.testing.assert_allclose(after.logits(prompt), wanted, rtol=2e-4, atol=2e-4 * float(wanted.std()))
    assert set(rotated.tensors) == set(source.tensors) | {"head"}


@pytest.mark.parametrize("name", NAMES)
def test_hidden_states_are_turned(name: str, tmp_path: Path) -> None:
    """Before the head, with the norm's weights equal: exactly h Q."""
    source = opened(name, tmp_path)
    source = changed(source, {"final_norm": torch.full(source.tensors["final_norm"].shape, 1.5)})
    rotated = rotate(source)
    assert rotated.config == source.config, "a tied head stays tied where one factor is all there is"
    assert set(rotated.tensors) == set(source.tensors)
    prompt = tiny_models.prompts()[0]
    hidden = reference(source).hidden(prompt)
    scale = 1.0 if source.config.head.tied else 1.5  # an own head takes the factor
    turned = hidden @ residual_rotation(source.config).matrix().numpy() / scale
    ours = reference(rotated).hidden(prompt)
    np.testing.assert_allclose(ours, turned, rtol=2e-4, atol=2e-4 * float(hidden.std()))
    assert float((ours - hidden).std()) > 0.5 * float(hidden.std())


def test_what_turns_and_what_stays(tmp_path: Path) -> None:
    source = opened("llama-odd", tmp_path)  # biases everywhere
    old = {name: tensor_values(tensor).clone() for name, tensor in source.tensors.items()}
    for name, tensor in rotate(source).tensors.items():
        values = tensor_values(tensor)
        if name.endswith("norm"):
            assert bool((values == 1).all())
        elif name.endswith(("q.bias", "k.bias", "gate.bias", "up.bias")):
            assert torch.equal(values, old[name]), name
        else:
            assert float((values - old[name]).std()) > 0.3 * float(old[name].std()), name
    assert all(torch.equal(tensor_values(tensor), old[name]) for name, tensor in source.tensors.items())


def test_values_turn_within_their_head(tmp_path: Path) -> None:
    """Cached values of the rotated model are R2^T times those of the model, head by head."""
    source = opened("qwen2", tmp_path)
    seen: dict[str, np.ndarray] = {}

    def record(name: str, value: np.ndarray) -> np.ndarray:
        if name.endswith(".values"):
            seen[name] = value
        return value

    values = []
    for model in (source, rotate(source)):
        tensors = {name: tensor_values(tensor).numpy() for name, tensor in model.tensors.items()}
        ReferenceDecoder(model.config, tensors, record).logits(tiny_models.prompts()[0])
        values.append(dict(seen))
    for layer in range(len(source.config.blocks)):
        before, after = (found[f"layers.{layer}.values"] for found in values)
        turned = before @ head_rotation(source.config, layer).matrix().numpy()
        np.testing.assert_allclose(after, turned, rtol=2e-4, atol=2e-4 * float(before.std()))


def test_a_tied_head_is_untied_and_packs(tmp_path: Path) -> None:
    source = rough_norms(opened("qwen2", tmp_path))
    assert source.config.head.tied
    rotated = rotate(source)
    assert not rotated.config.head.tied
    embed, head = (tensor_values(rotated.tensors[name]) for name in ("embed", "head"))
    assert not torch.allclose(embed, head, rtol=0.1)
    packed = pack_model(rotated, Recipe.parse("w4-head8"))
    assert packed.linears["head"].layout.bits == 8
    assert packed.linears["layers.0.q"].layout.bits == 4


def test_nothing_is_made_until_it_is_read_and_seeds_differ(tmp_path: Path) -> None:
    source = opened("llama", tmp_path)
    rotated = rotate(source)
    matrices = [tensor for tensor in rotated.tensors.values() if len(tensor.shape) == 2]
    assert all(tensor.is_made for tensor in matrices)
    q = [tensor_values(rotate(source, seed).tensors["layers.0.q"]) for seed in (0, 0, 1)]
    assert torch.equal(q[0], q[1])
    assert not torch.allclose(q[0], q[2], rtol=0.1)


@pytest.mark.parametrize("name", REFUSED)
def test_norms_that_fold_nowhere_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be rotated") as refused:
        rotate(opened(name, tmp_path))
    assert refused.value.hint is not None


def test_offset_norms_fold_as_what_they_are(tmp_path: Path) -> None:
    """A file that holds weight - 1 (as Gemma's do) rotates as one that holds the weight."""
    source = rough_norms(opened("llama", tmp_path))
    norm = source.tensors["layers.1.mlp_norm"]
    less = torch.from_numpy(norm.data.view(np.float32).copy()) - 1
    other = changed(source, {"layers.1.mlp_norm": less})
    tensors = other.tensors | {"layers.1.mlp_norm": replace(other.tensors["layers.1.mlp_norm"], offset=1.0)}
    ours = rotate(replace(other, tensors=tensors)).tensors["layers.1.up"]
    torch.testing.assert_close(tensor_values(ours), tensor_values(rotate(source).tensors["layers.1.up"]))


HADAMARDS = [1, 2, 4, 12, 16, 20, 24, 28, 44, 64, 96, 108, 128, 576, 896, 960, 1536, 2560]


@pytest.mark.parametrize("size", [*HADAMARDS, 3, 22, 66, 7 * 2, 33])
def test_orthogonal(size: int) -> None:
    found = orthogonal(size, 5)
    matrix = found.matrix()
    product = matrix.double() @ matrix.double().T
    torch.testing.assert_close(product, torch.eye(size, dtype=torch.float64), rtol=0, atol=2e-7)
    flat = matrix.abs() * size**0.5
    is_hadamard = bool(((flat - 1).abs() < 1e-5).all())
    assert is_hadamard == (size in HADAMARDS)
    assert is_hadamard != ("no Hadamard" in found.because)
    assert str(size) in found.because
    x = torch.randn(3, 5, 2 * size, generator=torch.Generator().manual_seed(1))
    wanted = (x.view(3, 5, 2, size) @ matrix).view_as(x)
    torch.testing.assert_close(found.turn_(x.clone()), wanted, rtol=0, atol=2e-6 * size**0.5)
    rows = x[0].T.contiguous()
    torch.testing.assert_close(found.turn_rows_(rows.clone()), wanted[0].T, rtol=0, atol=2e-6 * size**0.5)


@pytest.mark.demo
def test_the_demo_model_turns_by_a_hadamard_matrix() -> None:
    source = open_model("demo")
    assert residual_rotation(source.config).because.startswith("896 = 32 x 28: a Hadamard matrix")
    rotated = rotate(source)
    q, k = (tensor_values(rotated.tensors[f"layers.3.{name}"]) for name in "qk")
    old_q, old_k = (tensor_values(source.tensors[f"layers.3.{name}"]) for name in "qk")
    norm = tensor_values(source.tensors["layers.3.attn_norm"])
    torch.testing.assert_close(q @ k.T, (old_q * norm) @ (old_k * norm).T, rtol=1e-3, atol=1e-3)
