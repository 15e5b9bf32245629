"""What work kept on disk belongs to: a model's content, a text, and how it was done."""

from __future__ import annotations

import hashlib

import numpy as np

from hasten.compress.calibration import Calibration
from hasten.models.source import Source

_SAMPLE = 4096


def identity_of(source: Source, calibration: Calibration | None, *how: object) -> str:
    """32 hexadecimal digits that differ where model, text or `how` do.

    A model that was changed in memory (pruned, distilled) has no files of its own, so its tensors are looked
    at: shape, type and 4,096 bytes spread over each, which no training step or pruning leaves as they were.
    """
    found = hashlib.sha256(repr((source.config, how)).encode())
    for name in sorted(source.tensors):
        tensor = source.tensors[name]
        data = tensor.data
        step = max(1, data.size // _SAMPLE)
        found.update(repr((name, tensor.shape, tensor.dtype, tensor.offset)).encode())
        found.update(np.ascontiguousarray(data[::step]).tobytes())
    if calibration is not None:
        found.update(calibration.sha256.encode())
    return found.hexdigest()[:32]
