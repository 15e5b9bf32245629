"""Rotary frequencies of every kind, as tables the native engine and the reference decoder both read.

A token at position p turns the pair (x[i], x[i + rotary_dim / 2]) of a head by the angle p * inv_freq[i];
dimensions past `rotary_dim` pass through. A scale multiplies both cosine and sine. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hasten.core import ModelConfig
from hasten.errors import ModelError
from hasten.rope_scaling import RopeScaling

Frequencies = npt.NDArray[np.float64]  # [rotary_dim / 2], radians a token


@dataclass(frozen=True)
class RopeTables:
    """What a model's layers rotate with. Arrays are float64 [rotary_dim / 2], in radians a token.

    A layer that slides reads `local_inv_freq` with scale 1 where there is one (Gemma 3); every other layer
    that rotates reads `global_inv_freq` with `global_scale`. LongRoPE has a second set: a sequence of more
    than `long_threshold` tokens uses `long_inv_freq` and `long_scale` at all its positions, so keys rotated
    before the sequence grew past the threshold must be computed again.
    """

    global_inv_freq: Frequencies
    local_inv_freq: Frequencies | None
    global_scale: float
    long_inv_freq: Frequencies | None
    long_threshold: int | None  # tokens
    long_scale: float


def tables(config: ModelConfig, length: int | None = None) -> RopeTables:
    """Frequencies of all layers.

    Args:
        length: tokens of the sequence; only the `dynamic` kind depends on it, and only past the original
            context. None: a sequence within the original context.

    Raises:
        ModelError: the scaling parameters do not fit the rotary dimensions or each other.
    """
    scaling = config.rope_scaling
    frequencies, scale = rope_frequencies(config, length)
    local = None if config.rope_local_theta is None else _base(_rotary_dim(config), config.rope_local_theta)
    long_frequencies, threshold = None, None
    if scaling.kind == "longrope" and scaling.long_factor and scaling.long_factor != scaling.short_factor:
        threshold = _original_context(config)
        long_frequencies, _ = rope_frequencies(config, threshold + 1)
    return RopeTables(frequencies, local, scale, long_frequencies, threshold, scale)


def rope_frequencies(config: ModelConfig, length: int | None = None) -> tuple[Frequencies, float]:
    """(inv_freq float64 [rotary_dim / 2], attention factor) of the layers with the model's main theta.

    Args:
        length: tokens of the sequence, for the kinds that depend on it (`dynamic`, `longrope`).

    Raises:
        ModelError: the scaling parameters do not fit the rotary dimensions or each other.
    """
    dim = _rotary_dim(config)
    kind = config.rope_scaling.kind
    if kind not in _KINDS:
        raise ModelError(
            f"rope scaling kind {kind!r} is not supported", hint=f"supported: {', '.join(_KINDS)}"
        )
    if kind != "default" and kind != "longrope" and not config.rope_scaling.factor > 0:
        raise ModelError(f"rope scaling factor must be positive, got {config.rope_scaling.factor}")
    return _KINDS[kind](config, dim, length)


def _rotary_dim(config: ModelConfig) -> int:
    dim = config.head_dim if config.rotary_dim is None else config.rotary_dim
    if dim % 2 or not 0 < dim <= config.head_dim:
        raise ModelError(
            f"rotary dimensions must be even and at most the head size {config.head_dim}, got {dim}"
        )
    return dim


def _original_context(config: ModelConfig) -> int:
    return config.rope_scaling.original_context_length or config.context_length


def _base(dim: int, theta: float) -> Frequencies:
    if not theta > 0:
        raise ModelError(f"rope theta must be positive, got {theta}")
    return np.power(float(theta), -np.arange(0, dim, 2, dtype=np.float64) / dim)


def _default(config: ModelConfig, dim: int, length: int | None) -> tuple[Frequencies, float]:
    return _base(dim, config.rope_theta), 1.0


def _linear(config: ModelConfig, dim: int, length: int | None) -> tuple[Frequencies, float]:
    """Positions divided by the factor (Chen et al. 2023, arXiv:2306.15595)."""
    return _base(dim, config.rope_theta) / config.rope_scaling.factor, 1.0


def _dynamic(config: ModelConfig, dim: int, length: int | None) -> tuple[Frequencies, float]:
    """NTK-aware scaling whose theta grows with the sequence once it outgrows the original context."""
    original = _original_context(config)
    factor = config.rope_scaling.factor
    if dim <= 2:
        raise ModelError(f"dynamic rope scaling needs more than 2 rotary dimensions, got {dim}")
    stretch = factor * max(length or 0, original) / original - (factor - 1)
    return _base(dim, config.rope_theta * stretch ** (dim / (dim - 2))), 1.0


def _llama3(config: ModelConfig, dim: int, length: int | None) -> tuple[Frequencies, float]:
    """Llama 3.1: long waves divided by the factor, short ones kept, a blend between (its reference code)."""
    scaling, original = config.rope_scaling, _original_context(config)
    if scaling.high_freq_factor == scaling.low_freq_factor:
        raise ModelError(
            f"llama3 rope scaling: high_freq_factor equals low_freq_factor ({scaling.low_freq_factor})"
        )
    frequencies = _base(dim, config.rope_theta)
    turns = original * frequencies / (2 * math.pi)  # turns within the original context
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(kept, 0.0, 1.0)
    return frequencies * (kept + (1 - kept) / scaling.factor), 1.0


def _yarn(config: ModelConfig, dim: int, length: int | None) -> tuple[Frequencies, float]:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): interpolate by parts, and sharpen attention by a factor."""
    scaling, original = config.rope_scaling, _original_context(config)
    frequencies = _base(dim, config.rope_theta)
    low, high = (
        dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))
        for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / ((high - low) or 0.001), 0.0, 1.0)
    return frequencies * ((1 - ramp) + ramp / scaling.factor), _yarn_attention(scaling)


def _yarn_attention(scaling: RopeScaling) -> float:
    def sharpen(mscale: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * mscale * math.log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return sharpen(scaling.mscale) / sharpen(scaling.mscale_all_dim)
    return sharpen(1.0)


def _longrope(config: ModelConfig, dim: int, length: int | None) -> tuple[Frequencies, float]:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753): a searched divisor for each dimension, short and long.

    A `factor` of 1 counts as not given: it is then the context length over the original one.
    """
    scaling, original = config.rope_scaling, _original_context(config)
    is_long = length is not None and length > original and bool(scaling.long_factor)
    divisors = scaling.long_factor if is_long else scaling.short_factor
    if len(divisors) != dim // 2 or not all(d > 0 for d in divisors):
        which = "long" if is_long else "short"
        raise ModelError(f"longrope needs {dim // 2} positive {which} factors, got {len(divisors)}")
    frequencies = _base(dim, config.rope_theta) / np.asarray(divisors, dtype=np.float64)
    if scaling.attention_factor is not None:
        return frequencies, scaling.attention_factor
    factor = scaling.factor if scaling.factor != 1.0 else config.context_length / original
    return frequencies, 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


_KINDS: dict[str, Callable[[ModelConfig, int, int | None], tuple[Frequencies, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
