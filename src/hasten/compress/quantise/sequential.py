"""The best method found here: GPTQ where each layer sees what the quantised ones before it give.

Two streams of hidden states run through the model side by side, the source's and the quantised one's. Each
matrix is rounded for the inputs it will really get, and before that it is moved towards the weights that give
the source's outputs from those inputs: w + s (w C H^-1 - w), with H the second moments of the quantised
stream's inputs and C the cross moments of the source's. s = 1 is the least-squares fit, which follows the
calibration text too closely; halfway is better on other text (benchmarks/quantise.py). The idea of aiming at
the source's outputs is GPTAQ's (Li et al. 2025).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hasten.compress.quantise.fold import GROUPS, READERS
from hasten.compress.quantise.gptq import DAMP, Factor, gptq
from hasten.compress.quantise.layer_methods import (
    QuantisedLayer,
    adapted,
    changed_vectors,
    factor_of,
    kept_as,
)
from hasten.compress.quantise.staged import StagedLayer
from hasten.compress.quantise.statistics import LayerStatistics, final_states, mean_gram
from hasten.compress.stream import Stream, fast_type, in_fast_type
from hasten.compress.torch_layer import tensor_values
from hasten.core import Recipe
from hasten.models.source import Source
from hasten.weights.packed import PackedLinear, pack_integers, pack_linear

AIM = 0.5
"""How far a matrix moves towards the least-squares fit before it is rounded."""


@dataclass
class Streams:
    """Hidden states of the source and of the quantised model before the next layer."""

    full: Stream
    ours: Stream


@dataclass(frozen=True)
class Inputs:
    """What a group of matrices reads, in both streams: float32 [B, T, cols]."""

    full: torch.Tensor
    ours: torch.Tensor

    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(H, C): mean over tokens of ours ours^T, and of full ours^T; [cols, cols] each."""
        cols = self.ours.shape[-1]
        full, ours = self.full.reshape(-1, cols), self.ours.reshape(-1, cols)
        return mean_gram(ours), (full.T @ ours).div_(len(ours))


def sequential_layer(
    source: Source, recipe: Recipe, index: int, streams: Streams, statistics: LayerStatistics | None
) -> QuantisedLayer:
    """A layer quantised for the inputs it will get; both streams move on through it.

    Args:
        source: the model.
        recipe: of method `best`.
        index: which layer.
        streams: before the layer.
        statistics: of the source's activations, for `smooth`.

    Raises:
        ModelError: a weight or an activation is not finite; the layer is named.
    """
    weights, layouts, _ = adapted(source, recipe, index, statistics)
    run = in_fast_type(weights)
    ours = dict(run)
    there, here = StagedLayer(streams.full, index), StagedLayer(streams.ours, index)
    linears: dict[str, PackedLinear] = {}
    for group in GROUPS:
        inputs = Inputs(there.inputs(group, run), here.inputs(group, ours))
        names = [n for n in READERS[group] if layouts[n].is_integer and recipe.layout_for(_full(index, n))]
        aim = _Aim.of(inputs, f"layers.{index}.{group}") if names else None
        for name in READERS[group]:
            full = _full(index, name)
            if aim is None or name not in names:
                linears[full] = kept_as(source, recipe, full, weights[name], None)
                continue
            found = gptq(aim.moved(weights[name]), aim.factor, layouts[name], full)
            linears[full] = pack_integers(full, found)
            ours[name] = torch.from_numpy(found.values()).to(fast_type())
        there.pass_on(group, run, inputs.full)
        here.pass_on(group, ours, inputs.ours)
    return QuantisedLayer(linears, changed_vectors(source, index, weights))


def sequential_head(source: Source, recipe: Recipe, name: str, streams: Streams) -> PackedLinear:
    """The LM head, or a tied embedding, for the hidden states it will get."""
    layout = recipe.layout_for(name)
    if layout is None or not layout.is_integer or layout.bits >= 8:  # nothing to win that costs a minute
        return pack_linear(source.tensors[name], layout)
    weight = tensor_values(source.tensors[name])
    inputs = Inputs(final_states(source, streams.full), final_states(source, streams.ours))
    aim = _Aim.of(inputs, name)
    return pack_integers(name, gptq(aim.moved(weight), aim.factor, layout, name))


class _Aim:
    """Where a group's matrices are moved to before they are rounded."""

    def __init__(self, shift: torch.Tensor, factor: Factor) -> None:
        self._shift = shift  # [cols, cols]: s (C H^-1 - 1)
        self.factor = factor

    @classmethod
    def of(cls, inputs: Inputs, what: str) -> _Aim:
        gram, cross = inputs.moments()
        factor = factor_of(gram, what)
        damp = DAMP * gram.diagonal().mean().clamp(min=1e-30)
        gram.diagonal().add_(damp)
        cross.diagonal().add_(damp)  # so that equal streams leave the weights where they are
        fit = torch.cholesky_solve(cross.T, torch.linalg.cholesky(gram)).T
        fit.diagonal().sub_(1)
        return cls(fit.mul_(AIM), factor)

    def moved(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + weight @ self._shift


def _full(index: int, name: str) -> str:
    return f"layers.{index}.{name}"
