"""Whether a torch module is still the same: parameters, buffers and parts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class ModuleState:
    """What a module's output depends on, by identity and version, not by value.

    It holds on to the tensors' storage and to the parts, so that neither an address nor an id can come back
    for something else while it is compared with. Cost: a walk over the module, about a microsecond a part.
    """

    parts: tuple[nn.Module, ...]
    tensors: tuple[torch.Tensor, ...]  # aliases: they share storage and version counter
    versions: tuple[int, ...]
    places: tuple[tuple[object, ...], ...]  # address, dtype, shape, strides

    @classmethod
    def of(cls, module: nn.Module) -> ModuleState | None:
        """The state now; None in training mode (of any part) or where tensors have no version counter."""
        parts = tuple(module.modules())
        tensors: list[torch.Tensor] = []
        for part in parts:
            if part.training:
                return None
            for held in (part._parameters, part._buffers):
                tensors += [tensor for tensor in held.values() if tensor is not None]
        if any(tensor.is_inference() for tensor in tensors):
            return None
        return cls(
            parts=parts,
            tensors=tuple(tensor.detach() for tensor in tensors),
            versions=tuple(tensor._version for tensor in tensors),
            places=tuple((t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors),
        )

    def same(self, other: ModuleState) -> bool:
        """Whether nothing was replaced or written to in between."""
        return (
            self.versions == other.versions
            and self.places == other.places
            and len(self.parts) == len(other.parts)
            and all(mine is theirs for mine, theirs in zip(self.parts, other.parts, strict=True))
        )
