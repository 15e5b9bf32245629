"""Weights rounded as a native layout rounds them, with gradients: quantisation-aware distillation.

Values are those of native/layout.h: scale * (u - 2^(bits-1)) with an fp16 scale a group, or scale * u +
minimum. Rounding passes gradients straight through (Bengio et al. 2013); scales learn too (LSQ, Esser et al.
2020; with a minimum LSQ+, Bhalgat et al. 2020). They begin as the native search finds them (native/pack.cpp),
or as the student's own where it comes in this very layout, GPTQ's for example.

Afterwards the integers are handed over, not the values: searching scales again for values that lie on a grid
gives the same grid only where a group uses its ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from hasten.compress.changed import made_tensor
from hasten.core import Format
from hasten.weights.codec import Encoded
from hasten.weights.packed import integers, pack_linear, source_layout
from hasten.weights.tensors import TYPES, SourceTensor

_HALF_MAX = 65504.0


class _Rounded(torch.autograd.Function):
    """w [R, G, n], scale and minimum [R, G, 1] -> the values of the layout; keeps its inputs alone."""

    @staticmethod
    def forward(
        ctx: Any, w: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, low: float, high: float
    ) -> torch.Tensor:
        ctx.save_for_backward(w, scale, minimum)
        ctx.ends = (low, high)
        return _rounded(w, scale, minimum, low, high) * scale + minimum

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        w, scale, minimum = ctx.saved_tensors
        steps = (w - minimum) * _inverse(scale)
        q = _rounded(w, scale, minimum, *ctx.ends)
        inside = steps.round() == q
        grad = grads[0]
        d_scale = (grad * torch.where(inside, q - steps, q)).sum(-1, keepdim=True)
        d_minimum = (grad * ~inside).sum(-1, keepdim=True)
        return grad * inside, d_scale, d_minimum, None, None


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)


def _rounded(
    w: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, low: float, high: float
) -> torch.Tensor:
    return ((w - minimum) * _inverse(scale)).round().clamp(low, high)


def _half(value: torch.Tensor) -> torch.Tensor:
    """The nearest fp16 number in float32; gradients pass."""
    nearest = value.detach().clamp(-_HALF_MAX, _HALF_MAX).half().float()
    return value + (nearest - value.detach())


@dataclass
class Grid:
    """Scales (and minimums) of one matrix in an integer layout; called with the matrix, gives its values.

    `growth` and `shift` learn: scale = first * exp(growth), minimum = first + shift * first scale. Both begin
    at 0, are of the order of 1 whatever the weights, and so take one learning rate.
    """

    layout: Format
    cols: int
    scale: torch.Tensor  # float32 [R, G, 1], as it was first
    minimum: torch.Tensor | None
    growth: torch.Tensor
    shift: torch.Tensor | None

    @classmethod
    def of(cls, tensor: SourceTensor, layout: Format, device: torch.device, *, learns: bool = True) -> Grid:
        """Where the native packer would put it.

        Raises:
            ModelError: a value is not finite.
            UsageError: the layout's group does not divide the matrix's inputs.
        """
        found = integers(pack_linear(tensor, None if source_layout(tensor) == layout else layout))

        def on(halves: np.ndarray[Any, np.dtype[np.float16]]) -> torch.Tensor:
            return torch.from_numpy(halves.astype(np.float32)).to(device)[..., None]

        scale = on(found.scales)
        minimum = None if found.minimums is None else on(found.minimums)
        growth = torch.zeros_like(scale).requires_grad_(learns)
        shift = None if minimum is None else torch.zeros_like(minimum).requires_grad_(learns)
        return cls(layout, tensor.shape[1], scale, minimum, growth, shift)

    def learning(self) -> dict[str, torch.Tensor]:
        """What of it learns, by name."""
        found = {"growth": self.growth} | ({} if self.shift is None else {"shift": self.shift})
        return {name: value for name, value in found.items() if value.requires_grad}

    @property
    def _ends(self) -> tuple[float, float]:
        if not self.layout.symmetric:
            return 0.0, float(2**self.layout.bits - 1)
        half = 2 ** (self.layout.bits - 1)
        return float(1 - half if self.layout.bits == 8 else -half), float(half - 1)

    def _now(self) -> tuple[torch.Tensor, torch.Tensor]:
        scale = _half(self.scale * self.growth.exp())
        if self.minimum is None or self.shift is None:
            return scale, torch.zeros_like(scale)
        return scale, _half(self.minimum + self.shift * self.scale)

    def _grouped(self, weight: torch.Tensor) -> torch.Tensor:
        groups = self.scale.shape[1]
        padded = F.pad(weight, (0, groups * self.layout.group - self.cols))
        return padded.view(len(weight), groups, self.layout.group)

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = _Rounded.apply(  # type: ignore[no-untyped-call]
            self._grouped(weight), *self._now(), *self._ends
        )
        return found.flatten(1)[:, : self.cols]

    @torch.no_grad()
    def integers(self, weight: torch.Tensor) -> Encoded:
        """What `self(weight)` is made of, as it is packed."""
        scale, minimum = self._now()
        q = _rounded(self._grouped(weight), scale, minimum, *self._ends)
        zero = 2 ** (self.layout.bits - 1) if self.layout.symmetric else 0
        u = (q + zero).flatten(1)[:, : self.cols].to(torch.uint8).cpu().numpy()

        def halves(value: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float16]]:
            return np.ascontiguousarray(value[..., 0].cpu().numpy().astype(np.float16))

        return Encoded(
            self.layout,
            np.ascontiguousarray(u),
            halves(scale),
            None if self.layout.symmetric else halves(minimum),
        )


def integer_tensor(name: str, found: Encoded) -> SourceTensor:
    """A tensor of a source that packs to exactly these integers, without a layout being asked for.

    Where no number format of a source holds them (5 and 6 bits, groups of 16, a part of a group), it holds
    their values in float32.
    """
    rows, cols = found.codes.shape
    layout = found.layout
    kind = f"{'S' if layout.symmetric else 'A'}{layout.bits}_{layout.group}"
    if kind not in TYPES or cols % layout.group:
        return made_tensor(name, (rows, cols), torch.from_numpy(found.values()))
    numbers = [found.scales] if found.minimums is None else [found.scales, found.minimums]
    front = np.stack(numbers, axis=-1).astype("<f4").view(np.uint8)  # [rows, groups, 4 or 8]
    blocks = np.concatenate([front, found.codes.reshape(rows, -1, layout.group)], axis=-1)
    return SourceTensor(name, (rows, cols), kind, np.ascontiguousarray(blocks).reshape(-1))
