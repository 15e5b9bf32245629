"""A Hugging Face config.json as a ModelConfig.

Source: each model's configuration and modelling code in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hasten.core import ModelConfig, NormPlacement
from hasten.errors import ModelError
from hasten.models.config_check import activation_of, checked, refuse, unsupported_architecture
from hasten.models.fields import Fields, bf16_rounded
from hasten.models.hf_rope import hf_rope


@dataclass(frozen=True)
class _Family:
    """How one `model_type` differs: its rules, and what its configuration class assumes for missing keys."""

    architecture: str
    theta: float = 10_000.0
    placement: NormPlacement = "pre"
    qk_norm: Literal["none", "head", "full"] = "none"
    qkv_bias: bool = False  # always there, whatever the configuration says
    asks_bias: bool = True  # `attention_bias` means q, k, v and o
    defaults: Mapping[str, Any] = field(default_factory=dict)


_GEMMA3 = _Family(
    "gemma3", 1_000_000.0, "sandwich", "head",
    defaults={
        "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256,
        "max_position_embeddings": 131_072, "sliding_window": 4096, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh", "eos_token_id": 1, "bos_token_id": 2,
    },
)  # fmt: skip
_FAMILIES: dict[str, _Family] = {
    "llama": _Family("llama", defaults={"max_position_embeddings": 2048}),
    "mistral": _Family(
        "mistral",
        asks_bias=False,
        defaults={"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "qwen2": _Family("qwen2", qkv_bias=True, asks_bias=False, defaults={"sliding_window": 4096}),
    "qwen3": _Family("qwen3", qk_norm="head", defaults={"head_dim": 128, "sliding_window": 4096}),
    "gemma3_text": _GEMMA3,
    "gemma3": _GEMMA3,
    "phi3": _Family(
        "phi3", asks_bias=False, defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
    ),
    "smollm3": _Family(
        "smollm3", 2_000_000.0, defaults={"num_key_value_heads": 4, "tie_word_embeddings": True}
    ),
    "olmo2": _Family(
        "olmo2",
        placement="post",
        qk_norm="full",
        defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    ),
}


@dataclass(frozen=True)
class HfConfig:
    """A ModelConfig and which linear layers of each block must have a bias."""

    config: ModelConfig
    biases: frozenset[str]  # of "q", "k", "v", "o", "gate", "up", "down"


def hf_config(values: Any, where: str, embed_dtype: str = "BF16") -> HfConfig:
    """Translate a configuration.

    Args:
        values: the parsed config.json.
        where: what errors call it.
        embed_dtype: how the embedding is stored; Gemma's scale of it is rounded to that, as in the original.

    Raises:
        ModelError: an architecture or feature that is not supported, or a value that makes no sense.
    """
    if not isinstance(values, Mapping):
        raise ModelError(f"{where}: must hold an object, got {type(values).__name__}")
    model_type = values.get("model_type")
    family = _FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise unsupported_architecture(model_type, where)
    if model_type == "gemma3":
        values = Fields(values, where).mapping("text_config")
    fields = Fields(values, where, defaults=family.defaults)
    _refuse_features(fields)
    config = _translate(fields, family, embed_dtype)
    biases: set[str] = set("qkv") if family.qkv_bias else set()
    if family.asks_bias and fields.flag("attention_bias"):
        biases |= set("qkvo")
    if family.architecture in ("llama", "smollm3") and fields.flag("mlp_bias"):
        biases |= {"gate", "up", "down"}
    return HfConfig(checked(config, where), frozenset(biases))


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


def _translate(fields: Fields, family: _Family, embed_dtype: str) -> ModelConfig:
    heads = fields.integer("num_attention_heads")
    hidden = fields.integer("hidden_size")
    layers = fields.integer("num_hidden_layers", high=1024)
    head_dim = fields.integer("head_dim", hidden // heads)
    context = fields.integer("max_position_embeddings", 32_768, high=1 << 31)
    rope = hf_rope(fields, family.architecture, family.theta, context)
    window, sliding = _windows(fields, family.architecture, layers)
    is_gemma = family.architecture == "gemma3"
    activation = fields.text("hidden_act", "silu")
    if is_gemma:
        activation = fields.text("hidden_activation", activation)
    scalar = fields.number("query_pre_attn_scalar", None) if is_gemma else None
    scale = float(hidden) ** 0.5 if is_gemma else 1.0
    return ModelConfig(
        architecture=family.architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        context_length=context,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        activation=activation_of(activation, fields.where),
        norm_placement=family.placement,
        qk_norm=family.qk_norm,
        rotary_dim=None if rope.rotary_factor == 1 else int(head_dim * rope.rotary_factor),
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        rope_local_theta=rope.local_theta if window else None,
        rope_layers=_rope_layers(fields, layers) if family.architecture == "smollm3" else (),
        sliding_window=window,
        sliding_layers=sliding,
        query_scale=None if scalar is None else scalar**-0.5,
        attention_softcap=fields.number("attn_logit_softcapping", None) if is_gemma else None,
        logit_softcap=fields.number("final_logit_softcapping", None) if is_gemma else None,
        embed_scale=scale if embed_dtype == "F32" else bf16_rounded(scale),
        tied_head=fields.flag("tie_word_embeddings"),
        bos_token_id=fields.integer("bos_token_id", None, low=0),
        eos_token_ids=token_ids(fields, "eos_token_id"),
    )


def token_ids(fields: Fields, key: str) -> tuple[int, ...]:
    """One id or a list of ids; () where there is none."""
    value = fields.get(key, [])
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise fields.error(key, "a token id or a list of them", value)
    return tuple(dict.fromkeys(ids))


def _windows(fields: Fields, architecture: str, layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """(window, one flag a layer): transformers' rules, which differ by architecture."""
    window = fields.integer("sliding_window", None, high=1 << 31)
    if architecture in ("llama", "olmo2") or window is None:
        return None, ()
    if architecture in ("mistral", "phi3"):
        return window, (True,) * layers
    if architecture != "gemma3" and not fields.flag("use_sliding_window"):
        return None, ()
    slides = _sliding_layers(fields, architecture, layers)
    return (window, slides) if any(slides) else (None, ())


def _sliding_layers(fields: Fields, architecture: str, layers: int) -> tuple[bool, ...]:
    types = fields.get("layer_types")
    if types is not None:
        known = ("full_attention", "sliding_attention")
        if not isinstance(types, list) or len(types) != layers or any(t not in known for t in types):
            raise fields.error("layer_types", f"{layers} of {' and '.join(known)}", types)
        return tuple(t == "sliding_attention" for t in types)
    if architecture == "gemma3":
        pattern = fields.integer("sliding_window_pattern", fields.integer("_sliding_window_pattern", 6))
        return tuple((i + 1) % pattern != 0 for i in range(layers))
    if architecture == "smollm3":
        return tuple(not rotates for rotates in _rope_layers(fields, layers))
    first = fields.integer("max_window_layers", 28, low=0)
    return tuple(i >= first for i in range(layers))


def _rope_layers(fields: Fields, layers: int) -> tuple[bool, ...]:
    """SmolLM3: which layers rotate. The field is called no_rope_layers and holds 1 where they do."""
    flags = fields.get("no_rope_layers")
    if flags is None:
        interval = fields.integer("no_rope_layer_interval", 4)
        return tuple((i + 1) % interval != 0 for i in range(layers))
    if not isinstance(flags, list) or len(flags) != layers or any(f not in (0, 1) for f in flags):
        raise fields.error("no_rope_layers", f"{layers} of 0 and 1", flags)
    return tuple(bool(f) for f in flags)
