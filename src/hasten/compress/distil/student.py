"""The model that learns: which of its numbers do, and what it is afterwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hasten.compress.changed import changed
from hasten.compress.distil.decoder import Change, Decoder
from hasten.compress.distil.fake_quant import Grid, integer_tensor
from hasten.compress.distil.lora import Adapter
from hasten.compress.torch_layer import LINEARS
from hasten.core import Format
from hasten.models.source import Source
from hasten.weights.codec import Encoded

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
