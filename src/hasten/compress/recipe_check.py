"""What a recipe asks of a model, looked at before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec

from hasten.compress.layer_rules import layer_names, matches, spelled_out
from hasten.core import Format, ModelSpec, Recipe
from hasten.errors import MachineError, UsageError

GROUPS = (128, 64, 32)
_DATA_FREE = ("rtn", "hqq")


def needs_torch(recipe: Recipe) -> bool:
    """Whether more is to be done than to pack the source's values."""
    return not recipe.is_plain


def needs_text(recipe: Recipe) -> bool:
    """Whether calibration text is read."""
    from_text = ("wanda", "sparsegpt", "ffn", "heads", "layers", "width", "vocabulary")
    pruned = any(one.kind in from_text or one.repair for one in recipe.prune)
    calibrated = recipe.method not in _DATA_FREE or recipe.smooth is not None
    return calibrated or pruned or recipe.distil is not None


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
    if not any(one.kind in ("ffn", "heads", "width") for one in recipe.prune):  # else columns change yet
        _refuse_groups(found, config, where)
    if needs_torch(recipe):
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
    if before.tied_head and not after.tied_head:  # one matrix became two
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
        for layer in range(config.num_layers)
        for group in (("q", "k", "v"), ("gate", "up"))
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
    kinds = [one.kind for one in recipe.prune if one.kind in ("magnitude", "wanda", "sparsegpt")]
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
    kinds = {one.kind for one in recipe.prune}
    if recipe.distil is None:
        return
    if "vocabulary" in kinds:
        raise UsageError(
            f"{where}: a model whose vocabulary was pruned has no words for what its teacher says",
            hint="distil without pruning the vocabulary, and prune that afterwards",
        )
    if recipe.rotate and recipe.distil.hidden:
        raise UsageError(
            f"{where}: rotate turns hidden states into another basis, in which the teacher's say nothing",
            hint="leave hidden out of distil, or leave rotate out",
        )
    if "width" in kinds and recipe.distil.hidden:
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
    shapes = {"embed": (config.vocab_size, config.hidden_size), **config.linear_shapes()}
    return {name: shapes[name] for name in layer_names(config)}


def _refuse_rotation(recipe: Recipe, config: ModelSpec, where: str) -> None:
    if not recipe.rotate:
        return
    from hasten.compress.quantise.rotate import obstacle

    if (why := obstacle(config)) is not None:
        raise UsageError(f"{where}: rotate: {why}", hint="leave rotate out of the recipe")
