"""What attention cannot see of keys, taken off before they are rounded for the cache: biases and sizes.

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

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from hasten.core import Attention, ModelSpec
from hasten.models.rope import Frequencies, frequencies

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
