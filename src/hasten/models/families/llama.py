"""Llama, SmolLM and SmolLM2 (which are Llamas), Mistral, and SmolLM3.

Source: LlamaConfig, MistralConfig and SmolLM3Config in transformers.
"""

from __future__ import annotations

from hasten.models.families.family import Family, Fields, Flags, every_layer, layer_types

_MLP_BIAS: dict[str, tuple[str, ...]] = {"mlp_bias": ("gate", "up", "down")}
ATTENTION_BIAS: dict[str, tuple[str, ...]] = {"attention_bias": ("q", "k", "v", "o")}


def _smollm3_rotates(fields: Fields, layers: int) -> Flags:
    """Which layers rotate. The field is called no_rope_layers and holds 1 where they do."""
    flags = fields.get("no_rope_layers")
    if flags is None:
        interval = fields.integer("no_rope_layer_interval", 4)
        return tuple((i + 1) % interval != 0 for i in range(layers))
    if not isinstance(flags, list) or len(flags) != layers or any(f not in (0, 1) for f in flags):
        raise fields.error("no_rope_layers", f"{layers} of 0 and 1", flags)
    return tuple(bool(f) for f in flags)


def _smollm3_slides(fields: Fields, layers: int) -> Flags:
    if not fields.flag("use_sliding_window"):
        return (False,) * layers
    return layer_types(fields, layers) or tuple(not rotates for rotates in _smollm3_rotates(fields, layers))


LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    "llama",
    defaults={"max_position_embeddings": 2048},
    bias_keys=ATTENTION_BIAS | _MLP_BIAS,
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
SMOLLM3 = Family(
    "smollm3",
    "SmolLM3ForCausalLM",
    "smollm3",
    defaults={"num_key_value_heads": 4, "tie_word_embeddings": True},
    theta=2_000_000.0,
    bias_keys=ATTENTION_BIAS | _MLP_BIAS,
    sliding=_smollm3_slides,
    rotating=_smollm3_rotates,
    is_permuted=True,
)
