"""The Triton kernel for attention of a decode step: one query token a row, keys and values in pages.

A program takes one row, one KV head with all query heads that share it (their keys are read once), and one
split of `SPLIT` tokens. The tensor cores' tile has 16 query rows; groups of 1 to 8 heads leave some unused,
which costs nothing: reading keys and values is what takes the time. Splits begin at multiples of `SPLIT`
counted from the sequence's start, so where they lie depends on the row's own length alone, and the last
program of a row to finish merges them in order: a row's result is the same in any company.

Keys and values: bf16 [pages, K heads, PAGE tokens, D] each, one pair of arrays a layer.
"""

# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from hasten.runtime.gpu.batch_products import (
    is_last,
    let_next_start,
    prefetch,
    wait_for_previous,
)

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def attend_block(q, top, total, mixed, keys, values, table, start, low, high, g, scale, softcap,
                 KV: tl.constexpr, D: tl.constexpr, DIMS: tl.constexpr, PAGE: tl.constexpr,
                 BLOCK: tl.constexpr, SOFTCAP: tl.constexpr):  # fmt: skip
    """One block of keys into the running softmax: top [G] (in log2), total [G], mixed [G, DIMS]."""
    token, d = start + tl.arange(0, BLOCK), tl.arange(0, DIMS)
    seen = (token >= low) & (token < high)
    page = tl.load(table + token // PAGE, mask=seen, other=0).to(tl.int64)
    at = (((page * KV + g) * PAGE + token % PAGE) * D)[:, None] + d[None, :]
    mask = seen[:, None] & (d < D)[None, :]
    k = tl.load(keys + at, mask=mask, other=0.0)
    v = tl.load(values + at, mask=mask, other=0.0)
    s = tl.dot(q, tl.trans(k)) * scale
    if SOFTCAP:
        s = softcap * (1.0 - 2.0 / (tl.exp(2.0 * s / softcap) + 1.0))
    s = tl.where(seen[None, :], s * LOG2_E, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1))
    p, old = tl.exp2(s - new_top[:, None]), tl.exp2(top - new_top)
    mixed = tl.dot(p.to(tl.bfloat16), v, mixed * old[:, None])
    return new_top, total * old + tl.sum(p, 1), mixed


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
                   DIMS: tl.constexpr, PAGE: tl.constexpr, SPLIT: tl.constexpr):  # fmt: skip
    """The first pages of a split into the L2, while the kernel before still writes the newest token."""
    pages: tl.constexpr = 128 // PAGE if SPLIT > 128 else SPLIT // PAGE
    p, line = (
        tl.arange(0, pages),
        tl.arange(0, DIMS // 2),
    )  # a page of one head is PAGE * D * 2 = 128 * D/2 bytes
    index = tl.minimum(start // PAGE + p, (length - 1) // PAGE)
    page = tl.load(table + index).to(tl.int64)
    at = ((page * KV + g) * (PAGE * D))[:, None] + (tl.minimum(line, D // 2 - 1) * 64)[None, :]
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
def attend(queries, keys, values, table, positions, out, peaks, parts, tops, totals, arrivals, scale, softcap,
           TABLE: tl.constexpr, HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, DIMS: tl.constexpr,
           GROUP: tl.constexpr, PAGE: tl.constexpr, SPLIT: tl.constexpr, SPLITS: tl.constexpr,
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
            prefetch_pages(keys, values, table + row * TABLE, start, length, g, KV, D, DIMS, PAGE, SPLIT)
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
            top, total, mixed = attend_block(q, top, total, mixed, keys, values, table + row * TABLE, block,
                                             low, high, g, scale, softcap, KV, D, DIMS, PAGE, BLOCK,
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
