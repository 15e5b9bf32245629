"""`--to gptq` and `--to compressed-tensors`: Hugging Face folders of integer weights.

**gptq** is the format of AutoGPTQ and GPTQModel, which transformers and vLLM read too. Weights lie
transposed: `qweight` [inputs * bits / 32, outputs] holds u = q + 2^(bits-1) along the inputs, `scales`
[groups, outputs] fp16, `qzeros` the zero minus one (the first version's habit), `g_idx` each input's group.
One width a model: 8 bits if any layer needs more than 4. Source: GPTQModel's torch kernel and checkpoint
format "gptq".

**compressed-tensors** is the format of llm-compressor, for transformers and vLLM. Weights are
`pack-quantized`: 4 or 8 bits in int32 words along the inputs, u = q + 2^(bits-1), an fp16 scale a group.
Modules of one width are one config group, named module by module where there are several. Source:
compressed-tensors' pack_quantized compressor and vLLM's CompressedTensorsWNA16.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hasten.export import Exported, Progress
from hasten.export import huggingface as hf
from hasten.export.huggingface import HfPlan, Module, Scheme
from hasten.models.artifact import Artifact
from hasten.weights.tensors import Entry


class _Folder(Protocol):
    """One of the two formats."""

    name: str

    def quantization_config(self, made: HfPlan) -> dict[str, Any]:
        """The object of that name in config.json."""

    def encode(self, made: HfPlan, module: Module, scheme: Scheme) -> list[Entry]:
        """The tensors of a module with its scheme."""

    def write(self, made: HfPlan, path: Path, progress: Progress) -> Exported:
        """As `hasten.export.Format` says."""
        quantisation = self.quantization_config(made) if made.quantised else {}
        return hf.write(made, path, progress, self.name, quantisation, self.encode)


class _Gptq(_Folder):
    name = "gptq"

    def plan(self, artifact: Artifact) -> HfPlan:
        made = hf.plan(artifact, lambda module: module.cols % 32 == 0 and module.rows % 8 == 0)
        schemes = [module.scheme for module in made.quantised if module.scheme]
        if not schemes:
            return made
        one = Scheme(max(scheme.bits for scheme in schemes), min(scheme.group for scheme in schemes))
        modules = tuple(replace(m, scheme=one) if m.scheme else m for m in made.modules)
        return replace(made, modules=modules)

    def quantization_config(self, made: HfPlan) -> dict[str, Any]:
        """`dynamic` with `-:` names layers that are floats."""
        scheme = made.quantised[0].scheme
        assert scheme is not None
        skipped = [name for name in made.skipped if name != "lm_head"]
        found: dict[str, Any] = {
            "quant_method": self.name,
            "checkpoint_format": self.name,
            "bits": scheme.bits,
            "group_size": scheme.group,
            "sym": True,
            "desc_act": False,
            "static_groups": False,
            "true_sequential": True,
            "lm_head": False,
            "pack_dtype": "int32",
        }
        if skipped:
            found["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in skipped}
        return found

    def encode(self, made: HfPlan, module: Module, scheme: Scheme) -> list[Entry]:
        groups, per_word = module.cols // scheme.group, 32 // scheme.bits

        def words() -> Iterator[npt.NDArray[Any]]:
            rows = [_packed_words(q, scheme.bits) for q, _ in hf.rows_of(made, module)]
            yield np.concatenate(rows).T

        def scales() -> Iterator[npt.NDArray[Any]]:
            yield np.concatenate([found for _, found in hf.rows_of(made, module)]).T

        zero = (1 << (scheme.bits - 1)) - 1
        word = sum(zero << (scheme.bits * i) for i in range(per_word))
        zeros = np.full((groups, module.rows // per_word), word, np.uint32)
        inputs = np.arange(module.cols, dtype=np.int32) // scheme.group
        return [
            Entry(f"{module.name}.qweight", "I32", (module.cols // per_word, module.rows), words),
            Entry(f"{module.name}.qzeros", "I32", zeros.shape, lambda: [zeros]),
            Entry(f"{module.name}.scales", "F16", (groups, module.rows), scales),
            Entry(f"{module.name}.g_idx", "I32", (module.cols,), lambda: [inputs]),
        ]


class _CompressedTensors(_Folder):
    name = "compressed-tensors"

    def plan(self, artifact: Artifact) -> HfPlan:
        return hf.plan(artifact, lambda module: module.cols % 8 == 0)

    def quantization_config(self, made: HfPlan) -> dict[str, Any]:
        schemes = sorted({m.scheme for m in made.quantised if m.scheme}, key=lambda s: (s.bits, s.group))
        groups = {}
        for index, scheme in enumerate(schemes):
            names = [module.name for module in made.quantised if module.scheme == scheme]
            weights = {
                "num_bits": scheme.bits,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": scheme.group,
                "dynamic": False,
            }
            groups[f"group_{index}"] = {
                "targets": ["Linear"] if len(schemes) == 1 else names,
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            }
        return {
            "quant_method": self.name,
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "kv_cache_scheme": None,
            "config_groups": groups,
            "ignore": made.skipped,
        }

    def encode(self, made: HfPlan, module: Module, scheme: Scheme) -> list[Entry]:
        def words() -> Iterator[npt.NDArray[Any]]:
            return (_packed_words(q, scheme.bits) for q, _ in hf.rows_of(made, module))

        def scales() -> Iterator[npt.NDArray[Any]]:
            return (found for _, found in hf.rows_of(made, module))

        shape = np.array([module.rows, module.cols], np.int64)
        cols = module.cols * scheme.bits // 32
        return [
            Entry(f"{module.name}.weight_packed", "I32", (module.rows, cols), words),
            Entry(f"{module.name}.weight_scale", "F16", (module.rows, module.cols // scheme.group), scales),
            Entry(f"{module.name}.weight_shape", "I64", (2,), lambda: [shape]),
        ]


def _packed_words(q: npt.NDArray[np.int8], bits: int) -> npt.NDArray[np.int32]:
    """int8 [rows, cols] -> int32 [rows, cols * bits / 32], the first value lowest."""
    u: npt.NDArray[np.uint8] = (q.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    if bits == 4:
        u = u[:, ::2] | (u[:, 1::2] << np.uint8(4))
    return np.ascontiguousarray(u).view(np.int32)


GPTQ = _Gptq()
COMPRESSED_TENSORS = _CompressedTensors()
