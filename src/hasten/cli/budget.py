"""How a quality budget is written on the command line."""

from __future__ import annotations

import re

from hasten.errors import UsageError


def fraction(text: str) -> float:
    """`1%` or `0.01` -> 0.01.

    Raises:
        UsageError: neither, negative, or 1 and more without a percent sign, which is surely a slip.
    """
    match = re.fullmatch(r"\s*\+?(\d+(?:\.\d*)?|\.\d+)\s*(%?)\s*", text)
    if match is None:
        raise UsageError(
            f"--max-ppl-increase must be a share such as 1% or 0.01, got {text!r}",
            hint="use --max-ppl-increase 1%",
        )
    value = float(match.group(1))
    if match.group(2):
        return value / 100
    if value >= 1:
        raise UsageError(
            f"--max-ppl-increase {text} would allow {value:.0%}; it is a share, or has a percent sign",
            hint=f"use --max-ppl-increase {text.strip()}%",
        )
    return value
