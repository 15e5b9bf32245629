"""How many of a width stay."""

from __future__ import annotations

from hasten.errors import UsageError

MULTIPLE = 32
"""Widths are kept in such multiples: a group of int8 activations."""


def kept_multiple(kind: str, noun: str, width: int, amount: float) -> int:
    """What is left of `width` without the fraction `amount`, as a multiple of 32.

    Raises:
        UsageError: nothing is left, or nothing goes.
    """
    kept = MULTIPLE * round((1 - amount) * width / MULTIPLE)
    if 0 < kept < width:
        return kept
    what = f"leaves no {noun}" if kept <= 0 else f"takes no {noun} out"
    most = MULTIPLE * ((width - 1) // MULTIPLE)
    if most == 0:
        raise UsageError(
            f"prune {kind}: a model with {width} {noun}s has none to spare; they are kept in multiples "
            f"of {MULTIPLE}",
            hint="prune layers instead: kind: layers",
        )
    raise UsageError(
        f"prune {kind}: amount {amount:g} of {width} {noun}s {what}; they are kept in multiples "
        f"of {MULTIPLE}",
        hint=f"use an amount between {1 - most / width:.3f} and {1 - MULTIPLE / width:.3f}",
    )
