"""`--to gptq`: the format of AutoGPTQ and GPTQModel, which transformers and vLLM read too.

Weights lie transposed: `qweight` [inputs * bits / 32, outputs] holds u = q + 2^(bits-1) along the inputs,
`scales` [groups, outputs] fp16, `qzeros` the zero minus one (the first version's habit), `g_idx` each input's
group. One width a model: 8 bits if any layer needs more than 4.

Source: GPTQModel's torch kernel and checkpoint format "gptq".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hasten.export import Exported, Progress
from hasten.export import huggingface as hf
from hasten.export.compressed_tensors import packed_words
from hasten.export.huggingface import HfPlan, Module, Scheme
from hasten.models.artifact import Artifact
from hasten.weights.safetensors_file import Entry

NAME = "gptq"


def plan(artifact: Artifact) -> HfPlan:
    made = hf.plan(artifact, lambda module: module.cols % 32 == 0 and module.rows % 8 == 0)
    schemes = [module.scheme for module in made.quantised if module.scheme]
    if not schemes:
        return made
    one = Scheme(max(scheme.bits for scheme in schemes), min(scheme.group for scheme in schemes))
    modules = tuple(replace(m, scheme=one) if m.scheme else m for m in made.modules)
    return replace(made, modules=modules)


def write(made: HfPlan, path: Path, progress: Progress) -> Exported:
    return hf.write(made, path, progress, NAME, quantization_config(made), _encode)


def quantization_config(made: HfPlan) -> dict[str, Any]:
    """The object of that name in config.json; `dynamic` with `-:` names layers that are floats."""
    if not made.quantised:
        return {}
    scheme = made.quantised[0].scheme
    assert scheme is not None
    skipped = [name for name in made.skipped if name != "lm_head"]
    found: dict[str, Any] = {
        "quant_method": NAME,
        "checkpoint_format": NAME,
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


def _encode(made: HfPlan, module: Module) -> list[Entry]:
    scheme = module.scheme
    assert scheme is not None
    groups, per_word = module.cols // scheme.group, 32 // scheme.bits

    def words() -> Iterator[npt.NDArray[Any]]:
        rows = [packed_words(q, scheme.bits) for q, _ in hf.rows_of(made, module)]
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
