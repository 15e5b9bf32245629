"""SmolLM3. Source: SmolLM3Config in transformers."""

from __future__ import annotations

from hasten.models.families.family import ATTENTION_BIAS, MLP_BIAS, Family, Fields, Flags, layer_types


def _rotates(fields: Fields, layers: int) -> Flags:
    """Which layers rotate. The field is called no_rope_layers and holds 1 where they do."""
    flags = fields.get("no_rope_layers")
    if flags is None:
        interval = fields.integer("no_rope_layer_interval", 4)
        return tuple((i + 1) % interval != 0 for i in range(layers))
    if not isinstance(flags, list) or len(flags) != layers or any(f not in (0, 1) for f in flags):
        raise fields.error("no_rope_layers", f"{layers} of 0 and 1", flags)
    return tuple(bool(f) for f in flags)


def _slides(fields: Fields, layers: int) -> Flags:
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
    sliding=_slides,
    rotating=_rotates,
    is_permuted=True,
)
