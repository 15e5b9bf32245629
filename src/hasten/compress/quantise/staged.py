"""A stream of hidden states through one layer in four stages: each matrix may be changed before it is used.

What quantising one layer after another needs: the inputs of `o` are there only once q, k and v are settled.
Every product is computed once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from hasten.compress.quantise.fold import GROUPS, Group
from hasten.compress.stream import Stream, stream_linear
from hasten.compress.torch_layer import Weights, activated, attended
from hasten.errors import ModelError


class StagedLayer:
    """One stream in one layer.

    Args:
        stream: the hidden states before the layer; moved on as stages pass.
        index: which layer.
    """

    def __init__(self, stream: Stream, index: int) -> None:
        self._stream, self._index = stream, index
        self._inner: torch.Tensor | None = None  # inputs of `o` or `down`, [B, T, cols]

    def inputs(self, group: Group, weights: Weights) -> torch.Tensor:
        """What a group's matrices read: float32 [B, T, cols].

        Raises:
            ModelError: a value is not finite; the layer is named.
        """
        found = self._inner
        if found is None:
            found = self._normed("attn_norm" if group == "qkv" else "mlp_norm", weights)
        if not torch.isfinite(found).all():
            raise ModelError(
                f"{self._stream.name}: what layers.{self._index}.{group} reads is not finite on the "
                "calibration text",
                hint=f"the weights of layers.{self._index} or before are damaged: get the model again",
            )
        return found

    def pass_on(self, group: Group, weights: Weights, inputs: torch.Tensor) -> None:
        """Through a group's matrices.

        Args:
            group: the stage; stages pass in the order of `GROUPS`.
            weights: the layer's.
            inputs: what `inputs` gave.
        """
        config, positions = self._stream.config, self._stream.positions
        if group == "qkv":
            self._inner = self._each(
                inputs, lambda x: attended(config, self._index, weights, x, positions, stream_linear)
            )
        elif group == "gate_up":
            self._inner = self._each(inputs, lambda x: activated(config, weights, x, stream_linear))
        else:
            self._join(group, weights, inputs)
            self._inner = None

    def _join(self, name: str, weights: Weights, inputs: torch.Tensor) -> None:
        """Add a block's output to the hidden states."""
        norm = weights.get("post_attn_norm" if name == "o" else "post_mlp_norm")
        for rows in self._stream.batches():
            y = stream_linear(name, inputs[rows], weights[name], weights.get(f"{name}.bias"))
            if norm is not None:
                y = F.rms_norm(y, norm.shape, norm, self._stream.config.norm_eps)
            self._stream.x[rows] += y

    def _normed(self, name: str, weights: Weights) -> torch.Tensor:
        norm = weights.get(name)
        if norm is None:  # norms come after the blocks
            return self._stream.x.clone()
        return F.rms_norm(self._stream.x, norm.shape, norm, self._stream.config.norm_eps)

    def _each(self, inputs: torch.Tensor, work: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        out: torch.Tensor | None = None
        for rows in self._stream.batches():
            found = work(inputs[rows])
            if out is None:
                out = torch.empty(*inputs.shape[:2], found.shape[-1])
            out[rows] = found
        assert out is not None, "calibration has at least one window"
        return out


def settle(layer: StagedLayer, weights: Weights) -> None:
    """All stages with the weights as they are."""
    for group in GROUPS:
        layer.pass_on(group, weights, layer.inputs(group, weights))
