"""Parts of a source's tensors: rows as their file holds them, and tensors under other names."""

from __future__ import annotations

import numpy as np
import torch

from hasten.compress.torch_layer import tensor_values
from hasten.weights.tensors import TYPES, Bytes, SourceTensor


def taken_rows(tensor: SourceTensor, rows: torch.Tensor, name: str | None = None) -> SourceTensor:
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
    return SourceTensor(name or tensor.name, shape, tensor.dtype, data, offset=tensor.offset)


def renamed(tensor: SourceTensor, name: str) -> SourceTensor:
    """The same tensor under another name, sharing its bytes."""
    data = (lambda: tensor.data) if tensor.is_made else tensor.data
    return SourceTensor(name, tensor.shape, tensor.dtype, data, tensor.row_order, tensor.offset)


def row_values(tensor: SourceTensor, rows: torch.Tensor) -> torch.Tensor:
    """Some rows of a matrix, int64 [n] -> float32 [n, cols]; the others are not unpacked."""
    return tensor_values(taken_rows(tensor, rows))
