"""A tensor as its file holds it, and the types of number that files store.

Types are ggml's by their names, the integers of safetensors, and our own.

Source: ggml's `ggml_type` and block structures (ggml/include/ggml.h, ggml-common.h).

Our own hold the matrices of GPTQ, AWQ and compressed-tensors checkpoints, and what calibration finds. They
are called S or A, BITS, _GROUP, and a block is one group: an fp32 scale, in A an fp32 minimum, then u, one
byte a value. S is symmetric, scale * (u - 2^(bits-1)); A is scale * u + minimum.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from hasten import _native


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
        TensorType("IQ4_XS", 23, 256, 136),
        TensorType("IQ3_XXS", 18, 256, 98),
        TensorType("IQ3_S", 21, 256, 110),
        TensorType("IQ2_XXS", 16, 256, 66),
        TensorType("IQ2_XS", 17, 256, 74),
        TensorType("IQ2_S", 22, 256, 82),
        TensorType("IQ1_S", 19, 256, 50),
        TensorType("IQ1_M", 29, 256, 56),
        TensorType("TQ1_0", 34, 256, 54),
        TensorType("TQ2_0", 35, 256, 66),
        TensorType("MXFP4", 39, 32, 17),
        TensorType("I8", -1, 1, 1),  # raw parts of quantised checkpoints: never a parameter by themselves
        TensorType("U8", -1, 1, 1),
        TensorType("BOOL", -1, 1, 1),  # masks that old checkpoints hold
        TensorType("F8_E4M3", -1, 1, 1),
        TensorType("I32", -1, 1, 4),
        TensorType("I64", -1, 1, 8),
        *(TensorType(f"S{b}_{g}", -1, g, 4 + g) for b in (4, 5, 6, 8) for g in (32, 64, 128)),
        *(TensorType(f"A{b}_{g}", -1, g, 8 + g) for b in (4, 5, 6, 8) for g in (32, 64, 128)),
    )
}
"""Every type this program reads."""

TYPES_BY_ID: dict[int, TensorType] = {t.ggml_id: t for t in TYPES.values() if t.ggml_id >= 0}

FOREIGN_NAMES: dict[int, str] = {
    4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    36: "I2_S (BitNet)", 40: "NVFP4",
}  # fmt: skip
"""ggml types that exist and are not read, so that an error can name them."""

Bytes = npt.NDArray[np.uint8]
_PIECE_BYTES = 1 << 22  # threads share the work by pieces


class _Data:
    """The bytes of a tensor, or the function that makes them, called anew each time they are read."""

    def __set__(self, tensor: object, value: Bytes | Callable[[], Bytes]) -> None:
        vars(tensor)["_data"] = value

    def __get__(self, tensor: object | None, owner: type) -> Bytes:
        if tensor is None:
            raise AttributeError("data")  # tells dataclass that the field has no default
        value: Bytes | Callable[[], Bytes] = vars(tensor)["_data"]
        return value() if callable(value) else value


@dataclass(frozen=True)
class SourceTensor:
    """One tensor, not converted: a view of the mapped file and what its bytes mean.

    A matrix of a GPTQ, AWQ or compressed-tensors checkpoint is no view: it is made with a function, and
    reading `data` unpacks the file's integers, each time anew, so that an opened model holds nothing twice.
    """

    name: str  # canonical name; in a file reader's hands the file's own name
    shape: tuple[int, ...]  # outermost first: [rows, cols] for matrices
    dtype: str  # a key of TYPES
    data: _Data = _Data()  # uint8 [nbytes], C-contiguous, rows in file order; not to be written to
    row_order: npt.NDArray[np.int64] | None = None  # [rows]: row r of the tensor is row row_order[r] of data
    offset: float = 0.0  # added to every value (Gemma's 1 + weight when the file lacks it)

    @property
    def rows(self) -> int:
        """Rows of a matrix; elements of a vector."""
        return self.shape[0]

    def part(self, name: str, first: int, count: int) -> SourceTensor:
        """`count` rows from `first` under another name, sharing the bytes; before a row order is set."""
        assert self.row_order is None and first >= 0 and first + count <= self.rows
        row_bytes = TYPES[self.dtype].bytes_of(self.shape) // self.rows
        cut = slice(first * row_bytes, (first + count) * row_bytes)
        data = (lambda: self.data[cut]) if self.is_made else self.data[cut]
        return SourceTensor(name, (count, *self.shape[1:]), self.dtype, data, offset=self.offset)

    @cached_property
    def content(self) -> bytes:
        """Digest of type, shape and every byte, 32 bytes: XXH64 of each 4 MiB at memory speed, computed once.

        Of a sample of the bytes it would not do: half the bytes of an F32 tensor that was bf16 are 0.
        """
        data = np.ascontiguousarray(self.data)
        order = b"" if self.row_order is None else self.row_order.tobytes()
        state = hashlib.sha256(f"{self.shape} {self.dtype} {self.offset} {len(order)}".encode() + order)
        sums = _native.checksums(data, _PIECE_BYTES, 0) if data.size else []
        state.update(np.array(sums, np.uint64).tobytes())
        return state.digest()

    @property
    def is_made(self) -> bool:
        """Whether `data` is made when it is read."""
        return callable(vars(self)["_data"])

    def __post_init__(self) -> None:
        assert self.is_made or len(self.data) == TYPES[self.dtype].bytes_of(self.shape), self.name
