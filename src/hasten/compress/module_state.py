"""Whether a torch module is still the same: parameters, buffers and parts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class ModuleState:
    """What a module's output depends on, by identity and version, not by value.

    It holds on to the tensors' storage and to the parts, so that neither an address nor an id can come back
    for something else while it is compared with. Comparing costs a walk over the module.
    """

    parts: tuple[nn.Module, ...]
    tensors: tuple[torch.Tensor, ...]  # aliases: they share storage and version counter with the module's
    marks: tuple[tuple[object, ...], ...]  # of each tensor: see `_mark`

    @classmethod
    def of(cls, module: nn.Module) -> ModuleState | None:
        """The state now; None in training mode (of any part) or where tensors have no version counter."""
        parts = _parts(module)
        tensors = _tensors(parts)
        if any(part.training for part in parts) or any(tensor.is_inference() for tensor in tensors):
            return None
        marks = tuple(_mark(tensor) for tensor in tensors)
        return cls(tuple(parts), tuple(tensor.detach() for tensor in tensors), marks)

    def holds(self, module: nn.Module) -> bool:
        """Whether the module is in evaluation mode and nothing was replaced or written to since."""
        parts = _parts(module)
        if len(parts) != len(self.parts) or any(part.training for part in parts):
            return False
        if any(mine is not theirs for mine, theirs in zip(self.parts, parts, strict=True)):
            return False
        tensors = _tensors(parts)
        return len(tensors) == len(self.marks) and all(
            not tensor.is_inference() and _mark(tensor) == mark
            for tensor, mark in zip(tensors, self.marks, strict=True)
        )


def _parts(module: nn.Module) -> list[nn.Module]:
    """The module and all below it, each once, in order of first meeting."""
    found, seen = [module], {module}
    for part in found:  # grows while it is walked
        for child in part._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


def _tensors(parts: list[nn.Module]) -> list[torch.Tensor]:
    tensors = []
    for part in parts:
        for held in (part._parameters, part._buffers):
            tensors += [tensor for tensor in held.values() if tensor is not None]
    return tensors


def _mark(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor._version, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
