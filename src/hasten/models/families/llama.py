"""Llama and families that differ from it in a word or two: Mistral, Qwen2 and Qwen3, Phi-3, OLMo 2, SmolLM3.

SmolLM and SmolLM2 are Llamas; Phi-4-mini is a Phi-3; a GGUF file of OLMo 3 says olmo2. Source: LlamaConfig,
MistralConfig, Qwen2Config, Qwen3Config, Phi3Config, Olmo2Config and SmolLM3Config in transformers.
"""

from __future__ import annotations

from hasten.core import Rotary
from hasten.models.families.family import (
    ATTENTION_BIAS,
    MLP_BIAS,
    Family,
    Fields,
    Flags,
    every_layer,
    layer_types,
    own_local_theta,
)

LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    "llama",
    defaults={"max_position_embeddings": 2048},
    bias_keys=ATTENTION_BIAS | MLP_BIAS,
    is_permuted=True,
)
MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    "llama",  # without a window; GGUF has no word for one
    defaults={"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
    sliding=every_layer,
    is_permuted=True,
)


def _slides(fields: Fields, layers: int) -> Flags:
    if not fields.flag("use_sliding_window"):
        return (False,) * layers
    first = fields.integer("max_window_layers", 28, low=0)
    return layer_types(fields, layers) or tuple(i >= first for i in range(layers))


QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    "qwen2",
    defaults={"sliding_window": 4096},
    always_biased=("q", "k", "v"),
    sliding=_slides,
)
QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    "qwen3",
    defaults={"head_dim": 128, "sliding_window": 4096},
    qk_norm="head",
    bias_keys=ATTENTION_BIAS,
    sliding=_slides,
)

PHI3 = Family(
    "phi3",
    "Phi3ForCausalLM",
    "phi3",
    defaults={
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    sliding=every_layer,
    long_ropes=("su", "yarn"),  # transformers reads the early names so
    has_fused_up=True,
)


def _local_theta(fields: Fields, rotary: Rotary) -> float | None:
    """OLMo 3 comes as olmo2 with a window: its sliding layers are not scaled."""
    return rotary.theta if rotary.scaling.kind != "default" else own_local_theta(fields, rotary)


OLMO2 = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    "olmo2",
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    placement="post",
    qk_norm="full",
    bias_keys=ATTENTION_BIAS,
    window_pattern=4,
    local_theta=_local_theta,
)


def _rotates(fields: Fields, layers: int) -> Flags:
    """Which layers rotate. The field is called no_rope_layers and holds 1 where they do."""
    flags = fields.get("no_rope_layers")
    if flags is None:
        interval = fields.integer("no_rope_layer_interval", 4)
        return tuple((i + 1) % interval != 0 for i in range(layers))
    if not isinstance(flags, list) or len(flags) != layers or any(f not in (0, 1) for f in flags):
        raise fields.error("no_rope_layers", f"{layers} of 0 and 1", flags)
    return tuple(bool(f) for f in flags)


def _slides_if_still(fields: Fields, layers: int) -> Flags:
    if not fields.flag("use_sliding_window"):
        return (False,) * layers
    return layer_types(fields, layers) or tuple(not rotates for rotates in _rotates(fields, layers))


SMOLLM3 = Family(
    "smollm3",
    "SmolLM3ForCausalLM",
    "smollm3",
    defaults={"num_key_value_heads": 4, "tie_word_embeddings": True},
    theta=2_000_000.0,
    bias_keys=ATTENTION_BIAS | MLP_BIAS,
    sliding=_slides_if_still,
    rotating=_rotates,
    is_permuted=True,
)
