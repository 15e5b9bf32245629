"""The NumPy twin of choose(): one row at a time, everything written out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import sampler_twin as twin

from hasten.runtime.sampling import SamplingOptions


def mask_words(allowed: np.ndarray) -> np.ndarray:
    """bool [rows, V] -> uint32 [rows, ceil(V / 32)], bit t % 32 of word t / 32."""
    padded = np.zeros((len(allowed), -(-allowed.shape[1] // 32) * 32), bool)
    padded[:, : allowed.shape[1]] = allowed
    return np.packbits(padded, axis=1, bitorder="little").view(np.uint32)


def adjusted(
    logits: np.ndarray,
    options: SamplingOptions,
    prompt: Sequence[int],
    answer: Sequence[int],
    allowed: np.ndarray | None = None,
) -> np.ndarray:
    """Mask, bias, repetition, frequency, presence: float32 [V]."""
    out = logits.copy()
    if allowed is not None:
        out[~allowed] = -np.inf
    for token, bias in options.logit_bias.items():
        out[token] += np.float32(bias)
    counts = np.bincount(np.array(answer, np.int64), minlength=len(out)).astype(np.float32)
    seen = counts > 0
    seen[list(prompt)] = True
    factor = np.float32(options.repetition_penalty)
    out = np.where(seen, np.where(out > 0, out / factor, out * factor), out)
    out -= np.float32(options.frequency_penalty) * counts
    return out - np.float32(options.presence_penalty) * (counts > 0)


def next_token(
    logits: np.ndarray,
    options: SamplingOptions,
    prompt: Sequence[int],
    answer: Sequence[int],
    position: int,
    allowed: np.ndarray | None = None,
) -> int:
    row = adjusted(logits, options, prompt, answer, allowed)
    cuts = (options.temperature, options.top_k, options.top_p, options.min_p)
    return twin.sample_row(row, *cuts, options.seed, position)


def logprobs(logits: np.ndarray) -> np.ndarray:
    """float64 [V], of the raw row."""
    wide = logits.astype(np.float64)
    return wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())


def ranked(logits: np.ndarray) -> np.ndarray:
    """Token ids, likeliest first, of equals the lower id first."""
    return np.lexsort((np.arange(len(logits)), -logits))
