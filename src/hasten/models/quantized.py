"""Matrices of quantised Hugging Face checkpoints: from packed integers to tensors that keep them.

GPTQ, AWQ and compressed-tensors all mean value = scale * (q - zero), with one scale and one zero point for
each group of inputs of a row; they differ in names and in how q and zero are packed (quantized_formats.py).
Here is what they share. The layouts of the native engine hold q and the scale as they are (native/layout.h):

- Every zero point 2^(bits-1): the symmetric layout, exact while the scale is an fp16 number, as it always is
  in GPTQ and AWQ. A bf16 scale is one from 2^-17 up. Other scales are rounded to fp16, which moves a value by
  |q - zero| * 2^-11 of a quantisation step at most (scales below 2^-14, where fp16 is coarser: the value by
  |q - zero| * 2^-25).
- Other zero points: the layout with a minimum, -scale * zero rounded to fp16. All values of a group move
  together, by zero * 2^-11 of a step at most: 0.008 of one at 4 bits, 0.125 at 8. bf16 would move each by up
  to |q - zero| * 2^-8 of a step, which is more, in four or two times the bytes.
- Groups larger than 128 (a whole row included) become groups of 128, 64 or 32 of the same scale.
- Inputs in another order than their groups (act-order), or groups of no multiple of 32 (a last one that is
  shorter counts too), fit no integer layout: such a matrix is kept in bf16, |q - zero| * 2^-8 of a step off
  at most, and a warning says so.

What rounding costs is measured where it happens: PackedLinear.relative_error. Opening reads zero points and
orders alone; q and scales are read when a tensor's data are.

Codes that stand for floats need no more than a scale: fp8, and what bitsandbytes saves (its integers too)
are read here.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hasten.errors import FormatError
from hasten.models.families.family import Fields
from hasten.weights import FORMATS
from hasten.weights.tensors import INTEGERS, SourceTensor

Tensors = Mapping[str, SourceTensor]
_NATIVE_GROUPS = (128, 64, 32)


QAndScale = tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]
"""q [rows, cols], 0 to 2^bits - 1, and scale [rows, groups]."""


@dataclass(frozen=True)
class QuantizedMatrix:
    """What is known of one quantised matrix before its integers are read.

    value[r, c] = scale[r, g] * (q[r, c] - zero[r, g]), where g is the group of input c.
    """

    module: str  # as the file calls it: "model.layers.0.mlp.up_proj"
    rows: int
    cols: int
    bits: int
    group: int  # inputs a scale; the last group may have fewer
    zero: npt.NDArray[np.uint8]  # [rows, groups]
    groups_of: npt.NDArray[np.int64] | None  # [cols]: the group of each input where they are out of order
    read: Callable[[], QAndScale]
    used: tuple[str, ...]  # the file's tensors it is made of

    @property
    def is_symmetric(self) -> bool:
        """Whether every zero point is in the middle."""
        return bool((self.zero == 1 << (self.bits - 1)).all())

    @property
    def native_group(self) -> int | None:
        """The largest group of the native layouts that divides this one and the inputs, if one does."""
        return next((g for g in _NATIVE_GROUPS if self.group % g == 0 and self.cols % g == 0), None)

    def tensor(self) -> SourceTensor:
        """As a tensor named `module.weight`, whose data are made when they are read."""
        name, shape = f"{self.module}.weight", (self.rows, self.cols)
        group = self.native_group
        if group is None or self.groups_of is not None:
            return SourceTensor(name, shape, "F32", lambda: self.values().view(np.uint8).reshape(-1))
        kind = "S" if self.is_symmetric else "A"
        dtype = f"{kind}{4 if self.bits <= 4 else 8}_{group}"
        return SourceTensor(name, shape, dtype, lambda: self._blocks(group).reshape(-1))

    def values(self) -> npt.NDArray[np.float32]:
        """float32 [rows, cols]: one rounding, none where the scale has 16 bits."""
        q, scale = self.read()
        columns = np.arange(self.cols) // self.group if self.groups_of is None else self.groups_of
        steps = q.astype(np.float32)
        steps -= self.zero.astype(np.float32)[:, columns]
        steps *= scale[:, columns]
        return steps

    def _blocks(self, group: int) -> npt.NDArray[np.uint8]:
        """In blocks of `group` values: uint8 [rows, cols / group, block bytes], see tensor_type.py."""
        u, scale = self.read()
        numbers = [scale]
        if self.is_symmetric:
            u = u + np.uint8((8 if self.bits <= 4 else 128) - (1 << (self.bits - 1)))
        else:
            numbers.append(-(scale * self.zero.astype(np.float32)))
        head = np.stack(numbers, axis=-1).astype("<f4").view(np.uint8)  # [rows, groups, 4 or 8]
        head = head[:, np.arange(self.cols // group) * group // self.group]
        return np.concatenate([head, u.reshape(self.rows, -1, group)], axis=2)


@dataclass(frozen=True)
class FloatMatrix:
    """A quantised matrix whose codes are no integers of one scale a group: fp8, nf4. It is kept in bf16."""

    module: str
    rows: int
    cols: int
    values: Callable[[], npt.NDArray[np.float32]]  # [rows, cols]
    used: tuple[str, ...]
    kind: str  # what the codes are, in words

    def tensor(self) -> SourceTensor:
        """As a tensor named `module.weight`, whose data are made when they are read."""
        name = f"{self.module}.weight"

        def data() -> npt.NDArray[np.uint8]:
            return np.ascontiguousarray(self.values(), np.float32).view(np.uint8).reshape(-1)

        return SourceTensor(name, (self.rows, self.cols), "F32", data)


Matrix = QuantizedMatrix | FloatMatrix


def bit_fields(packed: npt.NDArray[np.int32], bits: int, count: int) -> npt.NDArray[np.uint8]:
    """[n, words] -> [n, count]: field i of a row is at bits i * bits and up, counted through its words.

    Fields run over from one word into the next, as all three formats have it.
    """
    stream = np.ascontiguousarray(packed, "<i4").view(np.uint8)
    if bits == 8:
        fields = stream
    elif bits in (2, 4):
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        fields = ((stream[..., None] >> shifts) & np.uint8((1 << bits) - 1)).reshape(len(stream), -1)
    else:
        each = np.unpackbits(stream, axis=1, bitorder="little")
        each = each[:, : each.shape[1] // bits * bits].reshape(len(stream), -1, bits)
        fields = np.packbits(each, axis=2, bitorder="little")[..., 0]
    return fields[:, :count]


class Parts:
    """The tensors of one quantised module, taken with their type and shape checked.

    Args:
        tensors: of the checkpoint, by the file's names.
        module: the name in front.
        where: what errors call the checkpoint.
    """

    def __init__(self, tensors: Tensors, module: str, where: str) -> None:
        self._tensors = tensors
        self.module = module
        self._where = where
        self.used: list[str] = []

    def has(self, part: str) -> bool:
        """Whether there is such a tensor."""
        return f"{self.module}.{part}" in self._tensors

    def shape(self, part: str) -> tuple[int, ...]:
        """The shape of a tensor that is there."""
        return self._tensors[f"{self.module}.{part}"].shape

    def dtype(self, part: str) -> str:
        """The type of a tensor that is there."""
        return self._tensors[f"{self.module}.{part}"].dtype

    def take(self, part: str, dtypes: tuple[str, ...], shape: tuple[int | None, ...]) -> SourceTensor:
        """A tensor that must be there; None in `shape` stands for any size from 1.

        Raises:
            FormatError: it is missing, or of another type or shape.
        """
        name = f"{self.module}.{part}"
        tensor = self._tensors.get(name)
        if tensor is None:
            raise self.missing(part)
        fits = len(tensor.shape) == len(shape) and all(
            size > 0 and known in (None, size) for size, known in zip(tensor.shape, shape, strict=True)
        )
        if tensor.dtype not in dtypes or not fits:
            shown = ", ".join("any" if size is None else str(size) for size in shape)
            wanted, got = f"{' or '.join(dtypes)} [{shown}]", f"{tensor.dtype} {list(tensor.shape)}"
            raise self.error(f"tensor {name!r} must be {wanted}, got {got}")
        self.used.append(name)
        return tensor

    def groups_of(self, part: str, cols: int, group: int) -> npt.NDArray[np.int64] | None:
        """The group of each input from a tensor I32 [cols] (`g_idx`); None where they are in order.

        Raises:
            FormatError: as `take`; an entry is no group, or a group has more or fewer inputs than the others.
        """
        found = array(self.take(part, ("I32",), (cols,))).astype(np.int64)
        if (found == np.arange(cols) // group).all():
            return None
        groups = -(-cols // group)
        if found.min() < 0 or found.max() >= groups:
            wrong = int(found.min() if found.min() < 0 else found.max())
            raise self.error(f"{self.module}.{part} names group {wrong}, and there are {groups}")
        sizes, wanted = np.bincount(found, minlength=groups), np.full(groups, group)
        wanted[-1] = cols - (groups - 1) * group
        if (sizes != wanted).any():
            at = int(np.argmax(sizes != wanted))
            raise self.error(
                f"{self.module}.{part} gives group {at} {sizes[at]} inputs, and it has {wanted[at]}"
            )
        return found

    def missing(self, part: str) -> FormatError:
        """The error for a tensor that must be there."""
        name = f"{self.module}.{part}"
        return self.error(f"tensor {name!r} is missing", "the checkpoint is incomplete: download it again")

    def error(self, what: str, hint: str = "the file does not belong to its configuration") -> FormatError:
        """An error about this module."""
        return FormatError(f"{self._where}: {what}", hint=hint)


def array(tensor: SourceTensor) -> npt.NDArray[np.generic]:
    """A tensor of integers or floats as an array of its shape; bf16 as float32."""
    if tensor.dtype == "BF16":
        wide = tensor.data.view("<u2").astype(np.uint32) << np.uint32(16)
        return wide.view(np.float32).reshape(tensor.shape)
    kinds = {"F32": "<f4", "F16": "<f2", "I8": "i1", "I32": "<i4", "I64": "<i8", "U8": "u1", "F8_E4M3": "u1"}
    return tensor.data.view(kinds[tensor.dtype]).reshape(tensor.shape)


def words(tensor: SourceTensor) -> npt.NDArray[np.int32]:
    """A tensor of packed integers (I32)."""
    return array(tensor).astype(np.int32, copy=False)


def scales(tensor: SourceTensor) -> npt.NDArray[np.float32]:
    """A tensor of scales as float32 of its shape: exact."""
    return array(tensor).astype(np.float32)


def modules_with(tensors: Tensors, part: str) -> list[str]:
    """Names of the modules that have such a tensor, in the file's order."""
    return [name.removesuffix(f".{part}") for name in tensors if name.endswith(f".{part}")]


SCALES = ("F16", "BF16", "F32")
"""Types that scales come in."""
UNUSED = ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "k_scale", "v_scale")
"""Scales of activations and of keys and values: read by engines that round those by them."""
_log = logging.getLogger("hasten.models")


class Quantization(Protocol):
    """How a checkpoint's matrices are packed."""

    def matrices(self, tensors: Tensors, where: str) -> Sequence[Matrix]:
        """Every quantised module; FormatError where a tensor is missing, misshapen or contradicts another."""


def merged(
    quantization: Quantization, tensors: Tensors, is_needed: Callable[[str], bool], where: str
) -> tuple[dict[str, SourceTensor], tuple[str, ...]]:
    """The tensors of a checkpoint with every quantised matrix in place of its parts.

    Args:
        quantization: how they are packed.
        tensors: by the file's names.
        is_needed: whether the architecture has the parameter that a file's name stands for.
        where: what errors call the checkpoint.

    Returns:
        (tensors by the file's names, `module.weight` for a matrix; names of tensors without use: scales of
        activations, and biases of nothing but zeros that early GPTQ tools wrote for models without biases)

    Raises:
        FormatError: a part is missing, misshapen or contradicts another, or integers belong to no matrix.
    """
    matrices = quantization.matrices(tensors, where)
    used = {name for matrix in matrices for name in matrix.used}
    biases = {f"{matrix.module}.bias" for matrix in matrices}
    result: dict[str, SourceTensor] = {}
    unused: list[str] = []
    for name, tensor in tensors.items():
        if name in used:
            continue
        if name.rpartition(".")[2] in UNUSED or (
            name in biases and not is_needed(name) and not array(tensor).any()
        ):
            unused.append(name)
        elif tensor.dtype in INTEGERS:
            raise FormatError(
                f"{where}: tensor {name!r} holds integers ({tensor.dtype}) and is of no quantised module",
                hint="the checkpoint is incomplete or packed in another way: download it again",
            )
        else:
            result[name] = tensor
    for matrix in matrices:
        tensor = matrix.tensor()
        if tensor.name in result:
            raise FormatError(f"{where}: {matrix.module} is there twice, quantised and as {tensor.name!r}")
        result[tensor.name] = tensor
    _warn_of_bf16(matrices, where)
    return result, tuple(unused)


def _warn_of_bf16(matrices: Sequence[Matrix], where: str) -> None:
    wide = [matrix for matrix in matrices if matrix.tensor().dtype == "F32"]
    if not wide:
        return
    megabytes = sum(matrix.rows * matrix.cols for matrix in wide) * 2e-6
    floats = {matrix.kind for matrix in wide if isinstance(matrix, FloatMatrix)}
    ordered = any(isinstance(m, QuantizedMatrix) and m.groups_of is not None for m in wide)
    reason = "inputs out of order (act-order)" if ordered else "groups of no multiple of 32"
    reason = ", ".join(sorted(floats)) or reason
    _log.warning(
        "%s: %d of %d quantised matrices (%s ...) fit no integer layout: %s. Recipe source keeps them in "
        "bf16, %.0f MB; w8 or w6 is smaller and faster.",
        where, len(wide), len(matrices), wide[0].module, reason, megabytes,
    )  # fmt: skip


def unsupported(fields: Fields, key: str, found: Any, known: str) -> FormatError:
    """The error for an option that this program does not read."""
    return FormatError(
        f"{fields.where}: quantization_config.{key} {found!r:.80} is not supported",
        hint=f"supported: {known}; else open the model it was made from and give a recipe (w4, w8)",
    )


def unsigned(signed: npt.NDArray[Any], bits: int) -> npt.NDArray[np.uint8]:
    """Signed integers of a width plus 2^(bits-1)."""
    shifted = signed.astype(np.int8).view(np.uint8) + np.uint8(1 << (bits - 1))
    return shifted & np.uint8((1 << bits) - 1)


_FP8_BLOCK = 128


@dataclass(frozen=True)
class Fp8:
    """How a checkpoint of fp8 (e4m3) is packed: value = code * scale, by tensor, by row, or by block.

    DeepSeek, Qwen and vLLM's fp8 ("weight_scale_inv" by blocks of 128 x 128, or "weight_scale"), fbgemm_fp8,
    modelopt's FP8, and compressed-tensors of the format "float-quantized".
    """

    name: str  # what errors call it
    block: tuple[int, int] = (_FP8_BLOCK, _FP8_BLOCK)

    @classmethod
    def parse(cls, fields: Fields, name: str) -> Fp8:
        """From `quantization_config`.

        Raises:
            FormatError: blocks of a size that makes no sense.
        """
        size = fields.get("weight_block_size") or [_FP8_BLOCK, _FP8_BLOCK]
        if (
            not isinstance(size, list)
            or len(size) != 2
            or not all(isinstance(n, int) and n > 0 for n in size)
        ):
            raise unsupported(fields, "weight_block_size", size, "two sizes, such as [128, 128]")
        return cls(name, (size[0], size[1]))

    def matrices(self, tensors: Tensors, where: str) -> Sequence[Matrix]:
        """Every quantised module.

        Raises:
            FormatError: none is in fp8, a scale is missing or of another shape.
        """
        modules = [m for m in modules_with(tensors, "weight") if tensors[f"{m}.weight"].dtype == "F8_E4M3"]
        if not modules:
            raise FormatError(
                f"{where}: the configuration says {self.name}, and no weight is in fp8 (F8_E4M3)",
                hint="the checkpoint does not belong to its configuration: download it again, or take "
                "quantization_config out of config.json where the weights are plain",
            )
        return [self._matrix(Parts(tensors, module, where)) for module in modules]

    def _matrix(self, parts: Parts) -> FloatMatrix:
        weight = parts.take("weight", ("F8_E4M3",), (None, None))
        rows, cols = weight.shape
        part = "weight_scale_inv" if parts.has("weight_scale_inv") else "weight_scale"
        if not parts.has(part):
            raise parts.missing(part)
        shape = parts.shape(part)
        blocks = (-(-rows // self.block[0]), -(-cols // self.block[1]))
        known: tuple[tuple[int, ...], ...] = ((), (1,), (1, 1), (rows,), (rows, 1), blocks)
        scale = parts.take(part, SCALES, shape if shape in known else blocks)

        def values() -> npt.NDArray[np.float32]:
            table = np.array(FORMATS["fp8-e4m3"].table, np.float32)
            found: npt.NDArray[np.float32] = table[weight.data].reshape(rows, cols)
            by = scales(scale)
            if shape == blocks and shape not in ((1, 1), (rows, 1)):
                by = np.repeat(np.repeat(by, self.block[0], 0)[:rows], self.block[1], 1)[:, :cols]
            else:
                by = by.reshape((1, 1) if by.size == 1 else (rows, 1))
            found *= by
            return found

        return FloatMatrix(parts.module, rows, cols, values, tuple(parts.used), "fp8 values")


@dataclass(frozen=True)
class BitsAndBytes:
    """How bitsandbytes saves matrices.

    8 bits (LLM.int8):  weight I8 [rows, cols], SCB F32 [rows]; value = weight * SCB / 127
    4 bits (nf4, fp4):  weight U8 [rows * cols / 2, 1], the first value in the high nibble; weight.quant_map
                        F32 [16]; weight.absmax, one for `blocksize` values: F32, or U8 with
                        weight.nested_quant_map, nested_absmax and nested_offset; weight.quant_state.* is JSON

    Source: bitsandbytes (functional.py: QuantState.as_dict, dequantize_4bit; nn/modules.py: Linear8bitLt).
    """

    def matrices(self, tensors: Tensors, where: str) -> Sequence[Matrix]:
        """Every quantised module.

        Raises:
            FormatError: there is none, or a tensor of one is missing, misshapen or contradicts another.
        """
        whole = [self._whole(Parts(tensors, m, where)) for m in modules_with(tensors, "SCB")]
        four = [self._four(Parts(tensors, m, where)) for m in modules_with(tensors, "weight.absmax")]
        if not whole and not four:
            raise FormatError(
                f"{where}: the configuration says bitsandbytes, and no weight was saved by it",
                hint="take quantization_config out of config.json: the weights are those of the plain model",
            )
        return [*whole, *four]

    def _whole(self, parts: Parts) -> QuantizedMatrix:
        weight = parts.take("weight", ("I8",), (None, None))
        rows, cols = weight.shape
        scale = parts.take("SCB", ("F32",), (rows,))
        if parts.has("weight_format") and int(array(parts.take("weight_format", ("U8",), ())).item()) != 0:
            raise parts.error(f"{parts.module} is in a layout of a GPU's own, which is not supported")

        def read() -> QAndScale:
            return unsigned(array(weight), 8), (scales(scale) / np.float32(127)).reshape(rows, 1)

        zero = np.full((rows, 1), 128, np.uint8)
        return QuantizedMatrix(parts.module, rows, cols, 8, cols, zero, None, read, tuple(parts.used))

    def _four(self, parts: Parts) -> FloatMatrix:
        kind = next((k for k in ("nf4", "fp4") if parts.has(f"weight.quant_state.bitsandbytes__{k}")), None)
        if kind is None:
            raise parts.missing("weight.quant_state.bitsandbytes__nf4")
        state = parts.take(f"weight.quant_state.bitsandbytes__{kind}", ("U8",), (None,))
        try:
            known = json.loads(bytes(state.data))
            (rows, cols), size = (int(n) for n in known["shape"]), int(known["blocksize"])
            nested = int(known.get("nested_blocksize", 256))
            offset = float(known.get("nested_offset", 0.0))
        except (ValueError, KeyError, TypeError) as error:
            raise parts.error(f"the quant_state of {parts.module} cannot be read: {error!r}") from error
        if min(rows, cols, size, nested) < 1:
            raise parts.error(f"{parts.module} is [{rows}, {cols}] in blocks of {size}")
        count, blocks = rows * cols, -(-rows * cols // size)
        packed = parts.take("weight", ("U8",), (-(-count // 2), 1))
        table = parts.take("weight.quant_map", ("F32",), (16,))
        peaks = parts.take("weight.absmax", ("F32", "U8"), (blocks,))
        inner: tuple[SourceTensor, SourceTensor] | None = None
        if peaks.dtype == "U8":
            inner = (
                parts.take("weight.nested_quant_map", ("F32",), (256,)),
                parts.take("weight.nested_absmax", ("F32",), (-(-blocks // nested),)),
            )

        def values() -> npt.NDArray[np.float32]:
            by = array(peaks)
            if inner is not None:
                levels, most = (scales(one) for one in inner)
                by = levels[by.astype(np.int64)] * np.repeat(most, nested)[:blocks] + np.float32(offset)
            codes = packed.data
            both = np.stack([codes >> 4, codes & 15], axis=1).reshape(-1)[:count]
            found: npt.NDArray[np.float32] = scales(table)[both]
            found *= np.repeat(by.astype(np.float32), size)[:count]
            return found.reshape(rows, cols)

        return FloatMatrix(parts.module, rows, cols, values, tuple(parts.used), f"{kind} values")
