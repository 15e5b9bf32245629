"""GPTQ (Frantar et al. 2022): integers that make up for one another's rounding; `best` and AWQ beside it.

Columns are rounded one after another, and what each lost is taken out of those still to come, by the inverse
of the inputs' second moments: the output changes least where the inputs are. In the order of the inputs' size
(activation order), so that what matters most is rounded while most others can make up for it; scales are
settled before, from the weights alone, which keeps groups of neighbouring columns whatever the order.

The best method found here (`Best`) lets each layer see what the quantised ones before it give. Two streams of
hidden states run through the model side by side, the source's and the quantised one's. Each matrix is rounded
for the inputs it will really get, and before that it is moved towards the weights that give the source's
outputs from those inputs: w + s (w C H^-1 - w), with H the second moments of the quantised stream's inputs
and C the cross moments of the source's. s = 1 is the least-squares fit, which follows the calibration text
too closely; halfway is better on other text (benchmarks/quantise.py). The idea of aiming at the source's
outputs is GPTAQ's (Li et al. 2025).

AWQ (Lin et al. 2023) rounds weights that meet large activations on a finer grid. Column j of the matrices
that read an input is multiplied by s_j, and the input divided by it, which folds into what makes the input
(`fold`). s_j is the input's size to a power between 0 and 1; the power is the one that leaves the least error
of the output, measured with the inputs' second moments, so that no activations are kept. Scales clipped below
the largest weight, AWQ's other half, are what packing searches anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from hasten.compress.quantise import (
    Head,
    Layer,
    Method,
    QuantisedLayer,
    Rounded,
    Streams,
    divided,
    evened,
    fold,
    foldable,
    shared_scales,
)
from hasten.compress.quantise.statistics import StagedLayer, final_states, mean_gram, settle
from hasten.compress.stream import fast_type, in_fast_type
from hasten.compress.torch_model import LINEARS, Weights, layer_weights, made_tensor
from hasten.core import READERS, Format, Group, ModelSpec
from hasten.errors import ModelError
from hasten.models.source import Source
from hasten.weights.codec import Encoded
from hasten.weights.packed import integers, pack_linear, values_of

DAMP = 0.05
"""Part of the mean second moment added to each: directions that the text hardly has are not fitted."""
_BLOCK = 128
"""Columns whose losses are spread at once to all that follow."""
_ROWS = 16_384
"""Rows solved together: what a vocabulary of 152,000 words would otherwise take is gigabytes."""


@dataclass(frozen=True)
class Factor:
    """Everything of the inputs that rounding needs, shared by the matrices that read them."""

    order: torch.Tensor  # int64 [cols], columns as they are rounded
    upper: torch.Tensor  # float32 [cols, cols], upper Cholesky factor of the inverse second moments

    @classmethod
    def of(cls, gram: torch.Tensor, damp: float = DAMP) -> Factor:
        """Of second moments float32 [cols, cols], of any scale.

        Costs three times their memory, and cols^3 multiplications.
        """
        diagonal = gram.diagonal()
        order = torch.argsort(diagonal, descending=True)
        damped = gram[order][:, order]
        damped.diagonal().add_(max(damp * float(diagonal.mean()), 1e-30))
        lower = torch.linalg.cholesky(damped)
        return cls(order, torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True))


def nearest(weight: torch.Tensor, layout: Format, name: str = "the matrix") -> Encoded:
    """Round-to-nearest with searched scales: what `pack_linear` stores of float32 [rows, cols].

    Raises:
        ModelError: a value is not finite or does not fit the layout.
        UsageError: the layout's group does not divide the columns.
    """
    return integers(pack_linear(made_tensor(name, tuple(weight.shape), weight.float()), layout))


def gptq(weight: torch.Tensor, factor: Factor, layout: Format, name: str = "the matrix") -> Encoded:
    """Integers for a matrix whose inputs have the moments of `factor`.

    Args:
        weight: float32 [rows, cols].
        layout: of 8, 6, 5 or 4 bits.

    Raises:
        ModelError, UsageError: as `nearest`, whose scales and minimums are kept.
    """
    start = nearest(weight, layout, name)
    u = np.empty(weight.shape, np.uint8)
    for first in range(0, len(weight), _ROWS):
        part = slice(first, first + _ROWS)
        u[part] = _rounded(weight[part], factor, start, part).numpy()
    return Encoded(layout, u, start.scales, start.minimums)


def _rounded(weight: torch.Tensor, factor: Factor, start: Encoded, part: slice) -> torch.Tensor:
    """u of some rows: uint8 [rows, cols]."""
    layout, order = start.layout, factor.order
    place = order // layout.group  # group of each column as they come
    scale = torch.from_numpy(start.scales[part]).float().T[place]  # [cols, rows]
    zero = 1 << (layout.bits - 1)
    low = torch.full_like(scale, -float(zero)) * scale
    if start.minimums is not None:
        low = torch.from_numpy(start.minimums[part]).float().T[place]
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    # below 8 bits all levels are used; 8-bit symmetric integers keep to -127..127 as packing does
    least = 1.0 if layout.bits == 8 and layout.symmetric else 0.0
    most = float((1 << layout.bits) - 1)
    left = weight.float().T[order] - low  # what is still to be expressed, [cols, rows]
    u = torch.empty_like(left)
    for at in range(0, len(left), _BLOCK):
        end = min(at + _BLOCK, len(left))
        block, lost = left[at:end], torch.empty_like(left[at:end])
        upper = factor.upper[at:end, at:end]
        for i, pivot in enumerate(upper.diagonal().tolist()):
            level = (block[i] * inverse[at + i]).round_().clamp_(least, most)
            u[at + i] = level
            lost[i] = (block[i] - level * scale[at + i]) / pivot
            if i + 1 < len(block):
                block[i + 1 :].addr_(upper[i, i + 1 :], lost[i], alpha=-1)
        left[end:].addmm_(factor.upper[at:end, end:].T, lost, alpha=-1)
    found = torch.empty_like(u)
    found[order] = u
    return found.T.contiguous().to(torch.uint8)


class Gptq(Method):
    """`gptq`: each group of matrices by the second moments of what it reads in the source."""

    def layer(self, layer: Layer) -> Rounded:
        found = {}
        for group in READERS:
            if names := layer.rounded(group):
                factor = factor_of(layer.grams[group], layer.name(group))
                for name in names:
                    found[name] = gptq(layer.weights[name], factor, layer.layouts[name], layer.name(name))
        return Rounded(found, layer.weights)

    def head(self, head: Head) -> Encoded:
        return gptq(head.weight(), factor_of(head.moments(), head.name), head.layout, head.name)


def factor_of(gram: torch.Tensor, what: str) -> Factor:
    """The inverse of second moments.

    Raises:
        ModelError: they cannot be inverted, which damped moments of finite activations always can.
    """
    try:
        return Factor.of(gram)
    except RuntimeError:  # torch.linalg.LinAlgError is one
        raise ModelError(
            f"{what}: the second moments of its inputs cannot be inverted",
            hint="the activations on this text are not finite or beyond float32: use another --calibration",
        ) from None


def lost(gram: torch.Tensor, weight: torch.Tensor, found: torch.Tensor) -> float:
    """Squared change of the output, summed over rows and tokens of `gram`; weights [rows, cols]."""
    error = found - weight
    return float(((error @ gram) * error).sum(dtype=torch.float64))


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


POWERS = tuple(i / 10 for i in range(10))
_FARTHEST = 64.0
"""Most that a scale lies from the mean."""


def input_scales(gram: torch.Tensor, power: float) -> torch.Tensor:
    """The inputs' sizes to a power, [cols], their geometric mean 1."""
    size = gram.diagonal().clamp(min=0).sqrt()
    return evened(power * size.clamp(min=1e-30).log(), size > 0, _FARTHEST)


def awq_scales(
    weights: Weights,
    config: ModelSpec,
    group: Group,
    gram: torch.Tensor,
    layouts: Mapping[str, Format],
) -> torch.Tensor:
    """s of one group, float32 [cols], that leaves the least error of its outputs.

    Args:
        group: a foldable one.
        gram: second moments of what it reads, [cols, cols].
        layouts: of matrices that become integers; others have no say.
    """
    best, least = torch.ones(len(gram)), float("inf")
    for power in POWERS:
        scales = shared_scales(weights, config, group, input_scales(gram, power))
        error = 0.0
        for name in READERS[group]:
            if name in layouts:
                found = torch.from_numpy(nearest(weights[name] * scales, layouts[name], name).values())
                error += lost(gram, weights[name], found / scales)
        if error < least:
            best, least = scales, error
    return best


def scaled(layer: Layer) -> Layer:
    """A layer scaled for its layouts, and the moments of its inputs as they are then.

    Groups whose scales fold into nothing stay as they are.
    """
    weights, grams = layer.weights, dict(layer.grams)
    for group, gram in layer.grams.items():
        if layer.rounded(group) and foldable(layer.config, group):
            scales = awq_scales(weights, layer.config, group, gram, layer.layouts)
            weights = fold(weights, layer.config, group, scales)
            grams[group] = divided(gram, scales)
    return replace(layer, weights=weights, grams=grams)


class Awq(Method):
    """`awq`: scaled, then rounded to the nearest."""

    scales = True

    def layer(self, layer: Layer) -> Rounded:
        return Rounded({}, scaled(layer).weights)


class AwqGptq(Gptq):
    """`awq-gptq`: scaled, then rounded by GPTQ."""

    scales = True

    def layer(self, layer: Layer) -> Rounded:
        return super().layer(scaled(layer))
