"""Half-quadratic quantisation (HQQ, Badri and Shaji 2023): better scales and minimums without any data.

Weights have a few outliers that no group of integers should stretch for. So the error of a group is measured
as the sum of |w - w'|^p with p < 1, which forgives large errors and punishes many small ones. The error is
split into a sparse part, found by shrinkage, and a part that least squares brings down, in turns:

    sparse = shrink(w - w')                  the proximal step of |.|^p
    scale, minimum = least squares of w - sparse on the integers

The paper keeps the scale that spans the group and moves the zero point alone. Here both are fitted where a
layout has a minimum, which left a lower error on every tensor measured, and the scale where it has none
(symmetric layouts, for which the paper has no method). Both are rounded to fp16 in each turn. Kept is the
turn with the least error of what would be stored, among those whose squared error is no larger than rounding
to nearest leaves: never worse in either measure. Symmetric scales were searched for the least squares;
without that condition the demo model strayed further from its source than without HQQ.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from hasten.compress.quantise import Layer, Method, Rounded
from hasten.compress.quantise.gptq import nearest
from hasten.core import Format
from hasten.weights.codec import Encoded

POWER = 0.7
"""p of the paper's code."""
TURNS = 20
_BETA = 10.0
"""Weight of the quadratic part, errors in steps of the group: below a sixth of one all is noise."""
_GROWTH = 1.01
_CHUNK = 1 << 18
"""Weights solved at once: a few megabytes, which the cache holds."""


def hqq(weight: torch.Tensor, layout: Format, name: str = "the matrix") -> Encoded:
    """Integers with scales, and minimums where the layout has them, that leave a small error in |.|^0.7.

    Args:
        weight: float32 [rows, cols].
        layout: of 8, 6, 5 or 4 bits.

    Raises:
        ModelError: a value is not finite or does not fit the layout.
        UsageError: the layout's group does not divide the columns.
    """
    assert layout.is_integer, f"{layout} has no integers to find"
    start = nearest(weight, layout, name)
    rows, cols = weight.shape
    group = min(layout.group, cols)
    scales, minimums = start.scales.copy(), None if start.minimums is None else start.minimums.copy()
    u = np.empty((rows, cols), np.uint8)
    step = max(1, _CHUNK // cols)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        w = weight[part].float().reshape(-1, cols // group, group)
        lows = None if minimums is None else minimums[part]
        found = _solved(w, _Groups.of(scales[part], lows), layout)
        scales[part] = found.scale[..., 0].half().numpy()
        if lows is not None:
            lows[:] = found.minimum[..., 0].half().numpy()
        u[part] = _levels(w, found, layout).reshape(-1, cols).numpy() + _offset(layout)
    return Encoded(layout, u, scales, minimums)


class Hqq(Method):
    """`hqq`: every matrix alone."""

    def layer(self, layer: Layer) -> Rounded:
        layouts = layer.layouts.items()
        found = {name: hqq(layer.weights[name], layout, layer.name(name)) for name, layout in layouts}
        return Rounded(found, layer.weights)


@dataclass(frozen=True)
class _Groups:
    """Scale and minimum (0 in symmetric layouts) of each group, float32 [rows, groups, 1], fp16 values."""

    scale: torch.Tensor
    minimum: torch.Tensor

    @classmethod
    def of(cls, scales: np.ndarray, minimums: np.ndarray | None) -> _Groups:
        scale = torch.from_numpy(scales).float()[..., None]
        low = torch.zeros_like(scale) if minimums is None else torch.from_numpy(minimums).float()[..., None]
        return cls(scale, low)

    def where(self, chosen: torch.Tensor, other: _Groups) -> _Groups:
        """These where chosen, else others."""
        return _Groups(
            torch.where(chosen, self.scale, other.scale), torch.where(chosen, self.minimum, other.minimum)
        )


def _solved(w: torch.Tensor, start: _Groups, layout: Format) -> _Groups:
    """The turn with the least error, squares not above the first's, by group of w [rows, groups, group]."""
    now = best = start
    least = most_squares = torch.full_like(start.scale, torch.inf)
    beta = _BETA
    for turn in range(TURNS + 1):
        levels = _levels(w, now, layout)
        error = _in_steps(w, now) - levels
        roots = error.abs().clamp(min=1e-8) ** (POWER - 1)
        lost = (error.abs() * roots).sum(-1, keepdim=True) * now.scale.abs() ** POWER
        squares = (error * error).sum(-1, keepdim=True) * now.scale * now.scale
        if turn == 0:
            most_squares = squares
        is_scaled = (now.scale != 0) | (turn == 0)  # a scale that vanished counts nothing
        better = (lost < least) & (squares <= most_squares) & is_scaled
        if not bool(better.any()):
            break
        least, best = torch.where(better, lost, least), now.where(better, best)
        sparse = torch.sign(error) * (error.abs() - roots / beta).clamp(min=0)
        now = _fitted(w - sparse * now.scale, levels, layout)
        beta *= _GROWTH
    return best


def _fitted(w: torch.Tensor, levels: torch.Tensor, layout: Format) -> _Groups:
    """Least squares of w on the levels of its group, rounded to fp16; the minimum after the scale was."""
    if layout.symmetric:
        scale = _ratio((levels * w).sum(-1, keepdim=True), (levels * levels).sum(-1, keepdim=True))
        return _Groups(scale, torch.zeros_like(scale))
    spread = levels - levels.mean(-1, keepdim=True)
    scale = _ratio((spread * w).sum(-1, keepdim=True), (spread * spread).sum(-1, keepdim=True))
    return _Groups(scale, (w - scale * levels).mean(-1, keepdim=True).half().float())


def _ratio(above: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
    """above / below as fp16 values; 0 where all levels are one, which `_solved` passes over."""
    return torch.where(below > 1e-6, above / below.clamp(min=1e-6), 0.0).half().float()


def _in_steps(w: torch.Tensor, groups: _Groups) -> torch.Tensor:
    return (w - groups.minimum) / torch.where(groups.scale == 0, 1.0, groups.scale)


def _levels(w: torch.Tensor, groups: _Groups, layout: Format) -> torch.Tensor:
    """Nearest levels, whole numbers in float32: u, less 2^(bits-1) in symmetric layouts."""
    offset = _offset(layout)
    low = 1 - offset if layout.bits == 8 and layout.symmetric else -offset  # -128 does not occur in 8 bits
    steps = torch.where(groups.scale == 0, 0.0, _in_steps(w, groups))
    return steps.round().clamp(low, (1 << layout.bits) - 1 - offset)


def _offset(layout: Format) -> int:
    return 1 << (layout.bits - 1) if layout.symmetric else 0
