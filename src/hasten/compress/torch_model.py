"""A model in torch: one decoder layer that computes, a source's tensors of torch values, state on disk.

The layer is batched, differentiable, in any float type and on any device: what calibration runs a layer at a
time, and what distillation trains. Its plain twin is `runtime/reference.py`: one sequence, float32, no fused
attention. What pruning, rotating and distilling make of a model is its source with other values and parts of
tensors.

State is written whole or not at all, and read only as it was written: torch.load does not compare the
checksums that torch.save writes, so a bit that the disk turned would end up in the weights. They are compared
here, at some 1 GB/s.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from hasten import _native
from hasten.cache import write_atomic
from hasten.cache.reading import open_file
from hasten.core import READERS, Attention, ModelSpec
from hasten.errors import MachineError, UsageError
from hasten.machine.cores import usable_cores
from hasten.models import rope
from hasten.models.source import Source
from hasten.weights.tensors import TYPES, Bytes, SourceTensor
from hasten.weights.work_store import state_damage

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


_KIND = "kind"
Values = torch.Tensor | Callable[[], torch.Tensor]


def made_tensor(name: str, shape: tuple[int, ...], values: Values) -> SourceTensor:
    """A tensor of a source from torch values: bfloat16 stays so, all else becomes float32.

    A function is called anew each time the tensor is read, so that a changed model holds nothing twice.
    """
    if isinstance(values, torch.Tensor):
        assert tuple(values.shape) == shape, (name, values.shape, shape)
        dtype = "BF16" if values.dtype == torch.bfloat16 else "F32"
        return SourceTensor(name, shape, dtype, _bytes(values))
    return SourceTensor(name, shape, "F32", lambda: _bytes(values().float()))


def changed(source: Source, values: Mapping[str, Values], *, config: ModelSpec | None = None) -> Source:
    """`source` with some tensors replaced or added.

    Args:
        values: canonical name -> torch values, or a function that makes them (float32) when they are read.
        config: the new shape; a function's tensor must have the shape that it gives.
    """
    shape_of = config or source.config
    shapes = shape_of.parameter_shapes()
    made = {name: made_tensor(name, shapes[name], value) for name, value in values.items()}
    tensors = source.tensors | made
    wrong = {name for name, tensor in tensors.items() if shapes.get(name) != tensor.shape} | (
        shapes.keys() - tensors.keys()
    )
    assert not wrong, f"tensors do not fit the new shape: {sorted(wrong)[:4]}"
    return replace(source, config=shape_of, tensors=tensors)


def _bytes(values: torch.Tensor) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    kept = values.detach().cpu().contiguous()
    kept = kept.view(torch.int16) if kept.dtype == torch.bfloat16 else kept.float()
    return np.ascontiguousarray(kept.numpy()).reshape(-1).view(np.uint8)


def taken_rows(tensor: SourceTensor, rows: torch.Tensor) -> SourceTensor:
    """Rows of a matrix or elements of a vector, int64 [n], in their file's own format: not one value changes.

    Costs the bytes of the rows; nothing where the tensor is made when it is read.
    """
    picked = rows.numpy()
    order = picked if tensor.row_order is None else tensor.row_order[picked]
    row_bytes = TYPES[tensor.dtype].bytes_of(tensor.shape) // tensor.rows

    def cut() -> Bytes:
        return np.ascontiguousarray(tensor.data.reshape(tensor.rows, row_bytes)[order]).reshape(-1)

    shape = (len(picked), *tensor.shape[1:])
    data = cut if tensor.is_made else cut()
    return SourceTensor(tensor.name, shape, tensor.dtype, data, offset=tensor.offset)


def renamed(tensor: SourceTensor, name: str) -> SourceTensor:
    """The same tensor under another name, sharing its bytes."""
    data = (lambda: tensor.data) if tensor.is_made else tensor.data
    return SourceTensor(name, tensor.shape, tensor.dtype, data, tensor.row_order, tensor.offset)


def row_values(tensor: SourceTensor, rows: torch.Tensor) -> torch.Tensor:
    """Some rows of a matrix, int64 [n] -> float32 [n, cols]; the others are not unpacked."""
    return tensor_values(taken_rows(tensor, rows))


@contextlib.contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """`count` threads inside the block, as many as before afterwards; None: no more than `usable_cores`.

    torch itself counts the processors of the affinity mask, whatever time a control group gives.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, usable_cores()) if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def device_of(name: str | torch.device | None) -> torch.device:
    """The device of a name; None takes a GPU where there is one.

    Raises:
        UsageError: torch knows no such kind.
        MachineError: this machine has none.
    """
    there = torch.cuda.is_available()
    if name is None:
        return torch.device("cuda" if there else "cpu")
    found: torch.device | None = None
    with contextlib.suppress(RuntimeError):
        found = torch.device(name)
    if found is None or found.type not in ("cpu", "cuda"):
        raise UsageError(f"unknown device {name!r}", hint="use cpu or cuda")
    if found.type == "cuda" and not there:
        raise MachineError("torch sees no GPU here", hint="use --device cpu, or install torch for CUDA")
    return found


def write_state(path: Path, kind: str, state: Mapping[str, Any]) -> Path:
    """Keep tensors and plain values.

    Args:
        kind: what they are and by which version of it, such as "statistics 1".

    Raises:
        DiskError: full, read-only or forbidden disk; the file before is untouched.
    """
    return write_atomic(path, lambda file: torch.save({**state, _KIND: kind}, file))


def read_state(path: Path, kind: str) -> dict[str, Any] | None:
    """What a file holds, on the CPU; None where it is missing, damaged or of another kind."""
    try:
        return whole_state(path, kind)
    except Exception:  # noqa: BLE001  torch.load raises whatever a strange file makes it
        return None


def whole_state(path: Path, kind: str) -> dict[str, Any]:
    """What a file holds, on the CPU.

    Raises:
        ValueError: its checksums differ, or it is of another kind; torch.load raises what it likes.
    """
    if (wrong := state_damage(path)) is not None:
        raise ValueError(wrong)
    with open_file(path) as file:
        found: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=False)
    if (other := found.pop(_KIND, None)) != kind:
        raise ValueError(f"it is {other!r}, this program reads {kind!r}")
    return found
