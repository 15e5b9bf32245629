"""How each product of a batched decode step is cut into programs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Product = Literal["qkv", "o", "gate_up", "down", "head"]
_PROGRAMS = 128  # about one a multiprocessor of an H200
_LEAST_K = 256  # a split that reads less than this of a row is all prologue


@dataclass(frozen=True)
class Tile:
    """One product's programs.

    Attributes:
        rows: weight rows of a program; of each of both matrices for gate_up, half the head for qkv.
        block: columns a step of the loop takes.
        splits: programs that share a tile, each with its part of the columns.
        warps, stages: of a program, and how many blocks it loads ahead.
    """

    rows: int
    block: int
    splits: int = 1
    warps: int = 4
    stages: int = 4


INT8_STAGES = (2, 1)  # of the kernel for int8 pages: how many a warp has room for; few rows, many


@dataclass(frozen=True)
class AttentionTile:
    """Attention's programs: tokens of a split, tokens of a step of its loop."""

    split: int = 256
    block: int = 64
    warps: int = 4
    stages: int = 3


def tile(product: Product, n: int, k: int, *, rows: int, is_fp8: bool) -> Tile:
    """What to use for a product of n rows (of one matrix, or one head's half) and k columns.

    `rows` are the batch's, padded: 16, 32 or 64.
    """
    measured = _MEASURED.get((product, n, k, is_fp8, rows))
    if measured is not None:
        return measured
    block = _largest_divisor(k, 128 if is_fp8 else 64)
    tile_rows = min(128 if product == "head" else 64, _next_power(n))
    if product == "head":
        return Tile(tile_rows, block)
    tiles, splits = math.ceil(n / tile_rows), 1
    while tiles * splits < _PROGRAMS and k // (2 * splits) >= _LEAST_K and splits < 8:
        splits *= 2
    return Tile(tile_rows, block, splits)


def attention_tile(rows: int, is_int8: bool = False) -> AttentionTile:
    """What to use for attention: few rows are split to fill the device, many need no merging.

    `is_int8`: the kernel for int8 pages, which ignores `block`. Timed on an H200 with 8 KV heads of 128 and
    1,500 tokens: rings win up to 32 rows (16 rows: 20 us instead of 24), registers from 64 rows on (64 rows:
    55 us instead of 72; 512 rows: 380 instead of 425).
    """
    if is_int8:
        split = 128 if rows == 1 else 256 if rows <= 4 else 512 if rows <= 8 else 2048
        return AttentionTile(split, stages=INT8_STAGES[rows > 32])
    if rows <= 8:
        return AttentionTile(256, 64, 2, 5)
    return AttentionTile(1024, 64, 4, 5) if rows <= 16 else AttentionTile(1024, 32, 2, 5)


def _largest_divisor(k: int, most: int) -> int:
    return next(b for b in (128, 64, 32, 16) if b <= most and k % b == 0)


def _next_power(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


def _measured() -> dict[tuple[Product, int, int, bool, int], Tile]:
    """(product, n, k, fp8, rows) -> tile, from the table below."""
    found: dict[tuple[Product, int, int, bool, int], Tile] = {}
    for is_fp8, shapes in _FASTEST.items():
        for (product, n, k), (small, large) in shapes.items():
            found |= {
                (product, n, k, is_fp8, rows): Tile(*(small if rows == 16 else large))
                for rows in (16, 32, 64)
            }
    return found


_FASTEST: dict[bool, dict[tuple[Product, int, int], tuple[tuple[int, ...], tuple[int, ...]]]] = {
    False: {  # Qwen3-0.6B, then Llama-3.1-8B
        ("qkv", 2048, 1024): ((64, 128, 2, 4, 4), (64, 128, 2, 4, 4)),
        ("o", 1024, 2048): ((32, 128, 4, 4, 3), (32, 128, 4, 4, 3)),
        ("gate_up", 3072, 1024): ((32, 128, 1, 4, 4), (32, 128, 1, 4, 4)),
        ("down", 1024, 3072): ((32, 128, 8, 4, 3), (32, 128, 4, 4, 4)),
        ("head", 151936, 1024): ((64, 128, 1, 4, 4), (128, 64, 1, 4, 4)),
        ("qkv", 3072, 4096): ((64, 128, 2, 4, 4), (64, 128, 2, 4, 4)),
        ("o", 4096, 4096): ((64, 128, 2, 4, 4), (64, 128, 2, 4, 4)),
        ("gate_up", 14336, 4096): ((64, 128, 1, 4, 3), (64, 64, 1, 4, 3)),
        ("down", 4096, 14336): ((32, 128, 4, 4, 3), (64, 128, 2, 4, 4)),
        ("head", 128256, 4096): ((128, 128, 1, 4, 3), (128, 64, 1, 4, 4)),
        # half of that, on each of two GPUs (benchmarks/gpu/two.py)
        ("qkv", 1536, 4096): ((64, 128, 4, 4, 4), (64, 128, 4, 4, 4)),
        ("o", 4096, 2048): ((64, 128, 2, 4, 4), (64, 128, 2, 4, 4)),
        ("gate_up", 7168, 4096): ((32, 128, 1, 4, 4), (64, 64, 1, 4, 3)),
        ("down", 4096, 7168): ((64, 128, 2, 4, 4), (64, 128, 2, 4, 4)),
        ("head", 64128, 4096): ((128, 64, 1, 4, 4), (128, 64, 1, 4, 4)),
    },
    True: {  # Llama-3.1-8B
        ("qkv", 3072, 4096): ((64, 128, 4, 4, 4), (64, 128, 2, 4, 4)),
        ("o", 4096, 4096): ((64, 256, 4, 4, 3), (64, 128, 2, 4, 6)),
        ("gate_up", 14336, 4096): ((64, 128, 1, 4, 4), (64, 128, 1, 4, 3)),
        ("down", 4096, 14336): ((64, 256, 4, 4, 3), (64, 128, 2, 4, 6)),
        ("head", 128256, 4096): ((128, 128, 1, 4, 4), (128, 128, 1, 4, 4)),
    },
}
"""What was fastest on an H200 (benchmarks/gpu/batch_step.py --tune), for 2 to 16 rows and for more."""
_MEASURED = _measured()
