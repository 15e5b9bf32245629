"""The text a model is calibrated on, as windows of token ids."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hasten.errors import UsageError
from hasten.models.source import Source
from hasten.quality.text import Encoder, windows

TOKENS = 16_384
"""Tokens read where nobody says how many."""
LENGTH = 512
"""Tokens a window holds: what evaluation reads at once, too."""
FEWEST = 2_048
"""Below this, second moments of a thousand inputs are mostly chance."""


@dataclass(frozen=True)
class Calibration:
    """Windows of text, each read from an empty cache."""

    name: str
    ids: npt.NDArray[np.int32]  # [B, T]

    @property
    def tokens(self) -> int:
        """All of them."""
        return int(self.ids.size)

    @property
    def sha256(self) -> str:
        """Digest of the ids and their shape: goes into every cache key."""
        return hashlib.sha256(repr(self.ids.shape).encode() + self.ids.tobytes()).hexdigest()


def cut(
    name: str, text: str, tokenizer: Encoder, *, tokens: int = TOKENS, length: int = LENGTH
) -> Calibration:
    """Windows of `length` tokens spread evenly over a text.

    Raises:
        UsageError: the text has too few tokens to calibrate on.
    """
    count = len(tokenizer.encode(text, add_special=False))
    if count < min(FEWEST, tokens):
        raise UsageError(
            f"{name} has {count:,} tokens of calibration text, too few: {FEWEST:,} are the least",
            hint="give --calibration a text of some thousand words, or leave it out for the default text",
        )
    found = windows(
        text, tokenizer, tokens=min(tokens, count // length * length), length=min(length, count - 1)
    )
    return Calibration(name, np.stack([window.inputs for window in found]))


def work_key(source: Source, calibration: Calibration | None, *how: object) -> str:
    """What kept work belongs to: 32 hexadecimal digits that differ where model, text or `how` do."""
    text = None if calibration is None else calibration.sha256
    return hashlib.sha256(repr((source.content, text, how)).encode()).hexdigest()[:32]
