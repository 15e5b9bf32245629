"""GGUF metadata as a ModelConfig.

Source: the GGUF specification's standard keys, and what llama.cpp's converter writes and its loader assumes
for each architecture (convert_hf_to_gguf.py, llama-model.cpp).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from hasten.core import ModelConfig, NormPlacement
from hasten.errors import ModelError
from hasten.models.config_check import checked, refuse, unsupported_architecture
from hasten.models.fields import Fields, bf16_rounded
from hasten.models.gguf import GgufMetadata
from hasten.models.gguf_rope import gguf_rope
from hasten.rope_scaling import RopeScaling
from hasten.weights.tensors import SourceTensor


@dataclass(frozen=True)
class GgufFamily:
    """How one `general.architecture` differs."""

    placement: NormPlacement = "pre"
    qk_norm: Literal["none", "head", "full"] = "none"
    has_qkv_bias: bool = False  # always; others have one where the file has one
    is_permuted: bool = False  # q and k rows lie for llama.cpp's interleaved rotation
    window_pattern: int = 1  # with a window and no pattern: every n-th layer does not slide


FAMILIES: dict[str, GgufFamily] = {
    "llama": GgufFamily(is_permuted=True),
    "smollm3": GgufFamily(is_permuted=True),
    "qwen2": GgufFamily(has_qkv_bias=True),
    "qwen3": GgufFamily(qk_norm="head"),
    "gemma3": GgufFamily(placement="sandwich", qk_norm="head", window_pattern=6),
    "phi3": GgufFamily(),
    "olmo2": GgufFamily(placement="post", qk_norm="full", window_pattern=4),
}
_GEMMA_27B_LAYERS = 62
_SMOLLM3_ROPE_INTERVAL = 4


def gguf_config(metadata: GgufMetadata, tensors: Mapping[str, SourceTensor], where: str) -> ModelConfig:
    """Translate metadata.

    Args:
        metadata: of the file.
        tensors: of the file, by its own names; some say what metadata does not (vocabulary, rope, head).
        where: what errors call it.

    Raises:
        ModelError: an architecture or feature that is not supported, or a value that makes no sense.
    """
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in FAMILIES:
        raise unsupported_architecture(name, where)
    fields = Fields(metadata, where, prefix=f"{name}.")
    _refuse_features(fields, metadata)
    return checked(_translate(fields, name, FAMILIES[name], metadata, tensors), where)


def _refuse_features(fields: Fields, metadata: GgufMetadata) -> None:
    splits = metadata.get("split.count", 0)
    if isinstance(splits, int) and splits > 1:
        raise ModelError(
            f"{fields.where} is one of {splits} parts of a model",
            hint="join them: llama-gguf-split --merge FIRST_PART OUT.gguf",
        )
    get = fields.get
    refuse(
        {
            "mixture of experts (expert_count)": get("expert_count"),
            "multi-head latent attention (kv_lora_rank)": get("attention.kv_lora_rank"),
            "a parallel residual (use_parallel_residual)": get("use_parallel_residual"),
            "clipping of q, k and v (clamp_kqv)": get("attention.clamp_kqv"),
            "position bias (max_alibi_bias)": get("attention.max_alibi_bias"),
            "a logit scale": get("logit_scale"),
            "a residual scale": get("residual_scale"),
            "an embedding scale": get("embedding_scale"),
            "attention temperature": get("attention.temperature_scale"),
            "yarn's log multiplier": get("rope.scaling.yarn_log_multiplier"),
        },
        fields.where,
    )


def _translate(
    fields: Fields,
    name: str,
    family: GgufFamily,
    metadata: GgufMetadata,
    tensors: Mapping[str, SourceTensor],
) -> ModelConfig:
    heads, hidden = _uniform(fields, "attention.head_count"), fields.integer("embedding_length")
    layers = fields.integer("block_count", high=1024)
    head_dim = fields.integer("attention.key_length", hidden // heads)
    if fields.integer("attention.value_length", head_dim) != head_dim:
        raise fields.error(
            "attention.value_length", f"the key length {head_dim}", fields.get("attention.value_length")
        )
    rotary = fields.integer("rope.dimension_count", head_dim)
    if family.is_permuted and rotary != head_dim:
        raise fields.error("rope.dimension_count", f"the head size {head_dim} for this architecture", rotary)
    window, sliding = _windows(fields, family, layers)
    context = fields.integer("context_length", high=1 << 31)
    theta, scaling = gguf_rope(fields, tensors, rotary, context)
    return ModelConfig(
        architecture=name,
        vocab_size=_vocab_size(fields, metadata, tensors),
        hidden_size=hidden,
        intermediate_size=_uniform(fields, "feed_forward_length"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=_uniform(fields, "attention.head_count_kv", heads),
        head_dim=head_dim,
        context_length=context,
        norm_eps=_short(fields.number("attention.layer_norm_rms_epsilon")),
        activation="gelu_tanh" if name == "gemma3" else "silu",
        norm_placement=family.placement,
        qk_norm=family.qk_norm,
        rotary_dim=None if rotary == head_dim else rotary,
        rope_theta=theta,
        rope_scaling=scaling,
        rope_local_theta=_local_theta(fields, name, theta, scaling) if window else None,
        rope_layers=_rope_layers(name, layers),
        sliding_window=window,
        sliding_layers=sliding,
        query_scale=_query_scale(fields, name, layers, hidden, heads),
        attention_softcap=fields.number("attn_logit_softcapping", 0.0, low=-1.0) or None,
        logit_softcap=fields.number("final_logit_softcapping", 0.0, low=-1.0) or None,
        embed_scale=_embed_scale(name, hidden, tensors),
        tied_head="output.weight" not in tensors,
        bos_token_id=_token(metadata, "bos"),
        eos_token_ids=_eos_ids(metadata),
    )


def _short(value: float) -> float:
    """The shortest decimal that gives the same float32: 1e-06, not 9.999999974752427e-07."""
    return float(str(np.float32(value)))


def _uniform(fields: Fields, key: str, *default: int) -> int:
    """A number that may be given once for each layer, if it is the same in all."""
    value = fields.get(key)
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "iu" or len(set(value.tolist())) != 1:
            raise fields.error(key, "the same integer for every layer", value.tolist())
        fields = Fields({fields.prefix + key: int(value[0])}, fields.where, fields.prefix)
    return int(fields.integer(key, *default))


def _vocab_size(fields: Fields, metadata: GgufMetadata, tensors: Mapping[str, SourceTensor]) -> int:
    """The embedding's rows: metadata may count the tokenizer's entries, which padding can outnumber."""
    if "token_embd.weight" in tensors:
        return tensors["token_embd.weight"].rows
    return int(fields.integer("vocab_size", metadata.length("tokenizer.ggml.tokens") or 1))


def _windows(fields: Fields, family: GgufFamily, layers: int) -> tuple[int | None, tuple[bool, ...]]:
    window = fields.integer("attention.sliding_window", 0, low=0, high=(1 << 32) - 1)
    if not window:
        return None, ()
    pattern = fields.get("attention.sliding_window_pattern", 0)
    if isinstance(pattern, np.ndarray):
        if len(pattern) != layers:
            raise fields.error("attention.sliding_window_pattern", f"{layers} flags", pattern.tolist())
        slides = tuple(bool(flag) for flag in pattern.tolist())
    else:
        every = fields.integer("attention.sliding_window_pattern", 0, low=0) or family.window_pattern
        slides = tuple(every == 1 or i % every < every - 1 for i in range(layers))
    return (window, slides) if any(slides) else (None, ())


def _local_theta(fields: Fields, name: str, theta: float, scaling: RopeScaling) -> float | None:
    """Theta of sliding layers where they have their own; Gemma 3's is 10,000 if the file is silent."""
    if name == "gemma3":
        return float(fields.number("rope.freq_base_swa", 10_000.0))
    if name == "olmo2" and scaling.kind != "default":
        return theta  # OLMo 3 comes as olmo2 with a window: its sliding layers are not scaled
    given = fields.number("rope.freq_base_swa", None)
    return None if given is None or given == theta else float(given)


def _rope_layers(name: str, layers: int) -> tuple[bool, ...]:
    if name != "smollm3":
        return ()
    return tuple((i + 1) % _SMOLLM3_ROPE_INTERVAL != 0 for i in range(layers))


def _query_scale(fields: Fields, name: str, layers: int, hidden: int, heads: int) -> float | None:
    scale = fields.number("attention.scale", 0.0, low=-1.0)
    if scale:
        return float(scale)
    if name == "gemma3" and layers == _GEMMA_27B_LAYERS:
        return float((hidden // heads) ** -0.5)  # the 27B model alone; llama.cpp knows it by its layers too
    return None


def _embed_scale(name: str, hidden: int, tensors: Mapping[str, SourceTensor]) -> float:
    """Gemma: sqrt(E), in the precision of the checkpoint; a file of float32 came from one of float32."""
    if name != "gemma3":
        return 1.0
    scale = float(hidden) ** 0.5
    embed = tensors.get("token_embd.weight")
    return scale if embed is not None and embed.dtype == "F32" else bf16_rounded(scale)


def _token(metadata: GgufMetadata, kind: str) -> int | None:
    value: Any = metadata.get(f"tokenizer.ggml.{kind}_token_id")
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31 else None


def _eos_ids(metadata: GgufMetadata) -> tuple[int, ...]:
    found = (_token(metadata, kind) for kind in ("eos", "eot", "eom"))
    return tuple(dict.fromkeys(token for token in found if token is not None))
