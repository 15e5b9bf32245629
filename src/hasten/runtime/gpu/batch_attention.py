"""The Triton kernel for attention of a decode step: one query token a row, keys and values in pages.

A program takes one row, one KV head with all query heads that share it (their keys are read once), and one
split of `SPLIT` tokens. The tensor cores' tile has 16 query rows; groups of 1 to 8 heads leave some unused,
which costs nothing: reading keys and values is what takes the time. Splits begin at multiples of `SPLIT`
counted from the sequence's start, so where they lie depends on the row's own length alone, and the last
program of a row to finish merges them in order: a row's result is the same in any company.

Keys and values: bf16 [pages, K heads, PAGE tokens, D] each, one pair of arrays a layer; or int8 with scales
float32 [pages, K heads, PAGE tokens].
"""

# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from hasten.cache.reading import read_text
from hasten.core import ModelSpec
from hasten.runtime.gpu.batch_products import (
    is_last,
    let_next_start,
    prefetch,
    wait_for_previous,
)
from hasten.runtime.gpu.batch_weights import INT8_STAGES, AttentionTile
from hasten.runtime.gpu.driver import Module, built, current_device, with_defines

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def attend_block(q, top, total, mixed, keys, values, key_scales, value_scales, table, start, low, high, g,
                 scale,
                 softcap, KV: tl.constexpr, D: tl.constexpr, DIMS: tl.constexpr, PAGE: tl.constexpr,
                 SLAB: tl.constexpr,
                 BLOCK: tl.constexpr, SOFTCAP: tl.constexpr):  # fmt: skip
    """One block of keys into the running softmax: top [G] (in log2), total [G], mixed [G, DIMS]."""
    token, d = start + tl.arange(0, BLOCK), tl.arange(0, DIMS)
    seen = (token >= low) & (token < high)
    page = tl.load(table + token // PAGE, mask=seen, other=0).to(tl.int64)
    slab = (page * KV + g) * SLAB
    at, line = (slab + token % PAGE * D)[:, None] + d[None, :], slab // 4 + token % PAGE
    mask = seen[:, None] & (d < D)[None, :]
    k = tl.load(keys + at, mask=mask, other=0)
    v = tl.load(values + at, mask=mask, other=0)
    if key_scales is not None:  # int8 holds no more than bf16 does
        k, v = k.to(tl.float32).to(tl.bfloat16), v.to(tl.float32).to(tl.bfloat16)
    s = tl.dot(q, tl.trans(k)) * scale
    if key_scales is not None:
        s *= tl.load(key_scales + line, mask=seen, other=0.0)[None, :]
    if SOFTCAP:
        s = softcap * (1.0 - 2.0 / (tl.exp(2.0 * s / softcap) + 1.0))
    s = tl.where(seen[None, :], s * LOG2_E, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1))
    p, old = tl.exp2(s - new_top[:, None]), tl.exp2(top - new_top)
    total = total * old + tl.sum(p, 1)
    if value_scales is not None:
        p *= tl.load(value_scales + line, mask=seen, other=0.0)[None, :]
    mixed = tl.dot(p.to(tl.bfloat16), v, mixed * old[:, None])
    return new_top, total, mixed


@triton.jit
def merge(parts, tops, totals, base, count, SHARE: tl.constexpr, HEADS: tl.constexpr, DIMS: tl.constexpr,
          AT_ONCE: tl.constexpr):  # fmt: skip
    """All splits of one row and KV head, in order, `AT_ONCE` loads in flight: float32 [HEADS, DIMS].

    HEADS is SHARE, or the next power of two. With the tensor cores' 16 rows attention took 25 us, not 17
    (16 rows of 512 tokens in splits of 256).
    """
    s, r, d = tl.arange(0, AT_ONCE), tl.arange(0, HEADS), tl.arange(0, DIMS)
    top = tl.full([HEADS], -1e30, tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    mixed = tl.zeros([HEADS, DIMS], tl.float32)
    for start in range(0, count, AT_ONCE):
        there = (start + s < count)[:, None] & (r < SHARE)[None, :]
        at = (base + start + s)[:, None] * SHARE + r[None, :]
        its_top = tl.load(tops + at, mask=there, other=-1e30, cache_modifier=".cg")
        its_total = tl.load(totals + at, mask=there, other=0.0, cache_modifier=".cg")
        place = parts + at[:, :, None] * DIMS + d[None, None, :]
        part = tl.load(place, mask=there[:, :, None], other=0.0, cache_modifier=".cg")
        new_top = tl.maximum(top, tl.max(its_top, 0))
        old, new = tl.exp2(top - new_top), tl.exp2(its_top - new_top[None, :])
        total = total * old + tl.sum(its_total * new, 0)
        mixed = mixed * old[:, None] + tl.sum(part * new[:, :, None], 0)
        top = new_top
    return mixed / total[:, None]


@triton.jit
def prefetch_pages(keys, values, table, start, length, g, KV: tl.constexpr, D: tl.constexpr,
                   DIMS: tl.constexpr, PAGE: tl.constexpr, SLAB: tl.constexpr,
                   SPLIT: tl.constexpr):  # fmt: skip
    """The first pages of a split into the L2, while the kernel before still writes the newest token."""
    pages: tl.constexpr = 128 // PAGE if SPLIT > 128 else SPLIT // PAGE
    each: tl.constexpr = 1024 // keys.dtype.element_ty.primitive_bitwidth  # values in 128 bytes
    p, line = tl.arange(0, pages), tl.arange(0, PAGE * DIMS // each)
    index = tl.minimum(start // PAGE + p, (length - 1) // PAGE)
    page = tl.load(table + index).to(tl.int64)
    at = ((page * KV + g) * SLAB)[:, None] + (tl.minimum(line, PAGE * D // each - 1) * each)[None, :]
    prefetch(keys + at)
    prefetch(values + at)


@triton.jit
def put_heads(out, peaks, mixed, row, g, HEADS: tl.constexpr, SHARE: tl.constexpr, D: tl.constexpr,
              GROUP: tl.constexpr, DIMS: tl.constexpr):  # fmt: skip
    """Results of one KV head's query heads, bf16 into [M, H, D]. fp8: peaks[row] is raised to the largest."""
    r, d = tl.arange(0, GROUP), tl.arange(0, DIMS)
    inside = (r < SHARE)[:, None] & (d < D)[None, :]
    rounded = mixed.to(tl.bfloat16)
    tl.store(out + (row * HEADS + g * SHARE + r)[:, None] * D + d[None, :], rounded, mask=inside)
    if peaks is not None:
        largest = tl.max(tl.max(tl.where(inside, tl.abs(rounded.to(tl.float32)), 0.0), 1), 0)
        tl.atomic_max(peaks + row, largest.to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def attend(queries, keys, values, key_scales, value_scales, table, positions, out, peaks, parts, tops, totals,
           arrivals, scale, softcap, TABLE: tl.constexpr, HEADS: tl.constexpr, KV: tl.constexpr,
           D: tl.constexpr, DIMS: tl.constexpr,
           GROUP: tl.constexpr, PAGE: tl.constexpr, SLAB: tl.constexpr, SPLIT: tl.constexpr,
           SPLITS: tl.constexpr,
           BLOCK: tl.constexpr, WINDOW: tl.constexpr, MERGED: tl.constexpr, M: tl.constexpr,
           SOFTCAP: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """softmax(q k) v over a row's pages. Grid: (K heads, rows, SPLITS).

    WINDOW > 0: the last so many tokens alone, and SPLITS need cover no more than those. A program whose split
    holds none of the row's tokens does nothing.
    """
    g, row, slot = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    r, d = tl.arange(0, GROUP), tl.arange(0, DIMS)
    length = tl.load(positions + row) + 1
    low = length * 0
    if WINDOW > 0:
        low = tl.maximum(length - WINDOW, 0)
    first = low // SPLIT
    count = (length + SPLIT - 1) // SPLIT - first
    start = (first + slot) * SPLIT
    if PDL > 1 and M <= 16:  # noqa: SIM102 - the outer one is decided when this is compiled
        # More rows' pages would push one another out of the L2.
        if slot < count:
            prefetch_pages(
                keys, values, table + row * TABLE, start, length, g, KV, D, DIMS, PAGE, SLAB, SPLIT
            )
    wait_for_previous(PDL)  # the newest token is in its page now
    if slot < count:
        share: tl.constexpr = HEADS // KV
        used = (r < share)[:, None] & (d < D)[None, :]
        q = tl.load(queries + (row * HEADS + g * share + r)[:, None] * D + d[None, :], mask=used, other=0.0)
        high = tl.minimum(length, start + SPLIT)
        top = tl.full([GROUP], -1e30, tl.float32)
        total, mixed = tl.zeros([GROUP], tl.float32), tl.zeros([GROUP, DIMS], tl.float32)
        begin = tl.maximum(start, low // BLOCK * BLOCK)
        for block in range(begin, high, BLOCK):
            top, total, mixed = attend_block(q, top, total, mixed, keys, values, key_scales,
                                             value_scales, table + row * TABLE, block, low, high, g, scale,
                                             softcap, KV, D, DIMS, PAGE, SLAB, BLOCK,
                                             SOFTCAP)  # fmt: skip
        let_next_start(PDL)
        if count == 1:
            put_heads(out, peaks, mixed / total[:, None], row, g, HEADS, share, D, GROUP, DIMS)
        else:
            base = (row * KV + g) * SPLITS
            at = (base + slot) * share + r
            tl.store(tops + at, top, mask=r < share)
            tl.store(totals + at, total, mask=r < share)
            tl.store(parts + at[:, None] * DIMS + d[None, :], mixed, mask=used)
            if is_last(arrivals + row * KV + g, count):
                whole = merge(parts, tops, totals, base, count, share, MERGED, DIMS, 4)
                put_heads(out, peaks, whole, row, g, HEADS, share, D, MERGED, DIMS)


class _Arguments(ctypes.Structure):
    """`Args` of kernels/paged_attention.cu: the same fields in the same order."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("queries", "keys", "values", "key_scales", "value_scales")),
        *((name, ctypes.c_void_p) for name in ("table", "positions", "out", "peaks")),
        *((name, ctypes.c_void_p) for name in ("parts", "tops", "totals", "arrivals")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
        *((name, ctypes.c_int) for name in ("rows", "split", "splits", "window")),
    ]


class Int8Attention:
    """The same over int8 pages by a kernel in CUDA C++: products of int8, which Triton makes slower."""

    def __init__(self, config: ModelSpec, table: int, slab: int, together: int = 1) -> None:
        """The kernel in each of its ways (`INT8_STAGES`), compiled or from the cache.

        Args:
            table: pages a row may have.
            slab: `PagedCache.slab`.
            together: KV heads that share a block.
        """
        self._mixer, self._groups = config.blocks[0].mixer, config.blocks[0].mixer.kv_heads // together
        source = read_text(Path(__file__).parent / "kernels" / "paged_attention.cu")
        self._kernels = {}
        for stages in INT8_STAGES:
            defines = self.defines(config, table, slab, 4, stages, together)
            module = Module(built(with_defines(source, defines), current_device().architecture))
            shared, threads = module.constants("layout", 2)
            self._kernels[stages] = module.kernel("attend", shared), threads

    @staticmethod
    def defines(
        config: ModelSpec, table: int, slab: int, warps: int, stages: int, together: int
    ) -> dict[str, int | str]:
        """The kernel's compile-time values."""
        mixer = config.blocks[0].mixer
        return {
            "KV_HEADS": mixer.kv_heads,
            "SHARE": mixer.heads // mixer.kv_heads,
            "HEAD_DIM": mixer.head_dim,
            "TABLE": table,
            "SLAB": slab,
            "SOFTCAP": int(mixer.softcap is not None),
            "WARPS": warps,
            "TOGETHER": together,
            "STAGES": stages,
        }

    @staticmethod
    def computes(config: ModelSpec, device: torch.device) -> bool:
        """Whether it is made for such heads and such a GPU."""
        mixer = config.blocks[0].mixer
        is_made_for = mixer.head_dim in (64, 128, 256) and mixer.heads <= 8 * mixer.kv_heads
        return is_made_for and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)

    def launch(
        self, tensors: Sequence[Any], rows: int, tile: AttentionTile, splits: int, window: int
    ) -> None:
        """Attention of `rows` rows. `tensors`: what the kernel's pointers point to, in order, or None."""
        arguments = _Arguments(
            scale=self._mixer.score_scale,
            softcap=self._mixer.softcap or 0.0,
            rows=rows,
            split=tile.split,
            splits=splits,
            window=window,
        )
        for (name, *_), tensor in zip(_Arguments._fields_, tensors, strict=False):
            setattr(arguments, name, None if tensor is None else tensor.data_ptr())
        self._start(tile.stages, self._groups * rows * splits, arguments)

    def _start(self, stages: int, blocks: int, arguments: _Arguments) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        kernel, threads = self._kernels[stages]
        kernel.launch(blocks, threads, [arguments], stream, resident=False)
