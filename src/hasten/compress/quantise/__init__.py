"""How the integers of a layer's matrices are found: the protocol that every method implements.

A method is a file in this folder with a class of this protocol, and a line in `hasten.recipe.METHODS`.

Several move scales from a linear layer's inputs into what makes them, which leaves the output as it was
(`fold`). Multiplying column j of a matrix by s_j and dividing input j by it changes nothing, and the division
costs nothing where it folds into what is there: a norm's weight, or the rows of the matrix before. AWQ (Lin
et al. 2023) and SmoothQuant (Xiao et al. 2022) differ only in how they choose s. SmoothQuant makes large
activations smaller, and the weights that read them larger:

    s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)

The engine gives every 32 inputs of a token a scale of their own, so there is less to win here than with one
scale a token. Four layers of the demo model with int8 weights: at alpha 0.5 the mean error of a layer's
output falls by 3 %, and by 25 % with one scale a token; at 0.25 and 0.75 it grows. So nothing is smoothed
unless a recipe says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

import torch

from hasten.compress.quantise.statistics import LayerStatistics
from hasten.compress.stream import Stream
from hasten.compress.torch_model import LINEARS, Weights, layer_weights, made_tensor, tensor_values
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
        statistics: of the layer; needed where `job.reads_moments` says so.
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


_NORMS: Mapping[Group, str] = {"qkv": "attn_norm", "gate_up": "mlp_norm"}
_MAKERS: Mapping[Group, str] = {"o": "v", "down": "up"}


def obstacle(config: ModelSpec, group: Group) -> str | None:
    """Why scales of a group's inputs fold into nothing; None where they fold."""
    if group in _NORMS and config.blocks[0].norms.placement == "post":
        return (
            f"{config.architecture} has no norm before {' and '.join(READERS[group])}: "
            "they read the residual stream, which all layers share"
        )
    return None


def foldable(config: ModelSpec, group: Group) -> bool:
    """Whether scales of a group's inputs fold; `obstacle` says why not."""
    return obstacle(config, group) is None


def shared_scales(
    weights: Mapping[str, torch.Tensor], config: ModelSpec, group: Group, scales: torch.Tensor
) -> torch.Tensor:
    """The scales [cols] that `fold` uses: for `o` equal over the query heads that share a KV head.

    Their geometric mean: a channel of one value head is read by several query heads, and only one scale of
    it folds into `v`. Other groups keep what they are given.
    """
    if group != "o":
        return scales
    grouped = scales.reshape(-1, _share(weights), config.blocks[0].mixer.head_dim)  # [K, H / K, D]
    return grouped.log().mean(1, keepdim=True).exp().expand_as(grouped).reshape(-1)


def fold(
    weights: Mapping[str, torch.Tensor], config: ModelSpec, group: Group, scales: torch.Tensor
) -> dict[str, torch.Tensor]:
    """One layer with a group's inputs divided by `scales` and its matrices' columns multiplied by them.

    Args:
        weights: the layer by short name (compress/torch_model.py), of any float type.
        group: whose inputs; it must be `foldable`.
        scales: [cols], positive; those of `o` go through `shared_scales` first.

    Returns:
        The layer anew, of the same types. Its output is the same up to rounding.
    """
    assert foldable(config, group), obstacle(config, group)
    assert bool(torch.isfinite(scales).all()) and bool((scales > 0).all()), group
    scales = shared_scales(weights, config, group, scales.float())
    new = dict(weights)
    for name in READERS[group]:
        new[name] = _times(weights[name], scales)
    if group in _NORMS:
        new[_NORMS[group]] = _times(weights[_NORMS[group]], 1 / scales)
        return new
    maker = _MAKERS[group]
    rows = scales
    if group == "o":  # [H * D], equal over each KV head's query heads -> [K * D]
        rows = scales.reshape(-1, _share(weights), config.blocks[0].mixer.head_dim)[:, 0].reshape(-1)
    new[maker] = _times(weights[maker], 1 / rows[:, None])
    if (bias := weights.get(f"{maker}.bias")) is not None:
        new[f"{maker}.bias"] = _times(bias, 1 / rows)
    return new


def _times(values: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    return (values.float() * factors.to(values.device)).to(values.dtype)


def _share(weights: Mapping[str, torch.Tensor]) -> int:
    """Query heads a KV head serves, by the matrices' own shapes: heads may have been pruned."""
    return weights["o"].shape[1] // weights["v"].shape[0]


_FARTHEST = 256.0
"""Most that a scale lies from the group's mean: beyond it a channel is dead, not small."""


def evened(logs: torch.Tensor, alive: torch.Tensor, farthest: float) -> torch.Tensor:
    """Scales [cols] of these logarithms: their geometric mean is 1, none lies farther, dead ones are 1."""
    if not bool(alive.any()):
        return torch.ones_like(logs)
    scales = (logs - logs[alive].mean()).exp().clamp(1 / farthest, farthest)
    return torch.where(alive, scales, 1.0)


def smooth_scales(weights: Weights, group: Group, maximum: torch.Tensor, alpha: float) -> torch.Tensor:
    """s of one group, float32 [cols], its geometric mean 1; 1 for channels that are always zero.

    Args:
        maximum: largest magnitude of each channel of it, [cols].
        alpha: 0 makes the largest weight of each column equal, 1 the largest activation of each channel.
    """
    assert 0 <= alpha <= 1, alpha
    columns = torch.stack([weights[name].float().abs().amax(0) for name in READERS[group]]).amax(0)
    maximum = maximum.float().to(columns.device)
    alive = (maximum > 0) & (columns > 0)
    logs = alpha * maximum.clamp(min=1e-30).log() - (1 - alpha) * columns.clamp(min=1e-30).log()
    return evened(logs, alive, _FARTHEST)


def smooth_layer(
    weights: Weights,
    config: ModelSpec,
    maxima: Mapping[str, torch.Tensor],
    alpha: float,
) -> tuple[dict[str, torch.Tensor], dict[Group, torch.Tensor]]:
    """One layer with smoother activations and the same output, up to rounding.

    Groups whose scales fold into nothing stay as they are (`obstacle` says why), and so do those whose
    maxima are not given.

    Args:
        maxima: largest magnitude of each input channel [cols] by short name of a linear layer; of a group
            that reads the same input any one will do.
        alpha: 0 to 1; the paper uses 0.5.

    Returns:
        (the layer anew, by what each smoothed group's inputs are divided now [cols]).
    """
    new, used = dict(weights), dict[Group, torch.Tensor]()
    for group in READERS:
        given = [maxima[name] for name in READERS[group] if name in maxima]
        if given and foldable(config, group):
            scales = smooth_scales(new, group, given[0], alpha)
            used[group] = shared_scales(new, config, group, scales)
            new = fold(new, config, group, used[group])
    return new, used
