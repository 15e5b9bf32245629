"""Calibrated integers for a search: linear by linear for mixtures, whole models from the store."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from hasten.core import Format, Recipe
from hasten.errors import MachineError
from hasten.optimize.held_out import split
from hasten.optimize.made import Asked, artifact_of, compressed, made_with, told
from hasten.optimize.progress import Observer, Progress
from hasten.optimize.space import is_calibrated
from hasten.quality.text import Text

if TYPE_CHECKING:
    from hasten.compress.calibration import Calibration
    from hasten.compress.quantise.linears import CalibratedLinears
    from hasten.models.source import Source
    from hasten.weights.packed import PackedLinear, PackedModel

INSTALL = "pip install 'hasten[compress]'"


def torch_is_here() -> bool:
    """Whether torch is installed; it is not imported for the question."""
    return find_spec("torch") is not None


@dataclass
class CalibratedWeights:
    """A source and the text it is calibrated on."""

    source: Source
    text: Text
    observer: Observer

    @classmethod
    def of(cls, source: Source, text: Text, observer: Observer) -> CalibratedWeights:
        """Looks before any work.

        Raises:
            MachineError: torch is not installed.
            UsageError: the text is too short to calibrate on.
        """
        if not torch_is_here():
            raise MachineError("torch is not installed", hint=INSTALL)
        found = cls(source, text, observer)
        _ = found.calibration
        return found

    @property
    def identity(self) -> str:
        """See `Workshop.calibrate`."""
        return hashlib.sha256(repr(sorted(made_with(self.text).items())).encode()).hexdigest()

    @cached_property
    def calibration(self) -> Calibration:
        """The windows that mixtures are calibrated on; the map is measured on others."""
        from hasten.compress.calibration import cut

        part = split(self.text.calibration).calibrate
        return cut(self.text.name, part, self.source.tokenizer())

    @cached_property
    def _linears(self) -> CalibratedLinears:
        from hasten.compress.quantise.linears import CalibratedLinears
        from hasten.compress.result import Clock

        clock = Clock("calibrating", told(self.observer))
        return CalibratedLinears(self.source, self.calibration, "gptq", observer=clock)

    def linear(self, name: str, layout: Format) -> PackedLinear:
        """One matrix by GPTQ, as if all others were the source's own; computed once, then read."""
        return self._linears.linear(name, layout)

    def whole(self, ref: str | Path, recipe: Recipe, threads: int | None) -> PackedModel:
        """A model calibrated layer after layer, each on what the quantised ones before it give.

        It comes from the store where it was made before.
        """
        from hasten.models.artifact import load_artifact

        asked = Asked(recipe, self.text)
        folder = artifact_of(ref, asked, lambda: compressed(ref, asked, self.observer, threads))
        return replace(load_artifact(folder).packed, recipe=recipe)

    def mixture(self, recipe: Recipe, threads: int | None) -> PackedModel:
        """A model whose matrices below 8 bits are calibrated one by one, all others rounded or kept."""
        from hasten.weights.packed import pack_model

        packed = pack_model(self.source, replace(recipe, method="rtn"), threads)
        packed.recipe = recipe
        chosen = {n: layout for n, layout in recipe.layers.items() if is_calibrated(layout, recipe.method)}
        for number, (name, layout) in enumerate(chosen.items()):
            self.observer(Progress("calibrate", f"{recipe.name}: {name}", number, len(chosen)))
            found = self.linear(name, layout)
            packed.linears[name].data[:] = found.data  # into the one block of huge pages
            packed.linears[name] = replace(found, data=packed.linears[name].data)
        return packed
