"""The best method found here: GPTQ where each layer sees what the quantised ones before it give.

Two streams of hidden states run through the model side by side, the source's and the quantised one's. Each
matrix is rounded for the inputs it will really get, and before that it is moved towards the weights that give
the source's outputs from those inputs: w + s (w C H^-1 - w), with H the second moments of the quantised
stream's inputs and C the cross moments of the source's. s = 1 is the least-squares fit, which follows the
calibration text too closely; halfway is better on other text (benchmarks/quantise.py). The idea of aiming at
the source's outputs is GPTAQ's (Li et al. 2025).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hasten.compress.quantise import Head, Layer, Method, QuantisedLayer, Rounded, Streams
from hasten.compress.quantise.gptq import DAMP, Factor, factor_of, gptq
from hasten.compress.quantise.statistics import StagedLayer, final_states, mean_gram, settle
from hasten.compress.stream import fast_type, in_fast_type
from hasten.compress.torch_layer import LINEARS, layer_weights
from hasten.core import READERS, Format
from hasten.models.source import Source
from hasten.weights.codec import Encoded
from hasten.weights.packed import values_of

AIM = 0.5
"""How far a matrix moves towards the least-squares fit before it is rounded."""


@dataclass(frozen=True)
class Inputs:
    """What a group of matrices reads, in both streams: float32 [B, T, cols]."""

    full: torch.Tensor
    ours: torch.Tensor

    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(H, C): mean over tokens of ours ours^T, and of full ours^T; [cols, cols] each."""
        cols = self.ours.shape[-1]
        full, ours = self.full.reshape(-1, cols), self.ours.reshape(-1, cols)
        return mean_gram(ours), (full.T @ ours).div_(len(ours))


class Best(Method):
    """`best`: every matrix for the inputs that it will get."""

    def layer(self, layer: Layer) -> Rounded:
        """Both streams move on through the layer."""
        streams = layer.streams
        assert streams is not None
        run = in_fast_type(layer.weights)
        ours = dict(run)
        there, here = StagedLayer(streams.full, layer.index), StagedLayer(streams.ours, layer.index)
        found = {}
        for group in READERS:
            inputs = Inputs(there.inputs(group, run), here.inputs(group, ours))
            if names := layer.rounded(group):
                aim = _Aim.of(inputs, layer.name(group))
                for name in names:
                    found[name] = aim.rounded(layer.weights[name], layer.layouts[name], layer.name(name))
                    ours[name] = torch.from_numpy(found[name].values()).to(fast_type())
            there.pass_on(group, run, inputs.full)
            here.pass_on(group, ours, inputs.ours)
        return Rounded(found, layer.weights)

    def head(self, head: Head) -> Encoded:
        streams = head.streams()
        full, ours = (final_states(head.source, stream) for stream in (streams.full, streams.ours))
        return _Aim.of(Inputs(full, ours), head.name).rounded(head.weight(), head.layout, head.name)


class _Aim:
    """Where a group's matrices are moved to before they are rounded."""

    def __init__(self, shift: torch.Tensor, factor: Factor) -> None:
        self._shift = shift  # [cols, cols]: s (C H^-1 - 1)
        self._factor = factor

    @classmethod
    def of(cls, inputs: Inputs, what: str) -> _Aim:
        gram, cross = inputs.moments()
        factor = factor_of(gram, what)
        damp = DAMP * gram.diagonal().mean().clamp(min=1e-30)
        gram.diagonal().add_(damp)
        cross.diagonal().add_(damp)  # so that equal streams leave the weights where they are
        fit = torch.cholesky_solve(cross.T, torch.linalg.cholesky(gram)).T
        fit.diagonal().sub_(1)
        return cls(fit.mul_(AIM), factor)

    def rounded(self, weight: torch.Tensor, layout: Format, name: str) -> Encoded:
        return gptq(weight + weight @ self._shift, self._factor, layout, name)


def advance_through(source: Source, index: int, done: QuantisedLayer, streams: Streams) -> None:
    """Both streams through a finished layer, the source's with its own matrices."""
    prefix = f"layers.{index}."
    weights = layer_weights(source, index)
    ours = dict(weights)
    for name, value in done.vectors.items():
        ours[name.removeprefix(prefix)] = value
    for name in LINEARS:
        ours[name] = torch.from_numpy(values_of(done.linears[prefix + name]))
    for stream, used in ((streams.full, weights), (streams.ours, ours)):
        settle(StagedLayer(stream, index), in_fast_type(used))
