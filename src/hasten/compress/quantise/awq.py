"""AWQ (Lin et al. 2023): weights that meet large activations are rounded on a finer grid.

Column j of the matrices that read an input is multiplied by s_j, and the input divided by it, which folds
into what makes the input (`fold.py`). s_j is the input's size to a power between 0 and 1; the power is the
one that leaves the least error of the output, measured with the inputs' second moments, so that no
activations are kept. Scales clipped below the largest weight, AWQ's other half, are what packing searches
anyway.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hasten.compress.quantise.fold import READERS, Group, fold, foldable, shared_scales
from hasten.compress.quantise.gptq import lost, nearest
from hasten.compress.torch_layer import Weights
from hasten.core import Format, ModelSpec

POWERS = tuple(i / 10 for i in range(10))
_FARTHEST = 64.0
"""Most that a scale lies from the mean."""


def input_scales(gram: torch.Tensor, power: float) -> torch.Tensor:
    """The inputs' sizes to a power, [cols], their geometric mean 1."""
    size = gram.diagonal().clamp(min=0).sqrt()
    alive = size > 0
    if not bool(alive.any()):
        return torch.ones_like(size)
    logs = power * size.clamp(min=1e-30).log()
    scales = (logs - logs[alive].mean()).exp().clamp(1 / _FARTHEST, _FARTHEST)
    return torch.where(alive, scales, 1.0)


def awq_scales(
    weights: Weights,
    config: ModelSpec,
    group: Group,
    gram: torch.Tensor,
    layouts: Mapping[str, Format],
    powers: tuple[float, ...] = POWERS,
) -> torch.Tensor:
    """s of one group, float32 [cols], that leaves the least error of its outputs.

    Args:
        weights: the layer by short name, float32.
        config: the model's.
        group: a foldable one.
        gram: second moments of what it reads, [cols, cols].
        layouts: of each matrix of the group; floats have no say.
        powers: tried; 0 is no scaling.
    """
    best, least = torch.ones(len(gram)), float("inf")
    for power in powers:
        scales = shared_scales(weights, config, group, input_scales(gram, power))
        error = 0.0
        for name in READERS[group]:
            if layouts[name].is_integer:
                found = torch.from_numpy(nearest(weights[name] * scales, layouts[name], name).values())
                error += lost(gram, weights[name], found / scales)
        if error < least:
            best, least = scales, error
    return best


def awq_layer(
    weights: Weights,
    config: ModelSpec,
    grams: Mapping[Group, torch.Tensor],
    layouts: Mapping[str, Format],
) -> tuple[dict[str, torch.Tensor], dict[Group, torch.Tensor]]:
    """One layer scaled for its layouts, and the moments of its inputs as they are then.

    Groups whose scales fold into nothing stay as they are.

    Args:
        weights: the layer by short name, float32.
        config: the model's.
        grams: second moments of each group's inputs.
        layouts: of each matrix.
    """
    new, scaled = dict(weights), dict(grams)
    for group, gram in grams.items():
        if foldable(config, group) and any(layouts[name].is_integer for name in READERS[group]):
            scales = awq_scales(new, config, group, gram, layouts)
            new = fold(new, config, group, scales)
            scaled[group] = gram / scales / scales[:, None]
    return new, scaled
