"""The sampler's NumPy twin: sorts everything, one row at a time."""

from __future__ import annotations

import numpy as np


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 (Salmon et al. 2011)."""
    word = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & word, (a >> 32) ^ c3 ^ k1, a & word
        k0, k1 = (k0 + 0x9E3779B9) & word, (k1 + 0xBB67AE85) & word
    return c0, c1, c2, c3


def uniform_at(seed: int, position: int) -> float:
    low, high, *_ = philox4x32((position & 0xFFFFFFFF, position >> 32, 0, 0), (seed & 0xFFFFFFFF, seed >> 32))
    return ((high << 32 | low) >> 11) * 2.0**-53


def kept(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Weight of every token, 0 where it is cut; float64 [V]."""
    order = np.lexsort((np.arange(logits.size), -logits))
    weight = np.exp(((logits - logits.max()) / np.float32(temperature)).astype(np.float64))
    if top_k > 0:
        order = order[:top_k]
    if top_p < 1:
        mass = np.cumsum(weight[order])
        order = order[: 1 + int(np.searchsorted(mass, top_p * mass[-1]))]
    order = order[weight[order] >= min_p]
    out = np.zeros(logits.size)
    out[order] = weight[order]
    return out


def sample_row(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float, seed: int, position: int
) -> int:
    if temperature == 0:
        return int(np.argmax(logits))
    mass = np.cumsum(kept(logits, temperature, top_k, top_p, min_p))
    return int(np.searchsorted(mass, uniform_at(seed, position) * mass[-1], side="right"))


def rows(count: int, vocab: int, seed: int = 0, spread: float = 3.0) -> np.ndarray:
    """Random logits."""
    return (np.random.default_rng(seed).standard_normal((count, vocab)) * spread).astype(np.float32)
