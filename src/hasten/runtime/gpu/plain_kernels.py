"""The Triton kernels between a library's products: of prompts, and of steps with many rows.

Each is what several operations of torch do, in one pass over memory: at 8,192 tokens of an 8B model those
took 0.95 ms a layer beside products of 4.8 ms, and as much again where inputs are rounded to e4m3.
"""

# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from hasten.core import ModelSpec
from hasten.runtime.gpu.batch_products import LARGEST, activate, in_int8
from hasten.runtime.gpu.batch_weights import LayerWeights
from hasten.runtime.gpu.plain import LONG, Attend, Inputs, PlainStep, Span, upload
from hasten.runtime.gpu.shape import PAGE

_MOST_GATHERED = 1 << 18  # tokens whose keys and values may be out of their pages: 1 GB of an 8B model


@triton.jit
def put_rounded(out, scales, row, k, inside, values, K: tl.constexpr):
    """A row of a product's inputs: bf16, or e4m3 with a scale."""
    rounded = values.to(tl.bfloat16)
    if scales is None:
        tl.store(out + row.to(tl.int64) * K + k, rounded, mask=inside)
    else:
        wide = rounded.to(tl.float32)
        peak = tl.maximum(tl.max(tl.abs(wide), 0), 1e-30)
        tl.store(scales + row, peak / LARGEST)
        tl.store(out + row.to(tl.int64) * K + k, (wide * (LARGEST / peak)).to(tl.float8e4nv), mask=inside)


@triton.jit
def add_and_norm(x, y, post, gamma, out, scales, eps, E: tl.constexpr, BLOCK: tl.constexpr):
    """x += y (through a norm of its own where `post` is given); out = norm(x), rounded. Grid: (rows,)."""
    row, k = tl.program_id(0), tl.arange(0, BLOCK)
    inside, at = k < E, tl.program_id(0).to(tl.int64) * E + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=inside, other=0.0)
    if y is not None:
        more = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        if post is not None:
            more = (
                more * tl.rsqrt(tl.sum(more * more, 0) / E + eps) * tl.load(post + k, mask=inside, other=0.0)
            )
        value += more
        tl.store(x + at, value, mask=inside)
    scale = tl.rsqrt(tl.sum(value * value, 0) / E + eps)
    put_rounded(out, scales, row, k, inside, value * scale * tl.load(gamma + k, mask=inside, other=0.0), E)


@triton.jit
def gate(both, out, scales, F: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr):
    """activation(gate) * up of bf16 [N, 2 F], rounded. Grid: (rows,)."""
    row, k = tl.program_id(0), tl.arange(0, BLOCK)
    at = both + row.to(tl.int64) * (2 * F) + k
    first = tl.load(at, mask=k < F, other=0.0).to(tl.float32)
    second = tl.load(at + F, mask=k < F, other=0.0).to(tl.float32)
    put_rounded(out, scales, row, k, k < F, activate(first, second, GELU), F)


@triton.jit
def round_rows(x, out, scales, K: tl.constexpr, BLOCK: tl.constexpr):
    """bf16 [N, K] to e4m3. Grid: (rows,)."""
    row, k = tl.program_id(0), tl.arange(0, BLOCK)
    value = tl.load(x + row.to(tl.int64) * K + k, mask=k < K, other=0.0).to(tl.float32)
    put_rounded(out, scales, row, k, k < K, value, K)


@triton.jit
def place_heads(qkv, cos, sin, places, q_norm, k_norm, queries, keys, values, key_scales, value_scales,
                key_shift, eps, HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
                PAGE: tl.constexpr, SLAB: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """Norm and turn `GROUP` heads of a row; queries to [N, H, D], keys and values to pages.

    Grid: (rows, groups of the H + 2 K heads). A program a head took 240 us for 8,192 rows of 48 heads.
    """
    row, i = tl.program_id(0), tl.arange(0, HALF)[None, :]
    h = tl.program_id(1) * GROUP + tl.arange(0, GROUP)[:, None]
    inside = (i < D // 2) & (h < HEADS + 2 * KV)
    at = qkv + (row.to(tl.int64) * (HEADS + 2 * KV) + h) * D + i
    a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(at + D // 2, mask=inside, other=0.0).to(tl.float32)
    first, second = a, b
    if q_norm is not None:
        is_key = h >= HEADS
        r = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D + eps)[:, None]
        first = a * r * tl.load(tl.where(is_key, k_norm + i, q_norm + i), mask=inside, other=0.0)
        second = b * r * tl.load(tl.where(is_key, k_norm + i, q_norm + i) + D // 2, mask=inside, other=0.0)
    c = tl.load(cos + row * (D // 2) + i, mask=i < D // 2, other=0.0)
    s = tl.load(sin + row * (D // 2) + i, mask=i < D // 2, other=0.0)
    is_value = h >= HEADS + KV
    low, high = tl.where(is_value, a, first * c - second * s), tl.where(is_value, b, second * c + first * s)
    if key_shift is not None:
        is_key = (h >= HEADS) & (h < HEADS + KV)
        shift = key_shift + tl.where(is_key, h - HEADS, 0) * D + i
        low -= tl.load(shift, mask=inside & is_key, other=0.0)
        high -= tl.load(shift + D // 2, mask=inside & is_key, other=0.0)
    to = queries + (row.to(tl.int64) * HEADS + h) * D + i
    tl.store(to, low.to(tl.bfloat16), mask=inside & (h < HEADS))
    tl.store(to + D // 2, high.to(tl.bfloat16), mask=inside & (h < HEADS))
    place = tl.load(places + row).to(tl.int64)
    slab = (place // PAGE * KV + (h - HEADS) % KV) * SLAB
    offset, line = slab + place % PAGE * D + i, slab // 4 + place % PAGE
    kept = inside & (h >= HEADS) & (place >= 0)  # a row without a sequence has no page
    if key_scales is None:
        low, high = low.to(tl.bfloat16), high.to(tl.bfloat16)
    else:
        low, high, scale = in_int8(tl.where(inside, low, 0.0), tl.where(inside, high, 0.0), 1)
        scale, has_one = tl.expand_dims(scale, 1), (h >= HEADS) & (h < HEADS + 2 * KV) & (place >= 0)
        tl.store(key_scales + line, scale, mask=has_one & (h < HEADS + KV))
        tl.store(value_scales + line, scale, mask=has_one & is_value)
    tl.store(keys + offset, low, mask=kept & (h < HEADS + KV))
    tl.store(keys + offset + D // 2, high, mask=kept & (h < HEADS + KV))
    tl.store(values + offset, low, mask=kept & is_value)
    tl.store(values + offset + D // 2, high, mask=kept & is_value)


@triton.jit
def move_first(moves, table, keys, values, key_scales, value_scales, stride, TABLE: tl.constexpr,
               KV: tl.constexpr, D: tl.constexpr, SLAB: tl.constexpr, HEADS: tl.constexpr,
               DIMS: tl.constexpr):  # fmt: skip
    """The first token of spare pages to the pages that rows own now; tables follow. Grid: (moves, layers)."""
    move, layer = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, place = tl.load(moves + move * 4), tl.load(moves + move * 4 + 1)
    spare, page = tl.load(moves + move * 4 + 2), tl.load(moves + move * 4 + 3)
    head, i = tl.arange(0, HEADS)[:, None], tl.arange(0, DIMS)[None, :]
    old = layer * stride + (spare.to(tl.int64) * KV + head) * SLAB
    new = layer * stride + (page.to(tl.int64) * KV + head) * SLAB
    inside = (head < KV) & (i < D)
    tl.store(keys + new + i, tl.load(keys + old + i, mask=inside), mask=inside)
    tl.store(values + new + i, tl.load(values + old + i, mask=inside), mask=inside)
    if key_scales is not None:
        tl.store(key_scales + new // 4, tl.load(key_scales + old // 4, mask=head < KV), mask=head < KV)
        tl.store(value_scales + new // 4, tl.load(value_scales + old // 4, mask=head < KV), mask=head < KV)
    if layer == 0:
        tl.store(table + row * TABLE + place, page)
        if place + 1 < TABLE:
            tl.store(table + row * TABLE + place + 1, spare)


@triton.jit
def gather(keys, values, key_scales, value_scales, places, to_keys, to_values, KV: tl.constexpr,
           D: tl.constexpr,
           PAGE: tl.constexpr, SLAB: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Tokens at `places` (page * PAGE + token in it) out of their pages: bf16 [N, K, D]. Grid: (N,)."""
    token, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    place, inside = tl.load(places + token).to(tl.int64), tl.arange(0, BLOCK) < KV * D
    slab = (place // PAGE * KV + i // D) * SLAB
    at, line = slab + place % PAGE * D + i % D, slab // 4 + place % PAGE
    k, v = tl.load(keys + at, mask=inside, other=0), tl.load(values + at, mask=inside, other=0)
    if key_scales is not None:
        k = k.to(tl.float32) * tl.load(key_scales + line, mask=inside, other=0.0)
        v = v.to(tl.float32) * tl.load(value_scales + line, mask=inside, other=0.0)
    tl.store(to_keys + token * (KV * D) + i, k.to(tl.bfloat16), mask=inside)
    tl.store(to_values + token * (KV * D) + i, v.to(tl.bfloat16), mask=inside)


class KernelStep(PlainStep):
    """`PlainStep` on a GPU, with these kernels between the products."""

    def add_and_norm(
        self, x: torch.Tensor, y: torch.Tensor | None, post: torch.Tensor | None, gamma: torch.Tensor
    ) -> tuple[torch.Tensor, Inputs]:
        """See `PlainStep.add_and_norm`; x is changed in place."""
        out, e = self._room(*x.shape), x.shape[1]
        add_and_norm[(len(x),)](
            x, y, post, gamma, out.values, out.scales, self.weights.config.final_norm.eps, E=e,
            BLOCK=_power(e), num_warps=8,
        )  # fmt: skip
        return x, out

    def activate(self, both: torch.Tensor) -> Inputs:
        feed = both.shape[1] // 2
        out = self._room(len(both), feed)
        is_gelu = self.weights.config.blocks[0].feed_forward.activation == "gelu_tanh"
        gate[(len(both),)](
            both, out.values, out.scales, F=feed, BLOCK=_power(feed), GELU=is_gelu, num_warps=16
        )
        return out

    def round(self, x: torch.Tensor) -> Inputs:
        if not self.is_fp8:
            return Inputs(x.to(torch.bfloat16))
        out, k = self._room(*x.shape), x.shape[1]
        round_rows[(len(x),)](x, out.values, out.scales, K=k, BLOCK=_power(k), num_warps=8)
        return out

    def heads(
        self,
        layer: int,
        qkv: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        places: torch.Tensor,
    ) -> torch.Tensor:
        c: ModelSpec = self.weights.config
        mixer = c.blocks[0].mixer
        w: LayerWeights = self.weights.layers[layer]
        queries = torch.empty(len(qkv), mixer.heads, mixer.head_dim, dtype=torch.bfloat16, device=qkv.device)
        group = min(16, _power(mixer.heads + 2 * mixer.kv_heads))
        place_heads[(len(qkv), triton.cdiv(mixer.heads + 2 * mixer.kv_heads, group))](
            qkv, *angles, places, w.q_norm, w.k_norm, queries, *self.cache.of(layer), w.key_shift,
            c.final_norm.eps, HEADS=mixer.heads, KV=mixer.kv_heads,
            D=mixer.head_dim, HALF=_power(mixer.head_dim // 2), PAGE=PAGE, SLAB=self.cache.slab,
            GROUP=group, num_warps=4,
        )  # fmt: skip
        return queries

    def attention(self, spans: Sequence[Span], tables: Sequence[torch.Tensor]) -> Attend:
        """See `PlainStep.attention`; spans are attended to together where the library does that well."""
        one_by_one, mixer = super().attention(spans, tables), self.weights.config.blocks[0].mixer
        totals = [span.past + span.count for span in spans]
        is_plain = mixer.softcap is None and mixer.head_dim % 8 == 0 and mixer.head_dim <= 256
        if not is_plain or max(span.count for span in spans) >= LONG or sum(totals) > _MOST_GATHERED:
            return one_by_one
        places = [np.asarray(s.pages)[np.arange(n) // PAGE] * PAGE + np.arange(n) % PAGE
                  for s, n in zip(spans, totals, strict=True)]  # fmt: skip
        ends = np.zeros((2, len(spans) + 1), np.int32)
        ends[:, 1:] = np.cumsum([[span.count for span in spans], totals], 1)
        device = self.cache.device
        of_queries, of_keys = upload(ends, device)
        at = upload(np.concatenate(places).astype(np.int32), device)
        k, v = torch.empty(2, len(at), mixer.kv_heads, mixer.head_dim, dtype=torch.bfloat16, device=device)
        most = max(span.count for span in spans), max(totals)

        def attend(layer: int, q: torch.Tensor) -> torch.Tensor:
            window = self.weights.config.blocks[layer].mixer.window
            if window is not None and max(totals) > window:
                return one_by_one(layer, q)
            gather[(len(at),)](
                *self.cache.of(layer), at, k, v, KV=mixer.kv_heads, D=mixer.head_dim, PAGE=PAGE,
                SLAB=self.cache.slab, BLOCK=_power(mixer.kv_heads * mixer.head_dim), num_warps=4,
            )  # fmt: skip
            flash = torch.ops.aten._flash_attention_forward
            found: torch.Tensor = flash(
                q, k, v, of_queries, of_keys, *most, 0.0, True, False, scale=mixer.score_scale
            )[0]
            return found.flatten(1)

        return attend

    def _room(self, rows: int, width: int) -> Inputs:
        """What a product's inputs are written to."""
        device = self.cache.device
        if not self.is_fp8:
            return Inputs(torch.empty(rows, width, dtype=torch.bfloat16, device=device))
        values = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=device)
        return Inputs(values, torch.empty(rows, 1, device=device))


def _power(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
