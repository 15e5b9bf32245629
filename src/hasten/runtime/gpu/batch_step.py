"""The decode step of 2 to 64 rows: five kernels a layer, one CUDA graph a batch size, tokens fed on the device.

Every row is one sequence's newest token. The host writes a row's token, position and pages when a sequence
joins, gives it more pages when it needs them, and reads tokens as late as it likes: `step` neither waits nor
reads. A row's tokens and logits are equal to the bit whatever the other rows hold and wherever it stands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from hasten.errors import UsageError
from hasten.runtime.gpu import batch_attention, batch_products
from hasten.runtime.gpu.batch_tiles import AttentionTile, Product, Tile, attention_tile, tile
from hasten.runtime.gpu.batch_weights import BatchWeights, slides

PAGE = 32  # tokens
_LEAST_BUCKET = 512  # tokens; graphs are made for contexts of this, twice this, ...


@dataclass(frozen=True)
class StepOptions:
    """How a step runs.

    Attributes:
        rows: the largest batch, at most 64.
        pages: of KV cache, PAGE tokens each; page 0 upwards.
        context: the longest sequence, tokens.
        keep_logits: write float32 logits too; greedy decoding does not need them.
        dependent_launch: how early a kernel may start (Hopper and later; `batch_products.wait_for_previous`).
        ring: tokens kept for the host, a row.
    """

    rows: int
    pages: int
    context: int
    keep_logits: bool = False
    dependent_launch: int = 0
    ring: int = 1024


@dataclass(frozen=True)
class Shape:
    """What one graph is made for: rows, rows with padding (a power of two for the kernels), context, tiles."""

    rows: int
    padded: int
    context: int
    tiles: Mapping[Product, Tile]
    attention: AttentionTile


@dataclass(frozen=True)
class _Inputs:
    """What a product multiplies: bf16, or e4m3 with float32 scales [groups, M]."""

    values: torch.Tensor
    scales: torch.Tensor | None


@dataclass
class _Buffers:
    """Everything a step writes, for the largest shape. Shared by all graphs: they run one after another."""

    places: torch.Tensor  # int32 [M], where the newest token's keys and values go
    angles: dict[str, tuple[torch.Tensor, torch.Tensor]]  # cos, sin [M, D / 2] of each rotation
    residual: torch.Tensor  # float32 [M, E]
    hidden: _Inputs  # [M, E], residual times the next norm's weight
    queries: torch.Tensor  # bf16 [M, H D]
    attended: _Inputs  # [M, H D]
    mixed: _Inputs  # [M, F]
    plain: torch.Tensor  # float32 [M, E]
    squares: tuple[torch.Tensor, torch.Tensor]  # float32 [tiles, M]: before attention, before the MLP
    best: torch.Tensor  # float32 [M, tiles]
    best_id: torch.Tensor  # int32 [M, tiles]
    logits: torch.Tensor | None  # float32 [M, V]
    arrivals: torch.Tensor  # int32 [tiles], zero between kernels
    row_arrivals: torch.Tensor  # int32 [M K], zero between kernels
    parts: dict[str, torch.Tensor] = field(default_factory=dict)  # float32 scratch of splits, grown on demand
    kept: list[torch.Tensor] = field(default_factory=list)  # smaller scratch that captured graphs still write


class BatchStep:
    """Decodes up to 64 sequences a step.

    Attributes:
        tokens: int32 [M], each row's newest token: the step's input, then its output.
        positions: int32 [M], where that token stands; -1 for a row without a sequence. Moves on with each step.
        table: int32 [M, pages a sequence], page numbers of each row in order.
        emitted: int32 [M, ring], the token of position p at p % ring.
        keys, values: bf16 [pages, K, PAGE, D], one a layer.
    """

    def __init__(
        self,
        weights: BatchWeights,
        options: StepOptions,
        tiles: Callable[[Product, int], Tile] | None = None,
        attention: AttentionTile | Callable[[int], AttentionTile] | None = None,
    ) -> None:
        """`tiles` and `attention` (of the padded rows) override the choice; benchmarks use it."""
        if not 1 <= options.rows <= 64:
            raise UsageError(f"a batched step has 1 to 64 rows, got {options.rows}")
        self.weights, self.options = weights, options
        self._tiles, self._attention = tiles, attention
        c, device = weights.config, weights.embed.device
        m = _padded(options.rows)
        ints = {"dtype": torch.int32, "device": device}
        self.tokens = torch.zeros(m, **ints)
        self.positions = torch.full((m,), -1, **ints)
        self.table = torch.zeros(m, math.ceil(options.context / PAGE), **ints)
        self.emitted = torch.full((m, options.ring), -1, **ints)
        cache = (options.pages, c.num_kv_heads, PAGE, c.head_dim)
        self.keys = [torch.zeros(cache, dtype=torch.bfloat16, device=device) for _ in range(c.num_layers)]
        self.values = [torch.zeros(cache, dtype=torch.bfloat16, device=device) for _ in range(c.num_layers)]
        self._is_fp8 = weights.layers[0].o.scales is not None
        self.buffers = self._make_buffers(m)
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}

    def _make_buffers(self, m: int) -> _Buffers:
        c, device = self.weights.config, self.weights.embed.device
        e, heads = c.hidden_size, c.num_heads * c.head_dim

        def make(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        def inputs(width: int) -> _Inputs:
            if not self._is_fp8:
                return _Inputs(make(m, width, dtype=torch.bfloat16), None)
            return _Inputs(make(m, width, dtype=torch.float8_e4m3fn), make(width // 16 + 1, m))

        most_tiles = max(c.vocab_size, 2 * c.intermediate_size, c.num_heads + 2 * c.num_kv_heads, e) // 16 + 1
        return _Buffers(
            places=make(m, dtype=torch.int32),
            angles={name: (make(m, c.head_dim // 2), make(m, c.head_dim // 2)) for name in self.weights.rotations},
            residual=make(m, e),
            hidden=inputs(e),
            queries=make(m, heads, dtype=torch.bfloat16),
            attended=inputs(heads),
            mixed=inputs(c.intermediate_size),
            plain=make(m, e),
            squares=(make(e // 16 + 1, m), make(e // 16 + 1, m)),
            best=make(most_tiles, m),
            best_id=make(most_tiles, m, dtype=torch.int32),
            logits=make(m, c.vocab_size) if self.options.keep_logits else None,
            arrivals=make(most_tiles, dtype=torch.int32),
            row_arrivals=make(m * c.num_kv_heads, dtype=torch.int32),
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
        m = _padded(rows)
        attention = self._attention(m) if callable(self._attention) else self._attention
        return Shape(rows, m, min(bucket, self.options.context), self._choose(m), attention or attention_tile(m))

    def _choose(self, m: int) -> dict[Product, Tile]:
        """Tiles of all products. In fp8 a product's blocks lie within what one program before it wrote."""
        c = self.weights.config
        sizes: dict[Product, tuple[int, int]] = {
            "qkv": ((c.num_heads + 2 * c.num_kv_heads) * c.head_dim // 2, c.hidden_size),
            "o": (c.hidden_size, c.num_heads * c.head_dim),
            "gate_up": (c.intermediate_size, c.hidden_size),
            "down": (c.hidden_size, c.intermediate_size),
            "head": (c.vocab_size, c.hidden_size),
        }

        def pick(product: Product, group: int = 0) -> Tile:
            if self._tiles is not None:
                return self._tiles(product, m)
            n, k = sizes[product]
            return tile(product, n, k, rows=m, is_fp8=self._is_fp8, group=group if self._is_fp8 else 0)

        tiles: dict[Product, Tile] = {"o": pick("o", c.head_dim)}
        tiles["gate_up"] = pick("gate_up", tiles["o"].rows)
        tiles["down"] = pick("down", tiles["gate_up"].rows)
        tiles["qkv"], tiles["head"] = (pick(product, tiles["down"].rows) for product in ("qkv", "head"))
        groups = {"o": c.head_dim, "gate_up": tiles["o"].rows, "down": tiles["gate_up"].rows}
        for product, t in tiles.items():
            group = groups.get(product, tiles["down"].rows)
            assert not self._is_fp8 or group % t.block == 0, f"{product}: blocks of {t.block} in groups of {group}"
        return tiles

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
        self.begin(shape)
        self.look_up(shape)
        for layer in range(self.weights.config.num_layers):
            self.qkv(shape, layer)
            self.attention(shape, layer)
            self.o(shape, layer)
            self.gate_up(shape, layer)
            self.down(shape, layer)
        self.head(shape)
        self.pick(shape)

    # ---- one method a kernel -------------------------------------------------------------------------------

    def begin(self, shape: Shape) -> None:
        """Embeddings of the rows' tokens."""
        c, b, down = self.weights.config, self.buffers, shape.tiles["down"]
        tiles = self._squares(down)
        batch_products.begin[(shape.rows,)](
            self.weights.embed, self.tokens, self.weights.layers[0].attn_norm, b.residual, b.hidden.values, b.hidden.scales,
            b.squares[0], c.embed_scale, E=c.hidden_size, BLOCK=_power(c.hidden_size), TILES=tiles,
            TILES_BLOCK=_power(tiles), M=shape.padded, GROUP=down.rows, QUANT=self._is_fp8, num_warps=8, **self._pdl(),
        )  # fmt: skip

    def look_up(self, shape: Shape) -> None:
        """What all layers need of the rows' positions."""
        b, half = self.buffers, self.weights.config.head_dim // 2
        for name, rotation in self.weights.rotations.items():
            batch_products.look_up[(shape.rows,)](
                self.positions, self.table, rotation.cos, rotation.sin, *b.angles[name], b.places,
                TABLE=self.table.shape[1], HALF_D=half, BLOCK=_power(half), PAGE=PAGE, num_warps=1, **self._pdl(),
            )  # fmt: skip

    def qkv(self, shape: Shape, layer: int) -> None:
        """Queries, keys and values of a layer, normed, rotated and stored."""
        c, b, w, t = self.weights.config, self.buffers, self.weights.layers[layer], shape.tiles["qkv"]
        squares = self._squares(shape.tiles["down"])
        heads = c.num_heads + 2 * c.num_kv_heads
        half = _power(c.head_dim // 2)
        batch_products.project_qkv[(heads, t.splits)](
            w.qkv.values, b.hidden.values, b.hidden.scales, w.qkv.scales, w.qkv.bias, b.squares[0],
            self._parts("products", 2 * heads * t.splits * half * shape.padded), b.arrivals, b.places,
            *b.angles[self.weights.rotation_of(layer)], w.q_norm, w.k_norm, b.queries, self.keys[layer], self.values[layer],
            c.norm_eps, shape.rows, E=c.hidden_size, HEADS=c.num_heads, KV=c.num_kv_heads,
            D=c.head_dim, HALF=half, PAGE=PAGE, BLOCK=t.block, SPLITS=t.splits, M=shape.padded, SQUARES=squares,
            SQUARES_BLOCK=_power(squares), QK_NORM=c.qk_norm == "head", GROUP=self._group(shape.tiles["down"].rows),
            num_warps=t.warps, num_stages=t.stages, **self._pdl(),
        )  # fmt: skip

    def attention(self, shape: Shape, layer: int) -> None:
        """Attention of a layer over the rows' pages."""
        c, b, t = self.weights.config, self.buffers, shape.attention
        window = c.sliding_window or 0 if slides(c, layer) else 0
        seen = min(shape.context, window + t.split) if window else shape.context
        splits = math.ceil(seen / t.split)
        share, dims = c.num_heads // c.num_kv_heads, _power(c.head_dim)
        slots = shape.rows * c.num_kv_heads * splits * share
        batch_attention.attend[(c.num_kv_heads, shape.rows, splits)](
            b.queries, self.keys[layer], self.values[layer], self.table, self.positions,
            b.attended.values, b.attended.scales, self._parts("attended", slots * dims), self._parts("tops", slots), self._parts("totals", slots),
            b.row_arrivals, c.score_scale, c.attention_softcap or 0.0,
            TABLE=self.table.shape[1], HEADS=c.num_heads, KV=c.num_kv_heads, D=c.head_dim, DIMS=dims,
            GROUP=max(16, _power(share)), MERGED=_power(share), PAGE=PAGE, SPLIT=t.split, SPLITS=splits, BLOCK=t.block, WINDOW=window,
            M=shape.padded, SOFTCAP=c.attention_softcap is not None, QUANT=self._is_fp8, num_warps=t.warps,
            num_stages=t.stages, **self._pdl(),
        )  # fmt: skip

    def o(self, shape: Shape, layer: int) -> None:
        """Attention's output into the residual stream."""
        w = self.weights.layers[layer]
        self._add(shape, "o", layer, self.buffers.attended, w.mlp_norm, w.post_attn_norm)

    def gate_up(self, shape: Shape, layer: int) -> None:
        """Gate and up of a layer and their activation."""
        c, b, w, t = self.weights.config, self.buffers, self.weights.layers[layer], shape.tiles["gate_up"]
        tiles, squares = math.ceil(c.intermediate_size / t.rows), self._squares(shape.tiles["o"])
        batch_products.project_gate_up[(tiles, t.splits)](
            w.gate_up.values, b.hidden.values, b.hidden.scales, w.gate_up.scales, w.gate_up.bias, b.squares[1],
            self._parts("products", 2 * tiles * t.splits * t.rows * shape.padded), b.arrivals, b.mixed.values,
            b.mixed.scales, c.norm_eps, E=c.hidden_size, F=c.intermediate_size, ROWS=t.rows, BLOCK=t.block,
            SPLITS=t.splits, M=shape.padded, SQUARES=squares, SQUARES_BLOCK=_power(squares),
            GELU=c.activation == "gelu_tanh", GROUP=self._group(shape.tiles["o"].rows), num_warps=t.warps,
            num_stages=t.stages, **self._pdl(),
        )  # fmt: skip

    def down(self, shape: Shape, layer: int) -> None:
        """The MLP's output into the residual stream."""
        layers, w = self.weights.layers, self.weights.layers[layer]
        gamma = layers[layer + 1].attn_norm if layer + 1 < len(layers) else self.weights.final_norm
        self._add(shape, "down", layer, self.buffers.mixed, gamma, w.post_mlp_norm)

    def _add(self, shape: Shape, name: Product, layer: int, inputs: _Inputs, gamma: torch.Tensor,
             post_norm: torch.Tensor | None) -> None:  # fmt: skip
        """A product into the residual stream, through a norm of its own where the model has one."""
        c, b, t, w = self.weights.config, self.buffers, shape.tiles[name], self.weights.layers[layer]
        matrix, squares = (w.o, b.squares[1]) if name == "o" else (w.down, b.squares[0])
        group = c.head_dim if name == "o" else shape.tiles["gate_up"].rows
        e, tiles = c.hidden_size, math.ceil(c.hidden_size / t.rows)
        plain = None if post_norm is None else b.plain
        batch_products.project_residual[(tiles, t.splits)](
            matrix.values, inputs.values, inputs.scales, matrix.scales, matrix.bias,
            self._parts("products", tiles * t.splits * t.rows * shape.padded), b.arrivals, b.residual, gamma,
            b.hidden.values, b.hidden.scales, squares, plain, K=inputs.values.shape[1], E=e, ROWS=t.rows, BLOCK=t.block,
            SPLITS=t.splits, M=shape.padded, GROUP=self._group(group), num_warps=t.warps, num_stages=t.stages,
            **self._pdl(),
        )  # fmt: skip
        if post_norm is not None:
            batch_products.norm_and_add[(shape.rows,)](
                b.plain, post_norm, b.residual, gamma, b.hidden.values, b.hidden.scales, squares, c.norm_eps,
                E=e, BLOCK=_power(e), M=shape.padded, GROUP=t.rows, QUANT=self._is_fp8, num_warps=8, **self._pdl(),
            )  # fmt: skip

    def head(self, shape: Shape) -> None:
        """The final norm and the head."""
        c, b, head, t = self.weights.config, self.buffers, self.weights.head, shape.tiles["head"]
        squares = self._squares(shape.tiles["down"])
        batch_products.project_head[(math.ceil(c.vocab_size / t.rows),)](
            head.values, b.hidden.values, b.hidden.scales, head.scales, b.squares[0], b.logits, b.best,
            b.best_id, c.norm_eps, c.logit_softcap or 0.0, E=c.hidden_size, V=c.vocab_size, ROWS=t.rows, BLOCK=t.block,
            M=shape.padded, SQUARES=squares, SQUARES_BLOCK=_power(squares), SOFTCAP=c.logit_softcap is not None,
            GROUP=self._group(shape.tiles["down"].rows), num_warps=t.warps, num_stages=t.stages, **self._pdl(),
        )  # fmt: skip

    def pick(self, shape: Shape) -> None:
        """Greedy tokens, which become the next step's inputs."""
        c, b = self.weights.config, self.buffers
        tiles = math.ceil(c.vocab_size / shape.tiles["head"].rows)
        batch_products.pick[(shape.rows,)](
            b.best, b.best_id, self.tokens, self.positions, self.emitted, V=c.vocab_size, TILES=tiles,
            BLOCK=_power(tiles), RING=self.options.ring, num_warps=8, **self._pdl(),
        )  # fmt: skip

    # ---- what the kernels are given ------------------------------------------------------------------------

    def _squares(self, source: Tile) -> int:
        """How many tiles the sums of squares come in."""
        c = self.weights.config
        return 1 if c.norm_placement == "sandwich" else math.ceil(c.hidden_size / source.rows)

    def _group(self, size: int) -> int:
        """Inputs that share a scale: what one program of the kernel before wrote; 0 in bf16."""
        return size if self._is_fp8 else 0

    def _parts(self, name: str, floats: int) -> torch.Tensor:
        """Scratch of at least so many floats."""
        parts = self.buffers.parts
        if name not in parts or parts[name].numel() < floats:
            if name in parts:
                self.buffers.kept.append(parts[name])
            parts[name] = torch.zeros(floats, device=self.weights.embed.device)
        return parts[name]

    def _pdl(self) -> dict[str, Any]:
        level = self.options.dependent_launch
        return {"PDL": level, "launch_pdl": True} if level else {"PDL": 0}


def _padded(rows: int) -> int:
    """Rows with padding: the kernels' tiles have 16, 32 or 64."""
    return max(16, _power(rows))


def _power(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
