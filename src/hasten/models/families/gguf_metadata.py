"""GGUF metadata as a ModelSpec, with what its family adds.

Source: the GGUF specification's standard keys, and what llama.cpp's converter writes and its loader assumes
for each architecture (convert_hf_to_gguf.py, llama-model.cpp).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from hasten.core import Attention, FeedForward, Head, ModelSpec, Norm, Norms, RopeScaling, Rotary
from hasten.errors import ModelError
from hasten.models.families.family import Family, Fields, LayerKinds, refuse
from hasten.models.gguf import GgufMetadata
from hasten.weights.tensors import SourceTensor

Tensors = Mapping[str, SourceTensor]
_log = logging.getLogger("hasten.models")


def decoder(fields: Fields, family: Family, metadata: GgufMetadata, tensors: Tensors) -> ModelSpec:
    """Translate the metadata of a dense decoder.

    Args:
        fields: of the architecture.
        family: how it differs.
        metadata: all of the file's.
        tensors: of the file, by its names; some say what metadata does not (vocabulary, rope, biases, head).

    Raises:
        ModelError: a feature that is not supported, or a value that makes no sense.
    """
    _refuse_features(fields)
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
    kinds = _layer_kinds(fields, family, tensors, layers, head_dim, context)
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


def _layer_kinds(
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


def _refuse_features(fields: Fields) -> None:
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


_KINDS = ("none", "linear", "yarn", "longrope")


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
    if kind not in _KINDS:
        raise ModelError(
            f"{fields.where}: rope scaling {kind!r} is not supported", hint=f"supported: {', '.join(_KINDS)}"
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
