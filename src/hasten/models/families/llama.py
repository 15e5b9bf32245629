"""Llama and families that differ from it in a word or two: Mistral, Qwen2 and Qwen3, Phi-3, OLMo 2.

SmolLM and SmolLM2 are Llamas; Phi-4-mini is a Phi-3; a GGUF file of OLMo 3 says olmo2. Source: LlamaConfig,
MistralConfig, Qwen2Config, Qwen3Config, Phi3Config and Olmo2Config in transformers.
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
