"""A model over paged keys and values in plain torch, on any device: prompts, and the twin of the own kernels.

On a GPU the products are the library's (cuBLAS in bf16, `_scaled_mm` in e4m3) and attention is torch's
`scaled_dot_product_attention`; on a CPU everything is computed in float32 from the same bf16 values.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hasten.core import ModelSpec
from hasten.runtime.gpu.batch_weights import BatchWeights, Matrix
from hasten.runtime.gpu.driver import never_freed
from hasten.runtime.gpu.ranks import Team, best
from hasten.runtime.gpu.shape import E4M3_MAX, PAGE

Angles = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
Attend = Callable[[int, torch.Tensor], torch.Tensor]
"""(layer, queries [N, H, D]) -> [N, H D]."""
_QUERIES = 256  # rows of attention whose scores exist at a time
LONG = 2048  # queries from which on cuDNN's attention is worth its start
_ATTENTIONS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_PIECE = 8 << 20  # bytes of a pinned buffer
_OWN = threading.local()  # of each sender: a buffer and a stream
_SENDERS = ThreadPoolExecutor(8, thread_name_prefix="hasten-weights")


class PagedCache:
    """Keys and values [layers, pages, K, PAGE, D] each: the layout that every kernel reads.

    bf16; or int8 with a scale a token and head, 1 / 127 of the largest magnitude: half the bytes that
    attention reads. A scale depends on nothing but its own token. int8 keys, values and scales of a page and
    head lie side by side, in one piece.

    Attributes:
        arrays: keys, values, and their scales: float32 [layers, pages, K, PAGE] each, or None.
        slab: values from a page and head to the next; scales are a quarter of that apart.
    """

    def __init__(self, config: ModelSpec, pages: int, device: str, is_int8: bool = False) -> None:
        mixer = config.blocks[0].mixer
        most = (len(config.blocks), pages, mixer.kv_heads)
        one = PAGE * mixer.head_dim
        # zeros: what was never written must be finite
        if is_int8:
            store = torch.zeros((*most, 2 * one + 2 * 4 * PAGE), dtype=torch.int8, device=device)
            parts = [store[..., :one], store[..., one : 2 * one]]
            scales: list[torch.Tensor | None] = list(store.view(torch.float32)[..., one // 2 :].chunk(2, -1))
            self._stores = [store]
        else:
            parts = [torch.zeros((*most, one), dtype=torch.bfloat16, device=device) for _ in range(2)]
            scales, self._stores = [None, None], parts
        self.keys, self.values = (part.view(*most, PAGE, mixer.head_dim) for part in parts)
        self.arrays = (self.keys, self.values, *scales)
        self.slab = parts[0].stride(1) // mixer.kv_heads  # a dimension of one head has any stride

    @staticmethod
    def page_bytes(config: ModelSpec, is_int8: bool) -> int:
        """Bytes of a page, all layers."""
        size = 2 * PAGE * sum(block.mixer.kv_heads for block in config.blocks)
        return size * (
            config.blocks[0].mixer.head_dim + 4 if is_int8 else 2 * config.blocks[0].mixer.head_dim
        )

    def of(self, layer: int) -> list[torch.Tensor | None]:
        """A layer's `arrays`."""
        return [None if part is None else part[layer] for part in self.arrays]

    def put(self, layer: int, places: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keep keys and values [N, K, D] of a layer's tokens, at page * PAGE + token in it [N]."""
        page, slot = places // PAGE, places % PAGE
        for whole, scales, new in zip(self.arrays[:2], self.arrays[2:], (keys, values), strict=True):
            assert whole is not None
            if scales is not None:
                new = new.float()
                peak = new.abs().amax(-1)
                scales[layer][page, :, slot] = peak / 127
                new = (new * torch.where(peak > 0, 127 / peak, 0.0)[..., None] + 0.5).floor()
            whole[layer][page, :, slot] = new.to(whole.dtype)

    def take(self, layer: int, table: torch.Tensor, count: int) -> Iterator[torch.Tensor]:
        """Keys, then values of a sequence's first `count` tokens: bf16 [K, count, D]."""
        for whole, scales in zip(self.arrays[:2], self.arrays[2:], strict=True):
            assert whole is not None
            found = whole[layer].transpose(0, 1).index_select(1, table).flatten(1, 2)[:, :count]
            if scales is not None:
                by = scales[layer].transpose(0, 1).index_select(1, table).flatten(1, 2)[:, :count]
                found = (found * by[..., None]).to(torch.bfloat16)
            yield found

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self._stores[0].device

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy pages, all layers."""
        if not sources:
            return
        pairs = upload(np.array([sources, targets], np.int64), self.device)
        for store in self._stores:
            store.index_copy_(1, pairs[1], store.index_select(1, pairs[0]))

    def read(self, page: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """One page's bytes, all layers."""
        parts = [store[:, page].contiguous().view(torch.uint8) for store in self._stores]
        return fetched(torch.cat([part.flatten() for part in parts]))

    def write(self, page: int, data: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        """Put what `read` gave into a page."""
        found, first = send(np.asarray(data, np.uint8), str(self.device)), 0
        for store in self._stores:
            own = store[:, page]
            size = own.numel() * own.element_size()
            own.copy_(found[first : first + size].view(store.dtype).view(own.shape))
            first += size


def upload(array: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    """A small array on the device, without waiting: the driver keeps a copy of what is on its way."""
    return torch.from_numpy(array).to(device, non_blocking=True)


def fetched(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """A tensor on the host, through pinned memory, which torch keeps for the next one."""
    if not tensor.is_cuda:
        return tensor.numpy()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor).numpy()


def send(data: np.ndarray[Any, np.dtype[np.uint8]], device: str) -> torch.Tensor:
    """Many bytes on the device, uint8 [n]: through pinned buffers that several threads fill.

    One thread and no buffers carry a file of the page cache at 3 to 5 GB/s.
    """
    if device == "cpu":
        return torch.from_numpy(np.array(data))
    found = torch.empty(len(data), dtype=torch.uint8, device=device)

    def carry(first: int) -> None:
        if not hasattr(_OWN, "stream"):
            torch.cuda.set_device(found.device)  # this thread's; the first one unless said otherwise
            _OWN.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            _OWN.pinned = torch.empty(_PIECE, dtype=torch.uint8, pin_memory=True)
            never_freed(_OWN.pinned)
        part = data[first : first + _PIECE]
        _OWN.pinned.numpy()[: len(part)] = part
        _OWN.stream.wait_stream(torch.cuda.default_stream())  # the memory may have been another's just now
        with torch.cuda.stream(_OWN.stream):
            found[first : first + len(part)].copy_(_OWN.pinned[: len(part)], non_blocking=True)
        _OWN.stream.synchronize()

    list(_SENDERS.map(carry, range(0, len(data), _PIECE)))
    return found


@dataclass(frozen=True)
class Span:
    """A sequence's rows of a step: `count` tokens behind the `past` ones that its pages hold already."""

    past: int
    count: int
    pages: Sequence[int]  # of all of them


@dataclass(frozen=True)
class Inputs:
    """A product's inputs [N, K]: bf16, or e4m3 with scales float32 [N, 1]."""

    values: torch.Tensor
    scales: torch.Tensor | None = None


class PlainStep:
    """Computes any step: prompt chunks, single tokens, drafts, ragged and together."""

    def __init__(self, weights: BatchWeights, cache: PagedCache, team: Team | None = None) -> None:
        self.weights, self.cache, self.team = weights, cache, team
        self.is_fp8 = weights.layers[0].o.scales is not None

    @torch.inference_mode()
    def run(self, tokens: np.ndarray[Any, np.dtype[np.int32]], spans: Sequence[Span]) -> torch.Tensor:
        """The residual stream behind the last layer, float32 [N, E]; keys and values join the cache.

        Args:
            tokens: int32 [N], those of all spans one after another.
        """
        w, device = self.weights, self.cache.device
        positions = np.concatenate([np.arange(s.past, s.past + s.count) for s in spans])
        pages = [np.asarray(s.pages)[np.arange(s.past, s.past + s.count) // PAGE] for s in spans]
        places = np.concatenate(pages) * PAGE + positions % PAGE
        ids, at, to = upload(np.stack((tokens, positions, places)), device)
        tables = [upload(np.asarray(s.pages[: -(-(s.past + s.count) // PAGE)]), device) for s in spans]
        angles = {name: (r.cos[at], r.sin[at]) for name, r in w.rotations.items()}

        return self.layers(ids, angles, to, self.attention(spans, tables))

    def attention(self, spans: Sequence[Span], tables: Sequence[torch.Tensor]) -> Attend:
        """Attention of these spans over their pages."""

        def attend(layer: int, q: torch.Tensor) -> torch.Tensor:
            mixed, first = [], 0
            for span, table in zip(spans, tables, strict=True):
                mixed.append(self._attend(layer, q[first : first + span.count], span, table))
                first += span.count
            return torch.cat(mixed) if len(mixed) > 1 else mixed[0]

        return attend

    def layers(self, ids: torch.Tensor, angles: Angles, places: torch.Tensor, attend: Attend) -> torch.Tensor:
        """All layers over token ids int64 [N] (-1: none was chosen): the residual stream, float32 [N, E].

        Args:
            angles: cosines and sines [N, D / 2] of each rotation.
            places: where keys and values go, page * PAGE + token in it, [N]; -1 for a row without a sequence.
            attend: mixes values for a layer's queries [N, H, D]: [N, H D].
        """
        w = self.weights
        x, y, post = w.embed[ids.clamp(min=0)].float() * w.config.embedding.scale, None, None
        for i, layer in enumerate(w.layers):
            x, inputs = self.add_and_norm(x, y, post, layer.attn_norm)
            q = self.heads(i, multiply(layer.qkv, inputs), angles[w.rotation_of(i)], places)
            y = self.sum_of_all(layer.o, self.round(attend(i, q)))
            x, inputs = self.add_and_norm(x, y, layer.post_attn_norm, layer.mlp_norm)
            y = self.sum_of_all(layer.down, self.activate(multiply(layer.gate_up, inputs)))
            post = layer.post_mlp_norm
        return x if y is None else x + (y if post is None else self._norm(y, post))

    # ---- what lies between the products -------------------------------------------------------------------

    def add_and_norm(
        self, x: torch.Tensor, y: torch.Tensor | None, post: torch.Tensor | None, gamma: torch.Tensor
    ) -> tuple[torch.Tensor, Inputs]:
        """x + y, y through a norm of its own where `post` is given, and the next product's normed inputs."""
        if y is not None:
            x = x + (y if post is None else self._norm(y, post))
        return x, self.round(self._norm(x, gamma))

    def sum_of_all(self, matrix: Matrix, inputs: Inputs) -> torch.Tensor:
        """A product whose columns the ranks of a team share: [N, M]."""
        if self.team is None:
            return multiply(matrix, inputs)
        ranks = self.team.ranks
        room = ranks.room(len(inputs.values), len(matrix.values)) if inputs.values.is_cuda else None
        return ranks.add(multiply(matrix, inputs, room))

    def activate(self, both: torch.Tensor) -> Inputs:
        """activation(gate) * up of [N, 2 F]."""
        gate, up = both.float().chunk(2, -1)
        is_silu = self.weights.config.blocks[0].feed_forward.activation == "silu"
        return self.round((F.silu(gate) if is_silu else F.gelu(gate, approximate="tanh")) * up)

    def round(self, x: torch.Tensor) -> Inputs:
        """Inputs of a product as its kernels take them."""
        return rounded(x, self.is_fp8)

    def heads(
        self,
        layer: int,
        qkv: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        places: torch.Tensor,
    ) -> torch.Tensor:
        """Queries bf16 [N, H, D] of a layer's [N, (H + 2 K) D]; keys and values join the cache."""
        c, w = self.weights.config, self.weights.layers[layer]
        mixer = c.blocks[0].mixer
        every, keys = qkv.view(len(qkv), -1, mixer.head_dim), mixer.heads + mixer.kv_heads
        q, k, v = every[:, : mixer.heads], every[:, mixer.heads : keys], every[:, keys:]
        cos, sin = (one[:, None] for one in angles)
        turned = []
        for part, gamma in ((q, w.q_norm), (k, w.k_norm)):
            one = part.float() if gamma is None else self._norm(part, gamma)
            a, b = one.chunk(2, -1)
            turned.append(torch.cat((a * cos - b * sin, b * cos + a * sin), -1))
        if w.key_shift is not None:
            turned[1] = turned[1] - w.key_shift.view(mixer.kv_heads, mixer.head_dim)
        self.cache.put(layer, places, turned[1], v)
        return turned[0].to(torch.bfloat16)

    @torch.inference_mode()
    def final(self, residual: torch.Tensor) -> torch.Tensor:
        """The final norm: float32 [R, E]."""
        return self._norm(residual, self.weights.final_norm)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The head, with its soft-cap: hidden states float32 [R, E] -> float32 [R, V]."""
        found = self.logits_here(hidden)
        if self.team is None or not self.team.shares_head:
            return found
        return self.team.ranks.gather(found)

    def best(self, hidden: torch.Tensor) -> torch.Tensor:
        """Greedy tokens, int64 [R]: the largest logits', the lowest id of equals; -1: one is no number."""
        if self.team is None or not self.team.shares_head:
            return greedy_tokens(self._scores(hidden))  # a soft-cap changes no order
        return best(self.team.ranks, self.logits_here(hidden), self.team.shard.vocabulary.start)

    @torch.inference_mode()
    def logits_here(self, hidden: torch.Tensor) -> torch.Tensor:
        """The same of the head's rows that are here: a part of the vocabulary where a team shares it."""
        found, cap = self._scores(hidden).float(), self.weights.config.head.softcap
        return found if cap is None else torch.tanh(found / cap) * cap

    @torch.inference_mode()
    def _scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits before their soft-cap: float32, or bf16 where an fp8 product gives no more."""
        head = self.weights.head
        if hidden.is_cuda and head.scales is None:  # bf16 sums would make ties of what is none
            return torch.mm(hidden.to(torch.bfloat16), head.values.t(), out_dtype=torch.float32)
        return multiply(head, rounded(hidden, head.scales is not None))

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], weight, self.weights.config.final_norm.eps)

    def _attend(self, layer: int, q: torch.Tensor, span: Span, table: torch.Tensor) -> torch.Tensor:
        """A span's queries [T, H, D] over its pages: [T, H D]."""
        c, total = self.weights.config, span.past + span.count
        mixer = c.blocks[0].mixer
        window = c.blocks[layer].mixer.window
        if window is not None and total <= window:
            window = None
        k, v = self.cache.take(layer, table, total)
        is_plain = window is None and mixer.softcap is None and mixer.head_dim <= 256
        if q.is_cuda and is_plain:
            return _library_attention(q, k, v, mixer.score_scale, span.past)
        return _written_out(q, k, v, c, span.past, window)


def greedy_tokens(logits: torch.Tensor) -> torch.Tensor:
    """The largest logit's id in each row of float32 or bf16 [R, V]; -1 where one is no number: int64 [R]."""
    best = logits.max(-1)  # NaN is larger than all
    return torch.where(best.values.isnan(), -1, best.indices)


def rounded(x: torch.Tensor, is_fp8: bool) -> Inputs:
    """Inputs [N, K] as bf16, and further as e4m3 with a scale a row."""
    values = x.to(torch.bfloat16)
    if not is_fp8:
        return Inputs(values)
    peak = values.abs().amax(-1, keepdim=True).float().clamp_min(1e-30)
    return Inputs((values.float() * (E4M3_MAX / peak)).to(torch.float8_e4m3fn), peak / E4M3_MAX)


def multiply(matrix: Matrix, inputs: Inputs, room: torch.Tensor | None = None) -> torch.Tensor:
    """Inputs [N, K] times a matrix [M, K]: bf16 [N, M] on a GPU, in `room` if given; else float32."""
    x, w, bias = inputs.values, matrix.values, matrix.bias
    if not x.is_cuda:
        out = F.linear(x.float(), w.float())
        if inputs.scales is not None and matrix.scales is not None:
            out = out * inputs.scales * matrix.scales
    elif inputs.scales is None or matrix.scales is None:
        out = F.linear(x, w) if room is None else torch.mm(x, w.t(), out=room)
    else:
        scales = matrix.scales[None]
        out = torch._scaled_mm(x, w.t(), inputs.scales, scales, out_dtype=torch.bfloat16, out=room)
    return out if bias is None else out + bias


def _library_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, past: int
) -> torch.Tensor:
    """Causal attention where the last query stands at the last key."""
    count, size = len(q), q.shape[-1]
    one, keys, values = q.transpose(0, 1)[None], k[None], v[None]
    if past and count > 1:
        # causal is lower right in this operation; torch's own way to it imports 800 modules, for seconds
        padded = [F.pad(part, (0, -size % 8)) if size % 8 else part for part in (one, keys, values)]
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        found = flash(*padded, 0.0, is_causal=True, scale=scale)[0][..., :size]
    else:
        # cuDNN is faster for long prompts and takes seconds to load
        with sdpa_kernel([*([SDPBackend.CUDNN_ATTENTION] if count >= LONG else []), *_ATTENTIONS]):
            found = F.scaled_dot_product_attention(
                one, keys, values, is_causal=count > 1, scale=scale, enable_gqa=True
            )
    mixed: torch.Tensor = found[0].transpose(0, 1).flatten(1)
    return mixed


def _written_out(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, c: ModelSpec, past: int, window: int | None
) -> torch.Tensor:
    """The same in float32 with windows and soft-caps, some queries at a time."""
    mixer = c.blocks[0].mixer
    keys, values, place = k.float(), v.float(), torch.arange(k.shape[1], device=q.device)
    found = []
    for first in range(0, len(q), _QUERIES):
        some = q[first : first + _QUERIES].float()
        some = some.reshape(len(some), mixer.kv_heads, -1, mixer.head_dim)  # [T, K, G, D]
        scores = torch.einsum("tkgd,ksd->kgts", some, keys) * mixer.score_scale
        if mixer.softcap is not None:
            scores = torch.tanh(scores / mixer.softcap) * mixer.softcap
        back = (past + first + torch.arange(len(some), device=q.device))[:, None] - place
        hidden = back < 0 if window is None else (back < 0) | (back >= window)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        found.append(torch.einsum("kgts,ksd->tkgd", weights, values).flatten(1))
    return torch.cat(found)
