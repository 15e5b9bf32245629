"""GPTQ (Frantar et al. 2022): integers that make up for one another's rounding.

Columns are rounded one after another, and what each lost is taken out of those still to come, by the inverse
of the inputs' second moments: the output changes least where the inputs are. In the order of the inputs' size
(activation order), so that what matters most is rounded while most others can make up for it; scales are
settled before, from the weights alone, which keeps groups of neighbouring columns whatever the order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from hasten.compress.quantise import Head, Layer, Method, Rounded
from hasten.compress.torch_tensors import made_tensor
from hasten.core import READERS, Format
from hasten.errors import ModelError
from hasten.weights.codec import Encoded
from hasten.weights.packed import integers, pack_linear

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
