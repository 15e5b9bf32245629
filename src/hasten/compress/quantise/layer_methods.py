"""One layer by one method: every matrix's integers, and the norms and biases that go with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from hasten.compress.changed import made_tensor
from hasten.compress.quantise.awq import awq_layer
from hasten.compress.quantise.fold import GROUPS, READERS, Group
from hasten.compress.quantise.gptq import Factor, gptq, nearest
from hasten.compress.quantise.hqq import hqq
from hasten.compress.quantise.smooth import smooth_layer
from hasten.compress.quantise.statistics import LayerStatistics
from hasten.compress.torch_layer import LINEARS, layer_weights
from hasten.core import Format, Recipe
from hasten.errors import ModelError
from hasten.models.source import Source
from hasten.weights.codec import Encoded
from hasten.weights.packed import PackedLinear, pack_integers, pack_linear, source_layout


@dataclass(frozen=True)
class QuantisedLayer:
    """Matrices by canonical name, and the vectors that are not the source's any more."""

    linears: Mapping[str, PackedLinear]
    vectors: Mapping[str, torch.Tensor]  # float32


def needs_statistics(recipe: Recipe) -> bool:
    """Whether a recipe's method looks at the source's own activations."""
    return recipe.method in ("gptq", "awq", "awq-gptq") or recipe.smooth is not None


def layer_alone(
    source: Source, recipe: Recipe, index: int, statistics: LayerStatistics | None
) -> QuantisedLayer:
    """A layer as if all others were the source's own.

    Args:
        source: the model.
        recipe: of any method but `best`.
        index: which layer.
        statistics: of the layer; needed where `needs_statistics` says so.

    Raises:
        ModelError: a weight is not finite; the matrix is named.
    """
    weights, layouts, scales = adapted(source, recipe, index, statistics)
    grams: dict[Group, torch.Tensor] = {}
    if statistics is not None and recipe.method != "rtn":
        grams = {group: scaled_gram(statistics.grams[group], scales.get(group)) for group in GROUPS}
    if recipe.method in ("awq", "awq-gptq"):
        weights, grams = awq_layer(weights, source.config, grams, layouts)
    linears: dict[str, PackedLinear] = {}
    for group in GROUPS:
        is_gptq = recipe.method in ("gptq", "awq-gptq")
        narrow = any(layouts[name].is_integer for name in READERS[group])
        factor = factor_of(grams[group], f"layers.{index}.{group}") if is_gptq and narrow else None
        for name in READERS[group]:
            full = f"layers.{index}.{name}"
            found = _integers(weights[name], layouts[name], recipe, factor, full)
            linears[full] = kept_as(source, recipe, full, weights[name], found)
    return QuantisedLayer(linears, changed_vectors(source, index, weights))


def adapted(
    source: Source, recipe: Recipe, index: int, statistics: LayerStatistics | None
) -> tuple[dict[str, torch.Tensor], dict[str, Format], dict[Group, torch.Tensor]]:
    """A layer's weights, float32, smoothed where the recipe says so; their layouts; the inputs' divisors."""
    prefix = f"layers.{index}."
    weights: dict[str, torch.Tensor] = layer_weights(source, index)
    layouts = {
        name: recipe.layout_for(prefix + name) or source_layout(source.tensors[prefix + name])
        for name in LINEARS
    }
    if recipe.smooth is not None:
        assert statistics is not None
        maxima = {READERS[group][0]: statistics.maxima[group] for group in GROUPS}
        smooth, scales = smooth_layer(weights, source.config, maxima, recipe.smooth)
        return smooth, layouts, scales
    return weights, layouts, {}


def scaled_gram(gram: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """Second moments of inputs that are divided by `scales`; None is 1."""
    return gram if scales is None else gram / scales / scales[:, None]


def factor_of(gram: torch.Tensor, what: str) -> Factor:
    """The inverse of second moments.

    Raises:
        ModelError: they cannot be inverted, which damped moments of finite activations always can.
    """
    try:
        return Factor.of(gram)
    except RuntimeError:  # torch.linalg.LinAlgError is one
        raise ModelError(
            f"{what}: the second moments of its inputs cannot be inverted",
            hint="the activations on this text are not finite or beyond float32: use another --calibration",
        ) from None


def kept_as(
    source: Source, recipe: Recipe, full: str, weight: torch.Tensor, found: Encoded | None
) -> PackedLinear:
    """A matrix packed: its integers, or the source's own values where nothing was asked for or changed."""
    if found is not None:
        return pack_integers(full, found)
    layout = recipe.layout_for(full)
    if recipe.smooth is None and recipe.method not in ("awq", "awq-gptq"):
        return pack_linear(source.tensors[full], layout)
    return pack_linear(made_tensor(full, tuple(weight.shape), weight), layout or Format.of(16))


def changed_vectors(
    source: Source, index: int, weights: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Norms and biases of a layer by canonical name."""
    prefix = f"layers.{index}."
    return {
        prefix + name: value
        for name, value in weights.items()
        if value.ndim == 1 and prefix + name in source.tensors
    }


def _integers(
    weight: torch.Tensor, layout: Format, recipe: Recipe, factor: Factor | None, full: str
) -> Encoded | None:
    """None where nothing is to be found: floats, or a layout the source's values are kept in."""
    if not layout.is_integer or recipe.layout_for(full) is None or recipe.method == "rtn":
        return None
    if recipe.method == "hqq":
        return hqq(weight, layout, full)
    if factor is not None:
        return gptq(weight, factor, layout, full)
    return nearest(weight, layout, full)
