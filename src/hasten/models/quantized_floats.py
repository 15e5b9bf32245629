"""Quantised checkpoints whose codes stand for floats: fp8, and what bitsandbytes saves (its integers too)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hasten.errors import FormatError
from hasten.models.families.family import Fields
from hasten.models.quantized import (
    SCALES,
    FloatMatrix,
    Matrix,
    Parts,
    QAndScale,
    QuantizedMatrix,
    Tensors,
    array,
    modules_with,
    scales,
    unsigned,
    unsupported,
)
from hasten.weights.formats import FORMATS
from hasten.weights.tensors import SourceTensor

_BLOCK = 128


@dataclass(frozen=True)
class Fp8:
    """How a checkpoint of fp8 (e4m3) is packed: value = code * scale, by tensor, by row, or by block.

    DeepSeek, Qwen and vLLM's fp8 ("weight_scale_inv" by blocks of 128 x 128, or "weight_scale"), fbgemm_fp8,
    modelopt's FP8, and compressed-tensors of the format "float-quantized".
    """

    name: str  # what errors call it
    block: tuple[int, int] = (_BLOCK, _BLOCK)

    @classmethod
    def parse(cls, fields: Fields, name: str) -> Fp8:
        """From `quantization_config`.

        Raises:
            FormatError: blocks of a size that makes no sense.
        """
        size = fields.get("weight_block_size") or [_BLOCK, _BLOCK]
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
