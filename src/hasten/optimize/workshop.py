"""What the search needs of the engine: models made from recipes, judged, timed and saved.

`EngineWorkshop` is the real one; tests search with a small NumPy one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from hasten.core import EngineOptions, Format, Machine, Measurement, ModelConfig, Recipe, Workload
from hasten.optimize.progress import Observer
from hasten.quality.divergence import Runnable
from hasten.quality.text import Encoder, Text
from hasten.recipe import Method


class Built(Runnable, Protocol):
    """A model made from a recipe, in memory."""

    @property
    def bits_per_weight(self) -> float:
        """Mean stored bits over the linear layers, scales included."""
        ...

    @property
    def weight_bytes(self) -> int:
        """Bytes of linear weights one decoded token reads."""
        ...

    def close(self) -> None:
        """Gives the memory back."""
        ...


class Workshop(Protocol):
    """An opened source model and everything that can be made of it."""

    options: EngineOptions

    @property
    def name(self) -> str:
        """The source's name."""
        ...

    @property
    def config(self) -> ModelConfig:
        """The source's shape."""
        ...

    def identity(self) -> dict[str, Any]:
        """What the source is, byte for byte: goes into cache keys."""
        ...

    def machine(self) -> Machine:
        """The machine everything is measured on."""
        ...

    def tokenizer(self) -> Encoder:
        """The source's tokenizer."""
        ...

    def kept(self) -> Mapping[str, Format]:
        """Format that holds the source's own values, by canonical name of each linear layer."""
        ...

    def calibrate(self, text: Text, observer: Observer) -> str:
        """Take a text for the methods that need one.

        Returns:
            A digest of what their integers depend on besides recipe and source.

        Raises:
            MachineError: there are none here, because torch is not installed.
            UsageError: the text is too short to calibrate on.
        """
        ...

    def build(self, recipe: Recipe) -> Built:
        """A model by a recipe; its owner closes it."""
        ...

    def swap(
        self, model: Built, tensors: Sequence[str], layout: Format | None, method: Method = "rtn"
    ) -> None:
        """Puts other weights into a built model: the source's, packed to `layout`, or kept (None)."""
        ...

    def error(self, tensor: str, layout: Format) -> float:
        """Mean squared difference to the source's values that packing to `layout` makes."""
        ...

    def measure(self, model: Built, workload: Workload, runs: int) -> Measurement:
        """Speed of a built model."""
        ...

    def claim(self, folder: Path) -> None:
        """Says that an artifact of this source will be written there.

        Raises:
            DiskError: one of another model stands there.
        """
        ...

    def save(self, model: Built, folder: Path, plan: Mapping[str, Any], report: str) -> Path:
        """Writes an artifact with its report.html; what is there before stays until it is whole."""
        ...
