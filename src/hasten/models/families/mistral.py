"""Mistral. Source: MistralConfig in transformers."""

from __future__ import annotations

from hasten.models.families.family import Family, every_layer

MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    "llama",  # without a window; GGUF has no word for one
    defaults={"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
    sliding=every_layer,
    is_permuted=True,
)
