"""Which single weights of a matrix stay, by their importance."""

from __future__ import annotations

import torch

from hasten.recipe import Pruning


def keep_mask(importance: torch.Tensor, pruning: Pruning, per_row: bool) -> torch.Tensor:
    """The most important weights, bool [rows, cols].

    Args:
        importance: [rows, cols].
        pruning: N of every M neighbours in a row stay, or all but the amount.
        per_row: the amount goes in every row (wanda), not in the matrix as a whole.
    """
    if pruning.pattern is not None:
        stay, of = pruning.pattern
        groups = importance.view(len(importance), -1, of)
        best = groups.topk(stay, dim=-1).indices
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True).view(importance.shape)
    flat = importance if per_row else importance.reshape(1, -1)
    gone = round(pruning.amount * flat.shape[1])
    worst = flat.topk(gone, dim=-1, largest=False).indices
    return torch.ones_like(flat, dtype=torch.bool).scatter_(-1, worst, False).view(importance.shape)
