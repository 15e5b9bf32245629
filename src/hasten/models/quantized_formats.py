"""The quantised checkpoints that open: GPTQ, AWQ and compressed-tensors, as `quantization_config` says.

GPTQ, as AutoGPTQ, GPTQModel, optimum and AutoRound write it. Of a module [rows, cols]:

    qweight  I32 [cols * bits / 32, rows]    a column is a stream of bits, the first input lowest
    qzeros   I32 [groups, rows * bits / 32]  the same along a row: the zero point less one ("gptq"), modulo
                                             2^bits, or the zero point itself ("gptq_v2")
    scales   F16 [groups, rows]
    g_idx    I32 [cols]                      the group of each input; may be missing without act-order

AWQ in the packing called "gemm", as AutoAWQ, GPTQModel and AutoRound write it:

    qweight  I32 [cols, rows / 8]    nibbles of a word, lowest first: outputs 0, 2, 4, 6, 1, 3, 5, 7 of eight
    qzeros   I32 [groups, rows / 8]  the same
    scales   F16 [groups, rows]

compressed-tensors of integers, as llm-compressor writes them, in the format "pack-quantized":

    weight_packed      I32 [rows, cols * bits / 32]  a row is a stream of bits, the first input lowest, each
                                                     field q + 2^(bits-1)
    weight_shape       I64 [2]                       rows and cols
    weight_scale       [rows, groups]                BF16, F16 or F32; strategy "channel": one group
    weight_zero_point  I32 [rows * bits / 32, groups]  packed down a column; before: I8 [rows, groups]
    weight_g_idx       I32 [cols]                    the group of each input, with act-order alone

and in "int-quantized" (how activations are to be rounded is not followed: the engine rounds them itself, by
groups of 32):

    weight             I8 [rows, cols]
    weight_scale       [rows, 1], [rows, groups], or one value for all
    weight_zero_point  I8, as the scale

fp8 and bitsandbytes: see quantized.py.

Sources: pack and forward of QuantLinear in AutoGPTQ (auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py);
checkpoint_format in GPTQModel (gptqmodel/quantization/config.py); packing_format in AutoRound
(auto_round/inference/backend.py); AutoAWQ (awq/utils/packing_utils.py, awq/modules/linear/gemm.py);
compressed-tensors (compressors/pack_quantized, compressors/naive_quantized, quantization/quant_args.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from hasten.errors import FormatError
from hasten.models.families.family import Fields
from hasten.models.quantized import (
    SCALES,
    BitsAndBytes,
    Fp8,
    Parts,
    QAndScale,
    Quantization,
    QuantizedMatrix,
    Tensors,
    array,
    bit_fields,
    modules_with,
    scales,
    unsigned,
    unsupported,
    words,
)
from hasten.weights.tensors import SourceTensor

_GPTQ_BITS = (2, 3, 4, 8)
_GPTQ_PACKINGS = {"gptq": 1, "gptq_v2": 0}  # checkpoint_format -> what is added to a stored zero point
AUTO_ROUND_PACKINGS = {
    "auto_round:auto_gptq": 1,
    "auto_round:gptq": 1,
    "auto_round": 0,
    "auto_round:gptqmodel": 0,
    "auto_round:exllamav2": 0,
}
"""AutoRound's packing_format -> the same."""


@dataclass(frozen=True)
class Own:
    """Modules with a width, group size or order of their own.

    Those are `dynamic` of GPTQModel and `extra_config` of AutoRound.
    """

    pattern: re.Pattern[str]
    bits: int | None = None  # None: as all others
    group: int | None = None  # -1: a whole row
    ordered: bool | None = None


@dataclass(frozen=True)
class Gptq:
    """How a GPTQ checkpoint is packed."""

    bits: int
    group: int | None  # None: one scale a row
    zero_offset: int
    acts_in_order: bool  # without act-order g_idx may be missing
    own: tuple[Own, ...] = ()  # the first that fits a module's name counts

    @classmethod
    def parse(cls, fields: Fields) -> Gptq:
        """From `quantization_config` of quant_method "gptq" or "auto-round".

        Raises:
            FormatError: a width, packing or option that is not supported; it is named.
            ModelError: a field of the wrong type.
        """
        bits = fields.integer("bits", high=64)
        if bits not in _GPTQ_BITS:
            raise unsupported(fields, "bits", bits, "2, 3, 4 and 8")
        _refuse_options(fields)
        own = tuple(_own_options(fields))
        return cls(bits, group_size(fields), _zero_offset(fields), not fields.flag("desc_act"), own)

    def matrices(self, tensors: Tensors, where: str) -> list[QuantizedMatrix]:
        """Every quantised module.

        Raises:
            FormatError: a tensor of one is missing, misshapen or contradicts another.
        """
        return [self._matrix(Parts(tensors, m, where)) for m in modules_with(tensors, "qweight")]

    def _of(self, module: str) -> Gptq:
        """How one module is packed."""
        own = next((one for one in self.own if one.pattern.match(module)), None)
        if own is None:
            return self
        return replace(
            self,
            bits=self.bits if own.bits is None else own.bits,
            group=self.group if own.group is None else (None if own.group == -1 else own.group),
            acts_in_order=self.acts_in_order if own.ordered is None else own.ordered,
        )

    def _matrix(self, parts: Parts) -> QuantizedMatrix:
        kind = self._of(parts.module)
        packed = parts.take("qweight", ("I32",), (None, None))
        rows, cols = packed.shape[1], packed.shape[0] * 32 // kind.bits
        group = kind.group or cols
        groups = -(-cols // group)
        scale = parts.take("scales", SCALES, (groups, rows))
        if rows * kind.bits % 32:
            raise parts.error(f"{parts.module} has {rows} outputs, whose zero points fill no whole words")
        stored = parts.take("qzeros", ("I32",), (groups, rows * kind.bits // 32))
        order = None
        if parts.has("g_idx") or not kind.acts_in_order:
            order = parts.groups_of("g_idx", cols, group)
        zero = kind._zero(stored, rows)

        def read() -> QAndScale:
            q = bit_fields(words(packed).T, kind.bits, cols)
            return q, np.ascontiguousarray(scales(scale).T)

        return QuantizedMatrix(
            parts.module, rows, cols, kind.bits, group, zero, order, read, tuple(parts.used)
        )

    def _zero(self, stored: SourceTensor, rows: int) -> npt.NDArray[np.uint8]:
        """[rows, groups]. 2^bits - 1 and one more is 0: the writer took one from 0."""
        fields = bit_fields(words(stored), self.bits, rows).T
        return (fields + np.uint8(self.zero_offset)) & np.uint8((1 << self.bits) - 1)


def _own_options(fields: Fields) -> Iterator[Own]:
    """Options of single modules, in the file's order.

    `dynamic` has expressions that a name must begin with, after "+:", or "-:" where the module is left
    unquantised; `extra_config` has names, or expressions. A width of 16 and more is unquantised too.

    Raises:
        FormatError: a width that is not supported, or an option that changes how tensors are packed.
    """
    for key in ("dynamic", "extra_config"):
        for name, options in fields.mapping(key).items():
            if name.startswith("-:") or not isinstance(options, Mapping):
                continue
            own = Fields(options, fields.where, prefix="")
            bits = own.integer("bits", None, high=64)
            if bits is not None and bits >= 16:
                continue
            if bits not in (None, *_GPTQ_BITS):
                raise unsupported(fields, key, {name: dict(options)}, "2, 3, 4 and 8 bits")
            group = own.integer("group_size", None, low=-1)
            ordered = None if options.get("desc_act") is None else not own.flag("desc_act")
            try:
                pattern = re.compile(name.removeprefix("+:"))
            except re.error as error:
                raise unsupported(fields, key, name, f"regular expressions ({error})") from error
            yield Own(pattern, bits, group, ordered)


def group_size(fields: Fields, key: str = "group_size") -> int | None:
    """Inputs a scale; None (-1 in the file) is a whole row.

    Raises:
        FormatError: no such size.
    """
    size = fields.integer(key, low=-1)
    if size == 0:
        raise unsupported(fields, key, size, "-1 (a whole row) and positive sizes")
    return None if size == -1 else int(size)


def _zero_offset(fields: Fields) -> int:
    if fields.text("quant_method").replace("_", "-") in ("auto-round", "intel/auto-round"):
        key = "packing_format" if fields.get("packing_format") is not None else "backend"
        packing = fields.text(key, "auto_round:auto_gptq")
        known = AUTO_ROUND_PACKINGS
    else:
        key = "checkpoint_format" if fields.get("checkpoint_format") is not None else "format"
        packing = fields.text(key, "gptq")
        known = _GPTQ_PACKINGS
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


_AWQ_BITS = 4
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
        if (bits := fields.integer(bits_key, high=64)) != _AWQ_BITS:
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
        groups = -(-cols // group)
        scale = parts.take("scales", SCALES, (groups, rows))
        zero = _unpacked(parts.take("qzeros", ("I32",), (groups, rows // 8)))

        def read() -> QAndScale:
            return _unpacked(packed), np.ascontiguousarray(scales(scale).T)

        return QuantizedMatrix(
            parts.module, rows, cols, _AWQ_BITS, group, zero, None, read, tuple(parts.used)
        )


def _unpacked(tensor: SourceTensor) -> npt.NDArray[np.uint8]:
    """I32 [n, rows / 8] -> uint8 [rows, n]."""
    n, rows = tensor.shape[0], tensor.shape[1] * 8
    fields = bit_fields(words(tensor), _AWQ_BITS, rows).reshape(n, -1, 8)[:, :, _NIBBLE_OF]
    return np.ascontiguousarray(fields.reshape(n, rows).T)


_FORMATS = ("pack-quantized", "int-quantized")
_STRATEGIES = ("group", "channel", "tensor")
_PACKED_BITS = (4, 8)


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
        expected = -(-cols // self.group) if self.group else 1
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
        scale = parts.take("weight_scale", SCALES, (None, None))
        fitting = [s for s in self.schemes if s.fits(packed.shape[1], cols, scale.shape[1])]
        scheme = (fitting or self.schemes)[0]
        group = scheme.group or cols
        if min(rows, cols) < 1 or packed.shape != (rows, -(-cols * scheme.bits // 32)):
            raise parts.error(
                f"tensor '{parts.module}.weight_packed' is {list(packed.shape)}, which does not hold "
                f"[{rows}, {cols}] values of {scheme.bits} bits"
            )
        groups = -(-cols // group)
        scale = parts.take("weight_scale", SCALES, (rows, groups))
        zero = _zero(parts, scheme, rows, groups)
        order = None
        given = parts.take("weight_g_idx", ("I32",), (cols,)) if parts.has("weight_g_idx") else None
        if given is not None and (array(given) != -1).any():  # it is made of -1
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
        groups = -(-cols // group)
        one = parts.has("weight_scale") and parts.shape("weight_scale") in ((), (1,), (1, 1))
        scale = parts.take("weight_scale", SCALES, parts.shape("weight_scale") if one else (rows, groups))
        zero = _zero(parts, scheme, rows, groups)

        def read() -> QAndScale:
            values = np.broadcast_to(scales(scale).reshape((1, 1) if one else scale.shape), (rows, groups))
            return unsigned(array(weight), 8), np.ascontiguousarray(values)

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
        return np.broadcast_to(unsigned(value.reshape(1, 1), scheme.bits), (rows, groups))
    if shape == (rows, groups) and parts.dtype("weight_zero_point") != "I32":
        return unsigned(array(parts.take("weight_zero_point", ("I8",), shape)), scheme.bits)
    packed = parts.take("weight_zero_point", ("I32",), (-(-rows * scheme.bits // 32), groups))
    return np.ascontiguousarray(bit_fields(words(packed).T, scheme.bits, rows).T)


KEYS = ("quantization_config", "compression_config")  # the second: compressed-tensors before it had the first
METHODS = ("gptq", "awq", "compressed-tensors", "auto-round", "fp8", "fbgemm_fp8", "bitsandbytes")


def quantization_of(values: Mapping[str, Any], where: str) -> Quantization | None:
    """The quantisation of a checkpoint by its parsed config.json; None: there is none.

    Raises:
        FormatError: a method or option that is not supported; it is named.
        ModelError: a field of the wrong type.
    """
    key = next((key for key in KEYS if values.get(key) not in (None, {})), None)
    if key is None:
        return None
    fields = Fields(Fields(values, where).mapping(key), where)
    default = "compressed-tensors" if key == "compression_config" else "missing"
    method = fields.text("quant_method", default).lower().replace("_", "-").removeprefix("intel/")
    if method == "auto-round":
        packing = fields.text("packing_format", fields.text("backend", ""))
        return (
            Awq.parse(fields) if packing in ("auto_round:auto_awq", "auto_round:awq") else Gptq.parse(fields)
        )
    if method == "gptq":
        return Gptq.parse(fields)
    if method == "awq":
        return Awq.parse(fields)
    if method == "compressed-tensors":
        return Fp8.parse(fields, "float-quantized") if _is_fp8(fields) else CompressedTensors.parse(fields)
    if method in ("fp8", "fbgemm-fp8") or (method == "modelopt" and fields.get("quant_algo") == "FP8"):
        return Fp8.parse(fields, method)
    if method == "bitsandbytes":
        return BitsAndBytes()
    raise FormatError(
        f"{where}: {key}.quant_method {fields.get('quant_method')!r:.40} is not supported",
        hint=f"supported: {', '.join(METHODS)}, and GGUF files; else open the model it was made from and "
        "give a recipe (w4, w8)",
    )


def _is_fp8(fields: Fields) -> bool:
    """Whether compressed-tensors holds fp8 alone, by tensor, row or block."""
    groups = [g for g in fields.mapping("config_groups").values() if isinstance(g, Mapping)]
    kinds = [g["weights"] for g in groups if isinstance(g.get("weights"), Mapping)]
    is_fp8 = bool(kinds) and all(w.get("type") == "float" and w.get("num_bits") == 8 for w in kinds)
    return is_fp8 and fields.get("format") in ("float-quantized", "naive-quantized")


def without_quantization(values: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the model alone."""
    return {key: value for key, value in values.items() if key not in KEYS}
