"""A Hugging Face config.json or GGUF metadata as a ModelSpec, with what its family adds.

Rotary parameters come in two forms. Old: `rope_theta` and `rope_scaling`; new (transformers 5): both in
`rope_parameters`, which may hold one set for each layer type.

Sources of config.json: each model's configuration and modelling code in transformers, and its
modeling_rope_utils.py; of GGUF: the specification's standard keys, and what llama.cpp's converter writes and
its loader assumes for each architecture (convert_hf_to_gguf.py, llama-model.cpp).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

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
from hasten.models.gguf import GgufMetadata
from hasten.weights.tensors import SourceTensor

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


def from_config(fields: Fields, family: Family, embed_dtype: str) -> ModelSpec:
    """Translate the configuration of a dense decoder.

    Args:
        fields: of the (text) configuration, with the family's defaults.
        family: how it differs.
        embed_dtype: how the embedding is stored.

    Raises:
        ModelError: a feature that is not supported, or a value that makes no sense.
    """
    _json_refuse_features(fields)
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
        blocks=_json_layer_kinds(fields, family, layers, head_dim, context).blocks(
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
    ids = [one for one in (value if isinstance(value, list) else [value]) if one is not None]
    ids = [int(one) if isinstance(one, str) and one.isascii() and one.isdigit() else one for one in ids]
    if not all(_is_whole(i) for i in ids):
        raise fields.error(key, "a token id or a list of them", value)
    return tuple(dict.fromkeys(int(i) for i in ids if i >= 0))  # -1 is written where there is none


def _is_whole(value: Any) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole or (isinstance(value, float) and value.is_integer())


def _json_refuse_features(fields: Fields) -> None:
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


def _json_layer_kinds(fields: Fields, family: Family, layers: int, head_dim: int, context: int) -> LayerKinds:
    window = fields.integer("sliding_window", None, high=1 << 31)
    slides = (False,) * layers if window is None else family.sliding(fields, layers)
    rotary, local = _rotary(fields, family, head_dim, context)
    return LayerKinds(window, slides, family.rotating(fields, layers), rotary, local)


_JSON_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
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
    if name not in _JSON_KINDS:
        raise ModelError(
            f"{fields.where}: rope kind {name!r} is not supported",
            hint=f"supported: {', '.join(_JSON_KINDS)}",
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


Tensors = Mapping[str, SourceTensor]
_log = logging.getLogger("hasten.models")


def from_gguf(fields: Fields, family: Family, metadata: GgufMetadata, tensors: Tensors) -> ModelSpec:
    """Translate the metadata of a dense decoder.

    Args:
        fields: of the architecture.
        family: how it differs.
        metadata: all of the file's.
        tensors: of the file, by its names; some say what metadata does not (vocabulary, rope, biases, head).

    Raises:
        ModelError: a feature that is not supported, or a value that makes no sense.
    """
    _gguf_refuse_features(fields)
    heads, hidden = _uniform(fields, "attention.head_count"), fields.integer("embedding_length")
    layers = fields.integer("block_count", high=1024)
    eps = _short(fields.number("attention.layer_norm_rms_epsilon"))
    biases = _biases(family, tensors)
    head_dim = _head_dim(fields, hidden, heads)
    attention = Attention(
        heads,
        _uniform(fields, "attention.head_count_kv", heads),
        head_dim,
        qk_norm=family.qk_norm,
        scale=fields.number("attention.scale", 0.0, low=-1.0) or None,
        softcap=fields.number("attn_logit_softcapping", 0.0, low=-1.0) or None,
    )
    feed_forward = FeedForward(_uniform(fields, "feed_forward_length"))
    context = fields.integer("context_length", high=1 << 31)
    kinds = _gguf_layer_kinds(fields, family, tensors, layers, head_dim, context)
    softcap = fields.number("final_logit_softcapping", 0.0, low=-1.0) or None
    spec = ModelSpec(
        architecture=family.name,
        vocab=_vocab_size(fields, metadata, tensors),
        width=hidden,
        context=context,
        blocks=kinds.blocks(attention, feed_forward, Norms(family.placement, eps)),
        final_norm=Norm(eps),
        head=Head(tied="output.weight" not in tensors, softcap=softcap),
        bos_token_id=_token(metadata, "bos"),
        eos_token_ids=_eos_ids(metadata),
    )
    embed = tensors.get("token_embd.weight")
    spec = spec.with_blocks(lambda block: block.with_biases(biases))
    return family.gguf_finish(spec, fields, "BF16" if embed is None else embed.dtype)


def _biases(family: Family, tensors: Tensors) -> set[str]:
    """Linear layers with a bias: metadata does not say; no architecture has q's without k's and v's."""
    names = (part for tensor in tensors for part in family.gguf_names.parts(tensor) or ())
    found = {name.split(".")[2] for name in names if name.startswith("layers.") and name.endswith(".bias")}
    return found | (set("qkv") if found & set("qkv") or family.always_biased else set())


def _head_dim(fields: Fields, hidden: int, heads: int) -> int:
    head_dim = int(fields.integer("attention.key_length", hidden // heads))
    if fields.integer("attention.value_length", head_dim) != head_dim:
        raise fields.error(
            "attention.value_length", f"the key length {head_dim}", fields.get("attention.value_length")
        )
    return head_dim


def _gguf_layer_kinds(
    fields: Fields, family: Family, tensors: Tensors, layers: int, head_dim: int, context: int
) -> LayerKinds:
    dim = fields.integer("rope.dimension_count", head_dim)
    if family.is_permuted and dim != head_dim:
        raise fields.error("rope.dimension_count", f"the head size {head_dim} for this architecture", dim)
    theta, scaling = _rope(fields, tensors, dim, context)
    rotary = Rotary(dim, theta, scaling)
    window, slides = _windows(fields, family, layers)
    own = family.local_theta(fields, rotary) if window else None
    local = None if own is None else Rotary(dim, own)
    return LayerKinds(window, slides, family.rotating(fields, layers), rotary, local)


def _gguf_refuse_features(fields: Fields) -> None:
    get = fields.get
    refuse(
        {
            "mixture of experts (expert_count)": get("expert_count"),
            "multi-head latent attention (kv_lora_rank)": get("attention.kv_lora_rank"),
            "a parallel residual (use_parallel_residual)": get("use_parallel_residual"),
            "clipping of q, k and v (clamp_kqv)": get("attention.clamp_kqv"),
            "position bias (max_alibi_bias)": get("attention.max_alibi_bias"),
            "a logit scale": get("logit_scale"),
            "a residual scale": get("residual_scale"),
            "an embedding scale": get("embedding_scale"),
            "attention temperature": get("attention.temperature_scale"),
            "yarn's log multiplier": get("rope.scaling.yarn_log_multiplier"),
        },
        fields.where,
    )


def _short(value: float) -> float:
    """The shortest decimal that gives the same float32: 1e-06, not 9.999999974752427e-07."""
    return float(str(np.float32(value)))


def _uniform(fields: Fields, key: str, *default: int) -> int:
    """A number that may be given once for each layer, if it is the same in all."""
    value = fields.get(key)
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "iu" or len(set(value.tolist())) != 1:
            raise fields.error(key, "the same integer for every layer", value.tolist())
        fields = Fields({fields.prefix + key: int(value[0])}, fields.where, fields.prefix)
    return int(fields.integer(key, *default))


def _vocab_size(fields: Fields, metadata: GgufMetadata, tensors: Tensors) -> int:
    """The embedding's rows: metadata may count the tokenizer's entries, which padding can outnumber."""
    if "token_embd.weight" in tensors:
        return tensors["token_embd.weight"].rows
    return int(fields.integer("vocab_size", metadata.length("tokenizer.ggml.tokens") or 1))


def _windows(fields: Fields, family: Family, layers: int) -> tuple[int | None, tuple[bool, ...]]:
    usual = family.window_pattern
    window = fields.integer("attention.sliding_window", None, low=0, high=(1 << 32) - 1)
    if window is None and (window := family.implied_window(layers)):
        _log.warning(
            "%s: %sattention.sliding_window is missing: %d is taken, as in all %s models of this size",
            fields.where, fields.prefix, window, family.name,
        )  # fmt: skip
    if not window:
        return None, (False,) * layers
    pattern = fields.get("attention.sliding_window_pattern", 0)
    if isinstance(pattern, np.ndarray):
        if len(pattern) != layers:
            raise fields.error("attention.sliding_window_pattern", f"{layers} flags", pattern.tolist())
        slides = tuple(bool(flag) for flag in pattern.tolist())
    else:
        every = fields.integer("attention.sliding_window_pattern", 0, low=0) or usual
        slides = tuple(every == 1 or i % every < every - 1 for i in range(layers))
    return (window if any(slides) else None), slides


def _token(metadata: Mapping[str, Any], kind: str) -> int | None:
    value: Any = metadata.get(f"tokenizer.ggml.{kind}_token_id")
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31 else None


def _eos_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    found = (_token(metadata, kind) for kind in ("eos", "eot", "eom"))
    return tuple(dict.fromkeys(token for token in found if token is not None))


_GGUF_KINDS = ("none", "linear", "yarn", "longrope")


def _rope(fields: Fields, tensors: Tensors, rotary: int, context: int) -> tuple[float, RopeScaling]:
    """(theta, scaling).

    A `rope_freqs.weight` tensor holds Llama 3's scaling as divisors worked out by the converter: that is a
    `longrope` whose short and long factors are equal and whose attention factor is 1.

    Raises:
        ModelError: a kind that is not supported, or factors that do not fit the rotary dimensions.
    """
    theta = float(fields.number("rope.freq_base", 10_000.0))
    factor = fields.number("rope.scaling.factor", 0.0, low=-1.0)
    factor = factor or fields.number("rope.scale_linear", 0.0, low=-1.0) or 1.0  # the second is the old name
    kind = fields.text("rope.scaling.type", "linear" if factor != 1.0 else "none")
    if kind not in _GGUF_KINDS:
        raise ModelError(
            f"{fields.where}: rope scaling {kind!r} is not supported",
            hint=f"supported: {', '.join(_GGUF_KINDS)}",
        )
    original = fields.integer("rope.scaling.original_context_length", context, high=1 << 31)
    long = _factors(tensors, "rope_factors_long.weight", rotary, fields.where)
    short = _factors(tensors, "rope_factors_short.weight", rotary, fields.where)
    llama3 = _factors(tensors, "rope_freqs.weight", rotary, fields.where)
    if long or short:
        return theta, _longrope(fields, short or long, long or short, original, context)
    if llama3:
        if kind == "yarn":
            raise ModelError(f"{fields.where}: rope_freqs.weight together with yarn is not supported")
        scaled = tuple(divisor * (factor if kind == "linear" else 1.0) for divisor in llama3)
        same = RopeScaling(
            "longrope", 1.0, context, attention_factor=1.0, short_factor=scaled, long_factor=scaled
        )
        return theta, same
    if kind == "linear":
        return theta, RopeScaling("linear", factor) if factor != 1.0 else RopeScaling()
    if kind == "yarn":
        return theta, _yarn(fields, factor, original)
    return theta, RopeScaling()


def _factors(tensors: Tensors, name: str, rotary: int, where: str) -> tuple[float, ...]:
    tensor = tensors.get(name)
    if tensor is None:
        return ()
    if tensor.dtype != "F32" or tensor.shape != (rotary // 2,):
        raise ModelError(
            f"{where}: tensor {name!r} must be F32 [{rotary // 2}], got {tensor.dtype} {list(tensor.shape)}"
        )
    values = tensor.data.view(np.float32)
    if not bool(np.all(np.isfinite(values) & (values > 0))):
        raise ModelError(f"{where}: tensor {name!r} must hold finite, positive factors")
    return tuple(values.tolist())


def _longrope(
    fields: Fields, short: tuple[float, ...], long: tuple[float, ...], original: int, context: int
) -> RopeScaling:
    """Phi-3: the converter writes the attention factor; 1 where it is missing, as llama.cpp has it."""
    attention = fields.number("rope.scaling.attn_factor", 1.0)
    return RopeScaling(
        "longrope",
        context / original,
        original,
        attention_factor=attention,
        short_factor=short,
        long_factor=long,
    )


def _yarn(fields: Fields, factor: float, original: int) -> RopeScaling:
    """llama.cpp multiplies the usual sharpening 1 + 0.1 ln(factor) with the file's attn_factor."""
    given = fields.number("rope.scaling.attn_factor", 1.0)
    given *= fields.number("rope.scaling.yarn_attn_factor", 1.0)
    attention = given * (1.0 + 0.1 * math.log(factor)) if given != 1.0 and factor > 1 else None
    return RopeScaling(
        "yarn",
        factor,
        original,
        beta_fast=fields.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=fields.number("rope.scaling.yarn_beta_slow", 1.0),
        attention_factor=attention,
    )
