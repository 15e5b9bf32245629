"""What pruning gives: the smaller or sparser model, and what went where."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from hasten.core import as_json
from hasten.models.source import Source
from hasten.recipe import Pruning


@dataclass(frozen=True)
class PartPruned:
    """One place that lost something.

    Errors are squared errors relative to the squares of what the original model gives there, over the
    calibration text and under a root; None where they were not measured.
    """

    name: str  # `layers.3`, or a tensor such as `layers.3.down`
    kept: int  # weights, channels, heads, layers, ...
    total: int
    error_before: float | None = None  # as cut
    error_after: float | None = None  # repaired; None without repair


@dataclass(frozen=True)
class Pruned:
    """A model with parts taken out.

    `gets_faster` says whether Hasten's engine runs it faster than the model it was made from, and `because`
    why.
    """

    source: Source
    pruning: Pruning
    parts: tuple[PartPruned, ...]
    unit: str  # what `kept` and `total` count
    weights_before: int  # of the linear layers read for one token, head included
    weights_after: int  # of them not zero
    bytes_before: int  # in bf16, zeros stored
    bytes_after: int
    gets_faster: bool
    because: str
    notes: tuple[str, ...] = field(default=())  # what was left undone, and why

    def lines(self) -> list[str]:
        """The report as text."""
        kept, total = (sum(getattr(part, name) for part in self.parts) for name in ("kept", "total"))
        found = [
            f"prune {self.pruning.kind}: {kept:,} of {total:,} {self.unit} kept",
            f"weights a token reads: {self.weights_after:,} of {self.weights_before:,} are not zero; "
            f"bf16 bytes {self.bytes_after:,} of {self.bytes_before:,}",
            ("faster here: " if self.gets_faster else "not faster here: ") + self.because,
        ]
        found += [_line(part) for part in self.parts]
        return [*found, *self.notes]

    def record(self) -> dict[str, Any]:
        """The report as JSON."""
        return {f.name: as_json(getattr(self, f.name)) for f in fields(self) if f.name != "source"}


def _line(part: PartPruned) -> str:
    text = f"{part.name}: {part.kept:,} of {part.total:,} kept"
    if part.error_before is not None:
        text += f", output error {part.error_before:.1%}"
    if part.error_after is not None:
        text += f", repaired {part.error_after:.1%}"
    return text
