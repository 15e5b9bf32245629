"""A source with other values: what pruning, rotating and distilling make of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch

from hasten.core import ModelSpec
from hasten.models.source import Source
from hasten.weights.tensors import SourceTensor

Values = torch.Tensor | Callable[[], torch.Tensor]


def made_tensor(name: str, shape: tuple[int, ...], values: Values) -> SourceTensor:
    """A tensor of a source from torch values: bfloat16 stays so, all else becomes float32.

    A function is called anew each time the tensor is read, so that a changed model holds nothing twice.
    """
    if isinstance(values, torch.Tensor):
        assert tuple(values.shape) == shape, (name, values.shape, shape)
        return SourceTensor(name, shape, _dtype(values), _bytes(values))
    return SourceTensor(name, shape, "F32", lambda: _bytes(values().float()))


def changed(
    source: Source,
    values: Mapping[str, Values],
    *,
    config: ModelSpec | None = None,
    drop: frozenset[str] = frozenset(),
) -> Source:
    """`source` with some tensors replaced, added or dropped.

    Args:
        source: the model.
        values: canonical name -> torch values, or a function that makes them (float32) when they are read.
        config: the new shape; a function's tensor must have the shape that it gives.
        drop: canonical names of tensors the new model does not have.
    """
    shape_of = config or source.config
    shapes = shape_of.parameter_shapes()
    tensors = {name: tensor for name, tensor in source.tensors.items() if name not in drop}
    tensors |= {name: made_tensor(name, shapes[name], value) for name, value in values.items()}
    wrong = {name for name, tensor in tensors.items() if shapes.get(name) != tensor.shape} | (
        shapes.keys() - tensors.keys()
    )
    assert not wrong, f"tensors do not fit the new shape: {sorted(wrong)[:4]}"
    return replace(source, config=shape_of, tensors=tensors)


def _dtype(values: torch.Tensor) -> str:
    return "BF16" if values.dtype == torch.bfloat16 else "F32"


def _bytes(values: torch.Tensor) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    kept = values.detach().cpu().contiguous()
    kept = kept.view(torch.int16) if kept.dtype == torch.bfloat16 else kept.float()
    return np.ascontiguousarray(kept.numpy()).reshape(-1).view(np.uint8)
