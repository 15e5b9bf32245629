"""Phi-3 and Phi-4-mini. Source: Phi3Config in transformers."""

from __future__ import annotations

from hasten.models.families.family import Family, every_layer

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
