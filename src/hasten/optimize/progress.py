"""What the search tells whoever watches it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hasten.optimize.candidate import Candidate


@dataclass(frozen=True)
class Progress:
    """One step of a long piece of work."""

    stage: str  # "reference", "recipes", "sensitivity", "mixture", "artifact"
    detail: str  # "w5: quality"
    done: int = 0
    total: int = 0  # 0: no count
    candidate: Candidate | None = None  # what was just found


Observer = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """The observer that shows nothing."""
