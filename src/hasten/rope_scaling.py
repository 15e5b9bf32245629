"""How rotary frequencies are stretched for long context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RopeKind = Literal["default", "linear", "llama3", "yarn", "longrope", "dynamic"]


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for long context.

    Source: the `rope_scaling` object of a Hugging Face config.json; the names are its names.
    """

    kind: RopeKind = "default"
    factor: float = 1.0
    original_context_length: int | None = None  # tokens
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn, longrope: scales cos and sin; None = derived from factor
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dimensions
    short_factor: tuple[float, ...] = ()  # longrope, [rotary_dim / 2]
    long_factor: tuple[float, ...] = ()  # longrope, [rotary_dim / 2]
