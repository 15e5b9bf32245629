"""Llama, SmolLM and SmolLM2, which are Llamas, and Mistral. Source: their configs in transformers."""

from __future__ import annotations

from hasten.models.families.family import ATTENTION_BIAS, MLP_BIAS, Family, every_layer

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
