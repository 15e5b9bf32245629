"""Recipes as YAML files: docs/compress.md lists the keys.

default: w4
head: w8
method: gptq
layers:
  layers.*.down: w6
  layers.0-1.q,k,v: {bits: 8, group: 64}
prune:
  - {kind: ffn, amount: 0.25}
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from hasten.cache.reading import is_there, read_text_stream
from hasten.core import Format, Recipe
from hasten.errors import UsageError
from hasten.recipe import Distillation, Pruning
from hasten.weights.formats import FORMATS, FormatParts

T = TypeVar("T")
_SUFFIXES = (".yaml", ".yml")
_LARGEST = 1 << 20  # bytes; a rule for each matrix of a large model takes a tenth of it
_HINT = "docs/compress.md lists the keys of a recipe file"


def recipe_from(named: str | Path | Recipe) -> Recipe:
    """A recipe from what names it: itself, a file, or a name as `Recipe.parse` reads it.

    Raises:
        UsageError: no such name, or a file that cannot be read or says what cannot be done.
    """
    if isinstance(named, Recipe):
        return named
    if isinstance(named, Path) or named.lower().endswith(_SUFFIXES):
        return read_recipe(named)
    try:
        return Recipe.parse(named)
    except UsageError as wrong:
        if is_there(named) and not Path(named).is_dir():
            return read_recipe(named)
        raise UsageError(
            wrong.message, hint=f"{wrong.hint}; or give a recipe file, such as {named}.yaml"
        ) from None


def read_recipe(path: str | Path) -> Recipe:
    """A recipe from a YAML file. Rules for layers stay as they are written: `recipe_check.checked` spells
    them out once the model is known.

    Raises:
        UsageError: the file cannot be read, is no YAML, has unknown keys (the nearest ones are shown) or
            values of a wrong type, or asks for what cannot be.
    """
    path = Path(path)
    try:
        text = read_text_stream(path, _LARGEST)
    except OSError as wrong:
        raise UsageError(
            f"recipe file {path}: {wrong.strerror or 'cannot be read'}",
            hint="give --recipe a YAML file or a name",
        ) from None
    except UnicodeDecodeError as wrong:
        raise UsageError(
            f"recipe file {path} is not UTF-8: byte {wrong.start} cannot be decoded", hint=_HINT
        ) from None
    return parse_recipe(text, path.stem, f"recipe file {path}")


def parse_recipe(text: str, name: str = "recipe", where: str = "recipe") -> Recipe:
    """A recipe from YAML text.

    Args:
        text: the document.
        name: what the recipe is called where the document gives it no name.
        where: what errors call the document.

    Raises:
        UsageError: as `read_recipe`.
    """
    from hasten.compress.recipe_yaml import load_yaml

    given = _mapping(load_yaml(text, where), where)
    if not given:
        raise UsageError(f"{where} is empty", hint="say at least: default: w4")
    hints = get_type_hints(Recipe)
    _refuse_unknown(given, hints, where)
    values: dict[str, Any] = {"name": name}
    for key, value in given.items():
        values[key] = (
            _READ[key](value, f"{where}: {key}")
            if key in _READ
            else _typed(value, hints[key], f"{where}: {key}")
        )
    return _made(Recipe, values, where)


def write_recipe(recipe: Recipe) -> str:
    """The YAML text that `parse_recipe` reads back as an equal recipe."""
    from hasten.compress.recipe_yaml import dump_yaml

    plain = {key: value for key, value in _changes(recipe).items() if key != "name"}
    document: dict[str, Any] = {"name": recipe.name, "default": _layout_text(recipe.default)}
    for key, value in plain.items():
        if key == "default":
            continue
        if isinstance(value, Format):
            value = _layout_text(value)
        elif key == "layers":
            value = {rule: _layout_text(layout) for rule, layout in value.items()}
        elif key == "prune":
            value = [_plain(one) for one in value]
        elif dataclasses.is_dataclass(value):
            value = _plain(value)
        document[key] = value
    return dump_yaml(document)


def _changes(noun: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not as they are by default."""
    found = {}
    for item in dataclasses.fields(noun):
        value = getattr(noun, item.name)
        made = item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
        if value != made:
            found[item.name] = value
    return found


def _plain(noun: Any) -> dict[str, Any]:
    return {k: f"{v[0]}:{v[1]}" if k == "pattern" else v for k, v in _changes(noun).items()}


def _layout_text(layout: Format | None) -> str:
    return "source" if layout is None else layout.name


def _layout(value: Any, where: str) -> Format | None:
    """A layout from `w4-g64-asym` or {bits: 4, group: 64, symmetric: false}; None is the source's values."""
    if isinstance(value, str) and value in FORMATS:
        return FORMATS[value]
    if isinstance(value, str):
        try:
            named = Recipe.parse(value)
        except UsageError as wrong:
            raise UsageError(
                f"{where}: {wrong.message}", hint="use bf16, w8, w6, w5, w4, w4-g64 ..."
            ) from None
        if named != Recipe(name=value, default=named.default):
            raise UsageError(
                f"{where}: {value!r} says more than how weights are stored",
                hint="head, kv and method are keys of their own",
            )
        return named.default
    given = _mapping(value, where, "a name such as w4-g64, or bits, group and symmetric")
    if "bits" not in given:
        raise UsageError(f"{where}: bits is missing", hint="such as {bits: 4, group: 64}")
    return _filled(FormatParts, given, where).format()


def _integers(value: Any, where: str) -> Format:
    layout = _layout(value, where)
    if layout is None:
        raise UsageError(
            f"{where}: source is only for default",
            hint="leave the key out to follow default, or use bf16",
        )
    return layout


def _layers(value: Any, where: str) -> dict[str, Format]:
    given = _mapping(value, where, "rules such as layers.*.down: w6")
    for rule in given:
        if not isinstance(rule, str):
            raise UsageError(
                f"{where}: {rule!r} is no layer name", hint="such as layers.3.down or layers.*.down"
            )
    return {rule: _integers(layout, f"{where}: {rule}") for rule, layout in given.items()}


def _prune(value: Any, where: str) -> tuple[Pruning, ...]:
    if not isinstance(value, list):
        raise UsageError(
            f"{where} must be a list, got {_shown(value)}", hint="such as [{kind: ffn, amount: 0.25}]"
        )
    found = []
    for number, one in enumerate(value, start=1):
        place = f"{where} {number}"
        given = {"kind": one} if isinstance(one, str) else _mapping(one, place, "kind, amount, ...")
        if "kind" not in given:
            raise UsageError(f"{place}: kind is missing", hint="such as {kind: ffn, amount: 0.25}")
        found.append(_filled(Pruning, given, place))
    return tuple(found)


def _distil(value: Any, where: str) -> Distillation | None:
    if value is None:
        return None
    return _filled(Distillation, _mapping(value, where, "settings, or {} for the defaults"), where)


_READ = {"default": _layout, "head": _integers, "layers": _layers, "prune": _prune, "distil": _distil}


def _filled(kind: type[T], given: Mapping[Any, Any], where: str) -> T:
    """A dataclass from a mapping: every key known, every value of its field's type."""
    hints = get_type_hints(kind)
    _refuse_unknown(given, hints, where)
    values = {key: _typed(value, hints[key], f"{where}: {key}") for key, value in given.items()}
    return _made(kind, values, where)


def _made(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    try:
        return kind(**values)
    except UsageError as wrong:
        raise UsageError(f"{where}: {wrong.message}", hint=wrong.hint) from None


def _typed(value: Any, hint: Any, where: str) -> Any:
    """`value` if it is what a field's annotation says."""
    if get_origin(hint) in (Union, UnionType):
        if value is None:
            return None
        hint = next(one for one in get_args(hint) if one is not type(None))
    if get_origin(hint) is Literal:
        return _one_of(value, get_args(hint), where)
    if get_origin(hint) is tuple:
        return _pattern(value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    is_right = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    if not is_right or (isinstance(value, float) and not math.isfinite(value)):
        raise UsageError(f"{where} must be {_TYPES[hint]}, got {_shown(value)}", hint=_HINT)
    return value


_TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def _one_of(value: Any, known: tuple[str, ...], where: str) -> str:
    if value not in known:
        near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"{where} cannot be {_shown(value)}", hint=f"{hint}use one of {', '.join(known)}")
    return str(value)


def _pattern(value: Any, where: str) -> tuple[int, int]:
    """2:4, as text or as a list of two."""
    parts = value.split(":") if isinstance(value, str) else value
    if isinstance(parts, list) and len(parts) == 2 and all(str(part).strip().isdecimal() for part in parts):
        return int(parts[0]), int(parts[1])
    raise UsageError(f"{where} must be N:M, got {_shown(value)}", hint="such as 2:4")


def _mapping(value: Any, where: str, what: str = "keys and values") -> Mapping[Any, Any]:
    if value is None and what == "keys and values":
        return {}
    if not isinstance(value, dict):
        raise UsageError(f"{where} must be {what}, got {_shown(value)}", hint=_HINT)
    return value


def _refuse_unknown(given: Iterable[Any], known: Iterable[str], where: str) -> None:
    names = list(known)
    for key in given:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=2, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"keys are {', '.join(names)}"
            raise UsageError(f"{where}: unknown key {_shown(key)}", hint=hint)


def _shown(value: Any) -> str:
    return reprlib.repr(value)
