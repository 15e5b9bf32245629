"""AWQ checkpoints in the packing called "gemm", as AutoAWQ, GPTQModel and AutoRound write them.

Source: AutoAWQ (awq/utils/packing_utils.py, awq/modules/linear/gemm.py). Of a module [rows, cols]:

    qweight  I32 [cols, rows / 8]    nibbles of a word, lowest first: outputs 0, 2, 4, 6, 1, 3, 5, 7 of eight
    qzeros   I32 [groups, rows / 8]  the same
    scales   F16 [groups, rows]
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hasten.models.fields import Fields
from hasten.models.quantized import (
    Parts,
    QAndScale,
    QuantizedMatrix,
    Tensors,
    bit_fields,
    modules_with,
    scales,
    words,
)
from hasten.models.quantized_gptq import group_size, refuse_own_options, unsupported
from hasten.models.source import SourceTensor

_BITS = 4
_NIBBLE_OF = (0, 4, 1, 5, 2, 6, 3, 7)  # where each of eight outputs is


@dataclass(frozen=True)
class Awq:
    """How an AWQ checkpoint is packed."""

    group: int | None  # None: one scale a row

    @classmethod
    def parse(cls, fields: Fields) -> Awq:
        """From `quantization_config` of quant_method "awq", or "auto-round" with AWQ's packing.

        Raises:
            FormatError: a width, packing or option that is not supported; it is named.
            ModelError: a field of the wrong type.
        """
        bits_key = "bits" if fields.get("bits") is not None else "w_bit"
        if (bits := fields.integer(bits_key, high=64)) != _BITS:
            raise unsupported(fields, bits_key, bits, "4 bits")
        for key in ("version", "format", "checkpoint_format"):
            if fields.text(key, "gemm").lower() != "gemm":
                raise unsupported(fields, key, fields.get(key), "gemm")
        if fields.get("backend", "autoawq") == "llm-awq":
            raise unsupported(fields, "backend", "llm-awq", "autoawq")
        refuse_own_options(fields)
        return cls(
            group_size(fields, "group_size" if fields.get("group_size") is not None else "q_group_size")
        )

    def matrices(self, tensors: Tensors, where: str) -> list[QuantizedMatrix]:
        """Every quantised module.

        Raises:
            FormatError: a tensor of one is missing, misshapen or contradicts another.
        """
        return [self._matrix(Parts(tensors, m, where)) for m in modules_with(tensors, "qweight")]

    def _matrix(self, parts: Parts) -> QuantizedMatrix:
        packed = parts.take("qweight", ("I32",), (None, None))
        cols, rows = packed.shape[0], packed.shape[1] * 8
        group = self.group or cols
        groups = parts.divided(cols, group)
        scale = parts.take("scales", ("F16", "BF16", "F32"), (groups, rows))
        zero = _unpacked(parts.take("qzeros", ("I32",), (groups, rows // 8)))

        def read() -> QAndScale:
            return _unpacked(packed), np.ascontiguousarray(scales(scale).T)

        return QuantizedMatrix(parts.module, rows, cols, _BITS, group, zero, None, read, tuple(parts.used))


def _unpacked(tensor: SourceTensor) -> npt.NDArray[np.uint8]:
    """I32 [n, rows / 8] -> uint8 [rows, n]."""
    n, rows = tensor.shape[0], tensor.shape[1] * 8
    fields = bit_fields(words(tensor), _BITS, rows).reshape(n, -1, 8)[:, :, _NIBBLE_OF]
    return np.ascontiguousarray(fields.reshape(n, rows).T)
