"""Runs one verb through typer, without typer's own way of printing errors and swallowing Ctrl-C."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import typer
from typer.main import get_command


def parser_of(verb: str, module: str) -> Any:
    """The typer command of a verb: the function `command` of its module."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    settings = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
    app.command(name=verb, context_settings=settings)(import_module(module).command)
    return get_command(app)


def run(verb: str, module: str, arguments: list[str]) -> int:
    """Parse the arguments and run the verb. Returns its exit code; every error is raised."""
    parser = parser_of(verb, module)
    try:
        with parser.make_context(f"hasten {verb}", list(arguments)) as context:
            parser.invoke(context)
    except typer.Exit as stop:
        return int(stop.exit_code)
    return 0
