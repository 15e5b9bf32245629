"""Rotary frequencies of every kind, as tables the native engine and the reference decoder both read.

A token at position p turns the pair (x[i], x[i + rotary_dim / 2]) of a head by the angle p * inv_freq[i];
dimensions past `rotary_dim` pass through. A scale multiplies both cosine and sine. No torch here.

And what attention cannot see of keys, taken off before they are rounded for the cache: biases and sizes.

**Shifts.** Softmax does not change when every score of a query moves by the same amount, so one constant
vector may be subtracted from all keys of a head. Where a dimension rotates slowly, the key's bias is nearly a
constant; in Qwen2 models it is tens of times larger than what the tokens themselves put there, and its
rounding is most of what rounding costs. Seen with Qwen2.5-Coder-0.5B, 512 tokens, mean divergence from
unrounded keys: bf16 1.1e-4 -> 2.2e-5, int8 with one scale a token and head 5.1e-2 -> 1.3e-3.

**Scales.** An int8 cache has one scale a token and head, so a head's largest dimension decides how coarsely
all others are rounded, and in Qwen2 models some are tens of times larger than the rest. If a key's dimension
is divided by s and the query's is multiplied by it, every score stays as it was, also after rotation, where
the two dimensions that turn together have the same s. s is a power of two, so the division rounds nothing.

s is each pair's size as the weights let expect it: normed inputs have mean square 1, so a key's dimension has
about the norm of its row of the matrix, and its bias. The idea is SmoothQuant's (Xiao et al. 2022), applied
to keys and queries. With Qwen2.5-Coder-0.5B: `benchmarks/int8_cache.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hasten.core import Attention, ModelSpec, RopeScaling, Rotary
from hasten.errors import ModelError

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


def rotations(spec: ModelSpec) -> tuple[Rotary, Rotary | None]:
    """How layers turn: (those without a window, those with one where that is a way of their own).

    Where all layers that turn have a window, the first is how they do; where none turns, it means nothing.
    """
    mixers = [block.mixer for block in spec.blocks if block.mixer.rotary is not None]
    everywhere = sorted(mixers, key=lambda mixer: mixer.window is not None)
    main = everywhere[0].rotary if everywhere else None
    main = main or Rotary(spec.blocks[0].mixer.head_dim)
    return main, next((m.rotary for m in mixers if m.window is not None and m.rotary != main), None)


def tables(spec: ModelSpec, length: int | None = None) -> RopeTables:
    """Frequencies of all layers of a model with at most two kinds of rotation.

    Args:
        length: tokens of the sequence; only the `dynamic` kind depends on it, and only past the original
            context. None: a sequence within the original context.

    Raises:
        ModelError: the scaling parameters do not fit the rotary dimensions or each other.
    """
    rotary, own = rotations(spec)
    found, scale = frequencies(rotary, spec.context, length)
    local = None if own is None else frequencies(own, spec.context)[0]
    threshold = long_threshold(rotary, spec.context)
    beyond = None if threshold is None else frequencies(rotary, spec.context, threshold + 1)[0]
    return RopeTables(found, local, scale, beyond, threshold, scale)


def long_threshold(rotary: Rotary, context: int) -> int | None:
    """Tokens past which LongRoPE turns by other factors; None where nothing changes."""
    scaling = rotary.scaling
    changes = scaling.kind == "longrope" and scaling.long_factor not in ((), scaling.short_factor)
    return _original(rotary, context) if changes else None


def frequencies(rotary: Rotary, context: int, length: int | None = None) -> tuple[Frequencies, float]:
    """(inv_freq float64 [rotary.dim / 2], attention factor) of one kind of rotation.

    Args:
        context: tokens the model was made for: the original context where the scaling names none.
        length: tokens of the sequence, for the kinds that depend on it (`dynamic`, `longrope`).

    Raises:
        ModelError: the scaling parameters do not fit the rotary dimensions or each other.
    """
    if rotary.dim % 2 or rotary.dim < 1:
        raise ModelError(f"rotary dimensions must be even and above 0, got {rotary.dim}")
    scaling = rotary.scaling
    if scaling.kind not in _KINDS:
        raise ModelError(
            f"rope scaling kind {scaling.kind!r} is not supported", hint=f"supported: {', '.join(_KINDS)}"
        )
    if scaling.kind not in ("default", "longrope") and not scaling.factor > 0:
        raise ModelError(f"rope scaling factor must be positive, got {scaling.factor}")
    return _KINDS[scaling.kind](rotary, context, length)


def _original(rotary: Rotary, context: int) -> int:
    return rotary.scaling.original_context_length or context


def _base(dim: int, theta: float) -> Frequencies:
    if not theta > 0:
        raise ModelError(f"rope theta must be positive, got {theta}")
    return np.power(float(theta), -np.arange(0, dim, 2, dtype=np.float64) / dim)


def _default(rotary: Rotary, context: int, length: int | None) -> tuple[Frequencies, float]:
    return _base(rotary.dim, rotary.theta), 1.0


def _linear(rotary: Rotary, context: int, length: int | None) -> tuple[Frequencies, float]:
    """Positions divided by the factor (Chen et al. 2023, arXiv:2306.15595)."""
    return _base(rotary.dim, rotary.theta) / rotary.scaling.factor, 1.0


def _dynamic(rotary: Rotary, context: int, length: int | None) -> tuple[Frequencies, float]:
    """NTK-aware scaling whose theta grows with the sequence once it outgrows the original context."""
    dim, original, factor = rotary.dim, _original(rotary, context), rotary.scaling.factor
    if dim <= 2:
        raise ModelError(f"dynamic rope scaling needs more than 2 rotary dimensions, got {dim}")
    stretch = factor * max(length or 0, original) / original - (factor - 1)
    return _base(dim, rotary.theta * stretch ** (dim / (dim - 2))), 1.0


def _llama3(rotary: Rotary, context: int, length: int | None) -> tuple[Frequencies, float]:
    """Llama 3.1: long waves divided by the factor, short ones kept, a blend between (its reference code)."""
    scaling, original = rotary.scaling, _original(rotary, context)
    if scaling.high_freq_factor == scaling.low_freq_factor:
        raise ModelError(
            f"llama3 rope scaling: high_freq_factor equals low_freq_factor ({scaling.low_freq_factor})"
        )
    base = _base(rotary.dim, rotary.theta)
    turns = original * base / (2 * math.pi)  # turns within the original context
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(kept, 0.0, 1.0)
    return base * (kept + (1 - kept) / scaling.factor), 1.0


def _yarn(rotary: Rotary, context: int, length: int | None) -> tuple[Frequencies, float]:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): interpolate by parts, and sharpen attention by a factor."""
    scaling, original, dim = rotary.scaling, _original(rotary, context), rotary.dim
    base = _base(dim, rotary.theta)
    low, high = (
        dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rotary.theta))
        for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / ((high - low) or 0.001), 0.0, 1.0)
    return base * ((1 - ramp) + ramp / scaling.factor), _yarn_attention(scaling)


def _yarn_attention(scaling: RopeScaling) -> float:
    def sharpen(mscale: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * mscale * math.log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return sharpen(scaling.mscale) / sharpen(scaling.mscale_all_dim)
    return sharpen(1.0)


def _longrope(rotary: Rotary, context: int, length: int | None) -> tuple[Frequencies, float]:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753): a searched divisor for each dimension, short and long.

    A `factor` of 1 counts as not given: it is then the context length over the original one.
    """
    scaling, original = rotary.scaling, _original(rotary, context)
    is_long = length is not None and length > original and bool(scaling.long_factor)
    divisors = scaling.long_factor if is_long else scaling.short_factor
    half = rotary.dim // 2
    if len(divisors) != half or not all(d > 0 for d in divisors):
        which = "long" if is_long else "short"
        raise ModelError(f"longrope needs {half} positive {which} factors, got {len(divisors)}")
    base = _base(rotary.dim, rotary.theta) / np.asarray(divisors, dtype=np.float64)
    if scaling.attention_factor is not None:
        return base, scaling.attention_factor
    factor = scaling.factor if scaling.factor != 1.0 else context / original
    return base, 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


_KINDS: dict[str, Callable[[Rotary, int, int | None], tuple[Frequencies, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def interleaved_rows(rows: int, head_dim: int) -> npt.NDArray[np.int64]:
    """Where each row lies in a file for interleaved rotation: [rows].

    The file puts rows i and i + D/2 of a head side by side (convert_hf_to_gguf.py, LlamaModel.permute).
    """
    row = np.arange(rows, dtype=np.int64)
    head, inside = row // head_dim, row % head_dim
    half, index = inside // (head_dim // 2), inside % (head_dim // 2)
    return head * head_dim + 2 * index + half


Floats = npt.NDArray[np.float32]
_FARTHEST = 8
"""Most that a scale's exponent lies from the head's mean: beyond it a dimension is dead, not small."""


def key_shifts(config: ModelSpec, vectors: Mapping[str, Floats]) -> dict[str, Floats]:
    """What to subtract from each layer's rotated keys: `layers.{i}.key_shift` -> float32 [K * D].

    Only dimensions that turn by less than a radian over the model's whole context are shifted: there the
    shift never makes a key larger than its bias did. Models without key biases, with a norm after them, or
    with a soft-cap on scores (which does see a shift) get none.
    """
    shifts = {}
    for layer, block in enumerate(config.blocks):
        mixer, bias = block.mixer, vectors.get(f"layers.{layer}.k.bias")
        if bias is None or mixer.qk_norm != "none" or mixer.softcap is not None:
            continue
        still = bias.reshape(mixer.kv_heads, mixer.head_dim) * (_turns(mixer, config.context) < 1)
        shifts[f"layers.{layer}.key_shift"] = np.ascontiguousarray(still.reshape(-1), np.float32)
    return shifts


def _turns(mixer: Attention, context: int) -> Frequencies:
    """How far each dimension of a head turns over the model's context, in radians: [D]."""
    turns = np.zeros(mixer.head_dim)
    if mixer.rotary is not None:
        angle = frequencies(mixer.rotary, context)[0] * context
        turns[: 2 * len(angle)] = np.concatenate([angle, angle])
    return turns


def key_scales(
    config: ModelSpec,
    matrix: Callable[[str], Floats],
    vectors: Mapping[str, Floats],
    shifts: Mapping[str, Floats],
) -> dict[str, Floats]:
    """What to divide each layer's rotated keys by: `layers.{i}.key_scale` -> float32 [K * D], powers of two.

    Args:
        config: the model.
        matrix: gives float32 [K * D, E] of a key's matrix by name: a megabyte or so a layer.
        vectors: norms and biases.
        shifts: what is taken off the keys before (`key_shifts`).
    """
    scales = {}
    for layer, block in enumerate(config.blocks):
        mixer, shape = block.mixer, (block.mixer.kv_heads, block.mixer.head_dim)
        size = _sizes(mixer, f"layers.{layer}.", matrix, vectors, shifts).reshape(shape)
        if mixer.rotary is not None:
            half = mixer.rotary.dim // 2
            pairs = (size[:, :half] + size[:, half : 2 * half]) / 2
            size[:, :half] = size[:, half : 2 * half] = pairs
        exponents = np.log2(np.maximum(size, 1e-30)) / 2  # sizes are squares
        exponents -= exponents.mean(axis=1, keepdims=True)
        powers = np.exp2(np.clip(np.round(exponents), -_FARTHEST, _FARTHEST))
        scales[f"layers.{layer}.key_scale"] = np.ascontiguousarray(powers.reshape(-1), np.float32)
    return scales


def _sizes(
    mixer: Attention,
    prefix: str,
    matrix: Callable[[str], Floats],
    vectors: Mapping[str, Floats],
    shifts: Mapping[str, Floats],
) -> npt.NDArray[np.float64]:
    """Mean square of each dimension of the keys, as the weights let expect it: [K * D].

    In float64, which holds the squares of all that float32 holds.
    """
    norm = vectors.get(prefix + "k_norm")
    if norm is not None:  # keys are normed after the matrix: a head's, or all heads'
        return np.tile(np.square(norm, dtype=np.float64), mixer.kv_heads * mixer.head_dim // norm.size)
    weight = matrix(prefix + "k")
    before = vectors.get(prefix + "attn_norm", np.float32(1))
    found: npt.NDArray[np.float64] = np.square(np.multiply(weight, before, dtype=np.float64)).sum(axis=1)
    bias = vectors.get(prefix + "k.bias")
    if bias is not None:
        shift = shifts.get(prefix + "key_shift", np.float32(0))
        found = found + np.square(np.subtract(bias, shift, dtype=np.float64))
    return found
