"""Streams through layers that are quantised already: where a run goes on whose streams were lost."""

from __future__ import annotations

import torch

from hasten.compress.quantise.layer_methods import QuantisedLayer
from hasten.compress.quantise.sequential import Streams
from hasten.compress.quantise.staged import StagedLayer, settle
from hasten.compress.stream import in_fast_type
from hasten.compress.torch_layer import LINEARS, layer_weights
from hasten.models.source import Source
from hasten.weights.packed import values_of


def advance_through(source: Source, index: int, done: QuantisedLayer, streams: Streams) -> None:
    """Both streams through a finished layer, the source's with its own matrices."""
    prefix = f"layers.{index}."
    weights = layer_weights(source, index)
    ours = dict(weights)
    for name, value in done.vectors.items():
        ours[name.removeprefix(prefix)] = value
    for name in LINEARS:
        ours[name] = torch.from_numpy(values_of(done.linears[prefix + name]))
    for stream, used in ((streams.full, weights), (streams.ours, ours)):
        settle(StagedLayer(stream, index), in_fast_type(used))
