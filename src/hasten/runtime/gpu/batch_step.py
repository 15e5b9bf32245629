"""The decode step of 2 to 512 rows: a CUDA graph a batch size, tokens fed on the device.

Up to 64 rows a layer is five kernels of our own. More rows take the library's products, which are as fast
there, and our attention; `plain.py` has what lies between.

Every row is one sequence's newest token. The host writes a row's token, position and pages when a sequence
joins, gives it more pages when it needs them, and reads tokens as late as it likes: `step` neither waits nor
reads. A row's tokens and logits are equal to the bit whatever the other rows hold and wherever it stands, in
every graph of the same padded size (16, 32 or 64 rows); sizes differ by rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from hasten.errors import UsageError
from hasten.runtime.gpu import batch_attention, batch_products
from hasten.runtime.gpu.batch_weights import (
    AttentionTile,
    BatchWeights,
    Matrix,
    Product,
    Tile,
    attention_tile,
    tile,
)
from hasten.runtime.gpu.peers import MOST_ROWS as WORD_ROWS
from hasten.runtime.gpu.peers import PeerRanks, Words
from hasten.runtime.gpu.plain import PagedCache
from hasten.runtime.gpu.plain_kernels import KernelStep
from hasten.runtime.gpu.ranks import Team
from hasten.runtime.gpu.shape import PAGE

MOST_ROWS = 512
OWN_ROWS = 64  # up to which our own products are used
_PEAKS = 4  # a layer's inputs: of qkv, o, gate_up, down
_ROUNDS_ITSELF = 16  # rows up to which an fp8 product rounds its inputs itself
_L2_LAYER = 48 << 20  # bytes of a layer's weights up to which programs that start early gain by prefetching
_LEAST_BUCKET = 512  # tokens; graphs are made for contexts of this, twice this, ...


@dataclass(frozen=True)
class StepOptions:
    """How a step runs.

    Attributes:
        rows: the largest batch, at most 512.
        pages: of KV cache, PAGE tokens each, where the step makes its own.
        context: the longest sequence, tokens.
        keep_logits: write float32 logits too; greedy decoding does not need them.
        early: how early a kernel may start (`batch_products.wait_for_previous`); None: what is best here.
        ring: tokens kept for the host, a row.
    """

    rows: int
    pages: int
    context: int
    keep_logits: bool = False
    early: int | None = None
    ring: int = 1024


@dataclass(frozen=True)
class Shape:
    """What one graph is made for: rows, rows padded to 16, 32 or 64 for the kernels, context, tiles."""

    rows: int
    padded: int
    context: int
    tiles: Mapping[Product, Tile]
    attention: AttentionTile
    early: int  # how early a kernel may start: `batch_products.wait_for_previous`


@dataclass
class _Buffers:
    """Everything a step writes, for the largest shape. Shared by all graphs: they run one after another."""

    places: torch.Tensor  # int32 [M], where the newest token's keys and values go
    angles: dict[str, tuple[torch.Tensor, torch.Tensor]]  # cos, sin [M, D / 2] of each rotation
    residual: torch.Tensor  # float32 [M, E]
    hidden: torch.Tensor  # bf16 [M, E], residual times the next norm's weight
    queries: torch.Tensor  # bf16 [M, H D]
    attended: torch.Tensor  # bf16 [M, H D]
    mixed: torch.Tensor  # bf16 [M, F]
    peaks: torch.Tensor | None  # fp8: int32 (bits of float32) [4 layers + 1, M], largest magnitudes of inputs
    e4m3: torch.Tensor | None  # fp8: inputs of one product, rounded, [M, widest]
    plain: torch.Tensor  # float32 [M, E]
    squares: tuple[torch.Tensor, torch.Tensor]  # float32 [tiles, M]: before attention, before the MLP
    best: torch.Tensor  # float32 [M, tiles]
    best_id: torch.Tensor  # int32 [M, tiles]
    logits: torch.Tensor | None  # float32 [M, V]
    arrivals: torch.Tensor  # int32 [tiles], zero between kernels
    row_arrivals: torch.Tensor  # int32 [M K], zero between kernels
    parts: dict[str, torch.Tensor] = field(default_factory=dict)  # float32 scratch of splits, grown on demand
    kept: list[torch.Tensor] = field(default_factory=list)  # smaller scratch that captured graphs still write


class _Shared:
    """What a step needs of a team whose ranks map each other's memory."""

    def __init__(self, team: Team) -> None:
        assert isinstance(team.ranks, PeerRanks)
        self.ranks, self.words = team.ranks, Words(team.ranks)
        self.shares_head, self.first = team.shares_head, team.shard.vocabulary.start


class BatchStep:
    """Decodes up to 512 sequences a step.

    Attributes:
        tokens: int32 [M], each row's newest token: the step's input, then its output; -1 where a logit is no
            number.
        positions: int32 [M], where that token stands; -1 for a row without a sequence. Each step adds 1.
        table: int32 [M, pages a sequence], page numbers of each row in order.
        emitted: int32 [M, ring], the token of position p at p % ring.
        keys, values: bf16 or int8 [pages, K, PAGE, D], one a layer.
    """

    def __init__(
        self,
        weights: BatchWeights,
        options: StepOptions,
        tiles: Callable[[Product, int], Tile] | None = None,
        attention: Callable[[int, bool], AttentionTile] | None = None,
        cache: PagedCache | None = None,
        team: Team | None = None,
    ) -> None:
        """`tiles` (of padded rows) and `attention` (of rows, whether in CUDA C++) override the choice.

        `cache` holds keys and values; None makes one. `team`: these weights are a rank's share of a model.
        """
        if not 1 <= options.rows <= MOST_ROWS:
            raise UsageError(f"a batched step has 1 to {MOST_ROWS} rows, got {options.rows}")
        self.weights, self.options = weights, options
        self._tiles, self._attention = tiles, attention
        c, device = weights.config, weights.embed.device
        m = _padded(options.rows)
        ints = torch.int32
        self.tokens = torch.zeros(m, dtype=ints, device=device)
        self.positions = torch.full((m,), -1, dtype=ints, device=device)
        self.table = torch.zeros(m, math.ceil(options.context / PAGE), dtype=ints, device=device)
        self.emitted = torch.full((m, options.ring), -1, dtype=ints, device=device)
        self.cache = cache or PagedCache(c, options.pages, str(device))
        self.keys, self.values = list(self.cache.keys.unbind(0)), list(self.cache.values.unbind(0))
        self._int8: batch_attention.Int8Attention | None = None
        if self.cache.keys.dtype == torch.int8 and batch_attention.Int8Attention.computes(c, device):
            self._int8 = batch_attention.Int8Attention(c, self.table.shape[1], self.cache.slab)
        self._plain = KernelStep(weights, self.cache, team)
        self._team = _Shared(team) if team is not None else None
        self._vocab = weights.head.values.shape[0]  # of this rank
        self._is_fp8 = weights.layers[0].o.scales is not None
        self.buffers = self._make_buffers(m)
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}

    def _make_buffers(self, m: int) -> _Buffers:
        c, device = self.weights.config, self.weights.embed.device
        mixer, ways = c.blocks[0].mixer, c.blocks[0].feed_forward
        e, heads = c.width, mixer.heads * mixer.head_dim

        def make(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        most_tiles = max(self._vocab, 2 * ways.width, mixer.heads + 2 * mixer.kv_heads, e) // 16 + 1
        return _Buffers(
            places=make(m, dtype=torch.int32),
            angles={
                name: (make(m, mixer.head_dim // 2), make(m, mixer.head_dim // 2))
                for name in self.weights.rotations
            },
            residual=make(m, e),
            hidden=make(m, e, dtype=torch.bfloat16),
            queries=make(m, heads, dtype=torch.bfloat16),
            attended=make(m, heads, dtype=torch.bfloat16),
            mixed=make(m, ways.width, dtype=torch.bfloat16),
            peaks=make(_PEAKS * len(c.blocks) + 1, m, dtype=torch.int32) if self._is_fp8 else None,
            e4m3=make(m, max(e, heads, ways.width), dtype=torch.float8_e4m3fn) if self._is_fp8 else None,
            plain=make(m, e),
            squares=(make(e // 16 + 1, m), make(e // 16 + 1, m)),
            best=make(most_tiles, m),
            best_id=make(most_tiles, m, dtype=torch.int32),
            logits=make(m, self._vocab) if self.options.keep_logits else None,
            arrivals=make(most_tiles, dtype=torch.int32),
            row_arrivals=make(m * mixer.kv_heads, dtype=torch.int32),
        )

    def shape(self, rows: int, context: int) -> Shape:
        """The graph that `rows` rows with at most `context` tokens (the new one included) run in.

        Raises:
            UsageError: more rows or tokens than this step was made for.
        """
        if not 1 <= rows <= self.options.rows or not 1 <= context <= self.options.context:
            raise UsageError(
                f"{rows} rows of at most {context} tokens asked for",
                hint=f"this step was made for {self.options.rows} rows of {self.options.context} tokens",
            )
        bucket = _LEAST_BUCKET
        while bucket < context:
            bucket *= 2
        m, context = _padded(rows), min(bucket, self.options.context)
        attention = (self._attention or attention_tile)(rows, self._int8 is not None)
        return Shape(rows, m, context, self._choose(m), attention, self._how_early(rows))

    def _how_early(self, rows: int) -> int:
        if self.options.early is not None:
            return self.options.early
        device, layer = self.weights.embed.device, self.weights.layers[0]
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
            return 0
        size = sum(matrix.bytes for matrix in (layer.qkv, layer.o, layer.gate_up, layer.down))
        return 2 if rows <= 16 and size <= _L2_LAYER else int(rows <= OWN_ROWS)

    def _choose(self, m: int) -> dict[Product, Tile]:
        """Tiles of all products."""
        c = self.weights.config
        mixer, ways = c.blocks[0].mixer, c.blocks[0].feed_forward
        sizes: dict[Product, tuple[int, int]] = {
            "qkv": ((mixer.heads + 2 * mixer.kv_heads) * mixer.head_dim // 2, c.width),
            "o": (c.width, mixer.heads * mixer.head_dim),
            "gate_up": (ways.width, c.width),
            "down": (c.width, ways.width),
            "head": (self._vocab, c.width),
        }
        if self._tiles is not None:
            return {product: self._tiles(product, m) for product in sizes}
        is_fp8 = {p: self._is_fp8 if p != "head" else self.weights.head.scales is not None for p in sizes}
        return {p: tile(p, n, k, rows=m, is_fp8=is_fp8[p]) for p, (n, k) in sizes.items()}

    def step(self, rows: int, context: int) -> None:
        """One token for each of the first `rows` rows, none of which has more than `context` tokens after it.

        Replays a graph; the first call for a size captures it, which takes a second or less. Rows past `rows`
        are not touched.

        Raises:
            UsageError: more rows or tokens than this step was made for.
        """
        shape = self.shape(rows, context)
        if self.weights.embed.device.type != "cuda":  # Triton's interpreter
            self.run(shape)
            return
        key = shape.rows, shape.context
        if key not in self._graphs:
            self._graphs[key] = self.capture(shape)
        self._graphs[key].replay()

    def capture(self, shape: Shape) -> torch.cuda.CUDAGraph:
        """A graph of one step. Kernels compile first: with every row idle, nothing is written that counts."""
        tokens, positions = self.tokens.clone(), self.positions.clone()
        self.positions.fill_(-1)
        self.run(shape)
        torch.cuda.synchronize()
        self.tokens.copy_(tokens)
        self.positions.copy_(positions)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run(shape)
        return graph

    def run(self, shape: Shape) -> None:
        """Launch one step's kernels, one by one."""
        if shape.rows > OWN_ROWS:
            self._run_wide(shape)
            return
        self.begin(shape)
        self.look_up(shape)
        for layer in range(len(self.weights.config.blocks)):
            self.qkv(shape, layer)
            self.attention(shape, layer)
            self.o(shape, layer)
            self.gate_up(shape, layer)
            self.down(shape, layer)
        self.head(shape)
        self.pick(shape)

    @torch.inference_mode()
    def _run_wide(self, shape: Shape) -> None:
        """The same with the library's products."""
        b, m = self.buffers, shape.rows
        self.look_up(shape)

        def attend(layer: int, q: torch.Tensor) -> torch.Tensor:
            self.attention(shape, layer, q)
            return b.attended[:m]

        angles = {name: (cos[:m], sin[:m]) for name, (cos, sin) in b.angles.items()}
        x = self._plain.layers(self.tokens[:m].long(), angles, b.places[:m], attend)
        b.residual[:m] = x
        hidden = self._plain.final(x)
        if b.logits is not None:
            b.logits[:m] = self._plain.logits_here(hidden)
        is_live = self.positions[:m] >= 0
        self.tokens[:m] = torch.where(is_live, self._plain.best(hidden).int(), self.tokens[:m])
        self.positions[:m] += is_live
        place = (self.positions[:m, None] % self.options.ring).clamp(min=0).long()
        self.emitted[:m].scatter_(1, place, self.tokens[:m, None])

    # ---- one method a kernel -------------------------------------------------------------------------------

    def begin(self, shape: Shape) -> None:
        """Embeddings of the rows' tokens."""
        c, b = self.weights.config, self.buffers
        tiles, peaks = self._squares(shape.tiles["down"]), _PEAKS * len(c.blocks) + 1
        batch_products.begin[(shape.rows,)](
            self.weights.embed, self.tokens, self.weights.layers[0].attn_norm, b.residual, b.hidden,
            b.squares[0], b.peaks, None if self._team is None else self._team.words.turn,
            c.embedding.scale, E=c.width, BLOCK=_power(c.width), TILES=tiles,
            TILES_BLOCK=_power(tiles), PEAKS=peaks, PEAKS_BLOCK=_power(peaks), M=shape.padded, num_warps=8,
            **_early(shape),
        )  # fmt: skip

    def look_up(self, shape: Shape) -> None:
        """What all layers need of the rows' positions."""
        b, half = self.buffers, self.weights.config.blocks[0].mixer.head_dim // 2
        for name, rotation in self.weights.rotations.items():
            batch_products.look_up[(shape.rows,)](
                self.positions, self.table, rotation.cos, rotation.sin, *b.angles[name], b.places,
                TABLE=self.table.shape[1], HALF_D=half, BLOCK=_power(half), PAGE=PAGE, num_warps=1,
                **_early(shape),
            )  # fmt: skip

    def qkv(self, shape: Shape, layer: int) -> None:
        """Queries, keys and values of a layer, normed, rotated and stored."""
        c, b, w, t = self.weights.config, self.buffers, self.weights.layers[layer], shape.tiles["qkv"]
        mixer = c.blocks[0].mixer
        squares, heads = self._squares(shape.tiles["down"]), mixer.heads + 2 * mixer.kv_heads
        half = _power(mixer.head_dim // 2)
        batch_products.project_qkv[(heads, t.splits)](
            w.qkv.values, *self._inputs(shape, b.hidden, layer, 0), w.qkv.scales, w.qkv.bias, b.squares[0],
            self._parts("products", 2 * heads * t.splits * half * shape.padded), b.arrivals, b.places,
            *b.angles[self.weights.rotation_of(layer)], w.q_norm, w.k_norm, b.queries,
            *self.cache.of(layer), w.key_shift, c.final_norm.eps, shape.rows, E=c.width, HEADS=mixer.heads,
            KV=mixer.kv_heads, D=mixer.head_dim, HALF=half, PAGE=PAGE, SLAB=self.cache.slab, SQUARES=squares,
            SQUARES_BLOCK=_power(squares),
            QK_NORM=mixer.qk_norm == "head", **self._product(shape, "qkv"),
        )  # fmt: skip

    def attention(self, shape: Shape, layer: int, queries: torch.Tensor | None = None) -> None:
        """Attention of a layer over the rows' pages; `queries` bf16 [M, H D], or the step's own."""
        c, b, t, m = self.weights.config, self.buffers, shape.attention, shape.padded
        mixer = c.blocks[0].mixer
        window = c.blocks[layer].mixer.window or 0
        seen = min(shape.context, window + t.split) if window else shape.context
        splits = math.ceil(seen / t.split)
        share, dims = mixer.heads // mixer.kv_heads, _power(mixer.head_dim)
        slots = shape.rows * mixer.kv_heads * splits * share
        peaks = self._peaks(shape, layer, 1) if m <= OWN_ROWS else None
        scratch = [
            self._parts("attended", slots * dims),
            self._parts("tops", slots),
            self._parts("totals", slots),
        ]
        inputs = [
            b.queries if queries is None else queries,
            *self.cache.of(layer),
            self.table,
            self.positions,
            b.attended,
            peaks,
            *scratch,
        ]
        if self._int8 is not None:
            self._int8.launch([*inputs, b.row_arrivals], shape.rows, t, splits, window)
            return
        batch_attention.attend[(mixer.kv_heads, shape.rows, splits)](
            *inputs, b.row_arrivals, mixer.score_scale, mixer.softcap or 0.0,
            TABLE=self.table.shape[1], HEADS=mixer.heads, KV=mixer.kv_heads, D=mixer.head_dim, DIMS=dims,
            GROUP=max(16, _power(share)), MERGED=_power(share), PAGE=PAGE, SLAB=self.cache.slab,
            SPLIT=t.split, SPLITS=splits, BLOCK=t.block, WINDOW=window, M=m,
            SOFTCAP=mixer.softcap is not None, num_warps=t.warps, num_stages=t.stages, **_early(shape),
        )  # fmt: skip

    def o(self, shape: Shape, layer: int) -> None:
        """Attention's output into the residual stream."""
        w, b = self.weights.layers[layer], self.buffers
        inputs, peaks = self._inputs(shape, b.attended, layer, 1), self._peaks(shape, layer, 2)
        self._add(shape, ("o", layer), w.o, inputs, (b.squares[1], peaks), w.mlp_norm, w.post_attn_norm)

    def gate_up(self, shape: Shape, layer: int) -> None:
        """Gate and up of a layer and their activation."""
        c, b, w, t = self.weights.config, self.buffers, self.weights.layers[layer], shape.tiles["gate_up"]
        ways = c.blocks[0].feed_forward
        tiles, squares = math.ceil(ways.width / t.rows), self._squares(shape.tiles["o"])
        batch_products.project_gate_up[(tiles, t.splits)](
            w.gate_up.values, *self._inputs(shape, b.hidden, layer, 2), w.gate_up.scales, w.gate_up.bias,
            b.squares[1], self._parts("products", 2 * tiles * t.splits * t.rows * shape.padded), b.arrivals,
            b.mixed, self._peaks(shape, layer, 3), c.final_norm.eps, E=c.width, F=ways.width,
            ROWS=t.rows, SQUARES=squares, SQUARES_BLOCK=_power(squares), GELU=ways.activation == "gelu_tanh",
            **self._product(shape, "gate_up"),
        )  # fmt: skip

    def down(self, shape: Shape, layer: int) -> None:
        """The MLP's output into the residual stream."""
        layers, b, w = self.weights.layers, self.buffers, self.weights.layers[layer]
        gamma = layers[layer + 1].attn_norm if layer + 1 < len(layers) else self.weights.final_norm
        inputs, peaks = self._inputs(shape, b.mixed, layer, 3), self._peaks(shape, layer + 1, 0)
        self._add(shape, ("down", layer), w.down, inputs, (b.squares[0], peaks), gamma, w.post_mlp_norm)

    def _add(self, shape: Shape, where: tuple[Product, int], matrix: Matrix,
             inputs: tuple[torch.Tensor, torch.Tensor | None], sums: tuple[torch.Tensor, torch.Tensor | None],
             gamma: torch.Tensor, post_norm: torch.Tensor | None) -> None:  # fmt: skip
        """A product into the residual stream, through a norm of its own where the model has one.

        Several ranks have a part of the product each: then `norm_and_add` adds them up.
        """
        c, b, (name, layer) = self.weights.config, self.buffers, where
        e, t = c.width, shape.tiles[name]
        tiles, team = math.ceil(e / t.rows), self._team
        place = 2 * layer + 1 + (name == "down")
        sent, heard = (None, None, 0), (None, None, None, 0)
        ranks: dict[str, int] = {"RANKS": 1, "PLACES": 0}
        if team is not None:
            words, at = team.words, place % 2
            ranks = {"RANKS": team.ranks.ranks, "PLACES": 2 * len(c.blocks) + 1}
            sent = words.peers[at], words.turn, place  # type: ignore[assignment]
            heard = words.own[at], team.ranks.stop, words.turn, place  # type: ignore[assignment]
        plain = None if post_norm is None else b.plain
        batch_products.project_residual[(tiles, t.splits)](
            matrix.values, *inputs, matrix.scales, matrix.bias,
            self._parts("products", tiles * t.splits * t.rows * shape.padded), b.arrivals, b.residual, gamma,
            b.hidden, *sums, plain, *sent[:2], shape.rows, sent[2], K=matrix.values.shape[1], E=e,
            ROWS=t.rows, **ranks, **self._product(shape, name),
        )  # fmt: skip
        if post_norm is not None or team is not None:
            batch_products.norm_and_add[(shape.rows,)](
                b.plain, *heard, post_norm, b.residual, gamma, b.hidden, *sums, c.final_norm.eps, E=e,
                BLOCK=_power(e), STRIDE=0 if team is None else team.words.stride,
                RANKS_BLOCK=_power(ranks["RANKS"]), num_warps=8, **ranks, **_early(shape),
            )  # fmt: skip

    def head(self, shape: Shape) -> None:
        """The final norm and the head."""
        c, b, head, t = self.weights.config, self.buffers, self.weights.head, shape.tiles["head"]
        squares, arguments = self._squares(shape.tiles["down"]), self._product(shape, "head")
        del arguments["SPLITS"]  # a head has tiles enough
        inputs = self._inputs(shape, b.hidden, len(c.blocks), 0)
        if head.scales is None:
            inputs, arguments["ROUND"] = (b.hidden, None), False
        batch_products.project_head[(math.ceil(self._vocab / t.rows),)](
            head.values, *inputs, head.scales, b.squares[0], b.logits,
            b.best, b.best_id, c.final_norm.eps, c.head.softcap or 0.0, E=c.width,
            V=self._vocab, ROWS=t.rows, SQUARES=squares, SQUARES_BLOCK=_power(squares),
            SOFTCAP=c.head.softcap is not None, **arguments,
        )  # fmt: skip

    def pick(self, shape: Shape) -> None:
        """Greedy tokens, which become the next step's inputs."""
        c, b, team = self.weights.config, self.buffers, self._team
        tiles = math.ceil(self._vocab / shape.tiles["head"].rows)
        agree: tuple[Any, ...] = (None, None, None, None, 0)
        ranks = 1
        if team is not None and team.shares_head:
            words, ranks = team.words, team.ranks.ranks
            agree = words.token_peers, words.own[2], team.ranks.stop, words.turn, team.first
        batch_products.pick[(shape.rows,)](
            b.best, b.best_id, self.tokens, self.positions, self.emitted, *agree, V=self._vocab, TILES=tiles,
            BLOCK=_power(tiles), RING=self.options.ring, VOCAB=c.vocab, ROWS=WORD_ROWS, RANKS=ranks,
            RANKS_BLOCK=_power(ranks), PLACES=2 * len(c.blocks) + 1, num_warps=8, **_early(shape),
        )  # fmt: skip

    # ---- what the kernels are given ------------------------------------------------------------------------

    def _squares(self, source: Tile) -> int:
        """How many tiles the sums of squares come in."""
        c = self.weights.config
        is_whole = c.blocks[0].norms.placement == "sandwich" or self._team is not None
        return 1 if is_whole else math.ceil(c.width / source.rows)

    def _inputs(
        self, shape: Shape, x: torch.Tensor, layer: int, which: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A product's inputs and their largest magnitudes; those of larger fp8 batches are rounded here."""
        peaks, width = self._peaks(shape, layer, which), x.shape[1]
        if peaks is None or shape.padded <= _ROUNDS_ITSELF:
            return x, peaks
        assert self.buffers.e4m3 is not None
        rounded = self.buffers.e4m3.view(-1)[: x.numel()]
        block = min(4096, _power(width))
        batch_products.quantise[(shape.rows, math.ceil(width / block))](
            x, peaks, rounded, K=width, BLOCK=block, num_warps=8, **_early(shape)
        )
        return rounded, peaks

    def _peaks(self, shape: Shape, layer: int, which: int) -> torch.Tensor | None:
        peaks = self.buffers.peaks
        return None if peaks is None else peaks.view(-1)[(_PEAKS * layer + which) * shape.padded :]

    def _product(self, shape: Shape, name: Product) -> dict[str, Any]:
        """What every product's kernel is given."""
        t = shape.tiles[name]
        sizes = {
            "BLOCK": t.block,
            "SPLITS": t.splits,
            "M": shape.padded,
            "num_warps": t.warps,
            "num_stages": t.stages,
        }
        return {**sizes, "ROUND": self._is_fp8 and shape.padded <= _ROUNDS_ITSELF, **_early(shape)}

    def _parts(self, name: str, floats: int) -> torch.Tensor:
        """Scratch of at least so many floats."""
        parts = self.buffers.parts
        if name not in parts or parts[name].numel() < floats:
            if name in parts:
                self.buffers.kept.append(parts[name])
            parts[name] = torch.zeros(floats, device=self.weights.embed.device)
        return parts[name]


def _early(shape: Shape) -> dict[str, Any]:
    return {"PDL": shape.early, "launch_pdl": True} if shape.early else {"PDL": 0}


def _padded(rows: int) -> int:
    """Rows with padding: the kernels' tiles have 16, 32 or 64, buffers up to 512."""
    return max(16, _power(rows))


def _power(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
