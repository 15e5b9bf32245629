"""Streams through layers that are quantised already: where a run goes on whose streams were lost."""

from __future__ import annotations

import torch

from hasten.compress.quantise.layer_methods import QuantisedLayer
from hasten.compress.quantise.sequential import Streams
from hasten.compress.quantise.staged import StagedLayer, settle
from hasten.compress.stream import fast_type
from hasten.compress.torch_layer import LINEARS, layer_weights
from hasten.models.source import Source


def advance_through(source: Source, index: int, done: QuantisedLayer, streams: Streams) -> None:
    """Both streams through a finished layer, the source's with its own matrices."""
    from hasten import _native

    prefix, kind = f"layers.{index}.", fast_type()
    weights = layer_weights(source, index)
    ours = dict(weights)
    for name, value in done.vectors.items():
        ours[name.removeprefix(prefix)] = value
    for name in LINEARS:
        one = done.linears[prefix + name]
        stored = (one.layout.bits, one.layout.group, one.layout.symmetric)
        ours[name] = torch.from_numpy(_native.unpack(one.data, one.rows, one.cols, *stored))
    for stream, used in ((streams.full, weights), (streams.ours, ours)):
        cast = {name: value.to(kind) if value.ndim == 2 else value for name, value in used.items()}
        settle(StagedLayer(stream, index), cast)
