"""OLMo 2, and OLMo 3 where a GGUF file holds it. Source: Olmo2Config in transformers."""

from __future__ import annotations

from hasten.core import Rotary
from hasten.models.families.family import ATTENTION_BIAS, Family, Fields, own_local_theta


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
