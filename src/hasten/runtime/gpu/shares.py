"""A rank's share of a packed model's weights: its rows and columns are read, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from hasten.runtime.gpu.batch_weights import Precision
from hasten.runtime.gpu.executor import Tensors, matrix_of, tensors_of
from hasten.runtime.gpu.shape import WeightFormat
from hasten.runtime.gpu.tiles import Weights, joined, kept
from hasten.runtime.shards import Piece, Shard
from hasten.weights.formats import FORMATS
from hasten.weights.packed import PackedLinear, PackedModel, pack_linear, piece_of, values_of
from hasten.weights.tensors import SourceTensor

Pieces = Callable[[str, Piece], list[PackedLinear]]
"""A matrix's name, and what is wanted of it -> that, one range of rows behind another."""


def cut(linear: PackedLinear, piece: Piece) -> list[PackedLinear]:
    """A piece of a matrix, in its own format; in bf16 where it begins or ends inside a group or a panel."""
    found = [piece_of(linear, rows, piece.cols) for rows in piece.rows]
    if all(found):
        return [one for one in found if one is not None]
    values = values_of(linear)
    return [_in_bf16(values[rows][:, piece.cols]) for rows in piece.rows]


def _in_bf16(values: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> PackedLinear:
    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return pack_linear(SourceTensor("a piece", values.shape, "F32", data), FORMATS["bf16"])


def _head(whole: Tensors, shard: Shard) -> Precision:
    """The head's precision: the library multiplies e4m3 matrices of whole sixteens of rows."""
    return whole.head if len(shard.vocabulary) % 16 == 0 else "bf16"


def share_of_tensors(whole: Tensors, shard: Shard) -> Tensors:
    """A share's parameters of a whole model's, which are made one by one."""

    def tensor(name: str) -> torch.Tensor | None:
        piece, found = shard.piece(name), whole.of(shard.source(name))
        return None if piece is None or found is None else piece.of(found, torch.cat)

    return Tensors(tensor, whole.precision, _head(whole, shard))


def tensors_of_share(packed: PackedModel, shard: Shard, device: str, pieces: Pieces) -> Tensors:
    """A share's parameters by the names of `shard.local`, as `tensors_of` gives a whole model's.

    Args:
        packed: the whole model; of its matrices only the formats are looked at.
        pieces: gives them.
    """
    whole = tensors_of(packed, device)

    def tensor(name: str) -> torch.Tensor | None:
        piece, source = shard.piece(name), shard.source(name)
        if piece is None:
            return None
        if source in packed.linears:
            return torch.cat([matrix_of(one, device) for one in pieces(source, piece)])
        found = packed.vectors.get(source)
        return None if found is None else torch.from_numpy(np.array(piece.of(found, np.concatenate)))

    def tile(name: str) -> Weights:
        piece = shard.piece(name)
        assert piece is not None
        found = pieces(shard.source(name), piece)
        if all(one.layout.is_integer for one in found):
            return joined([kept(one, device) for one in found])
        return Weights(WeightFormat(), torch.cat([matrix_of(one, device) for one in found]))

    return Tensors(tensor, whole.precision, _head(whole, shard), tile if whole.tiles is not None else None)
