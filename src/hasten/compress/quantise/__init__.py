"""How the integers of a layer's matrices are found: the protocol that every method implements.

A method is a file in this folder with a class of this protocol, and a line in `hasten.recipe.METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

import torch

from hasten.compress.quantise.fold import smooth_layer
from hasten.compress.quantise.statistics import LayerStatistics
from hasten.compress.stream import Stream
from hasten.compress.torch_layer import LINEARS, Weights, layer_weights, tensor_values
from hasten.compress.torch_tensors import made_tensor
from hasten.core import READERS, Format, Group, ModelSpec, Recipe
from hasten.models.source import Source
from hasten.recipe import METHODS
from hasten.weights.codec import Encoded
from hasten.weights.packed import PackedLinear, pack_integers, pack_linear


@dataclass
class Streams:
    """Hidden states of the source and of the quantised model before the next layer."""

    full: Stream
    ours: Stream


@dataclass(frozen=True)
class Layer:
    """A layer as a method gets it. Names are short ones: `q`, `down`."""

    config: ModelSpec
    index: int
    weights: Weights  # float32, smoothed where the recipe says so
    layouts: Mapping[str, Format]  # of what becomes integers; the rest stays floats, or the source's own
    grams: Mapping[Group, torch.Tensor]  # second moments of what is read, where the method reads "moments"
    streams: Streams | None = None  # before the layer, where it reads "states"; it moves them on

    def name(self, short: str) -> str:
        """Canonical name of a matrix or group."""
        return f"layers.{self.index}.{short}"

    def rounded(self, group: Group) -> list[str]:
        """The matrices of a group that become integers."""
        return [name for name in READERS[group] if name in self.layouts]


@dataclass(frozen=True)
class Rounded:
    """What a method makes of a layer, by short name."""

    integers: Mapping[str, Encoded]  # those that are left out are rounded to the nearest
    weights: Weights  # what was rounded, and norms and biases: the layer's own, or scaled


@dataclass(frozen=True)
class Head:
    """The LM head, or a tied embedding, as a method gets it."""

    source: Source
    name: str
    layout: Format  # of integers below 8 bits: from there on nothing is won that is worth a minute
    moments: Callable[[], torch.Tensor]  # of the source's final states, where the method reads "moments"
    streams: Callable[[], Streams]  # behind the last layer, where it reads "states"

    def weight(self) -> torch.Tensor:
        """Its values, float32 [V, E], unpacked now."""
        return tensor_values(self.source.tensors[self.name])


class Method(Protocol):
    """A way to find integers; made once for a model."""

    scales: bool = False
    """Whether `layer` gives other weights than it gets: other matrices of the layer change with them."""

    def layer(self, layer: Layer) -> Rounded:
        """The integers of one layer.

        Raises:
            ModelError: a weight or an activation is not finite; the layer is named.
        """
        ...

    def head(self, head: Head) -> Encoded | None:
        """The integers of the head; None rounds to the nearest."""
        return None


class Nearest(Method):
    """`rtn`: packing rounds to the nearest by itself."""

    def layer(self, layer: Layer) -> Rounded:
        return Rounded({}, layer.weights)


def method_named(name: str) -> Method:
    """The method of a name in `METHODS`; its file is loaded now."""
    module, _, kind = METHODS[name].place.partition(":")
    made: Method = getattr(import_module(module), kind)()
    return made


@dataclass(frozen=True)
class QuantisedLayer:
    """Matrices by canonical name, and the vectors that are not the source's any more."""

    linears: Mapping[str, PackedLinear]
    vectors: Mapping[str, torch.Tensor]  # float32


def layer_to_round(
    source: Source, recipe: Recipe, index: int, statistics: LayerStatistics | None, streams: Streams | None
) -> Layer:
    """A layer as its recipe's method gets it.

    Args:
        statistics: of the layer; needed where `recipe_check.reads_moments` says so.
        streams: before the layer, for methods that read "states".
    """
    prefix = f"layers.{index}."
    asked = {name: recipe.layout_for(prefix + name) for name in LINEARS}
    layouts = {name: layout for name, layout in asked.items() if layout is not None and layout.is_integer}
    weights: Weights = layer_weights(source, index)
    scales: Mapping[Group, torch.Tensor] = {}
    if recipe.smooth is not None:
        assert statistics is not None
        maxima = {READERS[group][0]: statistics.maxima[group] for group in READERS}
        weights, scales = smooth_layer(weights, source.config, maxima, recipe.smooth)
    grams: dict[Group, torch.Tensor] = {}
    if METHODS[recipe.method].reads == "moments":
        assert statistics is not None
        grams = {group: divided(statistics.grams[group], scales.get(group)) for group in READERS}
    return Layer(source.config, index, weights, layouts, grams, streams)


def divided(gram: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """Second moments of inputs that are divided by `scales`; None is 1."""
    return gram if scales is None else gram / scales / scales[:, None]


def packed_layer(source: Source, recipe: Recipe, method: Method, layer: Layer) -> QuantisedLayer:
    """A layer rounded by a method, as the engine stores it."""
    found = method.layer(layer)
    is_source = recipe.smooth is None and not method.scales
    linears: dict[str, PackedLinear] = {}
    for name in LINEARS:
        full = layer.name(name)
        layout = recipe.layout_for(full)
        if name in found.integers:
            linears[full] = pack_integers(full, found.integers[name])
        elif is_source:
            linears[full] = pack_linear(source.tensors[full], layout)
        else:
            weight = found.weights[name]
            tensor = made_tensor(full, tuple(weight.shape), weight)
            linears[full] = pack_linear(tensor, layout or Format.of(16))
    vectors = {layer.name(name): value for name, value in found.weights.items() if value.ndim == 1}
    return QuantisedLayer(linears, {name: v for name, v in vectors.items() if name in source.tensors})
