"""Finding infinities and NaNs without unpacking anything."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hasten.errors import ModelError
from hasten.models.source import SourceTensor
from hasten.models.tensor_type import TYPES

_SCALES: dict[str, tuple[int, ...]] = {  # where a block's fp16 numbers are; its integers are always finite
    "Q8_0": (0,),
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
}


def check_finite(tensor: SourceTensor) -> None:
    """Refuse a tensor with an infinity or a NaN.

    Reads every value of a float tensor, only the scales of a quantised one.

    Raises:
        ModelError: there is one; the tensor and the first place are named.
    """
    bad = _not_finite(tensor)
    if not bad.any():
        return
    at = int(np.argmax(bad)) * TYPES[tensor.dtype].block
    row, column = divmod(at, int(np.prod(tensor.shape[1:], dtype=np.int64)))
    if tensor.row_order is not None:
        row = int(np.flatnonzero(tensor.row_order == row)[0])
    raise ModelError(
        f"tensor {tensor.name!r} is not finite: {int(bad.sum())} infinities or NaNs, the first in row {row}, "
        f"column {column}",
        hint="the checkpoint is damaged or its training diverged: get it again from its source",
    )


def _not_finite(tensor: SourceTensor) -> npt.NDArray[np.bool_]:
    """One flag a value of a float tensor, one a block of a quantised one."""
    data = np.ascontiguousarray(tensor.data)
    if tensor.dtype == "F32":
        flags = ~np.isfinite(data.view("<f4"))
        return np.asarray(flags, np.bool_)
    if tensor.dtype in ("F16", "BF16"):
        exponent = np.uint16(0x7C00 if tensor.dtype == "F16" else 0x7F80)  # all ones: infinity or NaN
        return np.asarray((data.view("<u2") & exponent) == exponent, np.bool_)
    blocks = data.reshape(-1, TYPES[tensor.dtype].block_bytes)
    if tensor.dtype not in _SCALES:  # our own: fp32 in front of the integers
        numbers = np.ascontiguousarray(blocks[:, : 4 if tensor.dtype[0] == "S" else 8]).view("<f4")
        return np.asarray(~np.isfinite(numbers).all(axis=1), np.bool_)
    bad = np.zeros(len(blocks), dtype=np.bool_)
    for at in _SCALES[tensor.dtype]:
        high = blocks[:, at + 1]  # little-endian: sign, exponent and the mantissa's upper bits
        bad |= (high & 0x7C) == 0x7C
    return bad
