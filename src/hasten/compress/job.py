"""A model and all that a recipe asks of it, and the room that takes on disk, looked at before any work.

Rules for layers are spelled out. One such as `layers.*.down`, `layers.0-3.q,k,v` or `head` has parts with
dots between as a layer's name. Each is one name or several with commas between; `*` stands for anything,
`3-7` for these numbers, both ends included. Where two rules meet, the one that names fewer of the other's
layers wins: one that takes a part of what the other takes.
"""

from __future__ import annotations

import difflib
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path

import hasten
from hasten.cache.folders import refuse_foreign, tree_bytes
from hasten.cache.store import free_bytes, why_not_writable
from hasten.compress.calibration import Calibration, calibration_from, statistics_bytes, work_key
from hasten.compress.recipe_file import write_recipe
from hasten.compress.result import Observer
from hasten.core import READERS, Format, ModelSpec, Recipe
from hasten.errors import DiskError, MachineError, UsageError
from hasten.models.artifact import refuse_other_model
from hasten.models.source import Source
from hasten.recipe import METHODS, PRUNINGS
from hasten.weights.packed import source_layout
from hasten.weights.work_store import WorkStore


def layer_names(config: ModelSpec) -> list[str]:
    """Every matrix a rule may name: the linear layers, and the embedding even where it is no head."""
    return list(dict.fromkeys([*config.linear_shapes(), "embed"]))


def matches(rule: str, names: Iterable[str]) -> frozenset[str]:
    """The names that a rule stands for."""
    wanted = rule.strip().split(".")
    split = ((name, name.split(".")) for name in names)
    return frozenset(
        name for name, parts in split if len(wanted) == len(parts) and all(map(_part_fits, wanted, parts))
    )


def _part_fits(wanted: str, part: str) -> bool:
    for one in wanted.split(","):
        span = re.fullmatch(r"(\d+)-(\d+)", one.strip())
        if span and part.isdecimal() and int(span[1]) <= int(part) <= int(span[2]):
            return True
        if fnmatchcase(part, one.strip()):
            return True
    return False


def spelled_out(rules: Mapping[str, Format], config: ModelSpec, where: str) -> dict[str, Format]:
    """Layer -> layout for every layer that a rule names, in the model's order.

    Raises:
        UsageError: a rule that names no layer (the nearest names are shown), or two rules that give a layer
            different layouts and neither is the narrower one.
    """
    names = layer_names(config)
    taken = {rule: _taken(rule, names, config, where) for rule in rules}
    found: dict[str, Format] = {}
    for name in names:
        mine = [rule for rule in rules if name in taken[rule]]
        narrowest = [rule for rule in mine if not any(taken[other] < taken[rule] for other in mine)]
        if len({rules[rule] for rule in narrowest}) > 1:
            raise _contradiction(name, narrowest, rules, where)
        if narrowest:
            found[name] = rules[narrowest[0]]
    return found


def _taken(rule: str, names: list[str], config: ModelSpec, where: str) -> frozenset[str]:
    taken = matches("embed" if rule == "head" and config.head.tied else rule, names)
    if taken:
        return taken
    near = _nearest(rule, names)
    raise UsageError(
        f"{where}: {rule!r} names no layer of this model, which has {len(config.blocks)} "
        f"(layers.0 to layers.{len(config.blocks) - 1})",
        hint=f"near it: {', '.join(near)}",
    )


def _nearest(rule: str, names: list[str]) -> list[str]:
    """Real names like a rule: by its last part where that exists, else by its letters."""
    last = [name for name in names if name.rsplit(".", 1)[-1] == rule.rsplit(".", 1)[-1]]
    plain = re.sub(r"[*,]|(?<=\d)-\d+", "", rule).replace("..", ".0.")
    return difflib.get_close_matches(plain, last or names, n=3, cutoff=0.4) or [*names[:2], names[-1]]


def _contradiction(name: str, rules: list[str], layouts: Mapping[str, Format], where: str) -> UsageError:
    first = rules[0]
    other = next(rule for rule in rules if layouts[rule] != layouts[first])
    return UsageError(
        f"{where}: contradictory rules for {name}: {first!r} says {layouts[first]}, "
        f"{other!r} says {layouts[other]}, and neither is a part of the other",
        hint=f"add a rule for what both name, such as {name}: {layouts[first]}",
    )


def pruned_shape(recipe: Recipe, config: ModelSpec, text: Calibration | None) -> ModelSpec:
    """The shape after all pruning of a recipe; the vocabulary's size shows only when its text was counted.

    Raises:
        UsageError: nothing would be left or taken, a pattern does not divide, too little calibration text.
    """
    if recipe.prune:
        from hasten.compress.prune import check

        for pruning in recipe.prune:
            config = check(config, pruning, text)
    return config


GROUPS = (128, 64, 32)


def needs_text(recipe: Recipe) -> bool:
    """Whether calibration text is read."""
    pruned = any(one.repair or not PRUNINGS[one.kind].blind for one in recipe.prune)
    return reads_text(recipe) or pruned or recipe.distil is not None


def reads_text(recipe: Recipe) -> bool:
    """Whether finding integers reads calibration text."""
    return METHODS[recipe.method].reads != "" or recipe.smooth is not None


def reads_moments(recipe: Recipe) -> bool:
    """Whether finding integers looks at the source's own activations."""
    return METHODS[recipe.method].reads == "moments" or recipe.smooth is not None


def checked(recipe: Recipe, config: ModelSpec) -> Recipe:
    """The recipe with its rules for layers spelled out, if the model can have it.

    Raises:
        MachineError: it needs torch, which is not installed.
        UsageError: a rule names no layer, rules contradict each other, a group divides no layer's inputs, or
            parts of the recipe exclude each other or the model.
    """
    where = f"recipe {recipe.name}"
    found = replace(recipe, layers=spelled_out(recipe.layers, config, where))
    _refuse_tables(found, config, where)
    _refuse_without_widths(found, config, where)
    _refuse_lesson(found, where)
    if not any(
        PRUNINGS[one.kind].takes in ("channels", "width") for one in recipe.prune
    ):  # else columns change yet
        _refuse_groups(found, config, where)
    if not recipe.is_plain:
        if find_spec("torch") is None:
            raise MachineError("compressing needs torch", hint="pip install 'hasten[compress]'")
        _refuse_rotation(found, config, where)
    return found


def fitted(recipe: Recipe, before: ModelSpec, after: ModelSpec) -> tuple[Recipe, tuple[str, ...]]:
    """A recipe that was checked for a model, spelled out for what became of it.

    Args:
        recipe: its rules as they are written. They count layers as they are now: where pruning took some, a
            rule for a number that is gone names nothing.
        before: the model it was checked for.
        after: the same, pruned or rotated.

    Returns:
        The recipe, and what is to be said of rules that name nothing any more.

    Raises:
        UsageError: as `checked`.
    """
    if before == after:
        return checked(recipe, before), ()
    names = layer_names(after)
    gone = [rule for rule in recipe.layers if not (matches(rule, names) or rule == "head")]
    left = {rule: layout for rule, layout in recipe.layers.items() if rule not in gone}
    found = checked(replace(recipe, layers=left, prune=(), rotate=False), after)
    if before.head.tied and not after.head.tied:  # one matrix became two
        tied = spelled_out(recipe.layers, before, recipe.name).get("embed")
        both = {} if tied is None else {"embed": tied, "head": tied}
        found = replace(found, layers={**found.layers, **both})
    found = replace(found, prune=recipe.prune, rotate=recipe.rotate)
    return found, tuple(f"the rule {rule!r} names layers that were pruned away" for rule in gone)


def notes(recipe: Recipe, config: ModelSpec) -> tuple[str, ...]:
    """What is no mistake and yet worth saying of a recipe that was checked."""
    return (*_unequal_widths(recipe, config), *_lost_zeros(recipe, config))


def _unequal_widths(recipe: Recipe, config: ModelSpec) -> tuple[str, ...]:
    unequal = [
        f"layers.{layer} {' '.join(group)}"
        for layer in range(len(config.blocks))
        for group in READERS.values()
        if len({recipe.layout_for(f"layers.{layer}.{name}") for name in group}) > 1
    ]
    if not unequal:
        return ()
    shown = ", ".join(unequal[:3]) + (f" and {len(unequal) - 3} more" if len(unequal) > 3 else "")
    return (
        f"{shown}: different widths in matrices that vLLM and GPTQModel run as one; exports to their formats "
        "store each such group at its widest",
    )


def _lost_zeros(recipe: Recipe, config: ModelSpec) -> tuple[str, ...]:
    """Zeros stay zero where each value is rounded to the nearest and the layout has a zero."""
    kinds = [one.kind for one in recipe.prune if PRUNINGS[one.kind].takes == "weights"]
    layouts = [recipe.layout_for(name) for name in config.linear_shapes()]
    why = [f"method {recipe.method}"] if recipe.method != "rtn" else []
    why += (
        ["a layout with minimums"]
        if any(one and one.bits < 16 and not one.symmetric for one in layouts)
        else []
    )
    if not kinds or not why:
        return ()
    return (f"prune {' and '.join(kinds)}: not all zeros stay zero through {' and '.join(why)}",)


def _refuse_without_widths(recipe: Recipe, config: ModelSpec, where: str) -> None:
    """A method or smoothing is for integers: some layer must become some."""
    layouts = [recipe.layout_for(name) for name in config.linear_shapes()]
    asked = _asked_of_integers(recipe)
    if asked and not any(layout is not None and layout.is_integer for layout in layouts):
        raise UsageError(
            f"{where}: {' and '.join(asked)} is for integer weights, and every layer stays in floats",
            hint="give default: w4, or leave it out",
        )


def _asked_of_integers(recipe: Recipe) -> list[str]:
    asked = [] if recipe.method == "rtn" else [f"method {recipe.method}"]
    return asked + ([f"smooth {recipe.smooth}"] if recipe.smooth is not None else [])


def _refuse_tables(recipe: Recipe, config: ModelSpec, where: str) -> None:
    """Methods, smoothing and distilling find integers; small floats are rounded to the nearest alone."""
    asked = _asked_of_integers(recipe) + (["distil"] if recipe.distil is not None else [])
    layouts = {name: recipe.layout_for(name) for name in _shapes(config)}
    tables = {name: layout for name, layout in layouts.items() if layout is not None and layout.table}
    if asked and tables:
        name, layout = next(iter(tables.items()))
        raise UsageError(
            f"{where}: {' and '.join(asked)} is for integer weights, and {name} is stored as {layout}, whose "
            "values are floats",
            hint=f"leave {' and '.join(word.split()[0] for word in asked)} out, or use integers: w8 or w4 "
            f"instead of {layout}",
        )


def _refuse_lesson(recipe: Recipe, where: str) -> None:
    """Teacher and student must speak of the same things."""
    taken = {PRUNINGS[one.kind].takes for one in recipe.prune}
    if recipe.distil is None:
        return
    if "words" in taken:
        raise UsageError(
            f"{where}: a model whose vocabulary was pruned has no words for what its teacher says",
            hint="distil without pruning the vocabulary, and prune that afterwards",
        )
    if recipe.rotate and recipe.distil.hidden:
        raise UsageError(
            f"{where}: rotate turns hidden states into another basis, in which the teacher's say nothing",
            hint="leave hidden out of distil, or leave rotate out",
        )
    if "width" in taken and recipe.distil.hidden:
        raise UsageError(
            f"{where}: hidden states of a pruned width cannot be compared with the teacher's",
            hint="leave hidden out of distil",
        )


def _refuse_groups(recipe: Recipe, config: ModelSpec, where: str) -> None:
    wrong = {
        name: (layout, cols)
        for name, (_, cols) in _shapes(config).items()
        if (layout := recipe.layout_for(name)) is not None and not _divides(layout.group, layout, cols)
    }
    if not wrong:
        return
    name, (layout, cols) = next(iter(wrong.items()))
    more = f", and {len(wrong) - 1} other layers likewise" if len(wrong) > 1 else ""
    raise UsageError(
        f"{where}: {name} has {cols} inputs, which groups of {layout.group} do not divide{more}",
        hint=_groups_that_do(wrong),
    )


def _groups_that_do(wrong: Mapping[str, tuple[Format, int]]) -> str:
    fit = [group for group in GROUPS if all(cols % group == 0 for _, cols in wrong.values())]
    fit = fit or [group for group in GROUPS if all(_divides(group, *one) for one in wrong.values())]
    if fit:
        return f"groups of {' or '.join(map(str, fit))} do"
    kinds = dict.fromkeys(name.rsplit(".", 1)[-1] for name in wrong if "." in name)
    rules = [f"layers.*.{','.join(kinds)}"] if kinds else []
    rules += [name for name in wrong if "." not in name]
    shown = ", ".join(f'"{rule}": bf16' for rule in rules)
    return f"no group does: keep such layers in floats with layers: {{{shown}}}"


def _divides(group: int, layout: Format, cols: int) -> bool:
    return not layout.is_integer or cols % group == 0 or cols <= group


def _shapes(config: ModelSpec) -> dict[str, tuple[int, int]]:
    shapes = {"embed": (config.vocab, config.width), **config.linear_shapes()}
    return {name: shapes[name] for name in layer_names(config)}


def _refuse_rotation(recipe: Recipe, config: ModelSpec, where: str) -> None:
    if not recipe.rotate:
        return
    from hasten.compress.quantise.rotate import obstacle

    if (why := obstacle(config)) is not None:
        raise UsageError(f"{where}: rotate: {why}", hint="leave rotate out of the recipe")


def refuse_short(text: Calibration | None) -> None:
    """Raise a UsageError where a text is too short to train on and hold out."""
    if text is None or len(text.ids) < 2:
        raise UsageError(
            "distil: one window of text cannot be trained on and held out",
            hint="give more calibration text, or shorter windows",
        )


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
            from hasten.compress.torch_model import device_of

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
