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


@dataclass(frozen=True)
class AttentionTile:
    """Attention's programs: tokens of a split, tokens of a step of its loop."""

    split: int = 256
    block: int = 64
    warps: int = 4
    stages: int = 3


def tile(product: Product, n: int, k: int, bytes_per_weight: int) -> Tile:
    """What to use for a product of n rows (of one matrix, or one head's half) and k columns.

    The same for every batch size, so a row's result depends on the batch's size as little as on its company.
    """
    block = _largest_divisor(k, 64 if bytes_per_weight == 2 else 128)
    rows = min(64, _next_power(n))
    if product == "head":
        return Tile(min(128, _next_power(n)), block)
    tiles = math.ceil(n / rows)
    splits = 1
    while tiles * splits < _PROGRAMS and k // (2 * splits) >= _LEAST_K and splits < 8:
        splits *= 2
    return Tile(rows, block, splits)


def _largest_divisor(k: int, most: int) -> int:
    return next(b for b in (128, 64, 32) if b <= most and k % b == 0)


def _next_power(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())
