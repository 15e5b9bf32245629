"""Single weights out of every matrix of every layer, by magnitude, wanda or sparsegpt.

The embedding and the head stay: a zero there takes a word's own meaning away (all three papers leave them).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hasten.compress.calibration import Calibration
from hasten.compress.changed import changed
from hasten.compress.moments import gram_error, symmetric_add
from hasten.compress.prune.magnitude import magnitude_mask
from hasten.compress.prune.pruned import PartPruned
from hasten.compress.prune.sparsegpt import sparsegpt
from hasten.compress.prune.wanda import wanda_mask
from hasten.compress.stream import Found, Stream, stream_weights
from hasten.compress.torch_layer import LINEARS, Weights, layer_weights
from hasten.core import ModelSpec
from hasten.errors import UsageError
from hasten.models.source import Source
from hasten.recipe import Pruning

_READ_ALIKE = {"q": ("q", "k", "v"), "o": ("o",), "gate": ("gate", "up"), "down": ("down",)}
"""Matrices that read the same inputs, by the first of them."""


def check_pattern(config: ModelSpec, pruning: Pruning) -> None:
    """Whether N:M fits every matrix.

    Raises:
        UsageError: M does not divide the inputs of a matrix.
    """
    if pruning.pattern is None:
        return
    of = pruning.pattern[1]
    for name, (_, cols) in config.linear_shapes().items():
        if name.startswith("layers.") and cols % of:
            raise UsageError(
                f"prune {pruning.kind}: pattern {pruning.pattern[0]}:{of} does not divide the {cols} inputs "
                f"of {name}",
                hint="use pattern: 2:4"
                if cols % 4 == 0 and of != 4
                else "use an amount instead of a pattern",
            )


def prune_single_weights(
    source: Source,
    pruning: Pruning,
    calibration: Calibration | None,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Source, list[PartPruned]]:
    """Set single weights to zero, layer after layer; each is judged on what the pruned ones before give it.

    Without repair, magnitude reads no text. Repair is sparsegpt's update over the mask that was chosen.

    Args:
        source: the model.
        pruning: of kind magnitude, wanda or sparsegpt.
        calibration: None only for magnitude without repair.
        step: told (layers done, layers in all).

    Raises:
        UsageError: the pattern does not divide a matrix's inputs.
        ModelError: activations that are not finite; the layer is named.
    """
    check_pattern(source.config, pruning)
    stream = None if calibration is None or not needs_text(pruning) else Stream.of(source, calibration)
    values: dict[str, torch.Tensor] = {}
    parts = []
    total = source.config.num_layers
    for index in range(total):
        step(index, total)
        weights = layer_weights(source, index)
        fast = {} if stream is None else stream_weights(source, index)
        grams = {} if stream is None else _grams(stream, index, fast)
        for first, names in _READ_ALIKE.items():
            for name in names:
                done = _pruned(weights[name], grams.get(first), pruning)
                full = f"layers.{index}.{name}"
                values[full] = done.weight
                parts.append(
                    PartPruned(
                        full, int(done.weight.count_nonzero()), done.weight.numel(), done.before, done.after
                    )
                )
        if stream is not None:
            new = {name: values[f"layers.{index}.{name}"].to(fast[name].dtype) for name in LINEARS}
            stream.advance(index, fast | new)
    step(total, total)
    return changed(source, values), parts


def needs_text(pruning: Pruning) -> bool:
    """Whether anything is measured on the calibration text."""
    return pruning.kind != "magnitude" or pruning.repair


@dataclass(frozen=True)
class _Done:
    weight: torch.Tensor  # bfloat16 [rows, cols]
    before: float | None
    after: float | None


def _pruned(weight: torch.Tensor, gram: torch.Tensor | None, pruning: Pruning) -> _Done:
    if gram is None:
        return _Done((weight * magnitude_mask(weight, pruning)).bfloat16(), None, None)
    if pruning.kind == "sparsegpt":  # choosing and repairing are one: as cut is what its mask alone leaves
        fit = sparsegpt(weight, gram, pruning).bfloat16()
        cut = (weight * (fit != 0)).bfloat16()
    else:
        by_size = pruning.kind == "magnitude"
        mask = magnitude_mask(weight, pruning) if by_size else wanda_mask(weight, gram, pruning)
        cut = (weight * mask).bfloat16()
        fit = sparsegpt(weight, gram, pruning, mask).bfloat16() if pruning.repair else cut
    before = gram_error(gram, weight, cut.float())
    if not pruning.repair:
        return _Done(cut, before, None)
    return _Done(fit, before, gram_error(gram, weight, fit.float()))


def _grams(stream: Stream, index: int, weights: Weights) -> dict[str, torch.Tensor]:
    """Second moments of a layer's four inputs, the layer not pruned yet."""
    grams = {name: torch.zeros(weights[name].shape[1], weights[name].shape[1]) for name in _READ_ALIKE}
    for rows in stream.batches():
        found: Found = {}
        stream.through(index, weights, rows, found, silent=("down",))
        for name, gram in grams.items():
            symmetric_add(gram, found[name][0])
    return grams
