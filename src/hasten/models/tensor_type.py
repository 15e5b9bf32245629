"""The number formats a tensor may be stored in: ggml's by their names, integers of safetensors, and our own.

Source: ggml's `ggml_type` and block structures (ggml/include/ggml.h, ggml-common.h).

Our own hold the matrices of GPTQ, AWQ and compressed-tensors checkpoints, and what calibration finds. They
are called S or A, BITS, _GROUP, and a block is one group: an fp32 scale, in A an fp32 minimum, then u, one
byte a value. S is symmetric, scale * (u - 2^(bits-1)); A is scale * u + minimum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TensorType:
    """A format stores `block` consecutive values of one row in `block_bytes` bytes."""

    name: str
    ggml_id: int  # negative: no type of GGUF files
    block: int  # values
    block_bytes: int

    def bytes_of(self, shape: Sequence[int]) -> int:
        """Bytes of a tensor [..., cols]; cols must be a multiple of `block`."""
        return math.prod(shape) // self.block * self.block_bytes


TYPES: dict[str, TensorType] = {
    t.name: t
    for t in (
        TensorType("F32", 0, 1, 4),
        TensorType("F16", 1, 1, 2),
        TensorType("BF16", 30, 1, 2),
        TensorType("Q8_0", 8, 32, 34),
        TensorType("Q4_0", 2, 32, 18),
        TensorType("Q4_1", 3, 32, 20),
        TensorType("Q5_0", 6, 32, 22),
        TensorType("Q5_1", 7, 32, 24),
        TensorType("Q2_K", 10, 256, 84),
        TensorType("Q3_K", 11, 256, 110),
        TensorType("Q4_K", 12, 256, 144),
        TensorType("Q5_K", 13, 256, 176),
        TensorType("Q6_K", 14, 256, 210),
        TensorType("IQ4_NL", 20, 32, 18),
        TensorType("I8", -1, 1, 1),  # raw parts of quantised checkpoints: never a parameter by themselves
        TensorType("I32", -1, 1, 4),
        TensorType("I64", -1, 1, 8),
        *(TensorType(f"S{b}_{g}", -1, g, 4 + g) for b in (4, 5, 6, 8) for g in (32, 64, 128)),
        *(TensorType(f"A{b}_{g}", -1, g, 8 + g) for b in (4, 5, 6, 8) for g in (32, 64, 128)),
    )
}
"""Every type this program reads."""

TYPES_BY_ID: dict[int, TensorType] = {t.ggml_id: t for t in TYPES.values() if t.ggml_id >= 0}

FOREIGN_NAMES: dict[int, str] = {
    4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip
"""ggml types that exist and are not read, so that an error can name them."""
