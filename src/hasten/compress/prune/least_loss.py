"""Which inputs of a linear layer can go: those whose absence a refit of the others makes good.

Optimal brain surgeon for whole columns (Hassibi and Stork 1993; ZipLM, Kurtic et al. 2023).
"""

from __future__ import annotations

import torch

from hasten.compress.moments import Moments

_LOOSE = 0.1  # of the ridge of the fit: what it then errs on other text is 2 to 4 % less (demo model)
_AT_ONCE = 32  # inputs that may go before the rest is judged anew
_STRANGER = 0.3  # partial correlation below which two inputs may go at once


def least_loss(moments: Moments, prior: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` inputs that are kept, int64 ascending: those go that cost the refitted output least.

    Args:
        moments: of all inputs.
        prior: [outputs, inputs]: the weights that the ridge falls back on.
        count: inputs that stay.
    """
    weight, inverse = _solved(moments, prior)
    gone = torch.zeros(len(inverse), dtype=torch.bool)
    while (left := len(inverse) - count - int(gone.sum())) > 0:
        loss = weight.square().sum(0) / inverse.diagonal().clamp_min(1e-12)
        worst = loss.masked_fill(gone, torch.inf).topk(min(_AT_ONCE, left), largest=False).indices
        out = worst[_strangers(inverse[worst][:, worst])]
        _remove(weight, inverse, out)
        gone[out] = True
    return (~gone).nonzero().squeeze(1)


def _solved(moments: Moments, prior: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Best weights with all inputs there, and the inverse of their moments; inputs scaled to size 1."""
    ridge, scale = _LOOSE * moments.ridge, moments.scale()
    system = moments.gram / scale / scale[:, None]
    system.diagonal().add_(ridge)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(system))
    return (moments.cross / scale + ridge * (prior * scale)) @ inverse, inverse


def _remove(weight: torch.Tensor, inverse: torch.Tensor, out: torch.Tensor) -> None:
    """Take inputs out of both, in place; the weights of the others change as a refit would change them."""
    update = torch.linalg.solve(inverse[out][:, out], inverse[out])  # [out, inputs]
    weight -= weight[:, out] @ update
    inverse.addmm_(inverse[:, out], update, alpha=-1)


def _strangers(inverse: torch.Tensor) -> torch.Tensor:
    """Which of some inputs, the best first, may go together, bool [n]: none that stands in for one before it.

    Of two inputs that say the same either may go, but not both; their partial correlation tells.
    """
    size = inverse.diagonal().clamp_min(1e-12).sqrt()
    partial = (inverse / size / size[:, None]).tril(-1).abs()
    return partial.amax(1) < _STRANGER
