"""A Hugging Face config.json as a ModelSpec, with what its family adds.

Rotary parameters come in two forms. Old: `rope_theta` and `rope_scaling`; new (transformers 5): both in
`rope_parameters`, which may hold one set for each layer type. Source: each model's configuration and
modelling code in transformers, and its modeling_rope_utils.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from hasten.core import (
    Activation,
    Attention,
    Embedding,
    FeedForward,
    Head,
    ModelSpec,
    Norm,
    Norms,
    RopeKind,
    RopeScaling,
    Rotary,
)
from hasten.errors import ModelError
from hasten.models.families.family import Family, Fields, LayerKinds, refuse

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


def decoder(fields: Fields, family: Family, embed_dtype: str) -> ModelSpec:
    """Translate the configuration of a dense decoder.

    Args:
        fields: of the (text) configuration, with the family's defaults.
        family: how it differs.
        embed_dtype: how the embedding is stored.

    Raises:
        ModelError: a feature that is not supported, or a value that makes no sense.
    """
    _refuse_features(fields)
    heads, hidden = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    layers = fields.integer("num_hidden_layers", high=1024)
    head_dim = fields.integer("head_dim", hidden // heads)
    context = fields.integer("max_position_embeddings", 32_768, high=1 << 31)
    eps = fields.number("rms_norm_eps", 1e-6)
    asked = (part for key, parts in family.bias_keys.items() if fields.flag(key) for part in parts)
    biases = {*family.always_biased, *asked}
    attention = Attention(
        heads,
        fields.integer("num_key_value_heads", heads),
        head_dim,
        qk_norm=family.qk_norm,
    )
    feed_forward = FeedForward(
        fields.integer("intermediate_size"),
        activation=activation_of(fields.text("hidden_act", "silu"), fields.where),
    )
    spec = ModelSpec(
        architecture=family.name,
        vocab=fields.integer("vocab_size"),
        width=hidden,
        context=context,
        blocks=_layer_kinds(fields, family, layers, head_dim, context).blocks(
            attention, feed_forward, Norms(family.placement, eps)
        ),
        embedding=Embedding(),
        final_norm=Norm(eps),
        head=Head(tied=fields.flag("tie_word_embeddings")),
        bos_token_id=next(iter(token_ids(fields, "bos_token_id")), None),
        eos_token_ids=token_ids(fields, "eos_token_id"),
    )
    return family.hf_finish(spec.with_blocks(lambda b: b.with_biases(biases)), fields, embed_dtype)


def activation_of(name: str, where: str) -> Activation:
    """The gated MLP's activation.

    Raises:
        ModelError: another one than SiLU or GELU's tanh form.
    """
    if name not in _ACTIVATIONS:
        raise ModelError(
            f"{where}: activation {name!r} is not supported", hint=f"supported: {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


def token_ids(fields: Fields, key: str) -> tuple[int, ...]:
    """One id or a list of ids; () where there is none.

    Raises:
        ModelError: something else is there.
    """
    value = fields.get(key, [])
    ids = value if isinstance(value, list) else [value]
    if not all(_is_whole(i) for i in ids):
        raise fields.error(key, "a token id or a list of them", value)
    return tuple(dict.fromkeys(int(i) for i in ids if i >= 0))  # -1 is written where there is none


def _is_whole(value: Any) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole or (isinstance(value, float) and value.is_integer())


def _refuse_features(fields: Fields) -> None:
    get = fields.get
    refuse(
        {
            "a quantised checkpoint (quantization_config)": get("quantization_config"),
            "mixture of experts (num_experts)": get("num_experts"),
            "mixture of experts (num_local_experts)": get("num_local_experts"),
            "mixture of experts (n_routed_experts)": get("n_routed_experts"),
            "multi-head latent attention (kv_lora_rank)": get("kv_lora_rank"),
            "a parallel residual (use_parallel_residual)": get("use_parallel_residual"),
            "a parallel residual (parallel_attn)": get("parallel_attn"),
            "clipping of q, k and v (clip_qkv)": get("clip_qkv"),
            "bidirectional attention (use_bidirectional_attention)": get("use_bidirectional_attention"),
        },
        fields.where,
    )


def _layer_kinds(fields: Fields, family: Family, layers: int, head_dim: int, context: int) -> LayerKinds:
    window = fields.integer("sliding_window", None, high=1 << 31)
    slides = (False,) * layers if window is None else family.sliding(fields, layers)
    rotary, local = _rotary(fields, family, head_dim, context)
    return LayerKinds(window, slides, family.rotating(fields, layers), rotary, local)


_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
_LAYER_TYPES = ("full_attention", "sliding_attention")


def _rotary(config: Fields, family: Family, head_dim: int, context: int) -> tuple[Rotary, Rotary | None]:
    """How layers turn, from either form: (all, those with a window where they have a way of their own)."""
    params, local = _split(config)
    if family.hf_local_theta is not None:
        local = {"rope_theta": config.number("rope_local_base_freq", family.hf_local_theta), **(local or {})}
    fields = Fields(params, f"{config.where}: rope parameters")
    kind = _kind(fields, family.long_ropes)
    partial = fields.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
    if partial > 1:
        raise config.error("partial_rotary_factor", "at most 1", partial)
    theta = fields.number("rope_theta", config.number("rope_theta", family.theta))
    scaling = _scaling(fields, kind, config.integer("original_max_position_embeddings", None), context)
    dim = head_dim if partial == 1 else int(head_dim * partial)
    own = _local_theta(local, params, theta, config)
    return Rotary(dim, theta, scaling), None if own is None else Rotary(dim, own)


def _split(config: Fields) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
    """(parameters of most layers, those of sliding layers if they are given apart)."""
    new = config.mapping("rope_parameters")
    old = config.mapping("rope_scaling")
    if any(name in new for name in _LAYER_TYPES):
        nested = Fields(new, config.where)
        merged = {**nested.mapping("full_attention"), **old}
        return merged, nested.mapping("sliding_attention") or None
    return (old or new), None


def _kind(fields: Fields, long_ropes: tuple[str, ...]) -> RopeKind:
    name = fields.text("rope_type", fields.text("type", "default"))
    if name in long_ropes:
        name = "longrope"
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
