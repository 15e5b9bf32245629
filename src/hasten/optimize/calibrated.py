"""Calibrated integers: linear by linear for mixtures, whole models made once and kept in the store."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.cache.folders import scratch
from hasten.compress.result import Observer, Progress
from hasten.core import Budget, Format, Recipe
from hasten.errors import MachineError
from hasten.models.artifact import keep_packed, load_artifact, save
from hasten.models.source import file_name_of, locate
from hasten.quality.text import Text, default_text
from hasten.weights.packed import PackedLinear, PackedModel, pack_model
from hasten.weights.packed_store import open_store

if TYPE_CHECKING:
    from hasten.compress.calibration import Calibration
    from hasten.compress.quantise.layerwise import CalibratedLinears
    from hasten.models.source import Source

_BLOCKS = 8
_HELD_OUT = (2, 6)  # of them: a quarter, from two places


def split(text: str) -> tuple[str, str]:
    """(to calibrate on, held out): two of eight blocks of a calibration text, cut at line ends if any."""
    cuts = [0, *(_line_end(text, len(text) * i // _BLOCKS) for i in range(1, _BLOCKS)), len(text)]
    blocks = [text[first:last] for first, last in pairwise(cuts)]
    rest = "".join(block for i, block in enumerate(blocks) if i not in _HELD_OUT)
    return rest, "".join(blocks[i] for i in _HELD_OUT)


def _line_end(text: str, near: int) -> int:
    """The end of the line before `near`, if it lies within the block; else `near` itself."""
    found = text.rfind("\n", max(0, near - len(text) // (2 * _BLOCKS)), near) + 1
    return found or near


METHOD_VERSION = 1
"""Raised whenever a method finds other integers than before: what was kept then counts no more."""

_log = logging.getLogger("hasten.optimize")


@dataclass(frozen=True)
class Asked:
    """What is to be made of a model, and on which text."""

    recipe: Recipe
    text: Text
    more: Mapping[str, Any] = field(default_factory=dict)  # what else it depends on

    @property
    def key(self) -> dict[str, Any]:
        return {**made_with(self.text), **self.more, "name": self.recipe.name}


@dataclass(frozen=True)
class Made:
    """A model that was made, with what goes into its plan.json."""

    packed: PackedModel
    source: Source
    plan: Mapping[str, Any]


def made_with(text: Text) -> dict[str, Any]:
    """What calibrated integers depend on besides model and recipe: goes into cache keys."""
    from hasten.compress.calibration import LENGTH, TOKENS

    return {"text": text.sha256, "tokens": TOKENS, "length": LENGTH, "methods": METHOD_VERSION}


def kept_artifact(ref: str | Path, asked: Asked) -> Path | None:
    """The folder of what was made before; None where there is none, or nothing is kept."""
    store = open_store()
    if store is None:
        return None
    return store.find(locate(ref).files, asked.recipe, Path, asked.key)[0]


def artifact_of(ref: str | Path, asked: Asked, make: Callable[[], Made], *, keep: bool = True) -> Path:
    """The folder of an artifact, made now where it is not kept yet.

    Two processes that ask at once may both make it; the folder appears whole, and the second finds it there.

    Args:
        ref: the source.
        asked: what it is kept under.
        make: makes it.
        keep: False writes it to a temporary folder that goes with this process, and so does a store that is
            switched off or too small.

    Raises:
        ModelError: there is no such model. DiskError: a full disk. And what `make` raises.
    """
    store = open_store() if keep else None
    if store is None:
        return _temporary(make())
    folder, origin = store.find(locate(ref).files, asked.recipe, Path, asked.key)
    if folder is not None:
        return folder
    made = make()
    if origin is not None:
        folder = keep_packed(
            store, origin, asked.recipe, made.packed, made.source, made_with=asked.key, plan=made.plan
        )
    return folder if folder is not None else _temporary(made)


def compressed(ref: str | Path, asked: Asked, observer: Observer, threads: int | None = None) -> Made:
    """A model through all steps of a recipe: `hasten.compress` on the calibration part of a text.

    Raises:
        MachineError: torch is not installed.
        UsageError: the recipe does not fit the model, or the text is too short.
        ModelError, DiskError: the model cannot be opened, the disk is full.
    """
    from hasten.compress.calibration import TOKENS, cut
    from hasten.compress.compress import carried_out
    from hasten.compress.job import Job, Means, needs_text
    from hasten.models.open import open_model

    source = open_model(ref)
    text = None  # the default text, as much of it as each step wants
    if needs_text(asked.recipe) and asked.text != default_text():
        text = cut(asked.text.name, asked.text.calibration, source.tokenizer())
    job = Job.of(source, asked.recipe, text, TOKENS, Means(threads=threads), told(observer))
    job.check_disk(None)
    result = carried_out(job)
    job.clean()
    plan = {
        "calibration": result.calibration,
        "steps": [{"name": s.name, "seconds": s.seconds, "lines": list(s.lines)} for s in result.steps],
        "notes": list(result.notes),
    }
    return Made(result.packed, result.source, {"compress": plan})


def told(observer: Observer) -> Callable[[Progress], None]:
    """An observer of compressing that passes on what it is told."""

    def tell(done: Progress) -> None:
        left = "" if done.seconds_left is None else f", {done.seconds_left:.0f} s left"
        what = f"{done.stage}: {done.detail}" if done.detail else done.stage
        observer(Progress("calibrate", what + left, done.done, done.total))

    return tell


def _temporary(made: Made) -> Path:
    """An artifact that goes when the process does."""
    folder = scratch()
    path = folder / f"{file_name_of(made.source.name)}.hasten"
    _log.info("not kept: %s is written to %s until this process ends", made.packed.recipe.name, folder)
    return save(path, made.packed, made.source, made.plan)


def is_calibrated(layout: Format, method: str) -> bool:
    """Whether a mixture's integers of this layout come from calibration: 8 bits round as well without."""
    return method != "rtn" and layout.bits < 8


def is_mixture(recipe: Recipe) -> bool:
    """Whether a recipe gives single layers their widths and keeps the source's values in all others."""
    return recipe.default is None and recipe.head is None and bool(recipe.layers)


def mixture_name(budget: Budget) -> str:
    """`mix:1%`."""
    return f"mix:{budget.max_ppl_increase * 100:.4g}%"


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
            raise MachineError("torch is not installed", hint="pip install 'hasten[compress]'")
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

        part, _ = split(self.text.calibration)
        return cut(self.text.name, part, self.source.tokenizer())

    @cached_property
    def _linears(self) -> CalibratedLinears:
        from hasten.compress.quantise.layerwise import CalibratedLinears
        from hasten.compress.result import StageClock

        clock = StageClock("calibrating", told(self.observer))
        return CalibratedLinears(self.source, self.calibration, observer=clock)

    def linear(self, name: str, layout: Format) -> PackedLinear:
        """One matrix by GPTQ, as if all others were the source's own; computed once, then read."""
        return self._linears.linear(name, layout)

    def whole(self, ref: str | Path, recipe: Recipe, threads: int | None) -> PackedModel:
        """A model calibrated layer after layer, each on what the quantised ones before it give.

        It comes from the store where it was made before.
        """
        asked = Asked(recipe, self.text)
        folder = artifact_of(ref, asked, lambda: compressed(ref, asked, self.observer, threads))
        return replace(load_artifact(folder).packed, recipe=recipe)

    def mixture(self, recipe: Recipe, threads: int | None) -> PackedModel:
        """A model whose matrices below 8 bits are calibrated one by one, all others rounded or kept."""
        packed = pack_model(self.source, replace(recipe, method="rtn"), threads)
        packed.recipe = recipe
        chosen = {n: layout for n, layout in recipe.layers.items() if is_calibrated(layout, recipe.method)}
        for number, (name, layout) in enumerate(chosen.items()):
            self.observer(Progress("calibrate", f"{recipe.name}: {name}", number, len(chosen)))
            found = self.linear(name, layout)
            packed.linears[name].data[:] = found.data  # into the one block of huge pages
            packed.linears[name] = replace(found, data=packed.linears[name].data)
        return packed
