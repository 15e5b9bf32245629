"""Files that have their full size and not all of their content.

Downloaders give a file its size first and fill it then; what never came reads as zeros. The header comes
first and is whole, so such a file opens, and the model talks nonsense. Reading all of a file, or its digest,
would cost more than a start may; the end, and the holes that the file system knows of, cost 0.3 ms.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hasten.cache.reading import open_raw
from hasten.errors import FormatError
from hasten.weights.tensors import SourceTensor

_log = logging.getLogger("hasten.weights")

HINT = (
    "the download was cut off after the file had been given its size: delete it and download it again, or "
    "compare its SHA-256 with its source"
)
_CUT_BYTES = 512  # zeros that end a tensor which is not all zeros: where a download stopped
_CUT_SHARE = 0.1  # of a matrix: padding takes less (5 % of a vocabulary, 0.5 % of a feed-forward layer)
_MOST_BYTES = 64 << 20  # looked at from the end: zeros, or it would have ended
_PAGE = 4096  # what of a hole may be a neighbour's
_MOST_HOLES = 1000
_SHOWN = 3


def check_written(data: memoryview, tensors: Mapping[str, SourceTensor], path: Path) -> None:
    """Refuse a file that ends in zeros where weights belong, or has holes there.

    A matrix of zeros alone that ends where its neighbour begins may be meant so: a warning says it.

    Args:
        data: the whole file, mapped.
        tensors: views of it.
        path: the file.

    Raises:
        FormatError: it was not written to its end; tensors are named.
    """
    base = _address(np.frombuffer(data, np.uint8))
    placed = sorted(((_address(tensor.data) - base, tensor) for tensor in tensors.values()), key=_first)
    _check_end(placed, path)
    _check_holes(placed, path, len(data))


def zeros_at_end(data: npt.NDArray[np.uint8], most: int = _MOST_BYTES) -> int:
    """How many bytes are zero at the end: uint8 [bytes]. No more than about `most` are looked at."""
    end, step = len(data), _PAGE
    while end and len(data) - end < most:
        piece = data[max(0, end - step) : end]
        if piece.any():
            return len(data) - end + int(np.argmax(piece[::-1] != 0))
        end, step = end - len(piece), 1 << 20
    return len(data) - end


Placed = list[tuple[int, SourceTensor]]


def _address(data: npt.NDArray[np.uint8]) -> int:
    return int(data.__array_interface__["data"][0])


def _first(placed: tuple[int, SourceTensor]) -> int:
    return placed[0]


def _check_end(placed: Placed, path: Path) -> None:
    empty: list[SourceTensor] = []
    cut, zeros, left = None, 0, _MOST_BYTES
    for _, tensor in reversed(placed):
        zeros = zeros_at_end(tensor.data, left)
        if zeros < len(tensor.data):
            cut = tensor
            break
        empty.append(tensor)
        left -= zeros
        if left <= 0:
            break
    weights = [tensor.name for tensor in empty if _is_weight(tensor)]
    inside = cut is None or zeros >= _CUT_BYTES
    part = cut if cut is not None and _is_weight(cut) and zeros >= _CUT_SHARE * len(cut.data) else None
    if inside and (weights or part is not None):
        whole = sum(len(tensor.data) for tensor in empty) + (zeros if inside else 0)
        names = weights + ([f"the end of {part.name}"] if part is not None else [])
        raise FormatError(
            f"{path}: its last {whole:,} bytes are zeros, {_named(names)} among them", hint=HINT
        )
    if weights:
        _log.warning("%s: %s: nothing but zeros; %s", path, _named(weights), HINT)


def _check_holes(placed: Placed, path: Path, size: int) -> None:
    for first, end in _holes(path, size):
        for at, tensor in placed:
            inside = min(end, at + len(tensor.data)) - max(first, at)
            if inside < max(_PAGE, _CUT_SHARE * len(tensor.data)) or not _is_weight(tensor):
                continue
            if inside < len(tensor.data) - 2 * _PAGE:  # else it may be zeros that were written so
                raise FormatError(
                    f"{path}: bytes {first:,} to {end:,} were never written, {tensor.name} is among them",
                    hint=HINT,
                )


def _holes(path: Path, size: int) -> Iterator[tuple[int, int]]:
    """(first, end) of what has no place on the disk; nothing where the file system does not tell."""
    with open_raw(path) as file:
        end = 0
        for _ in range(_MOST_HOLES):
            try:
                first = os.lseek(file.fileno(), end, os.SEEK_HOLE)
                if first >= size:
                    return
                end = os.lseek(file.fileno(), first, os.SEEK_DATA)
            except OSError:  # there is no data behind the last hole, or no such question
                return
            yield first, end


def _is_weight(tensor: SourceTensor) -> bool:
    """Whether a trained model never has it all zeros: biases and zero points may be."""
    return len(tensor.shape) > 1 and "zero" not in tensor.name


def _named(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
