"""Single weights by their size alone: no text is needed unless the rest is repaired."""

from __future__ import annotations

import torch

from hasten.compress.prune.mask import keep_mask
from hasten.recipe import Pruning


def magnitude_mask(weight: torch.Tensor, pruning: Pruning) -> torch.Tensor:
    """Weights that stay, bool [rows, cols]: the largest of the matrix, or of every M neighbours."""
    return keep_mask(weight.abs(), pruning, per_row=False)
