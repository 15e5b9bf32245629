"""What distillation gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hasten.core import as_json
from hasten.models.source import Source
from hasten.weights.codec import Encoded


@dataclass(frozen=True)
class Point:
    """One place of the curve."""

    step: int
    tokens: int  # trained on so far
    seconds: float  # of training so far
    loss: float | None  # mean since the last point; None before the first step
    kl: float  # mean KL(teacher || student) on windows held out, nats a token


@dataclass(frozen=True)
class Distilled:
    """A student that has learned.

    `source` has its values: float ones in the type they were computed in, and those of layers trained in a
    layout as that layout's integers, so that packing them with no layout named gives what was trained.
    """

    source: Source
    curve: tuple[Point, ...]
    tokens: int  # trained on, repeats counted
    seconds: float  # of training, interrupted runs together
    integers: Mapping[str, Encoded] = field(default_factory=dict, repr=False)  # of layers with a layout

    def lines(self) -> list[str]:
        """The report as text."""
        first, last = self.curve[0], self.curve[-1]
        return [
            f"distil: {self.tokens:,} tokens in {self.seconds:,.0f} s",
            f"KL to the teacher on held-out text: {first.kl:.4f} before, {last.kl:.4f} after",
        ]

    def record(self) -> dict[str, Any]:
        """The report as JSON: the curve."""
        return {"tokens": self.tokens, "seconds": self.seconds, "curve": [as_json(p) for p in self.curve]}
