"""The model that learns: which of its numbers do, what becomes of them in use, what it is afterwards.

A matrix may learn through adapters, or rounded as a native layout rounds it, with gradients. Values are then
those of native/layout.h: scale * (u - 2^(bits-1)) with an fp16 scale a group, or scale * u + minimum.
Rounding passes gradients straight through (Bengio et al. 2013); scales learn too (LSQ, Esser et al. 2020;
with a minimum LSQ+, Bhalgat et al. 2020). They begin as the native search finds them (native/pack.cpp), or as
the student's own where it comes in this very layout, GPTQ's for example. Afterwards the integers are handed
over, not the values: searching scales again for values that lie on a grid gives the same grid only where a
group uses its ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from hasten.compress.distil import Change, Decoder
from hasten.compress.torch_model import LINEARS, changed, made_tensor
from hasten.core import Format
from hasten.models.source import Source
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


ADAPTER_SCALE = 2.0
"""What the product is multiplied with: the paper's alpha / rank, at the usual alpha = 2 * rank."""


@dataclass(frozen=True)
class Adapter:
    """Low rank (Hu et al. 2021, arXiv:2106.09685): weight + ADAPTER_SCALE * b @ a. `b` begins as zeros.

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
        return weight + ADAPTER_SCALE * (self.b @ self.a)


Layouts = Callable[[str], Format | None]
"""The layout a matrix is trained through, by canonical name; None or floats: as it is."""


@dataclass
class Student:
    """A decoder with numbers that learn."""

    source: Source
    model: Decoder
    weights: dict[str, torch.Tensor]  # what learns at the plain rate, by name
    scales: dict[str, torch.Tensor]  # scales and minimums of grids, at a higher rate
    grids: dict[str, Grid]

    @classmethod
    def of(
        cls,
        source: Source,
        model: Decoder,
        *,
        lora: int | None = None,
        layouts: Layouts | None = None,
        keep_zeros: bool = False,
        seed: int = 0,
    ) -> Student:
        """Give a decoder what it needs to learn.

        Args:
            source: where its values came from. model: in float32; its `changes` are set here.
            lora: rank of adapters on every linear layer of the layers; None trains every parameter.
            layouts: what matrices are rounded to. keep_zeros: a zero of a layer's matrix stays one.
            seed: of the adapters.

        Raises:
            ModelError, UsageError: as `Grid.of`.
        """
        weights: dict[str, torch.Tensor] = {}
        scales: dict[str, torch.Tensor] = {}
        grids: dict[str, Grid] = {}
        for number, (name, value) in enumerate(model.values.items()):
            changes: list[Change] = []
            is_linear = name.startswith("layers.") and name.rsplit(".", 1)[-1] in LINEARS
            if lora is None:
                weights[name] = value.requires_grad_()
            elif is_linear:
                adapter = Adapter.of(value, lora, seed * 100_003 + number)
                weights |= {f"{name}.lora_a": adapter.a, f"{name}.lora_b": adapter.b}
                changes.append(adapter)
            if keep_zeros and is_linear:
                changes.append(_Zeros(value.detach() != 0))
            layout = layouts(name) if layouts is not None and value.ndim == 2 else None
            if layout is not None and layout.is_integer:
                grids[name] = Grid.of(source.tensors[name], layout, model.device)
                scales |= {f"{name}.{key}": value for key, value in grids[name].learning().items()}
                changes.append(grids[name])
            if changes:
                model.changes[name] = tuple(changes)
        return cls(source, model, weights, scales, grids)

    @property
    def learning(self) -> dict[str, torch.Tensor]:
        """All that learns, by name."""
        return self.weights | self.scales

    @torch.no_grad()
    def integers(self) -> dict[str, Encoded]:
        """What the layers with a layout are now made of."""
        return {name: grid.integers(self._before(name)) for name, grid in self.grids.items()}

    def _before(self, name: str) -> torch.Tensor:
        """A weight just before it is rounded."""
        value = self.model.values[name]
        for change in self.model.changes[name][:-1]:
            value = change(value)
        return value

    @torch.no_grad()
    def made(self, found: dict[str, Encoded]) -> Source:
        """The student as a source.

        Floats come in the type that they were computed in: of bf16 products, bf16 weights are what was
        trained, rounding them loses nothing.
        """
        dtype = self.model.dtype
        learned = {*self.weights, *self.model.changes} & self.model.values.keys()
        values = {name: self.model.weight(name).to(dtype) for name in learned - found.keys()}
        made = changed(self.source, values)
        made.tensors.update({name: integer_tensor(name, kept) for name, kept in found.items()})
        return made


@dataclass(frozen=True)
class _Zeros:
    """Zeros stay: what was pruned one by one."""

    kept: torch.Tensor  # bool, as the weight

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.kept
