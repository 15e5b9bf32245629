"""A model's weights as the kernels of a batched decode step read them: fused, bf16 or e4m3, on the device.

And how each product of such a step is cut into programs (`tile`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from hasten.core import ModelSpec
from hasten.errors import ModelError
from hasten.models import rope
from hasten.models.rope import key_scales, key_shifts
from hasten.runtime.gpu.shape import E4M3_MAX

Precision = Literal["bf16", "fp8"]
TensorOf = Callable[[str], "torch.Tensor | None"]
KeyScales = Mapping[str, np.ndarray[Any, np.dtype[np.float32]]]
_STEP = 32  # widths are multiples of what one tensor-core instruction takes in e4m3


@dataclass(frozen=True)
class Matrix:
    """One weight matrix [rows, columns], bf16, or e4m3 with a scale a row (float32 [rows])."""

    values: torch.Tensor
    scales: torch.Tensor | None = None
    bias: torch.Tensor | None = None  # float32 [rows]

    @property
    def bytes(self) -> int:
        """Bytes read to multiply with it."""
        return self.values.numel() * self.values.element_size()


@dataclass(frozen=True)
class LayerWeights:
    """One layer. Norm weights float32; None where the model has none."""

    qkv: Matrix  # [(H + 2 K) D, E]
    o: Matrix  # [E, H D]
    gate_up: Matrix  # [2 F, E], gate first
    down: Matrix  # [E, F]
    attn_norm: torch.Tensor
    mlp_norm: torch.Tensor
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    post_attn_norm: torch.Tensor | None
    post_mlp_norm: torch.Tensor | None
    key_shift: torch.Tensor | None = None  # float32 [K D], taken off turned keys (`key_shifts`)


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines, float32 [positions, D / 2]."""

    cos: torch.Tensor
    sin: torch.Tensor


@dataclass(frozen=True)
class BatchWeights:
    """All of a model."""

    config: ModelSpec
    embed: torch.Tensor  # bf16 [V, E]
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor
    head: Matrix
    rotations: dict[str, Rotation]  # "global", "local" (Gemma's sliding layers), "none"
    key_scales: KeyScales | None = None  # in the matrices or norms of queries and keys; and the keys' shifts

    def rotation_of(self, layer: int) -> str:
        """Which rotation a layer's queries and keys have."""
        c = self.config
        if c.blocks[layer].mixer.rotary is None:
            return "none"
        return "local" if slides(c, layer) and "local" in self.rotations else "global"

    def place(self, name: str) -> tuple[Matrix, slice]:
        """Where a linear layer is, by canonical name: a fused matrix and its rows of it."""
        if name == self.config.head_name:
            return self.head, slice(None)
        _, layer, member = name.split(".")
        c, own = self.config, self.layers[int(layer)]
        mixer = c.blocks[0].mixer
        heads, kept, feed = (
            mixer.heads * mixer.head_dim,
            mixer.kv_heads * mixer.head_dim,
            c.blocks[0].feed_forward.width,
        )
        fused, first, count = {
            "q": (own.qkv, 0, heads),
            "k": (own.qkv, heads, kept),
            "v": (own.qkv, heads + kept, kept),
            "o": (own.o, 0, c.width),
            "gate": (own.gate_up, 0, feed),
            "up": (own.gate_up, feed, feed),
            "down": (own.down, 0, c.width),
        }[member]
        return fused, slice(first, first + count)

    def replace(self, name: str, values: torch.Tensor) -> None:
        """Put other values [rows, cols] in a linear layer's place."""
        if name == "embed":
            self.embed.copy_(values)
            if not self.config.head.tied:
                return
        matrix, rows = self.place(name)
        precision: Precision = "bf16" if matrix.scales is None else "fp8"
        device = str(self.embed.device)
        maker = _Maker(self.config, {name: values}.get, precision, device, self.key_scales)
        made = maker.matrix([name])
        matrix.values[rows] = made.values
        if matrix.scales is not None and made.scales is not None:
            matrix.scales[rows] = made.scales

    @property
    def bytes(self) -> int:
        """Bytes of weights one step reads."""
        matrices = [m for w in self.layers for m in (w.qkv, w.o, w.gate_up, w.down)]
        return sum(m.bytes for m in [*matrices, self.head])


def slides(config: ModelSpec, layer: int) -> bool:
    """Whether a layer looks back on `sliding_window` tokens alone."""
    return config.blocks[layer].mixer.window is not None


def load(
    config: ModelSpec,
    tensor_of: TensorOf,
    context: int,
    precision: Precision = "bf16",
    device: str = "cuda",
    head_precision: Precision | None = None,
    is_kv_int8: bool = False,
) -> BatchWeights:
    """Fuse, round and place a model's tensors.

    Args:
        tensor_of: canonical name -> tensor of any float dtype on any device, matrices [outputs, inputs]; None
            for a bias that does not exist.
        context: the longest sequence there may be, tokens.
        precision: of all linear layers; embeddings stay bf16.
        head_precision: of the head, if it is another.
        is_kv_int8: keys will be rounded to int8: their dimensions get sizes that are alike (`key_scales`).

    Raises:
        ModelError: the model has parts that these kernels do not compute.
    """
    refuse_others(config, context)
    scales = _key_changes(config, tensor_of, is_kv_int8)
    maker = _Maker(config, tensor_of, precision, device, scales)
    embed = maker.plain("embed").to(torch.bfloat16)
    head = maker.matrix([config.head_name], head_precision)
    layers = tuple(maker.layer(i) for i in range(len(config.blocks)))
    rotations = _rotations(config, context, device)
    return BatchWeights(config, embed, layers, maker.norm("final_norm"), head, rotations, scales)


def _key_changes(config: ModelSpec, tensor_of: TensorOf, is_kv_int8: bool) -> KeyScales:
    """`key_shifts` of a model whose parameters are tensors, and for int8 `key_scales`."""

    def floats(name: str) -> np.ndarray[Any, np.dtype[np.float32]] | None:
        found = tensor_of(name)
        return None if found is None else found.float().cpu().numpy()

    def matrix(name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        found = floats(name)
        if found is None:
            raise ModelError(f"tensor {name!r} is missing")
        return found

    names = [f"layers.{i}.{n}" for i in range(len(config.blocks)) for n in ("attn_norm", "k_norm", "k.bias")]
    vectors = {name: found for name in names if (found := floats(name)) is not None}
    shifts = key_shifts(config, vectors)
    scales = key_scales(config, matrix, vectors, shifts) if is_kv_int8 else {}
    return {**scales, **shifts}


def refuse_others(config: ModelSpec, context: int) -> None:
    """Refuse a model that the batched step does not compute, or a context past what it rotates.

    Raises:
        ModelError: what it is; every path of the GPU engine needs the batched step.
    """
    mixer = config.blocks[0].mixer
    if mixer.qk_norm == "full" or config.blocks[0].norms.placement == "post":
        raise ModelError(
            f"the batched GPU step does not compute {config.architecture}: norms over all heads together",
            hint="use --device cpu",
        )
    widths = config.width, config.blocks[0].feed_forward.width, mixer.heads * mixer.head_dim
    if any(width % _STEP for width in widths) or mixer.head_dim % 2:
        raise ModelError(
            f"the batched GPU step needs widths that are multiples of {_STEP} and even heads, "
            f"got {widths} and {mixer.head_dim}",
            hint="use --device cpu",
        )
    if context > longest(config):
        kind = rope.rotations(config)[0].scaling.kind
        raise ModelError(
            f"rope scaling {kind!r} past {longest(config)} tokens depends on a sequence's length",
            hint=f"use --context {longest(config)} or less, or --device cpu",
        )


def longest(config: ModelSpec) -> int:
    """Tokens of the longest sequence that is rotated here as the model does."""
    scaling = rope.rotations(config)[0].scaling
    original = scaling.original_context_length or config.context
    return original if scaling.kind in ("dynamic", "longrope") else config.context


class _Maker:
    """Reads tensors by name and makes what the kernels read."""

    def __init__(
        self,
        config: ModelSpec,
        tensor_of: TensorOf,
        precision: Precision,
        device: str,
        key_scales: KeyScales | None = None,
    ) -> None:
        self.config, self.tensor_of, self.precision, self.device = config, tensor_of, precision, device
        self._key_scales = key_scales
        self._order = torch.from_numpy(rotary_order(config)).to(device)

    def plain(self, name: str) -> torch.Tensor:
        tensor = self.tensor_of(name)
        if tensor is None:
            raise ModelError(f"tensor {name!r} is missing")
        return tensor.to(self.device)

    def norm(self, name: str) -> torch.Tensor:
        return self.plain(name).float().contiguous()

    def matrix(self, names: list[str], precision: Precision | None = None) -> Matrix:
        """Several matrices below one another; rows of q and k in rotary order."""
        rows = torch.cat([self._ordered(name, self.plain(name)) for name in names])
        biases = [self.tensor_of(name + ".bias") for name in names]
        bias = None
        if any(b is not None for b in biases):
            parts = [
                torch.zeros(self.plain(name).shape[0], device=self.device) if b is None else b.to(self.device)
                for name, b in zip(names, biases, strict=True)
            ]
            ordered = [self._ordered(n, p.float()) for n, p in zip(names, parts, strict=True)]
            bias = torch.cat(ordered).contiguous()
        if (precision or self.precision) == "bf16":
            return Matrix(rows.to(torch.bfloat16).contiguous(), None, bias)
        scales = (rows.float().abs().amax(-1) / E4M3_MAX).clamp_min(torch.finfo(torch.float32).tiny)
        return Matrix((rows.float() / scales[:, None]).to(torch.float8_e4m3fn).contiguous(), scales, bias)

    def layer(self, i: int) -> LayerWeights:
        p, c = f"layers.{i}.", self.config
        per_head, sandwich = c.blocks[0].mixer.qk_norm == "head", c.blocks[0].norms.placement == "sandwich"
        return LayerWeights(
            qkv=self.matrix([p + "q", p + "k", p + "v"]),
            o=self.matrix([p + "o"]),
            gate_up=self.matrix([p + "gate", p + "up"]),
            down=self.matrix([p + "down"]),
            attn_norm=self.norm(p + "attn_norm"),
            mlp_norm=self.norm(p + "mlp_norm"),
            q_norm=self._ordered(p + "q_norm", self.norm(p + "q_norm")).contiguous() if per_head else None,
            k_norm=self._ordered(p + "k_norm", self.norm(p + "k_norm")).contiguous() if per_head else None,
            post_attn_norm=self.norm(p + "post_attn_norm") if sandwich else None,
            post_mlp_norm=self.norm(p + "post_mlp_norm") if sandwich else None,
            key_shift=self._key_shift(p),
        )

    def _key_shift(self, prefix: str) -> torch.Tensor | None:
        found = None if self._key_scales is None else self._key_scales.get(prefix + "key_shift")
        if found is None:
            return None
        return self._ordered(prefix + "k", torch.from_numpy(found).to(self.device)).contiguous()

    def _ordered(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Rows of a matrix, or of its bias or norm: q and k in rotary order, with the keys' scales."""
        prefix, _, member = name.rpartition(".")
        if member not in ("q", "k", "q_norm", "k_norm"):
            return tensor
        mixer = self.config.blocks[0].mixer
        heads = tensor.reshape(-1, mixer.head_dim, *tensor.shape[1:])
        scales = (self._key_scales or {}).get(f"{prefix}.key_scale")
        if scales is not None and member.endswith("_norm") == (mixer.qk_norm == "head"):
            by = torch.from_numpy(scales).to(tensor.device)
            by = by.view(-1, mixer.head_dim)
            by = by[torch.arange(len(heads)) // (len(heads) // len(by)) if len(heads) > 1 else [0]]
            by = by.view(*by.shape, *[1] * (heads.dim() - 2))
            heads = heads * by if member.startswith("q") else heads / by
        return heads[:, self._order].flatten(0, 1)


def rotary_order(config: ModelSpec) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The order of a head's dimensions in which a rotation always pairs i with i + D/2, int64 [D].

    With partial rotary embedding it pairs i with i + rotary_dim / 2 and leaves the rest. Queries and keys may
    be reordered alike, since only their products count; then one kernel serves every model.
    """
    d = config.blocks[0].mixer.head_dim
    half = rope.rotations(config)[0].dim // 2
    rest = np.arange(2 * half, d, dtype=np.int64)
    first, second = np.arange(half, dtype=np.int64), np.arange(half, 2 * half, dtype=np.int64)
    return np.concatenate([first, rest[: len(rest) // 2], second, rest[len(rest) // 2 :]])


def _rotations(config: ModelSpec, context: int, device: str) -> dict[str, Rotation]:
    tables, half = rope.tables(config), config.blocks[0].mixer.head_dim // 2

    def rotation(frequencies: rope.Frequencies, scale: float) -> Rotation:
        padded = np.zeros(half)
        padded[: len(frequencies)] = frequencies
        factor = np.where(np.arange(half) < len(frequencies), scale, 1.0)  # what is not rotated is not scaled
        each, by = (torch.from_numpy(values).to(device) for values in (padded, factor))
        angles = torch.outer(torch.arange(context, dtype=torch.float64, device=device), each)
        return Rotation((angles.cos() * by).float(), (angles.sin() * by).float())

    made = {"global": rotation(tables.global_inv_freq, tables.global_scale)}
    if tables.local_inv_freq is not None:
        made["local"] = rotation(tables.local_inv_freq, 1.0)
    if any(block.mixer.rotary is None for block in config.blocks):
        made["none"] = rotation(np.zeros(0), 1.0)
    return made


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
