"""Recipes as YAML files: docs/compress.md lists the keys.

YAML as people read it, the core schema of YAML 1.2, every key once: PyYAML follows YAML 1.1, in which `2:4`
is the number 124, `5e-5` a text and `no` false; and it keeps the last of two equal keys without a word.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from hasten.cache.reading import is_there, read_text_stream
from hasten.core import Format, Recipe
from hasten.errors import UsageError
from hasten.recipe import Distillation, Pruning
from hasten.weights import FORMATS, FormatParts

_KINDS = {
    "null": (r"~|null|Null|NULL|", "~nN\0"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
}
_RESOLVERS: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
for _kind, (_form, _firsts) in _KINDS.items():
    for _first in _firsts:
        _entry = (f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_form})$"))
        _RESOLVERS.setdefault("" if _first == "\0" else _first, []).append(_entry)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _RESOLVERS

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} is there twice", key.start_mark
                )
            seen.add(key.value)
        made: dict[Any, Any] = super().construct_mapping(node, deep)
        return made


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _RESOLVERS

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _whole(loader: Any, node: Any) -> int:
    return int(node.value)  # YAML 1.1 would read 010 as eight


def _real(loader: Any, node: Any) -> float:
    return float(node.value.replace(".inf", "inf").replace(".nan", "nan").lower())


_Loader.add_constructor("tag:yaml.org,2002:int", _whole)
_Loader.add_constructor("tag:yaml.org,2002:float", _real)


def load_yaml(text: str, where: str) -> Any:
    """The value of a document.

    Raises:
        UsageError: the text is no YAML, or a key is there twice; the line is named.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as wrong:
        mark = getattr(wrong, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark is not None else ""
        what = getattr(wrong, "problem", None) or str(wrong).splitlines()[0]
        raise UsageError(f"{where}{place}: {what}", hint="see docs/compress.md for an example") from None
    except RecursionError:
        raise UsageError(
            f"{where} is nested too deeply", hint="see docs/compress.md for an example"
        ) from None


def dump_yaml(value: Any) -> str:
    """A document that `load_yaml` reads back as the same value."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100))


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
    """A recipe from a YAML file. Rules for layers stay as they are written: `job.checked` spells
    them out once the model is known.

    Raises:
        UsageError: the file cannot be read, is no YAML, has unknown keys (the nearest ones are shown) or
            values of a wrong type, or asks for what cannot be.
    """
    path = Path(path)
    text = read_text_stream(path, _LARGEST, "recipe file", "give --recipe a YAML file or a name")
    return parse_recipe(text, path.stem, f"recipe file {path}")


def parse_recipe(text: str, name: str = "recipe", where: str = "recipe") -> Recipe:
    """A recipe from YAML text.

    Args:
        name: what the recipe is called where the document gives it no name.

    Raises:
        UsageError: as `read_recipe`.
    """

    given = _mapping(load_yaml(text, where), where)
    if not given:
        raise UsageError(f"{where} is empty", hint="say at least: default: w4")
    _refuse_unknown(given, get_type_hints(Recipe), where)
    values: dict[str, Any] = {"name": name}
    for key, value in given.items():
        place = f"{where}: {key}"
        values[key] = _READ[key](value, place) if key in _READ else _field(Recipe, key, value, place)
    return _made(Recipe, values, where)


def write_recipe(recipe: Recipe) -> str:
    """The YAML text that `parse_recipe` reads back as an equal recipe."""

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
            f"{where}: source is only for default", hint="leave the key out to follow default, or use bf16"
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
    _refuse_unknown(given, get_type_hints(kind), where)
    return _made(
        kind, {key: _field(kind, key, value, f"{where}: {key}") for key, value in given.items()}, where
    )


def _field(kind: type[Any], key: str, value: Any, where: str) -> Any:
    """`value` if a field of a dataclass can have it: of its type, or a name in its table."""
    table = {one.name: one.metadata.get("table") for one in dataclasses.fields(kind)}[key]
    return (
        _typed(value, get_type_hints(kind)[key], where)
        if table is None
        else _one_of(value, tuple(table), where)
    )


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
