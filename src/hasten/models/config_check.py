"""What every decoder must satisfy, whatever file its configuration came from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from hasten.core import Activation, ModelConfig
from hasten.errors import ModelError

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "smollm3", "olmo2")
"""Architectures the decoder runs; SmolLM and SmolLM2 are llama."""

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_MAX_LAYERS = 1024
_MAX_WIDTH = 1 << 20
_MAX_HEAD_DIM = 1024  # of native/bind/engine.cpp: attention keeps a query's row on the stack
_MAX_VOCAB = 1 << 22


def unsupported_architecture(name: Any, where: str) -> ModelError:
    """The error for an architecture that the decoder does not run."""
    return ModelError(
        f"{where}: architecture {name!r} is not supported",
        hint=f"supported: {', '.join(SUPPORTED)} (SmolLM and SmolLM2 are llama)",
    )


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


def refuse(features: Mapping[str, Any], where: str) -> None:
    """Refuse what the decoder does not have.

    Args:
        features: what it is in words -> its value in the configuration; None, 0, False, {} mean unused.

    Raises:
        ModelError: one is used.
    """
    for feature, value in features.items():
        if value is not None and value is not False and value != 0 and value != {} and value != []:
            raise ModelError(
                f"{where}: {feature} is not supported (found {value!r:.60})",
                hint="dense decoders are supported: " + ", ".join(SUPPORTED),
            )


def checked(config: ModelConfig, where: str) -> ModelConfig:
    """The configuration, if its numbers fit each other.

    Raises:
        ModelError: they do not.
    """
    for field, low, high in (
        ("num_layers", 1, _MAX_LAYERS),
        ("hidden_size", 1, _MAX_WIDTH),
        ("intermediate_size", 1, _MAX_WIDTH),
        ("num_heads", 1, 4096),
        ("num_kv_heads", 1, 4096),
        ("head_dim", 2, _MAX_HEAD_DIM),
        ("vocab_size", 1, _MAX_VOCAB),
        ("context_length", 1, 1 << 31),
    ):
        value = cast(int, getattr(config, field))
        if not low <= value <= high:
            raise ModelError(f"{where}: {field} must be from {low} to {high}, got {value}")
    _check_heads(config, where)
    _check_rope(config, where)
    for name, flags in (("rope", config.rope_layers), ("sliding", config.sliding_layers)):
        if flags and len(flags) != config.num_layers:
            raise ModelError(f"{where}: {len(flags)} {name} layer flags for {config.num_layers} layers")
    return config


def _check_heads(config: ModelConfig, where: str) -> None:
    if config.num_heads % config.num_kv_heads:
        raise ModelError(
            f"{where}: {config.num_heads} query heads are no multiple of {config.num_kv_heads} key heads"
        )
    if config.sliding_window is not None and config.sliding_window < 1:
        raise ModelError(f"{where}: a sliding window of {config.sliding_window} tokens")


def _check_rope(config: ModelConfig, where: str) -> None:
    rotary = config.head_dim if config.rotary_dim is None else config.rotary_dim
    if rotary % 2 or not 0 < rotary <= config.head_dim:
        raise ModelError(
            f"{where}: rotary dimensions must be even and at most the head size {config.head_dim}, "
            f"got {rotary}"
        )
    scaling = config.rope_scaling
    for name, factors in (("short", scaling.short_factor), ("long", scaling.long_factor)):
        if scaling.kind == "longrope" and (len(factors) != rotary // 2 or not all(f > 0 for f in factors)):
            raise ModelError(
                f"{where}: longrope needs {rotary // 2} positive {name} factors, got {len(factors)}"
            )
