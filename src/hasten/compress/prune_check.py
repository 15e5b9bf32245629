"""What pruning will make of a model's shape, and what it refuses, before any work."""

from __future__ import annotations

from dataclasses import replace

from hasten.compress.calibration import Calibration
from hasten.core import ModelSpec, Recipe
from hasten.recipe import Pruning


def pruned_shape(recipe: Recipe, config: ModelSpec, text: Calibration | None) -> ModelSpec:
    """The shape after all pruning of a recipe; the vocabulary's size shows only when its text was counted.

    Raises:
        UsageError: nothing would be left or taken, a pattern does not divide, too little calibration text.
    """
    if not recipe.prune:
        return config
    from hasten.compress.prune.prune import check

    for pruning in recipe.prune:
        check(config, pruning, text)
        config = _after(config, pruning)
    return config


def _after(config: ModelSpec, pruning: Pruning) -> ModelSpec:
    from hasten.compress.prune.ffn import kept_channels, with_channels
    from hasten.compress.prune.heads import kept_heads, with_heads
    from hasten.compress.prune.layers import kept_layers
    from hasten.compress.prune.width import kept_width

    if pruning.kind == "ffn":
        return with_channels(config, kept_channels(config, pruning.amount))
    if pruning.kind == "heads":
        plan = kept_heads(config, pruning.amount)
        return with_heads(config, plan)
    if pruning.kind == "layers":
        count = kept_layers(config, pruning.amount)  # which ones is found later
        return replace(config, blocks=config.blocks[:count])
    if pruning.kind == "width":
        return replace(config, width=kept_width(config, pruning.amount))
    return config
