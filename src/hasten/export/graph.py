"""A decoder as a graph of plain operations, for formats whose files hold one (OpenVINO, ONNX).

One description serves every architecture, as in the native engine: what differs is in ModelSpec. A format
says its words for the operations (`Graph`), and how weights and the cache of keys and values look in it.

The graph's inputs are `input_ids`, `attention_mask` and `position_ids`, int64 [B, T], [B, S] and [B, T], S
the cached tokens and the new ones; its output `logits` is float32 [B, T, V]. Which key a query sees is
counted in cached places, padded ones left out, so batches may be padded on the left.

Weights of 4 bits go as i4 or u4, of 5, 6 and 8 as i8 or u8, bf16 as bf16: every value is kept. A symmetric
layout is signed and has no zero point; one with a minimum is unsigned, and its minimum stays a number of its
own, because no integer zero point gives it: x (s u + m) = x (s u) + (sums of x by group) m.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hasten.cache import new_folder
from hasten.core import Attention, Block, FeedForward, Format, ModelSpec, Rotary
from hasten.errors import UsageError
from hasten.export import MARKER, Exported, write_companions
from hasten.export.huggingface import config_values
from hasten.models import rope
from hasten.models.artifact import Artifact
from hasten.weights.packed import PackedLinear, bf16_bits, integers, row_pieces

MASKED = -65504.0
"""Added to the score of a key that must not be seen: float16's least, so that no format makes it infinite."""
Node = Any
Array = npt.NDArray[Any]


class Graph(Protocol):
    """Operations of a format. A `Node` is a value in it; arithmetic broadcasts as in NumPy."""

    def input(self, name: str, sizes: Sequence[str]) -> Node:
        """int64 of named sizes."""

    def output(self, name: str, value: Node) -> None: ...

    def constant(self, values: Array) -> Node: ...

    def linear(self, name: str, x: Node) -> Node:
        """x [B, T, cols] times a matrix and plus its bias, by canonical name: [B, T, rows]."""

    def embed(self, ids: Node) -> Node:
        """Rows of the embedding: float32 [B, T, E]."""

    def extended(self, name: str, new: Node, mixer: Attention) -> Node:
        """Cached [B, K, S - T, D] and new [B, K, T, D] keys or values, together [B, K, S, D] and kept."""

    def attention(self, q: Node, k: Node, v: Node, mask: Node, mixer: Attention) -> Node:
        """q [B, H, T, D], k and v [B, K, S, D], mask [B, 1, T, S]: [B, H, T, D]."""

    def call(self, operation: str, *values: Node) -> Node:
        """Add, Subtract, Multiply, Divide, Sqrt, Tanh, Sigmoid, Erf, Cos, Sin, MatMul, LessEqual, Greater,
        And, Where."""

    def mean(self, x: Node) -> Node:
        """Over the last axis, which stays."""

    def softmax(self, x: Node) -> Node:
        """Over the last axis."""

    def reshape(self, x: Node, sizes: Sequence[int]) -> Node:
        """0 keeps a size, one -1 takes what is left."""

    def transpose(self, x: Node, axes: Sequence[int]) -> Node: ...

    def concat(self, values: Sequence[Node], axis: int) -> Node: ...

    def part(self, x: Node, first: int, end: int) -> Node:
        """x[..., first:end]."""

    def unsqueeze(self, x: Node, axis: int) -> Node: ...

    def floats(self, x: Node) -> Node:
        """int64 as float32."""

    def size(self, x: Node, axis: int) -> Node:
        """int64 scalar."""

    def range(self, first: Node, end: Node) -> Node:
        """int64 [end - first]."""

    def maximum(self, x: Node) -> Node:
        """Of all elements, a scalar."""


def slides(config: ModelSpec) -> bool:
    """Whether some layer looks back on less than the whole context."""
    return any(block.mixer.window is not None for block in config.blocks)


def _rotations(config: ModelSpec) -> dict[Rotary, None]:
    """Every way in which layers turn, once."""
    found = (block.mixer.rotary for block in config.blocks)
    return dict.fromkeys(rotary for rotary in found if rotary is not None)


def build(graph: Graph, config: ModelSpec, vectors: dict[str, npt.NDArray[np.float32]]) -> None:
    """Write a decoder into an empty graph.

    Args:
        vectors: weights of the norms, float32, by canonical name; `Graph.linear` adds the biases.
    """
    _Decoder(graph, config, vectors).run()


class _Decoder:
    def __init__(self, graph: Graph, config: ModelSpec, vectors: dict[str, npt.NDArray[np.float32]]) -> None:
        self.graph, self.config, self.vectors = graph, config, vectors

    def run(self) -> None:
        g, c = self.graph, self.config
        ids = g.input("input_ids", ("batch", "new"))
        attended = g.input("attention_mask", ("batch", "all"))
        positions = g.input("position_ids", ("batch", "new"))
        windows = dict.fromkeys(block.mixer.window for block in c.blocks)
        self.masks = {window: self._mask(ids, attended, window) for window in windows}
        self.turns = {rotary: self._rotation(positions, rotary) for rotary in _rotations(c)}
        x = g.embed(ids)
        if c.embedding.scale != 1.0:
            x = g.call("Multiply", x, self._scalar(c.embedding.scale))
        for layer, block in enumerate(c.blocks):
            x = self._block(f"layers.{layer}.", block, x)
        logits = g.linear(c.head_name, self._norm("final_norm", x, c.final_norm.eps))
        g.output("logits", capped(g, logits, c.head.softcap))

    def _scalar(self, value: float) -> Node:
        return self.graph.constant(np.array(value, np.float32))

    def _mask(self, ids: Node, attended: Node, window: int | None) -> Node:
        """What is added to scores, float32 [B, 1, T, S]: 0 or `MASKED`."""
        g = self.graph
        new, all_ = g.size(ids, 1), g.size(attended, 1)
        keys = g.unsqueeze(g.range(g.constant(np.array(0, np.int64)), all_), 0)  # [1, S]
        queries = g.unsqueeze(g.range(g.call("Subtract", all_, new), all_), 1)  # [T, 1]
        seen = g.call("LessEqual", keys, queries)  # [T, S]
        if window is not None:
            oldest = g.call("Subtract", queries, g.constant(np.array(window, np.int64)))
            seen = g.call("And", seen, g.call("Greater", keys, oldest))
        real = g.call("Greater", attended, g.constant(np.array(0, np.int64)))
        seen = g.call("And", g.unsqueeze(g.unsqueeze(real, 1), 1), seen)  # [B, 1, T, S]
        return g.call("Where", seen, self._scalar(0.0), self._scalar(MASKED))

    def _rotation(self, positions: Node, rotary: Rotary) -> tuple[Node, Node]:
        """Cosines and sines, float32 [B, 1, T, rotary.dim]: each frequency's twice, for both halves."""
        g, context = self.graph, self.config.context
        frequencies, scale = rope.frequencies(rotary, context)
        turning = g.constant(_twice(frequencies))
        if (threshold := rope.long_threshold(rotary, context)) is not None:
            is_long = g.call("Greater", g.maximum(positions), g.constant(np.array(threshold - 1, np.int64)))
            beyond, _ = rope.frequencies(rotary, context, threshold + 1)
            turning = g.call("Where", is_long, g.constant(_twice(beyond)), turning)
        angles = g.call("Multiply", g.unsqueeze(g.unsqueeze(g.floats(positions), 1), 3), turning)
        found = [g.call("Cos", angles), g.call("Sin", angles)]
        if scale != 1.0:
            found = [g.call("Multiply", one, self._scalar(scale)) for one in found]
        return found[0], found[1]

    def _block(self, p: str, block: Block, x: Node) -> Node:
        """One block, [B, T, E] -> [B, T, E]; `norms.placement` says where its norms stand."""
        g, eps = self.graph, block.norms.eps
        before = block.norms.placement in ("pre", "sandwich")
        after = block.norms.placement in ("post", "sandwich")
        y = self._attention(p, block, self._norm(p + "attn_norm", x, eps) if before else x)
        x = g.call("Add", x, self._norm(p + "post_attn_norm", y, eps) if after else y)
        y = self._mlp(p, block.feed_forward, self._norm(p + "mlp_norm", x, eps) if before else x)
        return g.call("Add", x, self._norm(p + "post_mlp_norm", y, eps) if after else y)

    def _attention(self, p: str, block: Block, x: Node) -> Node:
        g, mixer, eps = self.graph, block.mixer, block.norms.eps
        q, k, v = (g.linear(p + name, x) for name in "qkv")
        if mixer.qk_norm == "full":
            q, k = self._norm(p + "q_norm", q, eps), self._norm(p + "k_norm", k, eps)
        q = g.reshape(q, (0, 0, mixer.heads, mixer.head_dim))
        k, v = (g.reshape(one, (0, 0, mixer.kv_heads, mixer.head_dim)) for one in (k, v))
        if mixer.qk_norm == "head":
            q, k = self._norm(p + "q_norm", q, eps), self._norm(p + "k_norm", k, eps)
        q, k, v = (g.transpose(one, (0, 2, 1, 3)) for one in (q, k, v))
        if mixer.rotary is not None:
            q, k = (self._turned(one, mixer.head_dim, mixer.rotary) for one in (q, k))
        cache = p.removeprefix("layers.")
        k, v = g.extended(f"{cache}key", k, mixer), g.extended(f"{cache}value", v, mixer)
        mixed = g.transpose(g.attention(q, k, v, self.masks[mixer.window], mixer), (0, 2, 1, 3))
        return g.linear(p + "o", g.reshape(mixed, (0, 0, mixer.heads * mixer.head_dim)))

    def _turned(self, x: Node, size: int, rotary: Rotary) -> Node:
        """x * cos + rotated x * sin, dimensions of a head of `size` past `rotary.dim` as they are."""
        g, dim, turn = self.graph, rotary.dim, self.turns[rotary]
        whole = x if dim == size else g.part(x, 0, dim)
        second = g.call("Multiply", g.part(whole, dim // 2, dim), self._scalar(-1.0))
        other = g.concat([second, g.part(whole, 0, dim // 2)], -1)
        turned = g.call("Add", g.call("Multiply", whole, turn[0]), g.call("Multiply", other, turn[1]))
        return turned if dim == size else g.concat([turned, g.part(x, dim, size)], -1)

    def _mlp(self, p: str, layer: FeedForward, x: Node) -> Node:
        g = self.graph
        gate, up = g.linear(p + "gate", x), g.linear(p + "up", x)
        active = _silu(g, gate) if layer.activation == "silu" else self._gelu(gate)
        return g.linear(p + "down", g.call("Multiply", active, up))

    def _gelu(self, x: Node) -> Node:
        """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
        call, scalar = self.graph.call, self._scalar
        cube = call("Multiply", call("Multiply", x, x), x)
        inner = call("Add", x, call("Multiply", cube, scalar(0.044715)))
        curve = call("Tanh", call("Multiply", inner, scalar((2 / np.pi) ** 0.5)))
        return call("Multiply", call("Multiply", x, scalar(0.5)), call("Add", curve, scalar(1.0)))

    def _norm(self, name: str, x: Node, eps: float) -> Node:
        g = self.graph
        squares = g.call("Add", g.mean(g.call("Multiply", x, x)), self._scalar(eps))
        even = g.call("Multiply", x, g.call("Divide", self._scalar(1.0), g.call("Sqrt", squares)))
        return g.call("Multiply", even, g.constant(self.vectors[name]))


def _silu(graph: Graph, x: Node) -> Node:
    return graph.call("Multiply", x, graph.call("Sigmoid", x))


def _twice(frequencies: rope.Frequencies) -> npt.NDArray[np.float32]:
    return np.concatenate([frequencies, frequencies]).astype(np.float32)


def capped(graph: Graph, x: Node, cap: float | None) -> Node:
    """tanh(x / cap) * cap."""
    if cap is None:
        return x
    size = graph.constant(np.array(cap, np.float32))
    return graph.call("Multiply", graph.call("Tanh", graph.call("Divide", x, size)), size)


def plain_attention(graph: Graph, q: Node, k: Node, v: Node, mask: Node, mixer: Attention) -> Node:
    """`Graph.attention` of matrix products, each group of query heads beside its key's head."""
    g, dim = graph, mixer.head_dim
    times = mixer.heads // mixer.kv_heads
    q = g.call("Multiply", q, g.constant(np.array(mixer.score_scale, np.float32)))
    q = g.reshape(q, (0, mixer.kv_heads, times, -1, dim))  # [B, K, H / K, T, D]
    k = g.unsqueeze(g.transpose(k, (0, 1, 3, 2)), 2)  # [B, K, 1, D, S]
    scores = capped(g, g.call("MatMul", q, k), mixer.softcap)
    weights = g.softmax(g.call("Add", scores, g.unsqueeze(mask, 1)))
    return g.reshape(g.call("MatMul", weights, g.unsqueeze(v, 2)), (0, mixer.heads, -1, dim))


@dataclass(frozen=True)
class GraphPlan:
    """Everything about the folder but the graph and its weights."""

    artifact: Artifact
    values: dict[str, Any]  # config.json
    stored: Mapping[str, str]  # matrix -> stored type
    notes: tuple[str, ...]


def plan(artifact: Artifact, name: str, kind: Callable[[str], str]) -> GraphPlan:
    """Decide what the folder of the format `name` will hold; reads no weights.

    Args:
        kind: matrix -> stored type.

    Raises:
        UsageError: a graph or config.json has no word for something of the model.
    """
    packed, config = artifact.packed, artifact.packed.config
    if any(rotary.scaling.kind == "dynamic" for rotary in _rotations(config)):
        raise UsageError(
            f"{name} cannot carry dynamic rope scaling: its frequencies change with the length, and cached "
            "keys are turned already",
            hint="run it with hasten serve, or use --to compressed-tensors",
        )
    values = config_values(config)
    values["dtype"] = values["torch_dtype"] = "float32"
    stored = {matrix: kind(matrix) for matrix in packed.linears}
    long = {rope.long_threshold(rotary, config.context) for rotary in _rotations(config)} - {None}
    said = [
        f"past {tokens:,} tokens LongRoPE's long factors turn new keys alone, as in transformers"
        for tokens in long
    ]
    wide = [linear for m, linear in packed.linears.items() if stored[m][1:] == "8" and linear.layout.bits < 8]
    if wide:
        more = sum(x.rows * x.cols * (8 - x.layout.bits) // 8 for x in wide)
        said.append(
            f"{len(wide)} matrices of 4 to 6 bits lie in 8: {more / 1e6:,.1f} MB more, the same values"
        )
    return GraphPlan(artifact, values, stored, tuple(said))


def write(made: GraphPlan, name: str, path: Path, model: Callable[[Path], str | None]) -> Exported:
    """Write the folder; nothing is rounded. `model` writes the graph into it and says what is to be noted."""
    with new_folder(path, marker=MARKER) as fresh:
        write_companions(fresh, made.artifact, made.values)
        note = model(fresh)
    kinds = [
        f"{kind}-g{made.artifact.packed.linears[matrix].layout.group}" if kind != "bf16" else kind
        for matrix, kind in made.stored.items()
    ]
    return Exported.of(name, path, kinds, [*made.notes, *([note] if note else [])])


Halves = npt.NDArray[np.float16]


def carrier(layout: Format) -> str:
    """i4, u4, i8, u8 or bf16."""
    if layout.bits == 16:
        return "bf16"
    return ("i" if layout.symmetric else "u") + ("4" if layout.bits == 4 else "8")


def group_of(linear: PackedLinear) -> int:
    """Inputs that share a scale; a matrix of fewer inputs than its layout's group has one."""
    return min(linear.layout.group, linear.cols)


@dataclass(frozen=True)
class Parameters:
    """fp16 [rows, groups] of a matrix: scales, and minimums where the layout has them."""

    scales: Halves
    minimums: Halves | None


def parameters(linear: PackedLinear) -> Parameters:
    """Scales and minimums of a whole matrix of integers."""
    found = [integers(linear, first, count) for first, count in row_pieces(linear)]
    minimums = [one.minimums for one in found if one.minimums is not None]
    return Parameters(
        np.concatenate([one.scales for one in found]), np.concatenate(minimums) if minimums else None
    )


def quants(linear: PackedLinear) -> Iterator[npt.NDArray[np.generic]]:
    """A matrix, some rows at a time: int8, uint8 or bf16's bits, [rows, cols]."""
    for first, count in row_pieces(linear):
        if linear.layout.bits == 16:
            yield bf16_bits(linear, first, count)
        else:
            found = integers(linear, first, count)
            yield found.signed if linear.layout.symmetric else found.codes


def pairs(values: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    """4-bit values, two a byte, the first lowest; an odd one out has a zero beside it. uint8, flat."""
    u = np.ascontiguousarray(values).reshape(-1).view(np.uint8) & np.uint8(15)
    if len(u) % 2:
        u = np.append(u, np.uint8(0))
    return np.asarray(u[::2] | (u[1::2] << np.uint8(4)), np.uint8)
