"""A model and all that will be done to it, looked at before any work."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import hasten
from hasten.cache.folders import refuse_foreign, tree_bytes
from hasten.compress.calibration import Calibration
from hasten.compress.calibration_text import calibration_from
from hasten.compress.prune_check import pruned_shape
from hasten.compress.recipe_check import checked, fitted, needs_text
from hasten.compress.recipe_file import write_recipe
from hasten.compress.result import Observer
from hasten.compress.room import artifact_bytes, refuse_small_disk, work_bytes
from hasten.core import Recipe
from hasten.errors import UsageError
from hasten.models.artifact import refuse_other_model
from hasten.models.source import Source
from hasten.weights.work_store import WorkStore


@dataclass(frozen=True)
class Means:
    """With what a model is compressed; what comes out depends on it by rounding alone."""

    threads: int | None = None  # None: the cores this process may use
    device: str | None = None  # of distilling: "cpu", "cuda"; None takes a GPU where there is one
    distil_seconds: float | None = None  # distilling stops after so long; None: when its tokens are read


@dataclass(frozen=True)
class Job:
    """A model and all that will be done to it, checked."""

    source: Source
    asked: Recipe  # its rules for layers as written
    recipe: Recipe  # spelled out
    text: Calibration | None  # for statistics
    lesson: Calibration | None  # for distilling: as much of the text as is asked for
    means: Means
    observer: Observer

    @classmethod
    def of(
        cls,
        source: Source,
        recipe: Recipe,
        calibration: str | Path | Calibration | None,
        tokens: int,
        means: Means,
        observer: Observer,
    ) -> Job:
        """Look at everything before any work.

        Raises:
            UsageError, MachineError, TokenizerError: as `compress`.
        """
        found = checked(recipe, source.config)
        source.tokenizer()  # an artifact holds it
        text = lesson = None
        if isinstance(calibration, Calibration):
            text = lesson = calibration
        elif needs_text(found):
            text = calibration_from(calibration, source.tokenizer(), tokens)
            if found.distil is not None:
                most = max(found.distil.tokens, tokens)
                lesson = calibration_from(calibration, source.tokenizer(), most, said=lambda _: None)
        elif calibration is not None:
            raise UsageError(
                f"recipe {found.name} reads no calibration text",
                hint="leave --calibration out, or use w4-best",
            )
        if found.distil is not None:
            _refuse_lesson(lesson, means)
        fitted(recipe, source.config, pruned_shape(found, source.config, text))
        return cls(source, recipe, found, text, lesson, means, observer)

    @property
    def folder(self) -> Path:
        """What is kept until the model is done: by the model's content, recipe, text and version."""
        texts = [one.sha256 for one in (self.text, self.lesson) if one is not None]
        key = [
            hasten.__version__,
            self.source.content,
            write_recipe(replace(self.recipe, name="")),
            texts,
        ]
        return WorkStore().place("runs", hashlib.sha256(repr(key).encode()).hexdigest()[:32])

    def check_disk(self, out: Path | None, force: bool = False) -> None:
        """Refuse an artifact that has no place, and make room in the cache for the work.

        Args:
            out: where it will be. force: an artifact of another model may be replaced.

        Raises:
            DiskError: too little room for it or the work, or something else stands there.
            UsageError: HASTEN_CACHE_GB is no number.
        """
        if out is not None:
            refuse_foreign(Path(os.path.realpath(out)), "plan.json")
            if not force:
                refuse_other_model(out, self.source, "--force")
        tokens, lesson = (0 if text is None else text.tokens for text in (self.text, self.lesson))
        there = tree_bytes(self.folder) if self.folder.is_dir() else 0
        work = work_bytes(self.source, self.recipe, tokens, lesson)
        needs = {self.folder: max(0, work - there)}
        if work:
            WorkStore().make_room(self.folder, needs[self.folder])
        if out is not None:
            needs[out.absolute()] = artifact_bytes(self.source, self.recipe)
        refuse_small_disk({place: need for place, need in needs.items() if need})
        if work:
            WorkStore().mark(self.folder, self.source.name)

    def clean(self) -> None:
        """Remove what was kept to go on from."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _refuse_lesson(lesson: Calibration | None, means: Means) -> None:
    from hasten.compress.quantise.torch_machine import refuse_device

    refuse_device(means.device)
    if lesson is None or len(lesson.ids) < 2:
        raise UsageError(
            "distil: one window of text cannot be trained on and held out", hint="give more calibration text"
        )
