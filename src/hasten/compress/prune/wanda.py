"""Single weights by size times what comes in: Sun et al. 2023, "A Simple and Effective Pruning Approach"."""

from __future__ import annotations

import torch

from hasten.compress.prune.mask import keep_mask
from hasten.recipe import Pruning


def wanda_mask(weight: torch.Tensor, gram: torch.Tensor, pruning: Pruning) -> torch.Tensor:
    """Weights that stay, bool [rows, cols]: the largest |w| * |x|_2 of each output row.

    Args:
        weight: [rows, cols].
        gram: [cols, cols], sum of x x^T over the calibration text.
        pruning: the amount or pattern.
    """
    norms = gram.diagonal().clamp_min(0).sqrt()
    return keep_mask(weight.abs() * norms, pruning, per_row=True)
