"""Hidden states of the calibration text on their way through a model, one layer after another."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hasten.compress.calibration import Calibration
from hasten.compress.taken import row_values
from hasten.compress.torch_layer import Linear, Positions, Weights, layer_forward, layer_weights
from hasten.core import ModelSpec
from hasten.errors import ModelError
from hasten.models.source import Source

BATCH_TOKENS = 2048
"""Tokens computed at once: 40 MB for each activation 4,864 wide."""

Found = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Short name of a linear layer -> what it read [b, T, cols] and gave [b, T, rows], bias left out."""


@dataclass
class Stream:
    """What every token's hidden state is before the next layer: float32 [B, T, E], 4 bytes E a token."""

    name: str  # the model's
    config: ModelSpec
    x: torch.Tensor
    positions: Positions

    @classmethod
    def of(cls, source: Source, calibration: Calibration) -> Stream:
        """Embeddings of the calibration text, before the first layer."""
        config = source.config
        ids, place = torch.unique(torch.from_numpy(calibration.ids).long(), return_inverse=True)
        x = row_values(source.tensors["embed"], ids)[place] * config.embed_scale
        return cls(source.name, config, x, Positions.of(config, calibration.ids.shape[1]))

    def copy(self) -> Stream:
        """The same states again, to go another way from here."""
        return Stream(self.name, self.config, self.x.clone(), self.positions)

    def batches(self) -> Iterator[slice]:
        """Which sequences are computed together."""
        size = max(1, BATCH_TOKENS // self.x.shape[1])
        yield from (slice(at, at + size) for at in range(0, len(self.x), size))

    def through(
        self,
        index: int,
        weights: Weights,
        rows: slice,
        found: Found | None = None,
        *,
        silent: Collection[str] = (),
    ) -> torch.Tensor:
        """Some sequences after a layer, [b, T, E]; the stream stays where it is.

        Args:
            index: which layer.
            weights: its parameters.
            rows: which sequences.
            found: filled with what each linear layer reads and gives.
            silent: linear layers that are not computed and give zeros.

        Raises:
            ModelError: a value is not finite; the layer is named.
        """
        hook = _recording(found, silent) if found is not None else stream_linear
        y = layer_forward(self.config, index, weights, self.x[rows], self.positions, hook)
        if not torch.isfinite(y).all():
            raise ModelError(
                f"{self.name}: layers.{index} gives values that are not finite on the calibration text",
                hint=f"the weights of layers.{index} or before are damaged: get the model again",
            )
        return y

    def advance(self, index: int, weights: Weights) -> None:
        """All sequences through a layer, in place."""
        for rows in self.batches():
            self.x[rows] = self.through(index, weights, rows)


def fast_type() -> torch.dtype:
    """What matrices are multiplied in: bfloat16 where the processor has it, as the engine's own bf16 does."""
    mkldnn = torch.backends.mkldnn
    has = mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # type: ignore[no-untyped-call]
    return torch.bfloat16 if has else torch.float32


def stream_weights(source: Source, index: int) -> dict[str, torch.Tensor]:
    """A layer's parameters: matrices in `fast_type`, norms and biases in float32."""
    return in_fast_type(layer_weights(source, index))


def in_fast_type(weights: Weights) -> dict[str, torch.Tensor]:
    """A layer's parameters with the matrices in `fast_type`."""
    dtype = fast_type()
    return {name: value.to(dtype) if value.ndim == 2 else value for name, value in weights.items()}


def stream_linear(
    name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Inputs and result in float32 around a product in the weight's type."""
    y = F.linear(x.to(weight.dtype), weight).float()
    return y if bias is None else y + bias


def _recording(found: Found, silent: Collection[str]) -> Linear:
    def linear(name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if name in silent:
            found[name] = x, x.new_zeros(1)
            return torch.zeros(*x.shape[:-1], len(weight))
        y = stream_linear(name, x, weight, None)
        found[name] = x, y
        return y if bias is None else y + bias

    return linear
