"""Writes docs/reference.md from the program itself: `python -m hasten.cli.reference > docs/reference.md`."""

from __future__ import annotations

import inspect
import sys
from importlib import import_module
from typing import Any

import hasten
from hasten.cli import VERBS
from hasten.cli.frame import parser_of

HEAD = """# Reference

Made by `make docs` from the program itself; a test keeps it in step.
[concepts.md](concepts.md) explains the ideas.
"""

CODES = """\
Exit codes: 0 done, 1 failed, 2 usage, 3 budget not met, 130 stopped by Ctrl-C. Errors go to stderr as
`error:` and `hint:` lines; `HASTEN_DEBUG=1` adds the traceback.

| environment variable | effect |
| --- | --- |
| `HASTEN_DEBUG=1` | show the traceback of an error |
| `HASTEN_ISA=avx2` | force an instruction set: `scalar`, `avx2`, `avx512` or `amx` |
| `HF_HUB_OFFLINE=1` | use downloaded models only |
"""


def reference() -> str:
    """The whole document."""
    parts = [HEAD, "## Commands\n", CODES]
    parts += [_verb(name) for name in VERBS]
    parts += [
        "## Python\n",
        "`import hasten` costs nothing; each name loads what it needs when first used.\n",
    ]
    parts += [_name(name) for name in hasten.__all__]
    return "\n".join(parts)


def _verb(name: str) -> str:
    module = import_module(VERBS[name].module)
    rows = [_row(parameter) for parameter in parser_of(name, VERBS[name].module).params]
    doc = inspect.getdoc(module.command) or ""
    table = "\n".join(["| argument or flag | meaning | default |", "| --- | --- | --- |", *rows])
    return f"### hasten {name}\n\n{doc}\n\n{table}\n"


def _row(parameter: Any) -> str:
    is_flag = parameter.param_type_name == "option"
    names = (
        ", ".join(f"`{o}`" for o in parameter.opts)
        if is_flag
        else f"`{parameter.metavar or parameter.name.upper()}`"
    )
    metavar = f" `{parameter.metavar}`" if is_flag and parameter.metavar else ""
    text = " ".join(parameter.help.split()).replace("|", "\\|")
    return f"| {names}{metavar} | {text} | {_default(parameter)} |"


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = parameter.default
    if value is None or value is False or value == "" or callable(value):
        return ""
    return f"`{value}`"


def _name(name: str) -> str:
    value = getattr(import_module(hasten._HOME[name]), name)
    doc = inspect.getdoc(value) or ""
    lines = [
        f"### hasten.{name}",
        "",
        "```text",
        f"{name}{_signature(value)}",
        "",
        *doc.splitlines(),
        "```",
        "",
    ]
    if inspect.isclass(value):
        lines += _members(value)
    return "\n".join(lines)


def _signature(value: Any) -> str:
    if inspect.isclass(value) and issubclass(value, BaseException):
        return "(message, *, hint=None)"
    return str(inspect.signature(value)).replace("'", "")


def _members(value: type) -> list[str]:
    """Public methods and properties of the class itself, each with the first paragraph of its docstring."""
    rows = []
    for member, item in vars(value).items():
        target = item.fget if isinstance(item, property) else getattr(item, "__func__", item)
        if member.startswith("_") or not (inspect.isfunction(target)):
            continue
        shape = (
            ""
            if isinstance(item, property)
            else str(inspect.signature(target)).replace("'", "").replace("self, ", "")
        )
        summary = (inspect.getdoc(target) or "").split("\n\n")[0].replace("\n", " ")
        rows.append(f"- `{member}{shape.replace('(self)', '()')}`: {summary}")
    return [*rows, ""] if rows else []


if __name__ == "__main__":
    sys.stdout.write(reference())
