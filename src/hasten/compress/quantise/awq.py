"""AWQ (Lin et al. 2023): weights that meet large activations are rounded on a finer grid.

Column j of the matrices that read an input is multiplied by s_j, and the input divided by it, which folds
into what makes the input (`fold`). s_j is the input's size to a power between 0 and 1; the power is the
one that leaves the least error of the output, measured with the inputs' second moments, so that no
activations are kept. Scales clipped below the largest weight, AWQ's other half, are what packing searches
anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from hasten.compress.quantise import Layer, Method, Rounded, divided, evened, fold, foldable, shared_scales
from hasten.compress.quantise.gptq import Gptq, lost, nearest
from hasten.compress.torch_model import Weights
from hasten.core import READERS, Format, Group, ModelSpec

POWERS = tuple(i / 10 for i in range(10))
_FARTHEST = 64.0
"""Most that a scale lies from the mean."""


def input_scales(gram: torch.Tensor, power: float) -> torch.Tensor:
    """The inputs' sizes to a power, [cols], their geometric mean 1."""
    size = gram.diagonal().clamp(min=0).sqrt()
    return evened(power * size.clamp(min=1e-30).log(), size > 0, _FARTHEST)


def awq_scales(
    weights: Weights,
    config: ModelSpec,
    group: Group,
    gram: torch.Tensor,
    layouts: Mapping[str, Format],
) -> torch.Tensor:
    """s of one group, float32 [cols], that leaves the least error of its outputs.

    Args:
        group: a foldable one.
        gram: second moments of what it reads, [cols, cols].
        layouts: of matrices that become integers; others have no say.
    """
    best, least = torch.ones(len(gram)), float("inf")
    for power in POWERS:
        scales = shared_scales(weights, config, group, input_scales(gram, power))
        error = 0.0
        for name in READERS[group]:
            if name in layouts:
                found = torch.from_numpy(nearest(weights[name] * scales, layouts[name], name).values())
                error += lost(gram, weights[name], found / scales)
        if error < least:
            best, least = scales, error
    return best


def scaled(layer: Layer) -> Layer:
    """A layer scaled for its layouts, and the moments of its inputs as they are then.

    Groups whose scales fold into nothing stay as they are.
    """
    weights, grams = layer.weights, dict(layer.grams)
    for group, gram in layer.grams.items():
        if layer.rounded(group) and foldable(layer.config, group):
            scales = awq_scales(weights, layer.config, group, gram, layer.layouts)
            weights = fold(weights, layer.config, group, scales)
            grams[group] = divided(gram, scales)
    return replace(layer, weights=weights, grams=grams)


class Awq(Method):
    """`awq`: scaled, then rounded to the nearest."""

    scales = True

    def layer(self, layer: Layer) -> Rounded:
        return Rounded({}, scaled(layer).weights)


class AwqGptq(Gptq):
    """`awq-gptq`: scaled, then rounded by GPTQ."""

    scales = True

    def layer(self, layer: Layer) -> Rounded:
        return super().layer(scaled(layer))
