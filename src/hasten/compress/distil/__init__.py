"""What was made smaller learns from its source: a decoder in torch, and what the teacher says of every token.

What a teacher says is computed once and kept on disk. Kept are final hidden states in the type that they were
computed in, [tokens, E], and not logits, [tokens, V]: with 152k words logits are 170 times as many, 304 KB a
token. The head makes logits of states again, at a quarter of a small model's pass. Of a teacher whose states
are all there, only the head is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from hasten.cache.reading import map_array
from hasten.compress.calibration import Calibration, work_key
from hasten.compress.torch_model import Positions, layer_forward, tensor_values
from hasten.core import ModelSpec
from hasten.errors import DiskError, ModelError
from hasten.models.source import Source
from hasten.weights.work_store import is_whole, write_checked

Change = Callable[[torch.Tensor], torch.Tensor]
"""What becomes of a weight before it is used: an adapter is added, it is rounded, zeros are kept."""

Layer = Callable[..., torch.Tensor]


@dataclass
class Decoder:
    """All layers, the embedding and the head.

    A student's weights are float32 and are cast to `dtype` where they are used (16 bytes a weight with
    gradient and AdamW's moments). bf16 weights with stochastic rounding would be 6 bytes smaller, but a step
    of 1e-5 of a weight is 400 times below bf16's own steps, and then a run is noise for its first thousands
    of steps; half a billion weights do not need to save that.

    Args:
        values: parameters by canonical name.
        dtype: of activations, and of weights in products.
        changes: by canonical name, applied in order.
        recompute: keep only each layer's input for the backward pass and compute the rest again: a third
            more work, T * E values a layer instead of about 30 times as many.
        layer: `layer_forward`, or that compiled.
    """

    config: ModelSpec
    values: dict[str, torch.Tensor]
    dtype: torch.dtype = torch.float32
    changes: dict[str, tuple[Change, ...]] = field(default_factory=dict)
    recompute: bool = False
    layer: Layer = layer_forward
    _positions: dict[int, Positions] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        source: Source,
        dtype: torch.dtype,
        device: torch.device,
        *,
        keep: torch.dtype = torch.float32,
        recompute: bool = False,
        layer: Layer = layer_forward,
    ) -> Decoder:
        """With the values of a source, kept as `keep`."""
        values = {name: tensor_values(tensor, keep, device) for name, tensor in source.tensors.items()}
        return cls(source.config, values, dtype, recompute=recompute, layer=layer)

    @property
    def device(self) -> torch.device:
        return self.values["embed"].device

    def weight(self, name: str) -> torch.Tensor:
        """One parameter as it is used, before it is cast."""
        value = self.values[name]
        for change in self.changes.get(name, ()):
            value = change(value)
        return value

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """States after the final norm: ids [B, T] -> [B, T, E] of `dtype`."""
        config, length = self.config, ids.shape[1]
        if length not in self._positions:
            self._positions[length] = Positions.of(config, length, self.device)
        positions = self._positions[length]
        x = (F.embedding(ids, self.weight("embed")) * config.embedding.scale).to(self.dtype)
        for index in range(len(config.blocks)):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(self._run, index, x, positions, use_reentrant=False)
            else:
                x = self._run(index, x, positions)
        return F.rms_norm(x, x.shape[-1:], self.weight("final_norm").to(x.dtype), config.final_norm.eps)

    def _run(self, index: int, x: torch.Tensor, positions: Positions) -> torch.Tensor:
        layer = self.layer if torch.is_grad_enabled() else layer_forward  # judging: other shapes, seldom
        return layer(self.config, self._alike(index), self._weights(index), x, positions)

    def _weights(self, index: int) -> Mapping[str, torch.Tensor]:
        prefix = f"layers.{index}."
        names = (name for name in self.values if name.startswith(prefix))
        return {name.removeprefix(prefix): self.weight(name).to(self.dtype) for name in names}

    def _alike(self, index: int) -> int:
        """Where all layers are computed alike, all are layer 0: compiled once, not once a layer."""
        return 0 if len(set(self.config.blocks)) == 1 else index

    def head(self) -> torch.Tensor:
        """The head's matrix, [V, E] of `dtype`."""
        return self.weight(self.config.head_name).to(self.dtype)

    def logits(self, hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """[R, E] times the head, soft-capped: [R, V]."""
        return head_logits(self.config, hidden, head)


def head_logits(config: ModelSpec, hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """[R, E] by [V, E] -> [R, V] with the model's soft cap."""
    found = F.linear(hidden, head)
    cap = config.head.softcap
    return found if cap is None else torch.tanh(found / cap) * cap


SHARD_TOKENS = 1 << 16
"""Tokens a file holds: 117 MB at E = 896 in bf16."""
Step = Callable[[int, int], None]


class Teacher(Protocol):
    """Logits of any window of the text, in two steps."""

    def hidden(self, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        """Final states of windows by number: [B, T, E]."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, E] -> [R, V]."""


@dataclass
class _Head:
    config: ModelSpec
    matrix: torch.Tensor  # [V, E]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return head_logits(self.config, hidden, self.matrix)


@dataclass
class LiveTeacher(_Head):
    """Runs the teacher anew for each batch: no disk, a third more time a step, for text that is read once."""

    model: Decoder
    ids: torch.Tensor  # [B, T]

    @torch.no_grad()
    def hidden(self, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        return self.model.hidden(self.ids[torch.as_tensor(rows, device=self.ids.device)])


@dataclass
class CachedTeacher(_Head):
    """Reads states from files."""

    shape: tuple[int, int]  # T, E
    dtype: torch.dtype
    shards: list[Path]
    per_shard: int  # windows
    _open: dict[int, npt.NDArray[np.uint8]] = field(default_factory=dict, repr=False)

    def hidden(self, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        found = torch.from_numpy(np.stack([self._window(int(row)) for row in rows]))
        return found.view(self.dtype).view(len(rows), *self.shape).to(self.matrix.device)

    def _window(self, row: int) -> npt.NDArray[np.uint8]:
        shard, inside = divmod(row, self.per_shard)
        if shard not in self._open:
            self._open[shard] = self._mapped(self.shards[shard])
        size = self.shape[0] * self.shape[1] * self.dtype.itemsize
        return self._open[shard][inside * size : (inside + 1) * size]

    @staticmethod
    def _mapped(shard: Path) -> npt.NDArray[np.uint8]:
        try:
            return map_array(shard)
        except OSError as error:
            raise DiskError(
                f"distil: the teacher's states are gone: {error}", hint="run it again: they are made again"
            ) from None


def live_teacher(source: Source, text: Calibration, dtype: torch.dtype, device: torch.device) -> LiveTeacher:
    """A teacher that is run for each batch."""
    model = Decoder.of(source, dtype, device, keep=dtype)
    return LiveTeacher(
        source.config,
        model.values[model.config.head_name],
        model,
        torch.from_numpy(text.ids).long().to(device),
    )


def cached_teacher(
    source: Source,
    text: Calibration,
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    *,
    batch_tokens: int = 4096,
    step: Step = lambda done, total: None,
) -> CachedTeacher:
    """The teacher's states of a text: those missing in the folder are computed and written.

    Each file appears whole or not at all and ends with a checksum, so a run that was killed goes on where it
    was; a damaged file is made again.

    Args:
        source: the teacher. text: windows [B, T].
        folder: files go to a folder in it named by the model's content, the text and the type.
        dtype: of states and head. device: where the teacher runs and states are given.
        batch_tokens: read at once. step: told (windows done, windows in all).

    Raises:
        DiskError: the disk is full, read-only or not ours.
        ModelError: a state is not finite.
    """
    count, length = text.ids.shape
    shape = (length, source.config.width)
    per_shard = max(1, SHARD_TOKENS // length)
    place = folder / work_key(source, text, "teacher", str(dtype))
    shards = [place / f"{n:05d}.states" for n in range(-(-count // per_shard))]
    sizes = [min(per_shard, count - n * per_shard) for n in range(len(shards))]
    missing = [
        n
        for n, shard in enumerate(shards)
        if not is_whole(shard, sizes[n] * shape[0] * shape[1] * dtype.itemsize)
    ]
    model = Decoder.of(source, dtype, device, keep=dtype) if missing else None
    for n in missing:
        assert model is not None
        ids = text.ids[n * per_shard : n * per_shard + sizes[n]]
        step(n * per_shard, count)
        write_checked(shards[n], _states(model, ids, max(1, batch_tokens // length)))
    step(count, count)
    name = source.config.head_name
    head = model.values[name] if model else tensor_values(source.tensors[name], dtype, device)
    return CachedTeacher(source.config, head, shape, dtype, shards, per_shard)


@torch.no_grad()
def _states(model: Decoder, ids: npt.NDArray[np.int32], rows: int) -> npt.NDArray[np.uint8]:
    found = []
    for at in range(0, len(ids), rows):
        states = model.hidden(torch.from_numpy(ids[at : at + rows]).long().to(model.device))
        if not torch.isfinite(states).all():
            raise ModelError(
                "distil: the teacher's states are not finite", hint="check its files: hasten eval MODEL"
            )
        found.append(states.cpu().contiguous().view(torch.uint8).flatten().numpy())
    return np.concatenate(found)
