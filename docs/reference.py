"""Writes docs/reference.md from the program itself: `python docs/reference.py > docs/reference.md`."""

from __future__ import annotations

import inspect
import sys
from importlib import import_module
from typing import Any

import hasten
from hasten.cli import VERBS
from hasten.cli.frame import parser_of, subcommands_of, subparser_of

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
| `HASTEN_CACHE=DIR` | keep everything that can be made again in DIR |
| `HASTEN_CACHE_PACKED=0` | neither keep packed weights nor use kept ones |
| `HASTEN_CACHE_GB=N` | most that packed weights may take, GB; default 20, or half of the disk |
| `HASTEN_ISA=avx2` | force an instruction set: `scalar`, `avx2`, `avx512vnni`, `avx512` or `amx` |
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
    parts = [_command(f"hasten {name}", parser_of(name))]
    parts += [_command(f"hasten {name} {sub}", subparser_of(name, sub)) for sub in subcommands_of(name)]
    return "\n".join(parts)


def _command(name: str, parser: Any) -> str:
    doc = inspect.cleandoc(parser.help or "")
    rows = [_row(parameter) for parameter in parser.params]
    table = "\n".join(["| argument or flag | meaning | default |", "| --- | --- | --- |", *rows])
    return f"### {name}\n\n{doc}\n" + (f"\n{table}\n" if rows else "")


def _row(parameter: Any) -> str:
    if parameter.param_type_name == "option":
        names = ", ".join(f"`{flag}`" for flag in [*parameter.opts, *parameter.secondary_opts])
        names += f" `{parameter.metavar}`" if parameter.metavar else ""
    else:
        names = f"`{parameter.metavar or parameter.name.upper()}`"
    text = " ".join(parameter.help.split()).replace("|", "\\|")
    return f"| {names} | {text} | {_flag_default(parameter)} |"


def _flag_default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = parameter.default
    if value is True:
        return f"`{parameter.opts[0]}`"
    if value is None or value is False or value == "" or callable(value):
        return ""
    return f"`{value}`"


def _name(name: str) -> str:
    value = getattr(import_module(hasten._HOME[name]), name)
    doc = inspect.getdoc(value) or ""
    lines = [f"### hasten.{name}", "", "```text", _signature(name, value), "", *doc.splitlines(), "```", ""]
    if inspect.isclass(value):
        lines += _members(value)
    return "\n".join(lines)


def _signature(name: str, value: Any) -> str:
    """`name(argument: type = default, ...) -> type`, one argument a line where it is long."""
    if inspect.isclass(value) and issubclass(value, BaseException):
        return f"{name}(message: str, *, hint: str | None = None)"
    signature = inspect.signature(value)
    shown: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in shown:
            shown.append("*")
        if parameter.name != "self":
            shown.append(_parameter(parameter))
    end = f") -> {signature.return_annotation}" if inspect.isfunction(value) else ")"
    line = f"{name}({', '.join(shown)}{end}"
    if len(line) <= 100:
        return line
    return "\n".join([f"{name}(", *(f"    {part}," for part in shown), end])


def _parameter(parameter: inspect.Parameter) -> str:
    text = f"{parameter.name}: {parameter.annotation}"
    default = parameter.default
    if default is parameter.empty:
        return text
    if inspect.isfunction(default):
        return f"{text} = {default.__name__}"
    return f"{text} = {'...' if str(default).startswith('<') else repr(default)}"


def _members(value: type) -> list[str]:
    """Public methods and properties of the class itself, each with the first paragraph of its docstring."""
    rows = []
    for member, item in vars(value).items():
        target = item.fget if isinstance(item, property) else getattr(item, "__func__", item)
        if member.startswith("_") or not inspect.isfunction(target):
            continue
        summary = (inspect.getdoc(target) or "").split("\n\n")[0].replace("\n", " ")
        bound = target if isinstance(item, property) else getattr(value, member)
        shape = member if isinstance(item, property) else " ".join(_signature(member, bound).split())
        rows.append(f"- `{shape.replace('( ', '(').replace(', )', ')')}`: {summary}")
    return [*rows, ""] if rows else []


if __name__ == "__main__":
    sys.stdout.write(reference())
