"""Flags made from the fields of a frozen dataclass: name, type, default and help each stand in one place."""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Optional, get_args, get_origin, get_type_hints

import typer

from hasten.cli.flags import help_of


def parameters(
    noun: type, *, skip: Collection[str] = (), env: Mapping[str, str] | None = None
) -> list[inspect.Parameter]:
    """One keyword parameter a field, annotated as typer reads it.

    A tuple becomes a flag that may be given again and again, under the singular of its name.

    Args:
        noun: the dataclass; every field has a default and `help` metadata.
        skip: fields that are no flags.
        env: field -> environment variable that stands in for the flag.
    """
    hints = get_type_hints(noun)
    return [
        _parameter(noun, item, hints[item.name], (env or {}).get(item.name))
        for item in dataclasses.fields(noun)
        if item.name not in skip
    ]


def _parameter(noun: type, item: Any, hint: Any, env: str | None) -> inspect.Parameter:
    repeated = get_origin(hint) is tuple
    name = item.name.removesuffix("s") if repeated else item.name
    flag = "--" + name.replace("_", "-")
    default = None if repeated and not item.default else item.default
    plain: Any = Optional[types.GenericAlias(list, get_args(hint)[:1])] if repeated else hint  # noqa: UP045
    settings: dict[str, Any] = {"help": help_of(noun, item.name), "envvar": env}
    if hint is bool:
        flag = f"{flag}/--no-{name.replace('_', '-')}"
    else:
        settings["metavar"] = _metavar(hint)
        settings["show_default"] = default is not None
    annotation = Annotated[plain, typer.Option(flag, **settings)]
    return inspect.Parameter(
        item.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def _metavar(hint: Any) -> str | None:
    words = {int: "N", float: "X", str: "TEXT"}
    for part in (hint, *get_args(hint)):
        if part in words:
            return words[part]
        if getattr(part, "__name__", "") == "Path":
            return "PATH"
    return None


def fill(noun: type, values: Mapping[str, Any]) -> Any:
    """The dataclass of flag values; flags that belong to others are passed over."""
    taken = {}
    for item in dataclasses.fields(noun):
        if item.name in values:
            value = values[item.name]
            taken[item.name] = tuple(value or ()) if isinstance(item.default, tuple) else value
    return noun(**taken)
