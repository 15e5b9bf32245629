"""A model's weights as the kernels of a batched decode step read them: fused, bf16 or e4m3, on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from hasten.core import ModelSpec
from hasten.errors import ModelError
from hasten.models import rope
from hasten.runtime.gpu.shape import E4M3_MAX
from hasten.runtime.keys import key_scales, key_shifts

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
    key_scales: KeyScales | None = None  # which the matrices or norms of queries and keys have in them

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
    scales = _key_scales(config, tensor_of) if is_kv_int8 else None
    maker = _Maker(config, tensor_of, precision, device, scales)
    embed = maker.plain("embed").to(torch.bfloat16)
    head = maker.matrix([config.head_name], head_precision)
    layers = tuple(maker.layer(i) for i in range(len(config.blocks)))
    rotations = _rotations(config, context, device)
    return BatchWeights(config, embed, layers, maker.norm("final_norm"), head, rotations, scales)


def _key_scales(config: ModelSpec, tensor_of: TensorOf) -> KeyScales:
    """`key_scales` and `key_shifts` of a model whose parameters are tensors."""

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
    return {**key_scales(config, matrix, vectors, shifts), **shifts}


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
        if self._key_scales is not None and member.endswith("_norm") == (mixer.qk_norm == "head"):
            by = torch.from_numpy(self._key_scales[f"{prefix}.key_scale"]).to(tensor.device)
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
