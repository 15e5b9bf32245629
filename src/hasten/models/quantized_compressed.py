"""compressed-tensors checkpoints of integer weights, as llm-compressor writes them.

Source: the package compressed-tensors (compressors/pack_quantized, compressors/naive_quantized,
quantization/quant_args.py). Of a module [rows, cols], in the format "pack-quantized":

    weight_packed      I32 [rows, cols * bits / 32]  a row is a stream of bits, the first input lowest, each
                                                     field q + 2^(bits-1)
    weight_shape       I64 [2]                       rows and cols
    weight_scale       [rows, groups]                BF16, F16 or F32; strategy "channel": one group
    weight_zero_point  I32 [rows * bits / 32, groups]  packed down a column; before: I8 [rows, groups]
    weight_g_idx       I32 [cols]                    the group of each input, with act-order alone

and in "int-quantized":

    weight             I8 [rows, cols]
    weight_scale       [rows, 1], [rows, groups], or one value for all
    weight_zero_point  I8, as the scale

How activations are to be rounded is not followed: the engine rounds them itself, by groups of 32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hasten.models.fields import Fields
from hasten.models.quantized import (
    Parts,
    QAndScale,
    QuantizedMatrix,
    Tensors,
    array,
    bit_fields,
    modules_with,
    scales,
    words,
)
from hasten.models.quantized_gptq import unsupported
from hasten.models.source import SourceTensor

_FORMATS = ("pack-quantized", "int-quantized")
_STRATEGIES = ("group", "channel", "tensor")
_PACKED_BITS = (4, 8)
_SCALES = ("BF16", "F16", "F32")
UNUSED = ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "k_scale", "v_scale")
"""Scales of activations and of keys and values: read by engines that round those by them."""


@dataclass(frozen=True)
class _Scheme:
    """How the weights of one group of modules are quantised."""

    bits: int
    group: int | None  # None: one scale a row, or one for all
    is_symmetric: bool

    @classmethod
    def parse(cls, fields: Fields, name: str) -> _Scheme:
        """From `config_groups.NAME`.

        Raises:
            FormatError: something else than integers by group, row or tensor; it is named.
        """
        options = fields.mapping("config_groups").get(name)
        key = f"config_groups.{name}"
        if not isinstance(options, Mapping) or not isinstance(options.get("weights"), Mapping):
            raise unsupported(fields, key, options, "groups with weights")
        if options.get("format") not in (None, *_FORMATS):
            raise unsupported(fields, f"{key}.format", options["format"], " and ".join(_FORMATS))
        weights = Fields(options["weights"], fields.where, prefix="")
        for option, known in (("type", ("int",)), ("strategy", _STRATEGIES), ("dynamic", (False,))):
            found = weights.get(option, known[0] if option != "strategy" else _strategy(weights))
            if found not in known:
                raise unsupported(fields, f"{key}.weights.{option}", found, ", ".join(map(str, known)))
        bits = weights.integer("num_bits", 8, high=64)
        if bits not in _PACKED_BITS:
            raise unsupported(fields, f"{key}.weights.num_bits", bits, "4 and 8")
        is_grouped = weights.get("strategy", _strategy(weights)) == "group"
        group = weights.integer("group_size") if is_grouped else None
        return cls(bits, group, weights.flag("symmetric", True))

    def fits(self, packed_words: int, cols: int, groups: int) -> bool:
        """Whether a packed module may be one of this scheme."""
        expected = cols // self.group if self.group else 1
        return packed_words == -(-cols * self.bits // 32) and groups == expected


def _strategy(weights: Fields) -> str:
    """What a missing strategy means: a group size says it."""
    size = weights.get("group_size")
    if size is None:
        return "tensor"
    return "channel" if size == -1 else "group"


@dataclass(frozen=True)
class CompressedTensors:
    """How a compressed-tensors checkpoint is packed: one scheme or several."""

    schemes: tuple[_Scheme, ...]

    @classmethod
    def parse(cls, fields: Fields) -> CompressedTensors:
        """From `quantization_config` of quant_method "compressed-tensors".

        Raises:
            FormatError: a format, type or option that is not supported; it is named.
            ModelError: a field of the wrong type.
        """
        known = " and ".join(_FORMATS)
        if (packing := fields.text("format", "missing")) not in (*_FORMATS, "mixed-precision"):
            raise unsupported(fields, "format", packing, known)
        if (status := fields.text("quantization_status", "compressed")) != "compressed":
            raise unsupported(fields, "quantization_status", status, "compressed")
        if (sparsity := fields.mapping("sparsity_config").get("format", "dense")) != "dense":
            raise unsupported(fields, "sparsity_config.format", sparsity, "dense")
        if fields.mapping("transform_config").get("config_groups"):
            raise unsupported(fields, "transform_config", "...", "checkpoints without transforms")
        names = list(fields.mapping("config_groups"))
        if not names:
            raise unsupported(fields, "config_groups", {}, "one group of modules or more")
        return cls(tuple(_Scheme.parse(fields, name) for name in names))

    def matrices(self, tensors: Tensors, where: str) -> list[QuantizedMatrix]:
        """Every quantised module.

        Raises:
            FormatError: a tensor of one is missing, misshapen or contradicts another.
        """
        packed = [self._packed(Parts(tensors, m, where)) for m in modules_with(tensors, "weight_packed")]
        plain = [
            self._plain(Parts(tensors, m, where))
            for m in modules_with(tensors, "weight")
            if tensors[f"{m}.weight"].dtype == "I8"
        ]
        return packed + plain

    def _packed(self, parts: Parts) -> QuantizedMatrix:
        packed = parts.take("weight_packed", ("I32",), (None, None))
        rows, cols = (int(n) for n in array(parts.take("weight_shape", ("I64", "I32"), (2,))))
        scale = parts.take("weight_scale", _SCALES, (None, None))
        fitting = [s for s in self.schemes if s.fits(packed.shape[1], cols, scale.shape[1])]
        scheme = (fitting or self.schemes)[0]
        group = scheme.group or cols
        if min(rows, cols) < 1 or packed.shape != (rows, -(-cols * scheme.bits // 32)):
            raise parts.error(
                f"tensor '{parts.module}.weight_packed' is {list(packed.shape)}, which does not hold "
                f"[{rows}, {cols}] values of {scheme.bits} bits"
            )
        groups = parts.divided(cols, group)
        scale = parts.take("weight_scale", _SCALES, (rows, groups))
        zero = _zero(parts, scheme, rows, groups)
        order = None
        if parts.has("weight_g_idx") and not _is_unset(parts.take("weight_g_idx", ("I32",), (cols,))):
            order = parts.groups_of("weight_g_idx", cols, group)

        def read() -> QAndScale:
            return bit_fields(words(packed), scheme.bits, cols), scales(scale)

        return QuantizedMatrix(
            parts.module, rows, cols, scheme.bits, group, zero, order, read, tuple(parts.used)
        )

    def _plain(self, parts: Parts) -> QuantizedMatrix:
        weight = parts.take("weight", ("I8",), (None, None))
        rows, cols = weight.shape
        scheme = next((s for s in self.schemes if s.bits == 8), self.schemes[0])
        if scheme.bits != 8:
            raise parts.error(f"{parts.module}.weight is I8, and no group of config_groups has 8 bits")
        group = scheme.group or cols
        groups = parts.divided(cols, group)
        one = parts.has("weight_scale") and parts.shape("weight_scale") in ((), (1,), (1, 1))
        scale = parts.take("weight_scale", _SCALES, parts.shape("weight_scale") if one else (rows, groups))
        zero = _zero(parts, scheme, rows, groups)

        def read() -> QAndScale:
            values = np.broadcast_to(scales(scale).reshape((1, 1) if one else scale.shape), (rows, groups))
            return _unsigned(array(weight), 8), np.ascontiguousarray(values)

        return QuantizedMatrix(parts.module, rows, cols, 8, group, zero, None, read, tuple(parts.used))


def _zero(parts: Parts, scheme: _Scheme, rows: int, groups: int) -> npt.NDArray[np.uint8]:
    """Unsigned zero points [rows, groups]; symmetric schemes have none, or zeros."""
    if not parts.has("weight_zero_point"):
        if not scheme.is_symmetric:
            raise parts.missing("weight_zero_point")
        return np.full((rows, groups), 1 << (scheme.bits - 1), np.uint8)
    shape = parts.shape("weight_zero_point")
    if shape in ((), (1,), (1, 1)):
        value = array(parts.take("weight_zero_point", ("I8",), shape))
        return np.broadcast_to(_unsigned(value.reshape(1, 1), scheme.bits), (rows, groups))
    if shape == (rows, groups) and parts.dtype("weight_zero_point") != "I32":
        return _unsigned(array(parts.take("weight_zero_point", ("I8",), shape)), scheme.bits)
    packed = parts.take("weight_zero_point", ("I32",), (-(-rows * scheme.bits // 32), groups))
    return np.ascontiguousarray(bit_fields(words(packed).T, scheme.bits, rows).T)


def _unsigned(signed: npt.NDArray[Any], bits: int) -> npt.NDArray[np.uint8]:
    """Signed integers of a width plus 2^(bits-1)."""
    shifted = signed.astype(np.int8).view(np.uint8) + np.uint8(1 << (bits - 1))
    return shifted & np.uint8((1 << bits) - 1)


def _is_unset(order: SourceTensor) -> bool:
    """Whether all of weight_g_idx is -1, as it is made."""
    return bool((array(order) == -1).all())
