"""Low-rank adapters: a few numbers learn for a large matrix (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

SCALE = 2.0
"""What the product is multiplied with: the paper's alpha / rank, at the usual alpha = 2 * rank."""


@dataclass(frozen=True)
class Adapter:
    """weight + SCALE * b @ a. `b` begins as zeros, so that training begins with the model as it is.

    The sum is made before the product with activations: rank / tokens of the layer's own work (0.4 % at rank
    16 and 4,096 tokens), and the weight that is trained is, to the bit, the weight that is merged. The large
    matrix has no gradient and no moments: 4 bytes a weight instead of 16.
    """

    a: torch.Tensor  # [rank, cols]
    b: torch.Tensor  # [rows, rank]

    @classmethod
    def of(cls, weight: torch.Tensor, rank: int, seed: int) -> Adapter:
        """For a matrix [rows, cols]; a rank above its smaller side is that."""
        rows, cols = weight.shape
        rank = min(rank, rows, cols)
        drawn = torch.randn(rank, cols, generator=torch.Generator().manual_seed(seed)) * cols**-0.5
        a = drawn.to(weight.device).requires_grad_()
        return cls(a, torch.zeros(rows, rank, device=weight.device).requires_grad_())

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + SCALE * (self.b @ self.a)
