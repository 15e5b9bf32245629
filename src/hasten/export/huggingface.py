"""`--to gptq` and `--to compressed-tensors`: Hugging Face folders of integers, and of floats.

Integer weights go as integers of 4 or 8 bits with an fp16 scale a group: 5 and 6 bits fit 8 exactly. Modules
that engines fuse (q, k and v; gate and up) get one scheme, the widest of theirs. What is no symmetric integer
layout (a minimum, groups of 16, bf16), the embedding and the head go as floats, as readers expect them.

config.json is the inverse of models/families/decoder.py, and is checked by it.
Rope is written in the form of transformers 4 (`rope_theta`, `rope_scaling`), which every reader knows.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hasten.cache import new_folder
from hasten.core import READERS, ModelSpec
from hasten.errors import HastenError, UsageError
from hasten.export import MARKER, Exported, Loss, Progress, Rounding, difference, floats_of, write_companions
from hasten.models.artifact import Artifact
from hasten.models.families import FAMILIES, hf_spec
from hasten.models.rope import rotations
from hasten.weights.packed import PackedModel, bf16_bits, integers, row_pieces
from hasten.weights.tensors import Entry, write_safetensors

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Scheme:
    """Encoded of `bits` with one fp16 scale a group: value = scale * q, q from -2^(bits-1) on."""

    bits: int  # 4 or 8
    group: int


@dataclass(frozen=True)
class Module:
    """A linear layer or embedding of the file; Phi-3's fused ones have several parts, rows after rows."""

    name: str
    parts: tuple[str, ...]  # canonical names
    rows: int
    cols: int
    scheme: Scheme | None  # None: floats of `dtype`
    dtype: str  # "BF16" or "F16"


@dataclass
class HfPlan:
    """Everything about the folder but the weights' bytes."""

    artifact: Artifact
    modules: tuple[Module, ...]
    values: dict[str, Any]  # config.json
    notes: tuple[str, ...] = ()
    losses: dict[str, Loss] = field(default_factory=dict)  # by module

    @property
    def packed(self) -> PackedModel:
        return self.artifact.packed

    @property
    def quantised(self) -> list[Module]:
        return [module for module in self.modules if module.scheme is not None]

    @property
    def skipped(self) -> list[str]:
        """Linear layers that stay floats, the head first: what a reader must not look for integers in."""
        names = [m.name for m in self.modules if m.scheme is None and not m.name.endswith("embed_tokens")]
        return sorted({"lm_head", *names}, key=lambda name: (name != "lm_head", name))


def plan(artifact: Artifact, fits: Callable[[Module], bool]) -> HfPlan:
    """Decide what the folder will hold; reads no weights.

    Args:
        fits: whether the format can hold a module in its scheme.

    Raises:
        UsageError: config.json has no word for something of the model.
    """
    packed, config = artifact.packed, artifact.packed.config
    values = config_values(config)
    modules = _modules(packed, fits)
    quantised = [m for m in modules if m.scheme is not None]
    is_half = bool(quantised) and config.architecture != "gemma3"
    values["dtype"] = values["torch_dtype"] = "float16" if is_half else "bfloat16"
    notes = []
    if quantised:
        notes.append("scales are fp16: load it in float16 or float32; bfloat16 rounds each by up to 0.4 %")
    if quantised and config.architecture == "gemma3":
        notes.append("config.json says bfloat16, as Gemma 3 overflows float16: in float32 it is exact")
    return HfPlan(artifact, modules, values, tuple(notes))


def write(
    made: HfPlan,
    path: Path,
    progress: Progress,
    name: str,
    quantisation: Mapping[str, Any],
    encode: Callable[[HfPlan, Module, Scheme], Sequence[Entry]],
) -> Exported:
    """Write the folder of the format `name`.

    Args:
        quantisation: `quantization_config`, left out where nothing is quantised.
        encode: the tensors of a module that has a scheme.
    """
    entries = [
        entry for m in made.modules for entry in (encode(made, m, m.scheme) if m.scheme else _floats(made, m))
    ]
    entries += _vectors(made)
    values = {**made.values, **({"quantization_config": dict(quantisation)} if made.quantised else {})}
    with new_folder(path, marker=MARKER) as fresh:
        write_companions(fresh, made.artifact, values)
        write_safetensors(fresh / WEIGHTS, entries, progress)
    kinds = [f"int{m.scheme.bits}-g{m.scheme.group}" if m.scheme else m.dtype for m in made.modules]
    return Exported.of(name, path, kinds, made.notes, _roundings(made))


def rows_of(made: HfPlan, module: Module) -> Iterator[tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]]:
    """(q int8 [rows, cols], scales [rows, groups]) of a module in its scheme, some rows at a time."""
    assert module.scheme is not None
    for part in module.parts:
        linear = made.packed.linears[part]
        for first, count in row_pieces(linear):
            found = integers(linear, first, count)
            yield found.signed, np.repeat(found.scales, found.layout.group // module.scheme.group, axis=1)


def _modules(packed: PackedModel, fits: Callable[[Module], bool]) -> tuple[Module, ...]:
    config = packed.config
    found = [_float_module("model.embed_tokens", ("embed",), packed)]
    if "head" in packed.linears:
        found.append(_float_module("lm_head", ("head",), packed))
    for layer in range(len(config.blocks)):
        block = _block(config, layer)
        for siblings in _siblings(block):
            found += _schemed(siblings, packed, fits)
    return tuple(found)


def _block(config: ModelSpec, layer: int) -> dict[str, tuple[str, ...]]:
    """Modules of one layer -> canonical parts; fused ones for Phi-3 alone."""
    is_phi = config.architecture == "phi3"
    single = {"q", "k", "v", "gate", "up"} if is_phi else set()
    prefix = f"layers.{layer}."
    return {
        f"model.{prefix}{module}": tuple(prefix + part for part in parts)
        for module, parts in FAMILIES[config.architecture].hf_names.block.items()
        if "proj" in module and (len(parts) == 1 or is_phi) and not (set(parts) <= single and len(parts) == 1)
    }


def _siblings(block: Mapping[str, tuple[str, ...]]) -> Iterator[dict[str, tuple[str, ...]]]:
    """Modules that engines run as one, together; others alone."""
    left = dict(block)
    for group in (parts for parts in READERS.values() if len(parts) > 1):
        together: dict[str, tuple[str, ...]] = {
            n: p for n, p in left.items() if len(p) == 1 and p[0].rpartition(".")[2] in group
        }
        left = {n: p for n, p in left.items() if n not in together}
        if together:
            yield together
    for name, parts in left.items():
        alone: dict[str, tuple[str, ...]] = {name: parts}
        yield alone


def _schemed(
    siblings: Mapping[str, tuple[str, ...]], packed: PackedModel, fits: Callable[[Module], bool]
) -> list[Module]:
    """Modules of one scheme, if all their layouts are symmetric integers and the format takes it."""
    linears = [packed.linears[part] for parts in siblings.values() for part in parts]
    floats = [_float_module(name, parts, packed) for name, parts in siblings.items()]
    layouts = [linear.layout for linear in linears]
    if any(x.bits == 16 or not x.symmetric or x.group < 32 for x in layouts):
        return floats
    scheme = Scheme(4 if all(x.bits == 4 for x in layouts) else 8, min(x.group for x in layouts))
    made = [Module(m.name, m.parts, m.rows, m.cols, scheme, m.dtype) for m in floats]
    is_whole = all(linear.cols % linear.layout.group == 0 for linear in linears)
    return made if is_whole and all(fits(module) for module in made) else floats


def _float_module(name: str, parts: tuple[str, ...], packed: PackedModel) -> Module:
    linears = [packed.linears[part] for part in parts]
    dtype = "BF16" if all(linear.layout.bits == 16 for linear in linears) else "F16"
    return Module(name, parts, sum(linear.rows for linear in linears), linears[0].cols, None, dtype)


def _floats(made: HfPlan, module: Module) -> list[Entry]:
    def pieces() -> Iterator[npt.NDArray[Any]]:
        loss = made.losses[module.name] = Loss()
        for part in module.parts:
            linear = made.packed.linears[part]
            for first, count in row_pieces(linear):
                if module.dtype == "BF16":
                    yield bf16_bits(linear, first, count)
                    continue
                try:
                    yield loss.rounded(floats_of(linear, first, count))
                except OverflowError as large:
                    raise refuse(part, str(large)) from None

    return [Entry(f"{module.name}.weight", module.dtype, (module.rows, module.cols), pieces)]


def _vectors(made: HfPlan) -> list[Entry]:
    """Norms and biases in the smallest of F16, BF16 and F32 that holds them exactly."""
    config, vectors = made.packed.config, made.packed.vectors
    table = FAMILIES[config.architecture].hf_names
    names: list[tuple[str, list[str]]] = [("model.norm.weight", ["final_norm"])]
    for layer in range(len(config.blocks)):
        prefix = f"layers.{layer}."
        names += [
            (f"model.{prefix}{module}.weight", [prefix + norms[0]])
            for module, norms in table.block.items()
            if prefix + norms[0] in vectors and len(norms) == 1
        ]
        names += [
            (f"{module}.bias", [f"{part}.bias" for part in parts])
            for module, parts in _block(config, layer).items()
            if all(f"{part}.bias" in vectors for part in parts)
        ]
    assert {part for _, listed in names for part in listed} == set(vectors)
    is_gemma = config.architecture == "gemma3"
    found = []
    for name, listed in names:
        values = np.concatenate([vectors[part] for part in listed])
        is_offset = is_gemma and name.endswith("norm.weight")
        found.append(_vector(name, values - np.float32(1) if is_offset else values))
    return found


def _vector(name: str, values: npt.NDArray[np.float32]) -> Entry:
    bits = values.view(np.uint32)
    if not (bits & 0xFFFF).any():
        stored: npt.NDArray[Any] = (bits >> 16).astype(np.uint16)
        return Entry(name, "BF16", values.shape, lambda: [stored])
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if np.array_equal(half.astype(np.float32), values):
        return Entry(name, "F16", values.shape, lambda: [half])
    return Entry(name, "F32", values.shape, lambda: [values])


def _roundings(made: HfPlan) -> list[Rounding]:
    return [
        Rounding(f"{module.name}.weight", module.dtype, made.losses[module.name].relative)
        for module in made.modules
        if module.scheme is None and module.dtype == "F16"
    ]


def refuse(what: str, why: str) -> UsageError:
    """The error for what a Hugging Face folder cannot carry."""
    return UsageError(f"a Hugging Face folder cannot carry {what}: {why}", hint="run it with hasten serve")


def config_values(config: ModelSpec) -> dict[str, Any]:
    """The values of config.json, but for the numbers' types.

    Raises:
        UsageError: config.json has no word for something of the model; it is named.
    """
    mixer, feed_forward = config.blocks[0].mixer, config.blocks[0].feed_forward
    is_gemma = config.architecture == "gemma3"
    values: dict[str, Any] = {
        "architectures": [FAMILIES[config.architecture].hf_class],
        "model_type": "gemma3_text" if is_gemma else config.architecture,
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "intermediate_size": feed_forward.width,
        "num_hidden_layers": len(config.blocks),
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.kv_heads,
        "head_dim": mixer.head_dim,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.final_norm.eps,
        "hidden_act": "silu" if feed_forward.activation == "silu" else "gelu_pytorch_tanh",
        "tie_word_embeddings": config.head.tied,
        "attention_bias": "q" in mixer.biases and config.architecture != "qwen2",
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
        "pad_token_id": None,
        "use_cache": True,
    }
    values |= _rope(config) | _windows(config)
    if config.architecture in ("llama", "smollm3"):
        values["mlp_bias"] = "gate" in feed_forward.biases
    if is_gemma:
        values |= _gemma(config)
    _check(config, values)
    return values


def _rope(config: ModelSpec) -> dict[str, Any]:
    (rotary, local), size = rotations(config), config.blocks[0].mixer.head_dim
    scaling, kind = rotary.scaling, rotary.scaling.kind
    values: dict[str, Any] = {"rope_theta": rotary.theta, "rope_scaling": None}
    if rotary.dim != size:
        values["partial_rotary_factor"] = rotary.dim / size
    if local is not None:
        values["rope_local_base_freq"] = local.theta
    flags = [int(block.mixer.rotary is not None) for block in config.blocks]
    if not all(flags):
        values["no_rope_layers"] = flags
    if kind == "default":
        return values
    own: dict[str, Any] = {"rope_type": kind, "type": kind}
    if kind != "longrope":
        own["factor"] = scaling.factor
    if scaling.original_context_length is not None:
        own["original_max_position_embeddings"] = scaling.original_context_length
        if config.architecture == "phi3":
            values["original_max_position_embeddings"] = scaling.original_context_length
    if kind == "llama3":
        own |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if kind == "yarn":
        own |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
    if kind == "longrope":
        own |= {"short_factor": list(scaling.short_factor), "long_factor": list(scaling.long_factor)}
    for name in ("attention_factor", "mscale", "mscale_all_dim"):
        if getattr(scaling, name) is not None:
            own[name] = getattr(scaling, name)
    return {**values, "rope_scaling": own}


def _windows(config: ModelSpec) -> dict[str, Any]:
    slides = [block.mixer.window is not None for block in config.blocks]
    if not any(slides):
        is_silent = config.architecture in ("llama", "olmo2", "gemma3")
        return {} if is_silent else {"sliding_window": None, "use_sliding_window": False}
    kinds = ["sliding_attention" if one else "full_attention" for one in slides]
    first = slides.index(True)
    found: dict[str, Any] = {"sliding_window": config.blocks[first].mixer.window}
    if config.architecture in ("qwen2", "qwen3", "smollm3"):
        found |= {"use_sliding_window": True, "layer_types": kinds, "max_window_layers": first}
    if config.architecture == "gemma3":
        found["layer_types"] = kinds
    return found


def _gemma(config: ModelSpec) -> dict[str, Any]:
    mixer = config.blocks[0].mixer
    scalar = round(mixer.score_scale**-2, 6)
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": int(scalar) if scalar.is_integer() else scalar,  # transformers wants an int
        "attn_logit_softcapping": mixer.softcap,
        "final_logit_softcapping": config.head.softcap,
    }


def _check(config: ModelSpec, values: dict[str, Any]) -> None:
    """Read the values as a file's and compare what they say with the model."""
    try:
        found = hf_spec(values, "config.json")
    except HastenError as wrong:
        raise refuse("this model", wrong.message) from None
    if other := difference(config, found):
        raise refuse(other[0], f"the model has {other[1]}, config.json means {other[2]}")


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
        return write(made, path, progress, self.name, quantisation, self.encode)


class _Gptq(_Folder):
    name = "gptq"

    def plan(self, artifact: Artifact) -> HfPlan:
        made = plan(artifact, lambda module: module.cols % 32 == 0 and module.rows % 8 == 0)
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
            rows = [_packed_words(q, scheme.bits) for q, _ in rows_of(made, module)]
            yield np.concatenate(rows).T

        def scales() -> Iterator[npt.NDArray[Any]]:
            yield np.concatenate([found for _, found in rows_of(made, module)]).T

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
        return plan(artifact, lambda module: module.cols % 8 == 0)

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
            return (_packed_words(q, scheme.bits) for q, _ in rows_of(made, module))

        def scales() -> Iterator[npt.NDArray[Any]]:
            return (found for _, found in rows_of(made, module))

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
