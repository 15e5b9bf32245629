"""FFN channels: the same number goes in every layer, and `down` is fitted to what is left.

Which channels: those without which the squared error of the layer's output grows least, the rest refitted
(optimal brain surgeon for whole columns: Hassibi and Stork 1993; ZipLM, Kurtic et al. 2023). Without repair
the rest is not refitted, so it is what a channel itself contributes: second moment times |column of down|^2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from hasten.compress.calibration import Calibration
from hasten.compress.changed import made_tensor
from hasten.compress.prune.moments import Moments, fitted
from hasten.compress.prune.pruned import PartPruned
from hasten.compress.prune.stream import Stream, stream_linear, stream_weights
from hasten.compress.prune.taken import taken_rows
from hasten.compress.torch_layer import Linear, Weights
from hasten.core import ModelConfig
from hasten.errors import UsageError
from hasten.models.source import Source, SourceTensor

MULTIPLE = 32
"""Channels are kept in such multiples: a group of int8 activations."""
RIDGE = 0.03
_AT_ONCE = 32  # channels that may go before the rest is judged anew
_STRANGER = 0.3  # partial correlation below which two channels may go at once


def kept_channels(config: ModelConfig, amount: float) -> int:
    """How many FFN channels stay.

    Raises:
        UsageError: none of them, or all.
    """
    width = config.intermediate_size
    kept = MULTIPLE * round((1 - amount) * width / MULTIPLE)
    if 0 < kept < width:
        return kept
    what = "leaves no channel" if kept <= 0 else "takes no channel out"
    least = (width - MULTIPLE * ((width - 1) // MULTIPLE)) / width
    raise UsageError(
        f"prune ffn: amount {amount:g} of {width} channels {what}; they are kept in multiples of {MULTIPLE}",
        hint=f"use an amount between {least:.3f} and {max(least, 1 - MULTIPLE / width):.3f}",
    )


def prune_ffn(
    source: Source,
    amount: float,
    calibration: Calibration,
    repair: bool,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Source, list[PartPruned]]:
    """Take FFN channels out of every layer, one layer after another.

    Each layer is fitted on what the layers already pruned give it, towards what the original model adds to
    its hidden state there. Costs 2 bytes F a token besides the moments.

    Raises:
        UsageError: the amount leaves no channel, or all.
        ModelError: activations that are not finite; the layer is named.
    """
    count = kept_channels(source.config, amount)
    config = replace(source.config, intermediate_size=count)
    original = Stream.of(source, calibration)
    ours = original.copy()
    tensors = dict(source.tensors)
    parts = []
    for index in range(config.num_layers):
        step(index, config.num_layers)
        weights = stream_weights(source, index)
        moments, inputs = _moments(original, ours, index, weights)
        cut = _cut(moments, weights["down"].float(), count, repair)
        del moments
        tensors |= _tensors(source, index, cut)
        parts.append(PartPruned(f"layers.{index}", count, len(weights["gate"]), cut.before, cut.after))
        _advance(ours, weights, inputs, cut)
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
    kept = least_loss(moments, down, count, RIDGE)
    left = moments.kept(kept)
    fit = fitted(left, down[:, kept], RIDGE).bfloat16()
    return _Cut(kept, fit, left.error(down[:, kept]), left.error(fit.float()))


def least_loss(moments: Moments, prior: torch.Tensor, count: int, ridge: float) -> torch.Tensor:
    """The `count` inputs that are kept, int64 ascending, when those go whose loss a refit cannot make good.

    Args:
        moments: of all inputs.
        prior: [outputs, inputs]: the weights that the ridge falls back on.
        count: inputs that stay.
        ridge: see `fitted`.
    """
    scale = moments.scale()
    system = moments.gram / scale / scale[:, None]
    system.diagonal().add_(ridge)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(system))
    del system
    weight = (moments.cross / scale + ridge * (prior * scale)) @ inverse  # all inputs there: the best fit
    gone = torch.zeros(len(scale), dtype=torch.bool)
    while (left := len(scale) - count - int(gone.sum())) > 0:
        loss = weight.square().sum(0) / inverse.diagonal().clamp_min(1e-12)
        worst = loss.masked_fill(gone, torch.inf).topk(min(_AT_ONCE, left), largest=False).indices
        out = worst[_strangers(inverse[worst][:, worst])]
        update = torch.linalg.solve(inverse[out][:, out], inverse[out])  # [out, inputs]
        weight -= weight[:, out] @ update
        inverse.addmm_(inverse[:, out], update, alpha=-1)
        gone[out] = True
    return (~gone).nonzero().squeeze(1)


def _strangers(inverse: torch.Tensor) -> torch.Tensor:
    """Which of some inputs, the best first, may go together, bool [n]: none that stands in for one before it.

    Of two inputs that say the same either may go, but not both; their partial correlation tells.
    """
    size = inverse.diagonal().clamp_min(1e-12).sqrt()
    partial = (inverse / size / size[:, None]).tril(-1).abs()
    return partial.amax(1) < _STRANGER


def _moments(original: Stream, ours: Stream, index: int, weights: Weights) -> tuple[Moments, torch.Tensor]:
    """Of our `down` inputs, and of what the original adds from here; and those inputs, [B, T, F].

    Moves the original one layer on, and our stream to the middle of the layer, before the MLP's output.
    """
    config = original.config
    moments = Moments.zeros(config.intermediate_size, config.hidden_size)
    kept = torch.empty(*ours.x.shape[:2], config.intermediate_size, dtype=weights["down"].dtype)
    bias = weights.get("down.bias", torch.zeros(()))
    for rows in original.batches():
        found: dict[str, torch.Tensor] = {}
        after = original.through(index, weights, rows, _recording(found, skip=False))
        wanted = found["y"]
        ours.x[rows] = ours.through(index, weights, rows, _recording(found, skip=True))
        if config.norm_placement == "pre":  # else a norm stands between `down` and the hidden state
            wanted = after - ours.x[rows] - bias
        moments.add(found["x"], wanted)
        original.x[rows] = after
        kept[rows] = found["x"].to(kept.dtype)
    return moments, kept


def _recording(found: dict[str, torch.Tensor], skip: bool) -> Linear:
    """Notes what `down` reads and gives, bias left out; with `skip` it gives nothing to the hidden state."""

    def linear(name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if name != "down":
            return stream_linear(name, x, weight, bias)
        found["x"] = x
        if skip:
            return torch.zeros(*x.shape[:-1], len(weight))
        found["y"] = stream_linear(name, x, weight, None)
        return found["y"] if bias is None else found["y"] + bias

    return linear


def _advance(ours: Stream, weights: Weights, inputs: torch.Tensor, cut: _Cut) -> None:
    """Our stream from the middle of the layer to its end, through the `down` that is left."""
    down = cut.down.to(inputs.dtype)
    for rows in ours.batches():
        y = stream_linear("down", inputs[rows][..., cut.kept], down, weights.get("down.bias"))
        if ours.config.norm_placement != "pre":
            norm = weights["post_mlp_norm"]
            y = torch.nn.functional.rms_norm(y, norm.shape, norm, ours.config.norm_eps)
        ours.x[rows] += y


def _tensors(source: Source, index: int, cut: _Cut) -> dict[str, SourceTensor]:
    prefix = f"layers.{index}."
    names = [prefix + name for name in _ROWS if prefix + name in source.tensors]
    found = {name: taken_rows(source.tensors[name], cut.kept) for name in names}
    down = made_tensor(prefix + "down", tuple(cut.down.shape), cut.down)
    return found | {prefix + "down": down}


_ROWS = ("gate", "up", "gate.bias", "up.bias")
