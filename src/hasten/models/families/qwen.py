"""Qwen2 and Qwen3. Source: Qwen2Config and Qwen3Config in transformers."""

from __future__ import annotations

from hasten.models.families.family import ATTENTION_BIAS, Family, Fields, Flags, layer_types


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
