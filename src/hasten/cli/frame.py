"""Runs one verb through typer, without typer's own way of printing errors and swallowing Ctrl-C.

A verb's module has a function `command`. One with verbs of its own (`hasten cache ls`) has `SUBCOMMANDS` too,
name -> "module:function"; `command` is then only its description. The one that is run is imported, no other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import typer
from typer.main import get_command

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def parser_of(verb: str, module: str) -> Any:
    """The typer command of a verb: the function `command` of its module, or a group of its subcommands."""
    home = import_module(module)
    subcommands = subcommands_of(module)
    if not subcommands:
        return _parser(verb, home.command)
    app = _app()
    app.callback(context_settings=_SETTINGS)(home.command)
    for name, place in subcommands.items():
        app.command(name=name, context_settings=_SETTINGS)(_function(place))
    return get_command(app)


def subcommands_of(module: str) -> Mapping[str, str]:
    """Name -> "module:function" of a verb's own verbs; empty for most."""
    found: Mapping[str, str] = getattr(import_module(module), "SUBCOMMANDS", {})
    return found


def subparser_of(module: str, name: str) -> Any:
    """The typer command of one of a verb's own verbs."""
    return _parser(name, _function(subcommands_of(module)[name]))


def run(verb: str, module: str, arguments: list[str]) -> int:
    """Parse the arguments and run the verb. Returns its exit code; every error is raised."""
    subcommands = subcommands_of(module)
    if arguments and arguments[0] in subcommands:
        return _run(subparser_of(module, arguments[0]), f"hasten {verb} {arguments[0]}", arguments[1:])
    if subcommands and not arguments:
        arguments = ["--help"]
    return _run(parser_of(verb, module), f"hasten {verb}", arguments)


def _run(parser: Any, name: str, arguments: list[str]) -> int:
    try:
        with parser.make_context(name, list(arguments)) as context:
            parser.invoke(context)
    except typer.Exit as stop:
        return int(stop.exit_code)
    return 0


def _app() -> typer.Typer:
    return typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def _parser(name: str, function: Callable[..., object]) -> Any:
    app = _app()
    app.command(name=name, context_settings=_SETTINGS)(function)
    return get_command(app)


def _function(place: str) -> Callable[..., object]:
    module, _, name = place.partition(":")
    function: Callable[..., object] = getattr(import_module(module), name)
    return function
