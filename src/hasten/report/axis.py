"""Where ticks of a linear axis stand."""

from __future__ import annotations

import math

_NICE = (1.0, 2.0, 2.5, 5.0, 10.0)


def ticks(highest: float, room: float = 1.0) -> list[float]:
    """About five round numbers from 0 up to `room` times `highest`, which must be above 0."""
    rough = highest / 4
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(n * scale for n in _NICE if n * scale >= rough * 0.999)
    return [step * i for i in range(math.ceil(highest * room / step) + 1)]
