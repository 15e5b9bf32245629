"""A decoder with weights in torch, by canonical name: the teacher that is read, the student that learns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from hasten.compress.torch_layer import Positions, layer_forward, tensor_values
from hasten.core import ModelSpec
from hasten.models.source import Source

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
        config: its shape.
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

    @property
    def head_name(self) -> str:
        """`embed` where the head is tied to it."""
        return "embed" if self.config.tied_head else "head"

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
        x = (F.embedding(ids, self.weight("embed")) * config.embed_scale).to(self.dtype)
        for index in range(config.num_layers):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(self._run, index, x, positions, use_reentrant=False)
            else:
                x = self._run(index, x, positions)
        return F.rms_norm(x, x.shape[-1:], self.weight("final_norm").to(x.dtype), config.norm_eps)

    def _run(self, index: int, x: torch.Tensor, positions: Positions) -> torch.Tensor:
        layer = self.layer if torch.is_grad_enabled() else layer_forward  # judging: other shapes, seldom
        return layer(self.config, self._alike(index), self._weights(index), x, positions)

    def _weights(self, index: int) -> Mapping[str, torch.Tensor]:
        prefix = f"layers.{index}."
        names = (name for name in self.values if name.startswith(prefix))
        return {name.removeprefix(prefix): self.weight(name).to(self.dtype) for name in names}

    def _alike(self, index: int) -> int:
        """Where all layers are computed alike, all are layer 0: compiled once, not once a layer."""
        varies = self.config.sliding_layers or self.config.rope_layers
        return index if varies else 0

    def head(self) -> torch.Tensor:
        """The head's matrix, [V, E] of `dtype`."""
        return self.weight(self.head_name).to(self.dtype)

    def logits(self, hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """[R, E] times the head, soft-capped: [R, V]."""
        return head_logits(self.config, hidden, head)


def head_logits(config: ModelSpec, hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """[R, E] by [V, E] -> [R, V] with the model's soft cap."""
    found = F.linear(hidden, head)
    cap = config.logit_softcap
    return found if cap is None else torch.tanh(found / cap) * cap
