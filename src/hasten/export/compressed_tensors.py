"""`--to compressed-tensors`: the format of llm-compressor, for transformers and vLLM.

Weights are `pack-quantized`: 4 or 8 bits in int32 words along the inputs, u = q + 2^(bits-1), an fp16 scale a
group. Modules of one width are one config group, named module by module where there are several.

Source: compressed-tensors' pack_quantized compressor and vLLM's CompressedTensorsWNA16.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hasten.export import Exported, Progress
from hasten.export import huggingface as hf
from hasten.export.huggingface import HfPlan, Module, Scheme
from hasten.models.artifact import Artifact
from hasten.weights.safetensors_file import Entry

NAME = "compressed-tensors"


def plan(artifact: Artifact) -> HfPlan:
    return hf.plan(artifact, lambda module: module.cols % 8 == 0)


def write(made: HfPlan, path: Path, progress: Progress) -> Exported:
    return hf.write(made, path, progress, NAME, quantization_config(made), _encode)


def quantization_config(made: HfPlan) -> dict[str, Any]:
    """The object of that name in config.json."""
    schemes = sorted({m.scheme for m in made.quantised if m.scheme}, key=lambda s: (s.bits, s.group))
    groups = {}
    for index, scheme in enumerate(schemes):
        names = [module.name for module in made.quantised if module.scheme == scheme]
        groups[f"group_{index}"] = _group(scheme, ["Linear"] if len(schemes) == 1 else names)
    return {
        "quant_method": NAME,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "config_groups": groups,
        "ignore": made.skipped,
    }


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": scheme.group,
        "dynamic": False,
    }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": "pack-quantized",
    }


def packed_words(q: npt.NDArray[np.int8], bits: int) -> npt.NDArray[np.int32]:
    """int8 [rows, cols] -> int32 [rows, cols * bits / 32], the first value lowest."""
    u: npt.NDArray[np.uint8] = (q.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    if bits == 4:
        u = u[:, ::2] | (u[:, 1::2] << np.uint8(4))
    return np.ascontiguousarray(u).view(np.int32)


def _encode(made: HfPlan, module: Module) -> list[Entry]:
    scheme = module.scheme
    assert scheme is not None

    def words() -> Iterator[npt.NDArray[Any]]:
        return (packed_words(q, scheme.bits) for q, _ in hf.rows_of(made, module))

    def scales() -> Iterator[npt.NDArray[Any]]:
        return (found for _, found in hf.rows_of(made, module))

    shape = np.array([module.rows, module.cols], np.int64)
    cols = module.cols * scheme.bits // 32
    return [
        Entry(f"{module.name}.weight_packed", "I32", (module.rows, cols), words),
        Entry(f"{module.name}.weight_scale", "F16", (module.rows, module.cols // scheme.group), scales),
        Entry(f"{module.name}.weight_shape", "I64", (2,), lambda: [shape]),
    ]
