"""GPTQ checkpoints, as AutoGPTQ, GPTQModel, optimum and AutoRound write them.

Source: pack and forward of QuantLinear in AutoGPTQ (auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py);
checkpoint_format in GPTQModel (gptqmodel/quantization/config.py); packing_format in AutoRound
(auto_round/inference/backend.py). Of a module [rows, cols]:

    qweight  I32 [cols * bits / 32, rows]    a column is a stream of bits, the first input lowest
    qzeros   I32 [groups, rows * bits / 32]  the same along a row: the zero point less one ("gptq"), modulo
                                             2^bits, or the zero point itself ("gptq_v2")
    scales   F16 [groups, rows]
    g_idx    I32 [cols]                      the group of each input; may be missing without act-order
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hasten.errors import FormatError
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
from hasten.models.source import SourceTensor

_BITS = (2, 3, 4, 8)
_PACKINGS = {"gptq": 1, "gptq_v2": 0}  # checkpoint_format -> what is added to a stored zero point
AUTO_ROUND_PACKINGS = {
    "auto_round:auto_gptq": 1,
    "auto_round:gptq": 1,
    "auto_round": 0,
    "auto_round:gptqmodel": 0,
    "auto_round:exllamav2": 0,
}
"""AutoRound's packing_format -> the same."""


@dataclass(frozen=True)
class Gptq:
    """How a GPTQ checkpoint is packed."""

    bits: int
    group: int | None  # None: one scale a row
    zero_offset: int
    acts_in_order: bool  # without act-order g_idx may be missing

    @classmethod
    def parse(cls, fields: Fields) -> Gptq:
        """From `quantization_config` of quant_method "gptq" or "auto-round".

        Raises:
            FormatError: a width, packing or option that is not supported; it is named.
            ModelError: a field of the wrong type.
        """
        bits = fields.integer("bits", high=64)
        if bits not in _BITS:
            raise unsupported(fields, "bits", bits, "2, 3, 4 and 8")
        _refuse_options(fields)
        return cls(bits, group_size(fields), _zero_offset(fields), not fields.flag("desc_act"))

    def matrices(self, tensors: Tensors, where: str) -> list[QuantizedMatrix]:
        """Every quantised module.

        Raises:
            FormatError: a tensor of one is missing, misshapen or contradicts another.
        """
        return [self._matrix(Parts(tensors, m, where)) for m in modules_with(tensors, "qweight")]

    def _matrix(self, parts: Parts) -> QuantizedMatrix:
        packed = parts.take("qweight", ("I32",), (None, None))
        rows, cols = packed.shape[1], packed.shape[0] * 32 // self.bits
        group = self.group or cols
        groups = parts.divided(cols, group)
        scale = parts.take("scales", ("F16", "BF16", "F32"), (groups, rows))
        if rows * self.bits % 32:
            raise parts.error(f"{parts.module} has {rows} outputs, whose zero points fill no whole words")
        stored = parts.take("qzeros", ("I32",), (groups, rows * self.bits // 32))
        order = None
        if parts.has("g_idx") or not self.acts_in_order:
            order = parts.groups_of("g_idx", cols, group)
        zero = self._zero(stored, rows)

        def read() -> QAndScale:
            q = bit_fields(words(packed).T, self.bits, cols)
            return q, np.ascontiguousarray(scales(scale).T)

        return QuantizedMatrix(
            parts.module, rows, cols, self.bits, group, zero, order, read, tuple(parts.used)
        )

    def _zero(self, stored: SourceTensor, rows: int) -> npt.NDArray[np.uint8]:
        """[rows, groups]. 2^bits - 1 and one more is 0: the writer took one from 0."""
        fields = bit_fields(words(stored), self.bits, rows).T
        return (fields + np.uint8(self.zero_offset)) & np.uint8((1 << self.bits) - 1)


def group_size(fields: Fields, key: str = "group_size") -> int | None:
    """Inputs a scale; None (-1 in the file) is a whole row.

    Raises:
        FormatError: no such size.
    """
    size = fields.integer(key, low=-1)
    if size == 0:
        raise unsupported(fields, key, size, "-1 (a whole row) and positive sizes")
    return None if size == -1 else int(size)


def unsupported(fields: Fields, key: str, found: Any, known: str) -> FormatError:
    """The error for an option that this program does not read."""
    return FormatError(
        f"{fields.where}: quantization_config.{key} {found!r:.80} is not supported",
        hint=f"supported: {known}; else open the model it was made from and give a recipe (w4, w8)",
    )


def _zero_offset(fields: Fields) -> int:
    if fields.text("quant_method").replace("_", "-") in ("auto-round", "intel/auto-round"):
        key = "packing_format" if fields.get("packing_format") is not None else "backend"
        packing = fields.text(key, "auto_round:auto_gptq")
        known = AUTO_ROUND_PACKINGS
    else:
        key = "checkpoint_format" if fields.get("checkpoint_format") is not None else "format"
        packing = fields.text(key, "gptq")
        known = _PACKINGS
    if packing not in known:
        raise unsupported(fields, key, packing, ", ".join(known))
    return known[packing]


def _refuse_options(fields: Fields) -> None:
    """Options that change how tensors are packed or what they mean."""
    if fields.get("is_marlin_format"):
        raise unsupported(fields, "is_marlin_format", True, "the plain GPTQ packing")
    if (packs := fields.get("pack_dtype", "int32")) not in ("int32", "torch.int32"):
        raise unsupported(fields, "pack_dtype", packs, "int32")
    if (kind := fields.get("data_type", "int")) not in ("int", "int_sym", "int_asym", "rtn_int_sym"):
        raise unsupported(fields, "data_type", kind, "int")
    for key in ("rotation", "adapter"):
        if fields.get(key):
            raise unsupported(fields, key, fields.get(key), "checkpoints without one")
    refuse_own_options(fields)


def refuse_own_options(fields: Fields) -> None:
    """Refuse modules with a width or group size of their own; that some are not quantised is no harm.

    Raises:
        FormatError: there is one; it is named.
    """
    widths = {"bits": fields.get("bits"), "group_size": fields.get("group_size")}
    for key in ("dynamic", "extra_config"):
        for pattern, options in fields.mapping(key).items():
            if pattern.startswith("-:") or _is_as_others(options, widths):
                continue
            raise unsupported(fields, key, {pattern: options}, "one width and group size for all modules")


def _is_as_others(options: Any, widths: Mapping[str, Any]) -> bool:
    """Whether a module's own options leave it as the others are, or unquantised (16 bits and more)."""
    if not isinstance(options, Mapping):
        return False
    bits = options.get("bits")
    if isinstance(bits, int) and bits >= 16:
        return True
    return all(options.get(key) in (None, wanted) for key, wanted in widths.items())
