"""The state of a run on disk: written whole or not at all, and refused by any run but its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hasten.cache.reading import is_there, open_file
from hasten.compress.distil.result import Point
from hasten.compress.torch_file import write_state
from hasten.errors import ModelError, UsageError
from hasten.weights.work_store import state_damage

FILE = "distil.checkpoint"
_KIND = "distillation 1"


@dataclass(frozen=True)
class Checkpoint:
    """One place of a run; 12 bytes a number that learns."""

    run: str  # digest of everything that decides what the run computes
    step: int
    seconds: float  # of training so far
    curve: tuple[Point, ...]
    learning: dict[str, torch.Tensor]
    optimizer: dict[str, Any]

    def write(self, folder: Path) -> Path:
        """Replace the one in the folder.

        Raises:
            DiskError: full, read-only or forbidden disk; the one before is untouched.
        """
        curve = [vars(point) for point in self.curve]
        return write_state(folder / FILE, _KIND, {**vars(self), "curve": curve})

    @classmethod
    def read(cls, folder: Path, run: str) -> Checkpoint | None:
        """The one in the folder, None where there is none.

        Raises:
            UsageError: it belongs to another run.
            ModelError: it cannot be read.
        """
        path = folder / FILE
        if not is_there(path):
            return None
        try:
            if (wrong := state_damage(path)) is not None:
                raise ValueError(wrong)
            with open_file(path) as file:
                state = torch.load(file, map_location="cpu", weights_only=True)
            if (kind := state.pop("kind", None)) != _KIND:
                raise ValueError(f"it is {kind!r}, this program reads {_KIND!r}")
            curve = tuple(Point(**point) for point in state.pop("curve"))
            found = cls(curve=curve, **state)
        except Exception as error:  # noqa: BLE001  torch.load raises whatever a damaged file makes it
            raise ModelError(
                f"{path} cannot be read: {type(error).__name__}: {error}"[:300],
                hint=f"remove it to begin anew: rm {path}",
            ) from None
        if found.run != run:
            raise UsageError(
                f"{path} belongs to a distillation of other models, text or settings",
                hint=f"choose another folder, or remove it to begin anew: rm {path}",
            )
        return found
