"""Single weights, each one's loss put right by those after it: Frantar and Alistarh 2023, SparseGPT.

The same update repairs what another method took out: then the mask is given and only the rest moves.
"""

from __future__ import annotations

import torch

from hasten.compress.prune.mask import keep_mask
from hasten.recipe import Pruning

BLOCK = 128
"""Columns whose mask is chosen at once; the paper's."""
DAMPING = 0.01
"""Part of the mean second moment added to all: the paper's."""


def sparsegpt(
    weight: torch.Tensor, gram: torch.Tensor, pruning: Pruning, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Weights with zeros, float32 [rows, cols], nearest in output to those given.

    Column by column from the left: what a zero changes in the output is made good by the columns to its
    right, as the inverse Hessian says, through its Cholesky factor.

    Args:
        weight: [rows, cols].
        gram: [cols, cols], sum of x x^T over the calibration text.
        pruning: the amount or pattern, where no mask is given.
        mask: bool [rows, cols], weights that stay; None chooses them block by block, by w^2 / [H^-1]_jj.
    """
    weight = weight.clone()
    factor = _inverse_factor(gram, weight)
    width = _block(pruning)
    for at in range(0, weight.shape[1], width):
        end = min(at + width, weight.shape[1])
        block, own = weight[:, at:end], factor[at:end, at:end]
        every = end - at if pruning.pattern is None else pruning.pattern[1]
        stays = torch.zeros_like(block, dtype=torch.bool) if mask is None else mask[:, at:end]
        losses = torch.zeros_like(block)
        for column in range(end - at):
            if mask is None and column % every == 0:  # the next columns, as they are by now
                ahead = slice(column, column + every)
                saved = block[:, ahead].square() / own.diagonal()[ahead].square()
                stays[:, ahead] = keep_mask(saved, pruning, per_row=False)
            lost = block[:, column].masked_fill(stays[:, column], 0.0) / own[column, column]
            block[:, column:] -= lost[:, None] * own[column, column:]
            block[:, column].masked_fill_(~stays[:, column], 0.0)
            losses[:, column] = lost
        weight[:, end:] -= losses @ factor[at:end, end:]
    return weight


def _block(pruning: Pruning) -> int:
    if pruning.pattern is None:
        return BLOCK
    of = pruning.pattern[1]
    return max(1, BLOCK // of) * of


def _inverse_factor(gram: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor of the inverse of damped moments; inputs that are always zero lose weights."""
    system = gram.clone()
    dead = system.diagonal() <= 0
    weight[:, dead] = 0.0
    system.diagonal()[dead] = 1.0
    system.diagonal().add_(DAMPING * float(system.diagonal().mean()))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(system))
    factor: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor
