"""The calibration text cut in two: one part finds the integers, the other measures what they cost.

A map measured on the windows that GPTQ has seen would flatter it. Neither part is the evaluation text.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

_BLOCKS = 8
_HELD_OUT = (2, 6)  # of them: a quarter, from two places


@dataclass(frozen=True)
class CalibrationSplit:
    """Two texts without overlap."""

    calibrate: str
    held_out: str


def split(text: str) -> CalibrationSplit:
    """Eight blocks of a text, cut at line ends where there are any; two of them are held out.

    Args:
        text: `Text.calibration`.
    """
    cuts = [0, *(_line_end(text, len(text) * i // _BLOCKS) for i in range(1, _BLOCKS)), len(text)]
    blocks = [text[first:last] for first, last in pairwise(cuts)]
    return CalibrationSplit(
        calibrate="".join(block for i, block in enumerate(blocks) if i not in _HELD_OUT),
        held_out="".join(blocks[i] for i in _HELD_OUT),
    )


def _line_end(text: str, near: int) -> int:
    """The end of the line before `near`, if it lies within the block; else `near` itself."""
    found = text.rfind("\n", max(0, near - len(text) // (2 * _BLOCKS)), near) + 1
    return found or near
