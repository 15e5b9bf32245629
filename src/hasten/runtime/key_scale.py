"""Dimensions of the keys made alike before they are rounded to int8, which attention cannot see.

An int8 cache has one scale a token and head, so a head's largest dimension decides how coarsely all others
are rounded, and in Qwen2 models some are tens of times larger than the rest. Dividing a key's dimension by s
and multiplying the query's by it leaves every score as it was, also after rotation where the two dimensions
that turn together have the same s. With s a power of two nothing is rounded by it.

s is each pair's size as the weights let expect it: normed inputs have mean square 1, so a key's dimension has
about the norm of its row of the matrix, and its bias. The idea is SmoothQuant's (Xiao et al. 2022), applied
to keys and queries. With Qwen2.5-Coder-0.5B: `benchmarks/int8_cache.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from hasten.core import ModelConfig
from hasten.models.rope import tables
from hasten.weights.packed import PackedLinear, values_of

Floats = npt.NDArray[np.float32]
_FARTHEST = 8
"""Most that a scale's exponent lies from the head's mean: beyond it a dimension is dead, not small."""


def key_scales(
    config: ModelConfig,
    linears: Mapping[str, PackedLinear],
    vectors: Mapping[str, Floats],
    shifts: Mapping[str, Floats],
) -> dict[str, Floats]:
    """What to divide each layer's rotated keys by: `layers.{i}.key_scale` -> float32 [K * D], powers of two.

    Args:
        config: the model.
        linears: its matrices; those of keys are unpacked, a megabyte or so a layer.
        vectors: norms and biases.
        shifts: what is taken off the keys before (`key_shifts`).
    """
    half = len(tables(config).global_inv_freq)
    scales = {}
    for layer in range(config.num_layers):
        size = _sizes(config, layer, linears, vectors, shifts).reshape(config.num_kv_heads, config.head_dim)
        if not config.rope_layers or config.rope_layers[layer]:
            pairs = (size[:, :half] + size[:, half : 2 * half]) / 2
            size[:, :half] = size[:, half : 2 * half] = pairs
        exponents = np.log2(np.maximum(size, 1e-30)) / 2  # sizes are squares
        exponents -= exponents.mean(axis=1, keepdims=True)
        powers = np.exp2(np.clip(np.round(exponents), -_FARTHEST, _FARTHEST))
        scales[f"layers.{layer}.key_scale"] = np.ascontiguousarray(powers.reshape(-1), np.float32)
    return scales


def _sizes(
    config: ModelConfig,
    layer: int,
    linears: Mapping[str, PackedLinear],
    vectors: Mapping[str, Floats],
    shifts: Mapping[str, Floats],
) -> Floats:
    """Mean square of each dimension of the keys, as the weights let expect it: [K * D]."""
    prefix = f"layers.{layer}."
    norm = vectors.get(prefix + "k_norm")
    if norm is not None:  # keys are normed after the matrix: a head's, or all heads'
        return np.tile(norm**2, config.num_kv_heads * config.head_dim // norm.size).astype(np.float32)
    weight = values_of(linears[prefix + "k"])
    before = vectors.get(prefix + "attn_norm")
    found: Floats = np.square(weight if before is None else weight * before).sum(axis=1)
    bias = vectors.get(prefix + "k.bias")
    if bias is not None:
        found = found + np.square(bias - shifts.get(prefix + "key_shift", np.float32(0)))
    return found
