"""NumPy twins of the kernels of native/isa/kernels.h and of attention: float64, from their descriptions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
import twins
from twins import PANEL, Format

from hasten import _native

ISAS: list[str] = _native.isas()
PAGE: int = _native.PAGE_TOKENS
EPSILON = 2.0**-24  # largest relative error of one float32 rounding
SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")
T = TypeVar("T")


def fewer(every: Sequence[T], some: Sequence[T]) -> Sequence[T]:
    """What a test goes through: everything; under the sanitizers `some` of it.

    They look at addresses and at undefined operations, and take ten times as long: there each kernel, each
    format and each kind of border is enough, and other values on the same path show nothing more.
    """
    return some if SANITIZED else every


@dataclass(frozen=True)
class Weights:
    """A packed matrix [rows, cols] and what it is made of, padding included."""

    fmt: Format
    rows: int
    cols: int
    packed: np.ndarray  # uint8
    u: np.ndarray  # [padded rows, padded cols]: unsigned values, or bf16 bits
    scale: np.ndarray  # float64 [padded rows, groups]
    minimum: np.ndarray  # float64 [padded rows, groups]; zeros where the format is symmetric


@lru_cache(maxsize=64)
def random_weights(fmt: Format, rows: int, cols: int, seed: int = 0) -> Weights:
    """Every value a format can hold, the lowest (-128 for 8 bits) too; scales of either sign, some of them 0.

    The padded columns hold values too: activations are 0 there, so that they must not matter.
    """
    rng = np.random.default_rng([seed, rows, cols, fmt.bits, fmt.group, fmt.symmetric])
    padded_rows, padded_cols = -(-rows // PANEL) * PANEL, fmt.padded_cols(cols)
    if fmt.bits == 16:
        values = rng.standard_normal((rows, cols)).astype(np.float32)
        u = twins.to_bf16(twins.pad(values, padded_rows, padded_cols))
        nothing = np.zeros((padded_rows, 0))
        return Weights(fmt, rows, cols, twins.lay_out_bf16(values), u, nothing, nothing)
    u = rng.integers(0, 1 << fmt.bits, (padded_rows, padded_cols), dtype=np.uint8)
    u[:, ::9] = 0
    groups = padded_cols // fmt.group
    scale, minimum = (rng.uniform(-0.02, 0.02, (padded_rows, groups)).astype(np.float16) for _ in range(2))
    scale[:, ::7] = 0
    packed = twins.lay_out(u, scale, None if fmt.symmetric else minimum, fmt)
    zeros = np.zeros(minimum.shape)
    floats = zeros if fmt.symmetric else minimum.astype(np.float64)
    return Weights(fmt, rows, cols, packed, u, scale.astype(np.float64), floats)


def quantize(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 [M, P] and float32 scales [M, P / 32] of float32 [M, K], P = K rounded up to 128."""
    padded = twins.pad(x, len(x), -(-x.shape[1] // 128) * 128).reshape(len(x), -1, 32)
    most = np.abs(padded).max(-1)
    usable = most > 2.0**-120  # below, 127 / most would overflow
    inverse = np.where(usable, np.float32(127) / np.where(usable, most, np.float32(1)), np.float32(0))
    q = np.rint(padded * inverse[..., None]).astype(np.int8)
    return q.reshape(len(x), -1), most / np.float32(127)


def linear_int(w: Weights, q: np.ndarray, act: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Float64 [M, padded rows] of int8 activations, and how far float32 sums of the terms may be from it."""
    depth, step = w.u.shape[1], min(w.fmt.group, 32)  # inputs a float32 addition takes in
    signed = w.u.astype(np.float64) - w.fmt.zero
    a = q[:, :depth].astype(np.float64).reshape(len(q), -1, 32) * act[:, : depth // 32, None].astype(
        np.float64
    )
    a = a.reshape(len(q), depth // step, step)
    scale, minimum = (
        np.repeat(x, w.fmt.group // step, axis=1).T for x in (w.scale, w.minimum)
    )  # [steps, rows]
    steps = signed.reshape(len(signed), -1, step).transpose(1, 2, 0)  # [steps, inputs of one, rows]
    products = a.transpose(1, 0, 2) @ steps * scale[:, None]  # [steps, M, rows]
    shifts = a.sum(-1) @ minimum, np.abs(a.sum(-1)) @ np.abs(minimum)
    return products.sum(0) + shifts[0], rounding(np.abs(products).sum(0) + shifts[1], depth // step)


def linear_bf16(w: Weights, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Float64 [M, padded rows] of activations [M, K] rounded to bf16, and the tolerance of float32 sums."""
    values = twins.from_bf16(w.u).astype(np.float64)
    a = twins.from_bf16(twins.to_bf16(twins.pad(x, len(x), values.shape[1]))).astype(np.float64)
    return a @ values.T, rounding(np.abs(a) @ np.abs(values).T, values.shape[1])


def linear_wide(w: Weights, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integer weights rounded to bf16 against bf16 activations [M, K]: [M, padded rows], tolerance."""
    groups = (w.u.astype(np.float64) - w.fmt.zero).reshape(len(w.u), -1, w.fmt.group)
    values = w.scale[..., None] * groups + w.minimum[..., None]
    values = _bf16(values.astype(np.float32).reshape(w.u.shape))
    a = _bf16(twins.pad(x, len(x), values.shape[1]))
    magnitudes = np.abs(a) @ np.abs(values).T
    # with minimums a weight may lie between two bf16 values, and one rounding more or less then decides
    ties = 0.0 if w.fmt.symmetric else 2.0**-8 * np.abs(a).max(1, keepdims=True) * np.abs(values).max(1)
    return a @ values.T, rounding(magnitudes, values.shape[1]) + ties


def rounding(magnitudes: np.ndarray, additions: int) -> np.ndarray:
    """Tolerance of a float32 sum of terms of these summed magnitudes: less than one term of a random sum."""
    return 4 * EPSILON * np.sqrt(additions + 16) * magnitudes + 1e-34


def linear_native(
    w: Weights,
    x: np.ndarray,
    panels: tuple[int, int] | None = None,
    out: np.ndarray | None = None,
    add: bool = False,
    prefill: bool = False,
) -> np.ndarray:
    """The kernel of the instruction set in use, float32 [M, padded rows]."""
    if out is None:
        out = np.full((len(x), len(w.u)), np.nan, np.float32)
    first, last = panels or (0, len(w.u) // PANEL)
    fmt = w.fmt
    _native.kernels.linear(
        x, w.packed, w.rows, fmt.bits, fmt.group, fmt.symmetric, first, last, out, add, prefill
    )
    return out


def activations(m: int, cols: int, seed: int = 0) -> np.ndarray:
    """float32 [m, cols]; some rows are hard: zeros, an outlier, all equal, tiny, denormal, alternating."""
    rng = np.random.default_rng([seed, m, cols])
    x = rng.standard_normal((m, cols)).astype(np.float32)
    sign = np.where(np.arange(cols) % 2, np.float32(1), np.float32(-1))
    outlier = np.where(np.arange(cols) == cols // 3, np.float32(3e4), x[0])
    hard = [np.zeros(cols), outlier, np.full(cols, -2.5), x[0] * 1e-20, sign * 1e-40, sign * 17]
    for row, values in zip(x[1::5], hard, strict=False):
        row[:] = values
    return x


@dataclass(frozen=True)
class Masks:
    """What attention does to its scores."""

    scale: float = 0.25
    window: int = 0
    softcap: float = 0.0


def attend(
    q: np.ndarray, keys: np.ndarray, values: np.ndarray, past: int, masks: Masks, int8: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Causal attention of queries [T, H, D] at `past` over keys, values [S, K, D]: values, tolerance.

    Queries and keys are rounded as the engine rounds them. Softmax weights are not: the engine keeps them in
    bf16, and the tolerance is what that rounding may do: at most 2^-8 of each term, at random half that.
    """
    group = q.shape[1] // keys.shape[1]
    queries = _bf16(q * np.float32(masks.scale))
    k, v = (np.repeat((_int8 if int8 else _bf16)(x), group, axis=1) for x in (keys, values))
    scores = np.einsum("thd,shd->hts", queries, k)
    if masks.softcap:
        scores = masks.softcap * np.tanh(scores / masks.softcap)
    position, at = past + np.arange(len(q))[:, None], np.arange(len(k))[None, :]
    seen = (at <= position) & ((masks.window == 0) | (at > position - masks.window))
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    most = np.einsum("hts,shd->thd", weights, np.abs(v))
    spread = np.sqrt(np.einsum("hts,shd->thd", weights**2, v**2))
    tolerance = np.minimum(2.0**-8 * most, 6 * 2.0**-9 * spread) + 1e-4 * most + 1e-6
    return np.einsum("hts,shd->thd", weights, v), tolerance


def _bf16(x: np.ndarray) -> np.ndarray:
    return twins.from_bf16(twins.to_bf16(x)).astype(np.float64)


def _int8(x: np.ndarray) -> np.ndarray:
    most = np.abs(x).max(-1, keepdims=True)
    by = np.where(most > 0, np.float32(127) / np.where(most > 0, most, np.float32(1)), np.float32(0))
    return np.rint(x * by).astype(np.float64) * (most / np.float32(127))
