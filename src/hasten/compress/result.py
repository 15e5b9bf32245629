"""What compressing tells while it runs, and what it gives."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hasten.core import Recipe
from hasten.models.source import Source
from hasten.weights.packed import PackedModel


@dataclass(frozen=True)
class Progress:
    """One moment of a long piece of work: compressing, distilling, searching."""

    stage: str  # "prune ffn", "quantise"; of distilling "teacher", "train"; of a search "recipes"
    detail: str = ""  # what is done just now
    done: int = 0
    total: int = 0  # 0: nobody knows
    seconds_left: float | None = None  # of this stage
    loss: float | None = None
    tokens_per_s: float | None = None
    kl: float | None = None  # the last one measured on windows held out
    candidate: Any = None  # what a search just found: a `hasten.optimize.choice.Candidate`


Observer = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """The observer that shows nothing."""


@dataclass(frozen=True)
class Step:
    """One thing that was done to the model."""

    name: str
    seconds: float = 0.0
    lines: tuple[str, ...] = ()  # what it did, for people
    record: Mapping[str, Any] = field(default_factory=dict)  # the same for machines: JSON, nothing else


@dataclass(frozen=True)
class Compressed:
    """A compressed model, and how it came to be.

    `recipe` has its rules for layers spelled out, `source` is what was quantised: pruned, rotated, distilled.
    """

    artifact: Path | None  # where it was written
    packed: PackedModel = field(repr=False)
    source: Source = field(repr=False)
    recipe: Recipe
    bits_per_weight: float  # stored, scales and head included
    seconds: float
    peak_rss_bytes: int | None  # of this process so far, mapped files included; None where unknown
    steps: tuple[Step, ...]
    calibration: dict[str, Any] | None = None  # name, tokens and sha256 of the text; None: none was read
    notes: tuple[str, ...] = ()


class StageClock:
    """Adds the time left to what a step tells, as if its parts took equally long."""

    def __init__(self, step: str, observer: Observer) -> None:
        self._step, self._observer = step, observer
        self._began = self._since = time.monotonic()
        self._first: int | None = None
        self._last = 0

    def __call__(self, done: int, total: int, detail: str = "", seconds_left: float | None = None) -> None:
        """`done` of `total` are behind us. A step that was stopped begins with what is done already."""
        if self._first is None or done < self._last:  # a step may count several things one after another
            self._first, self._since = done, time.monotonic()
        self._last = done
        here = done - self._first
        if seconds_left is None and here > 0:
            seconds_left = (time.monotonic() - self._since) / here * (total - done)
        self._observer(Progress(self._step, detail, done, total, seconds_left))

    @property
    def seconds(self) -> float:
        """Since the step began."""
        return time.monotonic() - self._began
