"""FFN channels out of every architecture, and the least squares that repair what is left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from hasten.compress.prune.layers import Channels, least_loss
from hasten.compress.stream import Moments, fitted
from hasten.compress.torch_model import changed, tensor_values
from hasten.errors import ModelError, UsageError
from hasten.models.open import open_folder
from hasten.recipe import Pruning
from prune_models import NAMES, distance, taken, text


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_runs_pruned_and_repair_brings_it_nearer(
    name: str, tiny_folder: Callable[..., Path]
) -> None:
    source = open_folder(tiny_folder(name))
    cut, _ = taken("ffn", source, 0.25, text(), repair=False)
    repaired, parts = taken("ffn", source, 0.25, text(), repair=True)
    width = 192 if name == "llama-wide" else 64
    assert cut.config.blocks[0].feed_forward.width == repaired.config.blocks[0].feed_forward.width == width
    assert repaired.tensors["layers.1.down"].shape == (source.config.width, width)
    assert all(
        part.kept == width and part.total == source.config.blocks[0].feed_forward.width for part in parts
    )
    assert all(part.error_after < part.error_before for part in parts)
    ids = text(1).ids[0]
    assert 0 < distance(repaired, source, ids) < distance(cut, source, ids)


def test_channels_that_say_nothing_new_go_without_a_trace(tiny_folder: Callable[..., Path]) -> None:
    """32 of 96 channels repeat others': they go, and the fit adds their columns up."""
    source = open_folder(tiny_folder("llama"))
    doubled = {}
    for layer in range(len(source.config.blocks)):
        for name in ("gate", "up"):
            values = tensor_values(source.tensors[f"layers.{layer}.{name}"])
            values[64:] = values[:32]
            doubled[f"layers.{layer}.{name}"] = values
    source = changed(source, doubled)
    repaired, parts = taken("ffn", source, 1 / 3, text(), repair=True)
    cut, _ = taken("ffn", source, 1 / 3, text(), repair=False)
    ids = text(1).ids[0]
    assert distance(repaired, source, ids) < 0.05
    assert distance(cut, source, ids) > 0.2
    assert all(part.error_after < 0.1 for part in parts)


def test_kept_rows_are_the_files_own_bytes(tiny_folder: Callable[..., Path]) -> None:
    source = open_folder(tiny_folder("llama-odd"))  # with biases
    pruned, _ = taken("ffn", source, 0.3, text(), repair=True)
    for name in ("gate", "up"):
        before = tensor_values(source.tensors[f"layers.0.{name}"])
        bias = tensor_values(source.tensors[f"layers.0.{name}.bias"])
        after = tensor_values(pruned.tensors[f"layers.0.{name}"])
        kept = [int((before == row).all(1).nonzero()) for row in after]
        assert kept == sorted(set(kept))
        assert torch.equal(tensor_values(pruned.tensors[f"layers.0.{name}.bias"]), bias[kept])


def test_the_fit_is_least_squares_and_falls_back_on_the_prior() -> None:
    torch.manual_seed(0)
    h, weight, prior = torch.randn(200, 12), torch.randn(5, 12), torch.randn(5, 12)
    y = h @ weight.T + 0.1 * torch.randn(200, 5)
    moments = Moments.zeros(12, 5)
    moments.add(h[:77], y[:77])
    moments.add(h[77:].reshape(3, 41, 12), y[77:].reshape(3, 41, 5))
    plain = torch.linalg.lstsq(h, y).solution.T
    torch.testing.assert_close(fitted(moments, prior, 0.0), plain, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(fitted(moments, prior, 1e6), prior, rtol=1e-3, atol=1e-4)
    expected = float((y - h @ prior.T).norm() / y.norm())
    assert moments.error(prior) == pytest.approx(expected, rel=1e-3)


def test_moments_of_more_inputs_than_a_block_are_whole() -> None:
    h = torch.randn(50, 1500, generator=torch.Generator().manual_seed(0))
    moments = Moments.zeros(1500, 1)
    moments.add(h, torch.ones(50, 1))
    torch.testing.assert_close(moments.gram, h.T @ h, rtol=1e-4, atol=1e-4)


def test_the_choice_equals_trying_every_channel() -> None:
    """One channel at a time: the loss of a refit without it, computed anew for each."""
    torch.manual_seed(1)
    h = torch.randn(9000, 24) @ (torch.eye(24) + 0.3 * torch.randn(24, 24))
    y = h @ torch.randn(6, 24).T
    moments = Moments.zeros(24, 6)
    moments.add(h, y)
    prior = torch.zeros(6, 24)

    def loss(inputs: list[int]) -> float:
        return float((y - h[:, inputs] @ torch.linalg.lstsq(h[:, inputs], y).solution).square().sum())

    without = [loss([j for j in range(24) if j != i]) for i in range(24)]
    kept = least_loss(moments, prior, 23)
    assert set(range(24)) - set(kept.tolist()) == {int(np.argmin(without))}


@pytest.mark.parametrize(("amount", "message"), [(0.95, "leaves no channel"), (0.05, "takes no channel")])
def test_an_amount_that_leaves_or_takes_nothing_is_refused(
    amount: float, message: str, tiny_folder: Callable[..., Path]
) -> None:
    config = open_folder(tiny_folder("llama")).config
    with pytest.raises(UsageError, match=message) as refused:
        Channels().after(config, Pruning("ffn", amount))
    low, high = (float(word) for word in refused.value.hint.split() if word[0] == "0")
    assert Channels().after(config, Pruning("ffn", low)).blocks[0].feed_forward.width == 64
    assert Channels().after(config, Pruning("ffn", high)).blocks[0].feed_forward.width == 32


def test_values_that_are_not_finite_name_the_layer(tiny_folder: Callable[..., Path]) -> None:
    source = open_folder(tiny_folder("llama"))
    broken = tensor_values(source.tensors["layers.1.up"])
    broken[3, 5] = torch.nan
    with pytest.raises(ModelError, match=r"layers\.1 gives"):
        taken("ffn", changed(source, {"layers.1.up": broken}), 0.25, text(), repair=True)
