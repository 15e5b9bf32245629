"""What an export says of itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

Progress = Callable[[int, int], None]
"""Called with (done, total) as tensors are written."""


@dataclass(frozen=True)
class Rounding:
    """A tensor the format could not carry exactly."""

    tensor: str  # the file's name
    stored_as: str
    relative_error: float  # root of (squared rounding error / squared values); 0 where it came out exact


@dataclass(frozen=True)
class Exported:
    """What was written. Every tensor that `rounding` does not list holds the artifact's values exactly."""

    format: str
    path: Path
    bytes: int
    carried: Mapping[str, int]  # stored type -> matrices
    rounding: tuple[Rounding, ...]
    notes: tuple[str, ...]  # what the format leaves out

    @property
    def is_exact(self) -> bool:
        """Whether every value is kept."""
        return all(one.relative_error == 0 for one in self.rounding)
