"""Rotary embedding parameters of a Hugging Face config.json, in the old form and the new.

Old: `rope_theta` and `rope_scaling`; new (transformers 5): both in `rope_parameters`, which may hold one set
for each layer type. Source: transformers' modeling_rope_utils.py and each model's configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from hasten.errors import ModelError
from hasten.models.fields import Fields
from hasten.rope_scaling import RopeKind, RopeScaling

_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
_LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class HfRope:
    """What a config.json says about rotary embeddings."""

    theta: float
    scaling: RopeScaling
    rotary_factor: float  # the part of a head that is rotated
    local_theta: float | None  # of sliding layers where they have their own


def hf_rope(config: Fields, architecture: str, theta: float, context_length: int) -> HfRope:
    """Read either form.

    Args:
        config: the (text) configuration.
        architecture: one of ours; Gemma 3 and Phi-3 have rules of their own.
        theta: the architecture's default.
        context_length: tokens, the default original context.

    Raises:
        ModelError: a kind or combination that is not supported, or a value that makes no sense.
    """
    params, local = _split(config)
    if architecture == "gemma3":
        local = {"rope_theta": config.number("rope_local_base_freq", 10_000.0), **(local or {})}
    fields = Fields(params, f"{config.where}: rope parameters")
    kind = _kind(fields, architecture)
    partial = fields.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
    if partial > 1:
        raise config.error("partial_rotary_factor", "at most 1", partial)
    main_theta = fields.number("rope_theta", config.number("rope_theta", theta))
    scaling = _scaling(fields, kind, config.integer("original_max_position_embeddings", None), context_length)
    return HfRope(main_theta, scaling, partial, _local_theta(local, params, main_theta, config))


def _split(config: Fields) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
    """(parameters of most layers, those of sliding layers if they are given apart)."""
    new = config.mapping("rope_parameters")
    old = config.mapping("rope_scaling")
    if any(name in new for name in _LAYER_TYPES):
        nested = Fields(new, config.where)
        merged = {**nested.mapping("full_attention"), **old}
        return merged, nested.mapping("sliding_attention") or None
    return (old or new), None


def _kind(fields: Fields, architecture: str) -> RopeKind:
    name = fields.text("rope_type", fields.text("type", "default"))
    if name == "su" or (name == "yarn" and architecture == "phi3"):
        name = "longrope"  # transformers reads Phi-3's early names so
    if fields.get("mrope_section") is not None:
        name = "mrope"
    if name not in _KINDS:
        raise ModelError(
            f"{fields.where}: rope kind {name!r} is not supported", hint=f"supported: {', '.join(_KINDS)}"
        )
    return cast(RopeKind, name)


def _scaling(fields: Fields, kind: RopeKind, outer_original: int | None, context: int) -> RopeScaling:
    if kind == "default":
        return RopeScaling()
    original = None
    if kind in ("llama3", "yarn", "longrope"):
        inner = fields.integer("original_max_position_embeddings", context, high=1 << 31)
        original = outer_original or inner
    if kind == "longrope":
        factor = fields.number("factor", 1.0)  # 1: the context over the original one
    elif kind == "yarn":
        factor = fields.number("factor", context / (original or context))
    else:
        factor = fields.number("factor")
    return RopeScaling(
        kind=kind,
        factor=factor,
        original_context_length=original,
        low_freq_factor=fields.number("low_freq_factor", 1.0),
        high_freq_factor=fields.number("high_freq_factor", 4.0),
        beta_fast=fields.number("beta_fast", 32.0),
        beta_slow=fields.number("beta_slow", 1.0),
        attention_factor=fields.number("attention_factor", None),
        mscale=fields.number("mscale", None, low=-1.0),
        mscale_all_dim=fields.number("mscale_all_dim", None, low=-1.0),
        truncate=fields.flag("truncate", True),
        short_factor=fields.numbers("short_factor"),
        long_factor=fields.numbers("long_factor"),
    )


def _local_theta(
    local: Mapping[str, Any] | None, main: Mapping[str, Any], theta: float, config: Fields
) -> float | None:
    if local is None or local == main:
        return None
    fields = Fields(local, f"{config.where}: rope parameters of sliding layers")
    kind = fields.text("rope_type", fields.text("type", "default"))
    if kind != "default":
        raise ModelError(f"{fields.where}: rope kind {kind!r} is not supported there, only 'default'")
    return cast(float, fields.number("rope_theta", theta))
