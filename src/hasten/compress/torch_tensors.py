"""Torch beside the files of a model: a source's tensors of torch values, state on disk, what computes.

What pruning, rotating and distilling make of a model is its source with other values and parts of tensors.

State is written whole or not at all, and read only as it was written: torch.load does not compare the
checksums that torch.save writes, so a bit that the disk turned would end up in the weights. They are compared
here, at some 1 GB/s.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hasten.cache import write_atomic
from hasten.cache.reading import open_file
from hasten.compress.torch_layer import tensor_values
from hasten.core import ModelSpec
from hasten.errors import MachineError, UsageError
from hasten.machine.cores import usable_cores
from hasten.models.source import Source
from hasten.weights.tensors import TYPES, Bytes, SourceTensor
from hasten.weights.work_store import state_damage

_KIND = "kind"
Values = torch.Tensor | Callable[[], torch.Tensor]


def made_tensor(name: str, shape: tuple[int, ...], values: Values) -> SourceTensor:
    """A tensor of a source from torch values: bfloat16 stays so, all else becomes float32.

    A function is called anew each time the tensor is read, so that a changed model holds nothing twice.
    """
    if isinstance(values, torch.Tensor):
        assert tuple(values.shape) == shape, (name, values.shape, shape)
        dtype = "BF16" if values.dtype == torch.bfloat16 else "F32"
        return SourceTensor(name, shape, dtype, _bytes(values))
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


@contextlib.contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """`count` threads inside the block, as many as before afterwards; None: no more than `usable_cores`.

    torch itself counts the processors of the affinity mask, whatever time a control group gives.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, usable_cores()) if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def device_of(name: str | torch.device | None) -> torch.device:
    """The device of a name; None takes a GPU where there is one.

    Raises:
        UsageError: torch knows no such kind.
        MachineError: this machine has none.
    """
    there = torch.cuda.is_available()
    if name is None:
        return torch.device("cuda" if there else "cpu")
    found: torch.device | None = None
    with contextlib.suppress(RuntimeError):
        found = torch.device(name)
    if found is None or found.type not in ("cpu", "cuda"):
        raise UsageError(f"unknown device {name!r}", hint="use cpu or cuda")
    if found.type == "cuda" and not there:
        raise MachineError("torch sees no GPU here", hint="use --device cpu, or install torch for CUDA")
    return found


def write_state(path: Path, kind: str, state: Mapping[str, Any]) -> Path:
    """Keep tensors and plain values.

    Args:
        kind: what they are and by which version of it, such as "statistics 1".

    Raises:
        DiskError: full, read-only or forbidden disk; the file before is untouched.
    """
    return write_atomic(path, lambda file: torch.save({**state, _KIND: kind}, file))


def read_state(path: Path, kind: str) -> dict[str, Any] | None:
    """What a file holds, on the CPU; None where it is missing, damaged or of another kind."""
    try:
        return whole_state(path, kind)
    except Exception:  # noqa: BLE001  torch.load raises whatever a strange file makes it
        return None


def whole_state(path: Path, kind: str) -> dict[str, Any]:
    """What a file holds, on the CPU.

    Raises:
        ValueError: its checksums differ, or it is of another kind; torch.load raises what it likes.
    """
    if (wrong := state_damage(path)) is not None:
        raise ValueError(wrong)
    with open_file(path) as file:
        found: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=False)
    if (other := found.pop(_KIND, None)) != kind:
        raise ValueError(f"it is {other!r}, this program reads {kind!r}")
    return found
