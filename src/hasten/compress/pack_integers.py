"""Integers that were found elsewhere into the native layout, as they are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hasten.compress.pack import PackedLinear, pack_linear
from hasten.compress.unpack import Integers
from hasten.models.source import SourceTensor


def pack_integers(name: str, found: Integers) -> PackedLinear:
    """Integers, scales and minimums into a matrix of the engine; every value is kept.

    Raises:
        ModelError: a scale is not finite; the matrix is named.
    """
    layout, (rows, cols) = found.layout, found.u.shape
    groups = found.scales.shape[1]
    padding = groups * layout.group - cols  # a layer narrower than its group is filled up with zeros
    zero = 1 << (layout.bits - 1) if layout.symmetric else 0
    u = np.pad(found.u, ((0, 0), (0, padding)), constant_values=zero) if padding else found.u
    numbers = [found.scales] if found.minimums is None else [found.scales, found.minimums]
    head = np.stack([n.astype(np.float32) for n in numbers], axis=-1)  # [rows, groups, 1 or 2]
    blocks = np.concatenate([head.view(np.uint8), u.reshape(rows, groups, layout.group)], axis=-1)
    kind = f"{'S' if layout.symmetric else 'A'}{layout.bits}_{layout.group}"
    made = pack_linear(SourceTensor(name, (rows, cols + padding), kind, blocks.reshape(-1)), None)
    return replace(made, cols=cols)
