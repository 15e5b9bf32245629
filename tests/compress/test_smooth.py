"""Smoothing leaves a layer's output alone and makes its activations easier to round."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny_models
from hasten.compress.quantise import foldable, smooth_layer, smooth_scales
from hasten.compress.quantise.rotate import residual_rotation, rotate
from hasten.compress.torch_model import Positions, layer_forward, layer_weights, plain_linear
from hasten.core import READERS, ModelSpec
from hasten.models.open import open_folder

NAMES = sorted(tiny_models.TINY)
Layer = tuple[ModelSpec, dict[str, torch.Tensor], torch.Tensor]


def layer(name: str, folder: Path) -> Layer:
    """(config, weights of layer 1, inputs [2, 24, E] with outliers in three channels)."""
    source = open_folder(tiny_models.save_folder(tiny_models.TINY[name], folder))
    x = torch.randn(2, 24, source.config.width, generator=torch.Generator().manual_seed(3))
    x[..., [5, 17, 40]] *= 30
    return source.config, layer_weights(source, 1), x


class Maxima(dict[str, torch.Tensor]):
    """Largest magnitude of each input channel by linear layer: a hook of `layer_forward`."""

    def __call__(
        self, name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        self[name] = x.abs().reshape(-1, x.shape[-1]).amax(0)
        return plain_linear(name, x, weight, bias)


def maxima_of(config: ModelSpec, weights: dict[str, torch.Tensor], x: torch.Tensor) -> Maxima:
    watch = Maxima()
    layer_forward(config, 1, weights, x, Positions.of(config, x.shape[1]), watch)
    return watch


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("alpha", [0.25, 0.75])
def test_the_output_stays_and_the_balance_is_kept(name: str, alpha: float, tmp_path: Path) -> None:
    config, weights, x = layer(name, tmp_path)
    positions = Positions.of(config, x.shape[1])
    watch = maxima_of(config, weights, x)
    smooth = smooth_layer(weights, config, watch, alpha)[0]
    before, after = (layer_forward(config, 1, w, x, positions) for w in (weights, smooth))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4 * float(before.std()))
    for group in READERS:
        first = READERS[group][0]
        assert torch.equal(smooth[first], weights[first]) != foldable(config, group)


def test_a_rotated_layer_smooths_too(tmp_path: Path) -> None:
    source = open_folder(tiny_models.save_folder(tiny_models.TINY["qwen3"], tmp_path))
    config, weights = source.config, layer_weights(rotate(source), 2)
    x = torch.randn(2, 24, config.width, generator=torch.Generator().manual_seed(4))
    positions, watch = Positions.of(config, 24), Maxima()
    before = layer_forward(config, 2, weights, x, positions, watch)
    smooth = smooth_layer(weights, config, watch, 0.5)[0]
    assert not torch.equal(smooth["v"], weights["v"])
    after = layer_forward(config, 2, smooth, x, positions)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4 * float(before.std()))
    turn = residual_rotation(config)
    plain = layer_forward(config, 2, layer_weights(source, 2), x, positions)
    ours = layer_forward(config, 2, smooth, turn.turn_(x.clone()), positions)
    torch.testing.assert_close(ours, turn.turn_(plain), rtol=1e-3, atol=1e-3 * float(plain.std()))


def test_scales_are_the_papers(tmp_path: Path) -> None:
    config, weights, x = layer("llama", tmp_path)
    maximum = maxima_of(config, weights, x)["k"]
    columns = torch.cat([weights[name] for name in "qkv"]).abs().max(0).values
    wanted = maximum**0.6 / columns**0.4
    scales = smooth_scales(weights, "qkv", maximum, 0.6)
    torch.testing.assert_close(scales / scales[0], wanted / wanted[0], rtol=1e-4, atol=0)
    assert float(scales.log().mean()) == pytest.approx(0, abs=1e-5)


def test_the_ends_of_alpha(tmp_path: Path) -> None:
    """At 1 every channel has the same largest activation, at 0 every column the same largest weight."""
    config, weights, x = layer("llama", tmp_path)
    watch = maxima_of(config, weights, x)
    whole = smooth_layer(weights, config, {"gate": watch["gate"]}, 1.0)[0]
    found = maxima_of(config, whole, x)["up"]
    torch.testing.assert_close(found, found[:1].expand_as(found), rtol=1e-3, atol=0)
    none = smooth_layer(weights, config, {"gate": watch["gate"]}, 0.0)[0]
    columns = torch.cat([none["gate"], none["up"]]).abs().max(0).values
    torch.testing.assert_close(columns, columns[:1].expand_as(columns), rtol=1e-3, atol=0)
    assert torch.equal(none["q"], weights["q"]), "only what was watched is smoothed"
    named = smooth_layer(weights, config, {"o": watch["o"]}, 0.5)[0]
    changed = {name for name in weights if not torch.equal(named[name], weights[name])}
    assert changed == {"o", "v"}


def test_int8_activations_lose_less(tmp_path: Path) -> None:
    """Outliers beside small channels: the case the method is for."""
    config, weights, x = layer("llama", tmp_path)
    weights["attn_norm"][[5, 17, 40]] *= 20  # outliers of the normed input, where the paper finds them
    positions = Positions.of(config, x.shape[1])
    exact = layer_forward(config, 1, weights, x, positions)

    def rounded(name: str, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
        rows = torch.from_numpy(tiny_models.int8_groups(x.flatten(0, -2).numpy()))
        return plain_linear(name, rows.view(x.shape), w, b)

    errors = [
        float((layer_forward(config, 1, w, x, positions, rounded) - exact).square().mean())
        for w in (weights, smooth_layer(weights, config, maxima_of(config, weights, x), 0.5)[0])
    ]
    assert errors[1] < 0.5 * errors[0]


def test_dead_channels_keep_their_weights(tmp_path: Path) -> None:
    config, weights, x = layer("llama", tmp_path)
    weights["mlp_norm"][7] = 0
    weights["gate"][:, 9] = weights["up"][:, 9] = 0
    smooth = smooth_layer(weights, config, maxima_of(config, weights, x), 0.5)[0]
    assert all(bool(torch.isfinite(value).all()) for value in smooth.values())
    assert torch.equal(smooth["gate"][:, 7], weights["gate"][:, 7])
    assert float(smooth["mlp_norm"][9]) == float(weights["mlp_norm"][9])
    zero = smooth_scales(weights, "down", torch.zeros(96), 0.5)
    assert bool((zero == 1).all())
