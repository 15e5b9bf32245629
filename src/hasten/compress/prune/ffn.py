"""FFN channels: the same number goes in every layer, and `down` is fitted to what is left.

With repair the channels go that cost the refitted output of the layer least (`least_loss`). Without, those
that themselves contribute least: second moment times |column of down|^2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from hasten.compress.calibration import Calibration
from hasten.compress.changed import made_tensor
from hasten.compress.moments import Moments, fitted
from hasten.compress.prune.least_loss import least_loss
from hasten.compress.prune.mlp_output import from_middle, moments_of, to_middle, wanted_output
from hasten.compress.prune.multiple import kept_multiple
from hasten.compress.prune.pruned import PartPruned
from hasten.compress.stream import Stream, stream_weights
from hasten.compress.taken import taken_rows
from hasten.core import ModelSpec
from hasten.models.source import Source
from hasten.weights.tensors import SourceTensor

_ROWS = ("gate", "up", "gate.bias", "up.bias")


def with_channels(config: ModelSpec, count: int) -> ModelSpec:
    """The model with as many channels in every feed-forward layer."""
    return config.with_blocks(lambda b: replace(b, feed_forward=replace(b.feed_forward, width=count)))


def kept_channels(config: ModelSpec, amount: float) -> int:
    """How many FFN channels stay.

    Raises:
        UsageError: none of them, or all.
    """
    return kept_multiple("ffn", "channel", config.intermediate_size, amount)


def prune_ffn(
    source: Source,
    amount: float,
    calibration: Calibration,
    repair: bool,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Source, list[PartPruned]]:
    """Take FFN channels out of every layer, one layer after another.

    Each layer is fitted on what the layers already pruned give it, towards the original model's hidden state
    behind the layer. Costs 2 bytes F a token besides the moments.

    Raises:
        UsageError: the amount leaves no channel, or all.
        ModelError: activations that are not finite; the layer is named.
    """
    count = kept_channels(source.config, amount)
    config = with_channels(source.config, count)
    original = Stream.of(source, calibration)
    ours = original.copy()
    tensors = dict(source.tensors)
    parts = []
    for index in range(config.num_layers):
        step(index, config.num_layers)
        weights = stream_weights(source, index)
        inputs = to_middle(ours, index, weights)
        wanted = wanted_output(original, ours, index, weights)
        moments = moments_of(original, inputs, wanted)
        cut = _cut(moments, weights["down"].float(), count, repair)
        del moments, wanted
        tensors |= _tensors(source, index, cut)
        parts.append(PartPruned(f"layers.{index}", count, len(weights["gate"]), cut.before, cut.after))
        from_middle(ours, weights | {"down": cut.down.to(inputs.dtype)}, inputs[..., cut.kept])
    step(config.num_layers, config.num_layers)
    return replace(source, config=config, tensors=tensors), parts


@dataclass(frozen=True)
class _Cut:
    kept: torch.Tensor  # int64 [n], ascending
    down: torch.Tensor  # bfloat16 [E, n]
    before: float
    after: float | None


def _cut(moments: Moments, down: torch.Tensor, count: int, repair: bool) -> _Cut:
    if not repair:
        importance = moments.gram.diagonal() * down.square().sum(0)
        kept = importance.topk(count).indices.sort().values
        cut = down[:, kept].bfloat16()
        return _Cut(kept, cut, moments.kept(kept).error(cut.float()), None)
    kept = least_loss(moments, down, count)
    left = moments.kept(kept)
    fit = fitted(left, down[:, kept]).bfloat16()
    return _Cut(kept, fit, left.error(down[:, kept]), left.error(fit.float()))


def _tensors(source: Source, index: int, cut: _Cut) -> dict[str, SourceTensor]:
    prefix = f"layers.{index}."
    names = [prefix + name for name in _ROWS if prefix + name in source.tensors]
    found = {name: taken_rows(source.tensors[name], cut.kept) for name in names}
    down = made_tensor(prefix + "down", tuple(cut.down.shape), cut.down)
    return found | {prefix + "down": down}
