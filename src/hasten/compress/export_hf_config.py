"""A model as a Hugging Face config.json: the inverse of models/families/config_json.py, checked by it.

Rope is written in the form of transformers 4 (`rope_theta`, `rope_scaling`), which every reader knows.
"""

from __future__ import annotations

from typing import Any

from hasten.compress.config_difference import difference
from hasten.core import ModelSpec
from hasten.errors import HastenError, UsageError
from hasten.models.families import FAMILIES, hf_spec


def refuse(what: str, why: str) -> UsageError:
    """The error for what a Hugging Face folder cannot carry."""
    return UsageError(f"a Hugging Face folder cannot carry {what}: {why}", hint="run it with hasten serve")


def config_values(config: ModelSpec) -> dict[str, Any]:
    """The values of config.json, but for the numbers' types.

    Args:
        config: the model.

    Raises:
        UsageError: config.json has no word for something of the model; it is named.
    """
    biases = config.biases
    is_gemma = config.architecture == "gemma3"
    values: dict[str, Any] = {
        "architectures": [FAMILIES[config.architecture].hf_class],
        "model_type": "gemma3_text" if is_gemma else config.architecture,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu" if config.activation == "silu" else "gelu_pytorch_tanh",
        "tie_word_embeddings": config.tied_head,
        "attention_bias": "q" in biases and config.architecture != "qwen2",
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
        "pad_token_id": None,
        "use_cache": True,
    }
    values |= _rope(config) | _windows(config)
    if config.architecture in ("llama", "smollm3"):
        values["mlp_bias"] = "gate" in biases
    if is_gemma:
        values |= _gemma(config)
    _check(config, values)
    return values


def _rope(config: ModelSpec) -> dict[str, Any]:
    scaling, kind = config.rope_scaling, config.rope_scaling.kind
    values: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_scaling": None}
    if config.rotary_dim is not None and config.rotary_dim != config.head_dim:
        values["partial_rotary_factor"] = config.rotary_dim / config.head_dim
    if config.rope_layers:
        values["no_rope_layers"] = [int(flag) for flag in config.rope_layers]
    if kind == "default":
        return values
    own: dict[str, Any] = {"rope_type": kind, "type": kind}
    if kind != "longrope":
        own["factor"] = scaling.factor
    if scaling.original_context_length is not None:
        own["original_max_position_embeddings"] = scaling.original_context_length
        if config.architecture == "phi3":
            values["original_max_position_embeddings"] = scaling.original_context_length
    if kind == "llama3":
        own |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if kind == "yarn":
        own |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
    if kind == "longrope":
        own |= {"short_factor": list(scaling.short_factor), "long_factor": list(scaling.long_factor)}
    for name in ("attention_factor", "mscale", "mscale_all_dim"):
        if getattr(scaling, name) is not None:
            own[name] = getattr(scaling, name)
    return {**values, "rope_scaling": own}


def _windows(config: ModelSpec) -> dict[str, Any]:
    if config.sliding_window is None:
        is_silent = config.architecture in ("llama", "olmo2", "gemma3")
        return {} if is_silent else {"sliding_window": None, "use_sliding_window": False}
    kinds = ["sliding_attention" if slides else "full_attention" for slides in config.sliding_layers]
    found: dict[str, Any] = {"sliding_window": config.sliding_window}
    if config.architecture in ("qwen2", "qwen3", "smollm3"):
        first = next((i for i, slides in enumerate(config.sliding_layers) if slides), config.num_layers)
        found |= {"use_sliding_window": True, "layer_types": kinds, "max_window_layers": first}
    if config.architecture == "gemma3":
        found["layer_types"] = kinds
    return found


def _gemma(config: ModelSpec) -> dict[str, Any]:
    scalar = round(config.score_scale**-2, 6)
    found: dict[str, Any] = {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": int(scalar) if scalar.is_integer() else scalar,  # transformers wants an int
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
    }
    if config.rope_local_theta is not None:
        found["rope_local_base_freq"] = config.rope_local_theta
    return found


def _check(config: ModelSpec, values: dict[str, Any]) -> None:
    """Read the values as a file's and compare what they say with the model."""
    try:
        found = hf_spec(values, "config.json")
    except HastenError as wrong:
        raise refuse("this model", wrong.message) from None
    if found.biases != config.biases:
        biases = ", ".join(sorted(config.biases)) or "none"
        raise refuse(f"biases of {biases}", f"{config.architecture} has others")
    other = difference(config, found)
    if other is not None:
        raise refuse(other.name, f"the model has {other.ours}, config.json means {other.theirs}")
