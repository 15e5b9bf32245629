"""One decoder layer in torch: batched, differentiable, in any float type and on any device.

What calibration runs a layer at a time, and what distillation trains. Its plain twin is
`runtime/reference.py`: one sequence, float32, no fused attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from hasten.core import READERS, Attention, ModelSpec
from hasten.models import rope
from hasten.models.source import Source
from hasten.weights.tensors import SourceTensor

Weights = Mapping[str, torch.Tensor]
"""Parameters of one layer by short name: `q`, `q.bias`, `down`, `attn_norm` ...; matrices [rows, cols]."""

Linear = Callable[[str, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""(short name, input [..., cols], weight [rows, cols], bias [rows] or None) -> [..., rows]."""

LINEARS = tuple(name for names in READERS.values() for name in names)
"""Short names of a layer's matrices in the order they are computed."""


def plain_linear(name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The linear layer as it is; what `Linear` hooks replace to record, round or adapt."""
    return F.linear(x, weight, bias)


def tensor_values(
    tensor: SourceTensor, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> torch.Tensor:
    """The values of a source's tensor, [rows, cols] or [n]."""
    import numpy as np

    from hasten import _native
    from hasten.machine.cores import usable_cores

    count = int(np.prod(tensor.shape))
    values = _native.dequantize_ggml(tensor.data, tensor.dtype, count, usable_cores()).reshape(tensor.shape)
    if tensor.row_order is not None:
        values = values[tensor.row_order]
    if tensor.offset:
        values = values + np.float32(tensor.offset)
    return torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(device, dtype)


def layer_weights(source: Source, index: int) -> dict[str, torch.Tensor]:
    """All parameters of one layer by short name, float32, unpacked now: 4 bytes a weight."""
    prefix = f"layers.{index}."
    return {
        name.removeprefix(prefix): tensor_values(tensor)
        for name, tensor in source.tensors.items()
        if name.startswith(prefix)
    }


@dataclass(frozen=True)
class Positions:
    """Rotations and masks of T positions, the same for all layers of a kind."""

    config: ModelSpec
    cos: Mapping[bool, torch.Tensor]  # by "slides": float32 [T, rotary_dim / 2]
    sin: Mapping[bool, torch.Tensor]
    masks: Mapping[bool, torch.Tensor]  # by "slides": bool [T, T], True where a position may look

    @classmethod
    def of(cls, config: ModelSpec, length: int, device: str | torch.device = "cpu") -> Positions:
        """For sequences of `length` tokens that begin at position 0."""
        tables = rope.tables(config, length)
        is_long = tables.long_threshold is not None and length > tables.long_threshold
        frequencies, scale = tables.global_inv_freq, tables.global_scale
        if is_long and tables.long_inv_freq is not None:
            frequencies, scale = tables.long_inv_freq, tables.long_scale
        everywhere = _angles(length, frequencies, scale, device)
        local = tables.local_inv_freq
        sliding = everywhere if local is None else _angles(length, local, 1.0, device)
        at = torch.arange(length, device=device)
        back = at[:, None] - at[None, :]
        window = max((block.mixer.window or 0 for block in config.blocks), default=0) or length
        return cls(
            config,
            {False: everywhere[0], True: sliding[0]},
            {False: everywhere[1], True: sliding[1]},
            {False: back >= 0, True: (back >= 0) & (back < window)},
        )

    def slides(self, layer: int) -> bool:
        """Whether a layer looks back on a window only."""
        return self.config.blocks[layer].mixer.window is not None

    def rotate(self, x: torch.Tensor, slides: bool) -> torch.Tensor:
        """x [B, T, H, D] turned by its positions."""
        cos, sin = (table[slides][:, None].to(x.dtype) for table in (self.cos, self.sin))
        half = cos.shape[-1]
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def layer_forward(
    config: ModelSpec,
    index: int,
    weights: Weights,
    x: torch.Tensor,
    positions: Positions,
    linear: Linear = plain_linear,
) -> torch.Tensor:
    """One decoder layer.

    Args:
        config: the model's; heads and widths are read from the weights' own shapes: a pruned layer runs.
        x: [B, T, E].
        positions: of T tokens.
        linear: computes each linear layer; hooks see its short name and input.

    Returns:
        [B, T, E].
    """
    placement = config.blocks[index].norms.placement
    before, after = placement in ("pre", "sandwich"), placement in ("post", "sandwich")

    norm = partial(normed, config, weights)
    y = attended(config, index, weights, norm("attn_norm", x) if before else x, positions, linear)
    y = linear("o", y, weights["o"], weights.get("o.bias"))
    x = x + (norm("post_attn_norm", y) if after else y)
    y = mlp(config, weights, norm("mlp_norm", x) if before else x, linear)
    return x + (norm("post_mlp_norm", y) if after else y)


def normed(config: ModelSpec, weights: Weights, name: str, value: torch.Tensor) -> torch.Tensor:
    """RMS norm by one of the layer's norms, [..., n], in the value's type."""
    return F.rms_norm(value, value.shape[-1:], weights[name].to(value.dtype), config.blocks[0].norms.eps)


def attended(
    config: ModelSpec,
    index: int,
    weights: Weights,
    x: torch.Tensor,
    positions: Positions,
    linear: Linear = plain_linear,
) -> torch.Tensor:
    """What `o` reads: normed input [B, T, E] -> values mixed by attention, [B, T, H * D]."""
    mixer, slides = config.blocks[index].mixer, positions.slides(index)
    q, k, v = (linear(name, x, weights[name], weights.get(f"{name}.bias")) for name in "qkv")

    norm = partial(normed, config, weights)
    if mixer.qk_norm == "full":
        q, k = norm("q_norm", q), norm("k_norm", k)
    q, k, v = (value.view(*value.shape[:-1], -1, mixer.head_dim) for value in (q, k, v))  # [B, T, heads, D]
    if mixer.qk_norm == "head":
        q, k = norm("q_norm", q), norm("k_norm", k)
    if mixer.rotary is not None:
        q, k = positions.rotate(q, slides), positions.rotate(k, slides)
    return _attend(mixer, q, k, v, positions.masks[slides]).flatten(-2)


def _attend(
    mixer: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    share = q.shape[2] // k.shape[2]
    q, k, v = (value.transpose(1, 2) for value in (q, k, v))  # [B, H, T, D]
    k, v = (value.repeat_interleave(share, dim=1) for value in (k, v))
    if mixer.softcap is None:
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=mixer.score_scale)
    else:
        scores = (q @ k.transpose(-1, -2)) * mixer.score_scale
        scores = torch.tanh(scores / mixer.softcap) * mixer.softcap
        mixed = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ v
    return mixed.transpose(1, 2)


def mlp(config: ModelSpec, weights: Weights, x: torch.Tensor, linear: Linear = plain_linear) -> torch.Tensor:
    """The feed-forward part of one layer: normed input [B, T, E] -> what joins the residual, [B, T, E]."""
    return linear("down", activated(config, weights, x, linear), weights["down"], weights.get("down.bias"))


def activated(
    config: ModelSpec, weights: Weights, x: torch.Tensor, linear: Linear = plain_linear
) -> torch.Tensor:
    """What `down` reads: normed input [B, T, E] -> [B, T, F]."""
    gate = linear("gate", x, weights["gate"], weights.get("gate.bias"))
    up = linear("up", x, weights["up"], weights.get("up.bias"))
    gate = (
        F.silu(gate)
        if config.blocks[0].feed_forward.activation == "silu"
        else F.gelu(gate, approximate="tanh")
    )
    return gate * up


def _angles(
    length: int, frequencies: rope.Frequencies, scale: float, device: str | torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    turns = torch.outer(torch.arange(length, dtype=torch.float64), torch.as_tensor(frequencies))
    return (turns.cos() * scale).float().to(device), (turns.sin() * scale).float().to(device)
