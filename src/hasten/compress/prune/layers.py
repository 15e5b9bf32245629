"""Whole layers: those go that change the hidden state least.

Block influence: 1 - mean cosine of what goes into a layer and what comes out (Men et al. 2024, ShortGPT).
Repair: `down` of the layer before a gap is fitted so that it adds what the missing layers did.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from hasten.compress.calibration import Calibration
from hasten.compress.prune import Observer, PartPruned, Parts, Pruner
from hasten.compress.prune.ffn import moments_of, to_middle
from hasten.compress.stream import Stream, refit, stream_weights
from hasten.compress.torch_model import made_tensor, renamed
from hasten.core import ModelSpec
from hasten.errors import UsageError
from hasten.models.source import Source
from hasten.recipe import Pruning
from hasten.weights.tensors import SourceTensor


def kept_layers(config: ModelSpec, amount: float) -> int:
    """How many layers stay.

    Raises:
        UsageError: none of them, or all.
    """
    kept = round((1 - amount) * len(config.blocks))
    if 0 < kept < len(config.blocks):
        return kept
    one = 1 / len(config.blocks)
    raise UsageError(
        f"prune layers: amount {amount:g} of {len(config.blocks)} layers "
        + ("leaves no layer" if kept == 0 else "takes no layer out"),
        hint=f"use an amount between {one:.3f} and {1 - one:.3f}"
        if len(config.blocks) > 1
        else "prune FFN channels instead: kind: ffn",
    )


class Layers(Pruner):
    """`layers`: take the layers of least influence out.

    Models whose MLP output is normed before it is added (Gemma 3, OLMo 2) are not repaired: the norm would
    undo what is added to `down`.
    """

    unit = "layers"

    def after(self, config: ModelSpec, pruning: Pruning) -> ModelSpec:
        count = kept_layers(config, pruning.amount)  # which ones is found later
        return replace(config, blocks=config.blocks[:count])

    def run(self, source: Source, pruning: Pruning, text: Calibration | None, step: Observer) -> Parts:
        assert text is not None
        config = source.config
        count = kept_layers(config, pruning.amount)
        passes = 2 if pruning.repair and config.blocks[0].norms.placement == "pre" else 1
        total = passes * len(config.blocks)
        found = influence(source, text, lambda done: step(done, total))
        kept = found.topk(count).indices.sort().values.tolist()
        fits: dict[int, SourceTensor] = {}
        errors: dict[int, tuple[float, float | None]] = {}
        if passes == 2:
            fits, errors = _repaired(source, text, kept, lambda done: step(len(config.blocks) + done, total))
        step(total, total)
        parts = [
            PartPruned(f"layers.{index}", int(index in kept), 1, *errors.get(index, (None, None)))
            for index in range(len(config.blocks))
        ]
        return _without(source, kept, fits), parts

    def notes(self, config: ModelSpec, pruning: Pruning) -> tuple[str, ...]:
        if config.blocks[0].norms.placement == "pre" or not pruning.repair:
            return ()
        return ("not repaired: a norm behind the MLP would undo what `down` is given to add",)


def influence(source: Source, calibration: Calibration, step: Callable[[int], None]) -> torch.Tensor:
    """Block influence of every layer, [layers]: 0 for one that changes no direction."""
    stream = Stream.of(source, calibration)
    found = torch.zeros(len(source.config.blocks))
    for index in range(len(found)):
        step(index)
        before = stream.x.clone()
        stream.advance(index, stream_weights(source, index))
        found[index] = 1 - torch.cosine_similarity(before, stream.x, dim=-1).mean()
    return found


def _repaired(
    source: Source, calibration: Calibration, kept: list[int], step: Callable[[int], None]
) -> tuple[dict[int, SourceTensor], dict[int, tuple[float, float | None]]]:
    """`down` of every layer before a gap, and the error of what it should add, before and after."""
    original = Stream.of(source, calibration)
    ours = original.copy()
    for gone in range(kept[0]):  # nothing comes before this gap: the original crosses it alone
        original.advance(gone, stream_weights(source, gone))
    fits, errors = {}, {}
    for place, index in enumerate(kept):
        step(index)
        following = kept[place + 1] if place + 1 < len(kept) else len(source.config.blocks)
        weights = stream_weights(source, index)
        original.advance(index, weights)
        if following == index + 1:
            ours.advance(index, weights)
            continue
        inputs = to_middle(ours, index, weights)
        for gone in range(index + 1, following):
            original.advance(gone, stream_weights(source, gone))
        wanted = original.x - ours.x - weights.get("down.bias", torch.zeros(()))
        moments = moments_of(original, inputs, wanted)
        down = weights["down"].float()
        fit, before, after = refit(moments, down, repair=True)
        errors[index] = before, after
        fits[index] = made_tensor(f"layers.{index}.down", tuple(fit.shape), fit)
        ours.join("down", weights | {"down": fit.to(inputs.dtype)}, inputs)
    return fits, errors


def _without(source: Source, kept: list[int], fits: dict[int, SourceTensor]) -> Source:
    """The model of some layers, renumbered."""
    config = source.config
    tensors = {name: t for name, t in source.tensors.items() if not name.startswith("layers.")}
    for place, index in enumerate(kept):
        prefix = f"layers.{index}."
        for name, tensor in source.tensors.items():
            if name.startswith(prefix):
                new = f"layers.{place}." + name.removeprefix(prefix)
                changed = fits.get(index) if name == prefix + "down" else None
                tensors[new] = renamed(changed or tensor, new)
    shape = replace(config, blocks=tuple(config.blocks[i] for i in kept))
    return replace(source, config=shape, tensors=tensors)
