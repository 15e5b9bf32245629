"""A source with other values and parts of tensors: what pruning, rotating and distilling make of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch

from hasten.compress.torch_layer import tensor_values
from hasten.core import ModelSpec
from hasten.models.source import Source
from hasten.weights.tensors import TYPES, Bytes, SourceTensor

Values = torch.Tensor | Callable[[], torch.Tensor]


def made_tensor(name: str, shape: tuple[int, ...], values: Values) -> SourceTensor:
    """A tensor of a source from torch values: bfloat16 stays so, all else becomes float32.

    A function is called anew each time the tensor is read, so that a changed model holds nothing twice.
    """
    if isinstance(values, torch.Tensor):
        assert tuple(values.shape) == shape, (name, values.shape, shape)
        return SourceTensor(name, shape, _dtype(values), _bytes(values))
    return SourceTensor(name, shape, "F32", lambda: _bytes(values().float()))


def changed(source: Source, values: Mapping[str, Values], *, config: ModelSpec | None = None) -> Source:
    """`source` with some tensors replaced or added.

    Args:
        values: canonical name -> torch values, or a function that makes them (float32) when they are read.
        config: the new shape; a function's tensor must have the shape that it gives.
    """
    shape_of = config or source.config
    shapes = shape_of.parameter_shapes()
    made = {name: made_tensor(name, shapes[name], value) for name, value in values.items()}
    tensors = source.tensors | made
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


def taken_rows(tensor: SourceTensor, rows: torch.Tensor) -> SourceTensor:
    """Rows of a matrix or elements of a vector, int64 [n], in their file's own format: not one value changes.

    Costs the bytes of the rows; nothing where the tensor is made when it is read.
    """
    picked = rows.numpy()
    order = picked if tensor.row_order is None else tensor.row_order[picked]
    row_bytes = TYPES[tensor.dtype].bytes_of(tensor.shape) // tensor.rows

    def cut() -> Bytes:
        return np.ascontiguousarray(tensor.data.reshape(tensor.rows, row_bytes)[order]).reshape(-1)

    shape = (len(picked), *tensor.shape[1:])
    data = cut if tensor.is_made else cut()
    return SourceTensor(tensor.name, shape, tensor.dtype, data, offset=tensor.offset)


def renamed(tensor: SourceTensor, name: str) -> SourceTensor:
    """The same tensor under another name, sharing its bytes."""
    data = (lambda: tensor.data) if tensor.is_made else tensor.data
    return SourceTensor(name, tensor.shape, tensor.dtype, data, tensor.row_order, tensor.offset)


def row_values(tensor: SourceTensor, rows: torch.Tensor) -> torch.Tensor:
    """Some rows of a matrix, int64 [n] -> float32 [n, cols]; the others are not unpacked."""
    return tensor_values(taken_rows(tensor, rows))
