"""Llama, SmolLM and SmolLM2, which are Llamas. Source: LlamaConfig in transformers."""

from __future__ import annotations

from hasten.models.families.family import ATTENTION_BIAS, MLP_BIAS, Family

LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    "llama",
    defaults={"max_position_embeddings": 2048},
    bias_keys=ATTENTION_BIAS | MLP_BIAS,
    is_permuted=True,
)
