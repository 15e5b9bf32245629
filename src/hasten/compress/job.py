"""A model and all that will be done to it, and the room that takes on disk, looked at before any work."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import hasten
from hasten.cache.folders import refuse_foreign, tree_bytes
from hasten.cache.store import free_bytes, why_not_writable
from hasten.compress.calibration import Calibration, calibration_from, statistics_bytes, work_key
from hasten.compress.recipe_check import (
    checked,
    fitted,
    needs_text,
    pruned_shape,
    reads_moments,
    refuse_short,
)
from hasten.compress.recipe_file import write_recipe
from hasten.compress.result import Observer
from hasten.core import Recipe
from hasten.errors import DiskError, UsageError
from hasten.models.artifact import refuse_other_model
from hasten.models.source import Source
from hasten.recipe import METHODS
from hasten.weights.packed import source_layout
from hasten.weights.work_store import WorkStore

_STATE_BYTES = 2 * 12
"""Of a checkpoint, for each number that learns: the number and two moments; the last one stays meanwhile."""


def artifact_bytes(source: Source, recipe: Recipe) -> int:
    """Bytes of the matrices by a recipe; what is pruned counts, as it is not known yet how much it is."""
    total = 0
    for name, tensor in source.tensors.items():
        if len(tensor.shape) == 2:
            layout = recipe.layout_for(name) or source_layout(tensor)
            total += layout.bytes_of(*tensor.shape)
    return total


def work_bytes(source: Source, recipe: Recipe, tokens: int, distil_tokens: int) -> int:
    """Bytes that lie in the cache at most: finished layers, second moments, a checkpoint of distilling."""
    layers = 0 if recipe.is_plain else artifact_bytes(source, recipe)
    layers += statistics_bytes(source.config) if reads_moments(recipe) else 0
    if METHODS[recipe.method].reads == "states":  # of the source and of what is quantised
        layers += 2 * 4 * source.config.width * tokens
    if recipe.distil is None:
        return layers
    states = 4 * source.config.width * distil_tokens
    learning = source.config.weights_stored
    if (rank := recipe.distil.lora) is not None:
        learning = sum(rank * (rows + cols) for rows, cols in source.config.linear_shapes().values())
    return layers + states + _STATE_BYTES * learning


def refuse_small_disk(needs: dict[Path, int]) -> None:
    """Compare what will be written with what is free, one disk at a time.

    Args:
        needs: folder, there or not yet -> bytes.

    Raises:
        DiskError: a disk has too little room.
    """
    by_disk: dict[int | None, list[Path]] = {}
    for folder in needs:
        by_disk.setdefault(_disk(folder), []).append(folder)
    for folder in needs:
        if (why := why_not_writable(folder)) is not None:
            raise DiskError(
                f"{folder} cannot be written: {why}",
                hint="choose another place with --out DIR or HASTEN_CACHE=DIR",
            )
    for folders in by_disk.values():
        need, free = sum(needs[folder] for folder in folders), free_bytes(folders[0])
        if free is not None and free < need:
            raise DiskError(
                f"{' and '.join(map(str, folders))} would take about {need / 1e6:,.0f} MB, and "
                f"{free / 1e6:,.0f} MB are free there",
                hint="free some space, or choose another disk with --out DIR or HASTEN_CACHE=DIR",
            )


def _disk(path: Path) -> int | None:
    for folder in (path, *path.parents):
        try:
            return os.stat(folder).st_dev  # noqa: PTH116
        except OSError:
            continue
    return None


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
            from hasten.compress.torch_tensors import device_of

            device_of(means.device)
            refuse_short(lesson)
        fitted(recipe, source.config, pruned_shape(found, source.config, text))
        return cls(source, recipe, found, text, lesson, means, observer)

    @property
    def folder(self) -> Path:
        """What is kept until the model is done: by the model's content, recipe, text and version."""
        recipe, lesson = write_recipe(replace(self.recipe, name="")), self.lesson and self.lesson.sha256
        return WorkStore().place("runs", work_key(self.source, self.text, hasten.__version__, recipe, lesson))

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
