"""Models that take minutes to make: made once, kept in the store, found again for nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.core import Recipe
from hasten.optimize.progress import Observer, Progress
from hasten.quality.text import Text, default_text

if TYPE_CHECKING:
    from hasten.compress.result import Progress as Done
    from hasten.models.source import Source
    from hasten.weights.packed import PackedModel

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
        """What it is kept under beside the model's content and the recipe's steps."""
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
    from hasten.models.locate import locate
    from hasten.weights.packed_store import open_store

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
    from hasten.models.artifact import keep_packed
    from hasten.models.locate import locate
    from hasten.weights.packed_store import open_store

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
    from hasten.compress.job import Job, Means
    from hasten.compress.recipe_check import needs_text
    from hasten.compress.steps import carried_out
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


def told(observer: Observer) -> Callable[[Done], None]:
    """An observer of compressing that passes on what it is told."""

    def tell(done: Done) -> None:
        left = "" if done.seconds_left is None else f", {done.seconds_left:.0f} s left"
        what = f"{done.step}: {done.detail}" if done.detail else done.step
        observer(Progress("calibrate", what + left, done.done, done.total))

    return tell


def _temporary(made: Made) -> Path:
    """An artifact that goes when the process does."""
    from hasten.cache.folders import scratch
    from hasten.models.artifact import save
    from hasten.models.locate import file_name_of

    folder = scratch()
    path = folder / f"{file_name_of(made.source.name)}.hasten"
    _log.info("not kept: %s is written to %s until this process ends", made.packed.recipe.name, folder)
    return save(path, made.packed, made.source, made.plan)
