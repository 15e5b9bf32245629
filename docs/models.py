"""Writes docs/models.md from the program's registries: `python docs/models.py > docs/models.md`.

The tables that the program itself uses say which architectures, devices, files and formats there are. A test
makes the page again and compares.
"""

from __future__ import annotations

import sys

from records import table

from hasten.core import ModelSpec
from hasten.errors import HastenError
from hasten.export import FORMATS as EXPORTS
from hasten.models.families import FAMILIES, hf_spec
from hasten.models.families.family import Family
from hasten.models.quantized_formats import METHODS as CHECKPOINTS
from hasten.recipe import METHODS
from hasten.runtime.executor import EXECUTORS
from hasten.runtime.gpu.batch_weights import refuse_others
from hasten.runtime.gpu.shape import GROUPS, Tuning, problems
from hasten.weights import FORMATS, Format
from hasten.weights.tensors import TYPES

MODELS = {
    "llama": "Llama, SmolLM, SmolLM2, and others that are built like them",
    "mistral": "Mistral, dense, with windows or without",
    "qwen2": "Qwen2, Qwen2.5, Qwen2.5-Coder",
    "qwen3": "Qwen3, dense",
    "gemma3": "Gemma 3, the text part",
    "phi3": "Phi-3, Phi-3.5, Phi-4-mini",
    "smollm3": "SmolLM3",
    "olmo2": "OLMo 2; OLMo 3 as GGUF",
}
"""What people call the models of a family."""
DEVICES = {
    "cpu": "the native engine: x86-64 with AMX, AVX-512 or AVX2, 64-bit ARM with NEON; scalar code elsewhere",
    "reference": "plain NumPy in float32, slow: to compare with",
    "cuda": "NVIDIA GPUs from Ampere (compute capability 8.0) on; several of one host: `--tensor-parallel`",
    "torch": "the GPU executor in plain float32 torch on a CPU: to compare with",
}
"""What a device is for."""
SMALL = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
}
"""Sizes that every kernel holds, so that only the family decides."""

HEAD = """# Models

What runs where. Made by `make docs` from the program's own tables; a test keeps it in step.
[Formats](formats.md) says what is kept of each kind of file, [GPUs](gpu.md) what a GPU needs, and
[Export](export.md) what can be written. `hasten show MODEL` says what a file holds and whether it opens.
"""
ARCHITECTURES = """## Architectures

Dense decoders. A model opens if its `config.json` has one of these words as `model_type`, or its GGUF file as
`general.architecture`. Other words are refused by name.
"""
DEVICE_TEXT = """## Devices

`--device NAME`, or `auto`: a GPU where one runs the model, else the CPU.
"""
WEIGHT_TEXT = """## Weights

How weights may be stored, by the names that recipes use. A kernel reads a format `as it is`, or its values
are decoded to bf16 while they load. Integers come in groups of 32, or of 64 and 128 with `-g64` and `-g128`,
and may have a minimum beside each scale (`-asym`). Bits a weight count scales and minimums.
"""
METHOD_TEXT = """Methods that find integers, named behind the width (`w4-gptq`):
[Methods](compress.md) explains them.
"""
FILE_TEXT = """## Files

Hugging Face folders and ids with safetensors in F32, F16 or BF16, GGUF files whole or in parts, and LoRA
adapters on top of either.
"""
EXPORT_TEXT = """## Export

`hasten convert MODEL --to FORMAT`:
"""


def page() -> str:
    """The whole page."""
    return "\n".join(
        [
            HEAD,
            ARCHITECTURES,
            architectures(),
            DEVICE_TEXT,
            table(("device", "what it is"), [(f"`{name}`", DEVICES[name]) for name in EXECUTORS]),
            WEIGHT_TEXT,
            weights(),
            METHOD_TEXT,
            methods(),
            FILE_TEXT,
            files(),
            EXPORT_TEXT,
            exports(),
        ]
    )


def architectures() -> str:
    """Families, their words, and which device runs them."""
    rows = [
        (
            MODELS[name],
            ", ".join(f"`{word}`" for word in family.model_types or (family.name,)),
            f"`{family.gguf}`" if family.gguf else "none",
            "yes",
            on_gpu(spec_of(family)),
        )
        for name, family in FAMILIES.items()
    ]
    return table(("models", "`model_type`", "GGUF", "CPU", "GPU"), rows)


def spec_of(family: Family) -> ModelSpec:
    """A small model of a family."""
    word = (family.model_types or (family.name,))[0]
    return hf_spec({"model_type": word, **SMALL}, family.name)


def on_gpu(spec: ModelSpec) -> str:
    """Whether the GPU's kernels hold a model, and if not, why."""
    try:
        refuse_others(spec, spec.context)
    except HastenError as refused:
        return f"no: {refused.message.rpartition(': ')[2]}"
    return "yes, without the kernel for one sequence" if list(problems(spec, Tuning())) else "yes"


def weights() -> str:
    """Formats of weights and what reads them: a row a width of integers, a row a format of floats."""
    floats = [
        (f"`{one.name}`", f"{one.bits_per_weight:.4g}", "", "", cpu_reads(one), gpu_reads(one))
        for one in FORMATS.values()
        if not one.is_integer
    ]
    widths = dict.fromkeys(one.bits for one in FORMATS.values() if one.is_integer)
    integers = [
        (f"`w{bits}`", *(_sizes(bits, group) for group in GROUPS), cpu_reads(one), gpu_reads(one))
        for bits in widths
        for one in [Format.of(bits)]
    ]
    head = ("format", "bits a weight (with minimum)", "`-g64`", "`-g128`", "CPU", "GPU")
    return table(head, [*integers, *floats])


def _sizes(bits: int, group: int) -> str:
    plain, minimum = (Format.of(bits, group, symmetric).bits_per_weight for symmetric in (True, False))
    return f"{plain:g} ({minimum:g})"


def cpu_reads(one: Format) -> str:
    """Whether the native engine has a kernel for a format."""
    try:
        _ = one.native
    except HastenError:
        return "no; decode with `--recipe bf16`"
    return "as it is"


def gpu_reads(one: Format) -> str:
    """What the GPU engine makes of a format: hasten.runtime.gpu.tiles decides it for each model."""
    if one.name == "bf16" or one.name.startswith("fp8"):
        return "as it is" if one.name in ("bf16", "fp8-e4m3") else "in fp8 with a scale for each row"
    if one.is_integer and one.group in GROUPS:
        return "as it is for one sequence (H100, H200), else in bf16"
    return "in bf16"


def methods() -> str:
    """Methods that find integers."""
    rows = [(f"`{name}`", one.help, "yes" if one.reads else "no") for name, one in METHODS.items()]
    return table(("method", "how", "reads text"), rows)


def files() -> str:
    """Types of GGUF files, and quantised checkpoints."""
    types = [one.name for one in TYPES.values() if one.ggml_id >= 0]
    rows = [
        ("types of GGUF files", ", ".join(types)),
        ("`quant_method` of checkpoints", ", ".join(f"`{name}`" for name in CHECKPOINTS)),
    ]
    return table(("what", "opens"), rows)


def exports() -> str:
    """Formats that can be written."""
    rows = [
        (f"`{name}`", one.loads_in, "a file" if one.suffix else "a folder", ", ".join(one.types))
        for name, one in EXPORTS.items()
    ]
    return table(("format", "loads in", "is", "rounds to"), rows)


if __name__ == "__main__":
    sys.stdout.write(page())
