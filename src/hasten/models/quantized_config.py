"""What `quantization_config` of a config.json says: which format, and whether it is one that opens."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from hasten.cache.reading import is_there
from hasten.errors import FormatError
from hasten.models.checkpoint import read_json_object
from hasten.models.fields import Fields
from hasten.models.quantized import QuantizedMatrix, Tensors, array
from hasten.models.quantized_awq import Awq
from hasten.models.quantized_compressed import UNUSED, CompressedTensors
from hasten.models.quantized_gptq import Gptq
from hasten.models.source import SourceTensor

KEYS = ("quantization_config", "compression_config")  # the second: compressed-tensors before it had the first
_SIDE_FILE = "quantize_config.json"
_log = logging.getLogger("hasten.models")
METHODS = ("gptq", "awq", "compressed-tensors", "auto-round")


class Quantization(Protocol):
    """How a checkpoint's matrices are packed."""

    def matrices(self, tensors: Tensors, where: str) -> list[QuantizedMatrix]:
        """Every quantised module; FormatError where a tensor is missing, misshapen or contradicts another."""


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
        return CompressedTensors.parse(fields)
    raise FormatError(
        f"{where}: {key}.quant_method {fields.get('quant_method')!r:.40} is not supported",
        hint=f"supported: {', '.join(METHODS)}, and GGUF files; else open the model it was made from and "
        "give a recipe (w4, w8)",
    )


def with_side_file(values: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """The configuration, and the quantisation that early GPTQ tools wrote to a file of its own.

    Raises:
        ModelError, FormatError: that file is there and cannot be read.
    """
    side = folder / _SIDE_FILE
    if any(values.get(key) not in (None, {}) for key in KEYS) or not is_there(side):
        return values
    return {**values, KEYS[0]: {"quant_method": "gptq", **read_json_object(side)}}


def without_quantization(values: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the model alone."""
    return {key: value for key, value in values.items() if key not in KEYS}


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
        elif tensor.dtype in ("I8", "I32", "I64"):
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


def _warn_of_bf16(matrices: list[QuantizedMatrix], where: str) -> None:
    wide = [matrix for matrix in matrices if matrix.tensor().dtype == "F32"]
    if not wide:
        return
    megabytes = sum(matrix.rows * matrix.cols for matrix in wide) * 2e-6
    ordered = any(matrix.groups_of is not None for matrix in wide)
    reason = "inputs out of order (act-order)" if ordered else "groups of no multiple of 32"
    _log.warning(
        "%s: %d of %d quantised matrices (%s ...) fit no integer layout: %s. Recipe source keeps them in "
        "bf16, %.0f MB; w8 or w6 is smaller and faster.",
        where, len(wide), len(matrices), wide[0].module, reason, megabytes,
    )  # fmt: skip
