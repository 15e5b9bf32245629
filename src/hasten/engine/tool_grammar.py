"""A grammar that forces tool calls: valid in the model's own way, arguments as the function's schema says."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from hasten.engine.grammar import Grammar
from hasten.engine.grammar_source import check_schema, quoted, with_options
from hasten.errors import UsageError
from hasten.models.tool_calls import ToolStyle

ToolChoice = Literal["none", "auto", "required"] | Mapping[str, Any]
MAX_TOOLS = 128
_NAME = re.compile(r"[\w.:/-]{1,128}", re.ASCII)
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


def tool_grammar(
    tools: Sequence[Mapping[str, Any]],
    tool_choice: ToolChoice = "auto",
    parallel: bool = True,
    style: ToolStyle | None = None,
) -> Grammar | None:
    """What an answer must match so that it calls tools as it was told to.

    Args:
        tools: as OpenAI's API: `{"type": "function", "function": {"name", "description", "parameters"}}`.
        tool_choice: "none" and "auto" force nothing; "required" forces a call of any function, and
            `{"type": "function", "function": {"name": ...}}` one of that function.
        parallel: whether several calls may come; Llama's models make one at most.
        style: the model's way, `tokenizer.tool_style(architecture)`.

    Returns:
        None where nothing is forced.

    Raises:
        UsageError: the tools or the choice are not what they must be; a schema has what is not supported.
    """
    functions = checked_tools(tools)
    chosen = _chosen(functions, tool_choice)
    if not chosen:
        return None
    return Grammar("structural", _grammar(chosen, parallel, style or ToolStyle()))


def checked_tools(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The functions' argument schemas by name.

    Raises:
        UsageError: a tool is not a described function, has no proper name, or the name of another.
    """
    if not isinstance(tools, Sequence) or isinstance(tools, (str, bytes)) or len(tools) > MAX_TOOLS:
        raise UsageError(f"tools must be a list of at most {MAX_TOOLS} functions", hint=_EXAMPLE)
    functions: dict[str, Any] = {}
    for tool in tools:
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or tool.get("type") != "function":
            kind = tool.get("type") if isinstance(tool, Mapping) else type(tool).__name__
            raise UsageError(f"a tool of type {str(kind)[:40]!r} is not supported", hint=_EXAMPLE)
        name, schema = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UsageError(
                f"a function has the name {str(name)[:80]!r}",
                hint="use 1 to 128 letters, digits and any of _ . : / -",
            )
        if name in functions:
            raise UsageError(f"two functions are named {name!r}", hint="give each function its own name")
        if schema is not None and not isinstance(schema, Mapping):
            raise UsageError(f"the parameters of {name!r} are no JSON schema", hint=_EXAMPLE)
        functions[name] = _of_object(name, schema) if schema else _NO_ARGUMENTS
    return functions


def _of_object(name: str, schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Arguments are an object, whether or not the schema says so."""
    if schema.get("type", "object") != "object":
        raise UsageError(f"the parameters of {name!r} are no object", hint=_EXAMPLE)
    return schema if "$ref" in schema else {"type": "object", **schema}


_EXAMPLE = 'send tools like {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}'


def _chosen(functions: dict[str, Any], choice: ToolChoice) -> dict[str, Any]:
    if choice in ("none", "auto"):
        return {}
    if choice == "required":
        if functions:
            return functions
        raise UsageError(
            'tool_choice is "required", but there are no tools', hint='send tools, or use "auto"'
        )
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not isinstance(choice, Mapping) or choice.get("type") != "function":
        raise UsageError(
            f"tool_choice is {str(choice)[:80]!r}",
            hint='use "none", "auto", "required" or {"type": "function", "function": {"name": "f"}}',
        )
    if name not in functions:
        known = ", ".join(functions) or "none"
        raise UsageError(
            f"tool_choice names {name[:80]!r}, which is none of the tools", hint=f"known are: {known[:200]}"
        )
    return {name: functions[name]}


def _grammar(functions: dict[str, Any], parallel: bool, style: ToolStyle) -> str:
    opening, closing = _mark(style.opening, style), _mark(style.closing or "", style)
    shape, several = {
        "hermes": (f'{opening} "\\n" call "\\n" {closing}', f'("\\n" {opening} "\\n" call "\\n" {closing})*'),
        "hermes_list": (f'{opening} "[" call', f'(", " call)* "]" {closing}'),
        "phi": (f'{opening} "[" call', f'(", " call)* "]" {closing}'),
        "llama": ("call", ""),
        "mistral": (f"{opening} {quoted(' [' if style.spaced else '[')} call", '(", " call)* "]"'),
        "mistral_args": (f"{opening} call", f"({opening} call)*"),
    }[style.name]
    if not parallel:
        several = re.sub(r"\(.*\)\*", "", several)
    rules = [f"start: {shape} {several}".rstrip()]
    rules.append("call: " + " | ".join(f"call_{index}" for index in range(len(functions))))
    for index, (name, schema) in enumerate(functions.items()):
        try:
            check_schema(schema)
        except UsageError as error:
            raise UsageError(f"the function {name!r}: {error.message}", hint=error.hint) from None
        arguments = f"%json {json.dumps(with_options(schema))}"
        if style.name == "mistral_args":
            rules.append(f"call_{index}: {quoted(name)} {_mark('[ARGS]', style)} {arguments}")
        else:
            before = f'{{"name": {json.dumps(name)}, "{style.arguments_key}": '
            rules.append(f'call_{index}: {quoted(before)} {arguments} "}}"')
    return "\n".join(rules) + "\n"


def _mark(mark: str, style: ToolStyle) -> str:
    """A mark in Lark: special tokens by id, others by spelling."""
    if mark in style.special:
        return f"<[{style.special[mark]}]>"
    return quoted(mark) if mark else ""
