"""What an answer must match, as the text that llguidance compiles: `Grammar`, and `tool_grammar`.

Sources are checked here: their size, their nesting, and keywords that llguidance would pass over.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hasten.errors import UsageError
from hasten.models.tool_calls import ToolStyle

GrammarKind = Literal["json_schema", "json_object", "regex", "lark", "choice", "structural"]
ToolChoice = Literal["none", "auto", "required"] | Mapping[str, Any]

MAX_BYTES = 256 << 10
MAX_NESTING = 100  # levels of JSON; llguidance reads 128 with its own around them
# A small model left to itself can write spaces for ever; this much indents 30 levels.
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,64}"
ANY_OBJECT = {"type": "object"}

_SCHEMAS = {"items", "additionalProperties", "additionalItems", "propertyNames", "contains", "not"}
_SCHEMAS |= {"if", "then", "else", "unevaluatedItems", "unevaluatedProperties", "contentSchema"}
_SCHEMA_LISTS = {"allOf", "anyOf", "oneOf", "prefixItems", "items"}
_SCHEMA_MAPS = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
_RULES = {"type", "enum", "const", "multipleOf", "maximum", "minimum", "exclusiveMaximum"}
_RULES |= {"exclusiveMinimum", "maxLength", "minLength", "pattern", "maxItems", "minItems", "uniqueItems"}
_RULES |= {"maxContains", "minContains", "maxProperties", "minProperties", "required", "dependentRequired"}
_RULES |= {"format", "$ref", "$dynamicRef", "$recursiveRef", "dependencies"}
_NOTES = {"$schema", "$id", "$anchor", "$dynamicAnchor", "$vocabulary", "$comment", "id", "title"}
_NOTES |= {"description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly"}
_NOTES |= {"contentEncoding", "contentMediaType", "discriminator", "externalDocs", "xml"}
_KNOWN = _SCHEMAS | _SCHEMA_LISTS | _SCHEMA_MAPS | _RULES | _NOTES

MAX_TOOLS = 128
_NAME = re.compile(r"[\w.:/-]{1,128}", re.ASCII)
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class Grammar:
    """What an answer must match.

    `source` is a JSON schema as JSON text, nothing for `json_object`, a regular expression (Rust's syntax,
    digits are 0 to 9; the whole answer must match), a grammar in llguidance's Lark dialect, or a JSON list of
    texts for `choice`. `structural` is a Lark grammar that `tool_grammar` wrote.
    """

    kind: GrammarKind
    source: str = ""


def source_of(grammar: Grammar) -> str:
    """The text that llguidance compiles.

    Raises:
        UsageError: the source is too long, too deep, no Unicode or JSON, or a schema has an unknown keyword.
    """
    from llguidance import LLMatcher, regex_to_lark

    _check_text(grammar.source)
    match grammar.kind:
        case "json_schema":
            schema = _parsed(grammar.source)
            _check_schema(schema)
            return LLMatcher.grammar_from_json_schema(json.dumps(_with_options(schema)))
        case "json_object":
            return LLMatcher.grammar_from_json_schema(json.dumps(_with_options(ANY_OBJECT)))
        case "choice":
            return LLMatcher.grammar_from_lark(_choice(grammar.source))
        case "regex":
            # \d means 0 to 9, as in JSON schemas, not the digits of all scripts
            return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(grammar.source, 'd')}/")
        case "lark" | "structural":
            return LLMatcher.grammar_from_lark(grammar.source)
    raise UsageError(
        f"unknown kind of grammar {grammar.kind!r}", hint="use json_schema, regex, lark or choice"
    )


def _check_text(source: str) -> None:
    try:
        size = len(source.encode())
    except UnicodeEncodeError as error:
        raise UsageError(f"the grammar is no Unicode: {error.reason} at character {error.start}") from None
    if size > MAX_BYTES:
        raise UsageError(
            f"the grammar has {size} bytes, the limit is {MAX_BYTES}",
            hint="send a shorter one: leave out descriptions and examples",
        )


def _parsed(source: str) -> Any:
    try:
        return json.loads(source)
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"the schema is no JSON: {error}", hint='send a JSON schema such as {"type": "object"}'
        ) from None


def _check_schema(schema: Any) -> None:
    """Walk a JSON schema's nested schemas.

    llguidance refuses what it knows and lacks (`not`, `uniqueItems`); what it does not know it would pass
    over, as the standard wants of annotations. A misspelt `requierd` is none: both are refused by name.
    """
    _check_depth(schema)
    waiting = [(schema, 1)]
    while waiting:
        here, depth = waiting.pop()
        if depth > MAX_NESTING // 2:
            raise UsageError(
                f"the JSON schema nests deeper than {MAX_NESTING // 2} schemas",
                hint="name parts with $defs and $ref",
            )
        if not isinstance(here, Mapping):
            continue  # true, false, or what llguidance names as wrong
        for key, value in here.items():
            if key not in _KNOWN and not key.startswith("x-"):
                raise UsageError(
                    f"the JSON schema has the keyword {key[:80]!r}, which is not supported",
                    hint="leave it out, or begin it with x- if it is a remark",
                )
            waiting.extend((inner, depth + 1) for inner in _nested(key, value))


def _check_depth(value: Any) -> None:
    """Of any JSON, constants and examples too: what reads and writes it calls itself level by level."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_NESTING:
            raise UsageError(
                f"the JSON schema nests deeper than {MAX_NESTING} levels",
                hint="name parts with $defs and $ref",
            )
        lists = [one.values() if isinstance(one, Mapping) else one for one in level if _holds(one)]
        level = [inner for held in lists for inner in held if _holds(inner)]


def _holds(value: Any) -> bool:
    return isinstance(value, Mapping | list | tuple)


def _nested(key: str, value: Any) -> Iterable[Any]:
    if key in _SCHEMA_LISTS and isinstance(value, list):
        return value
    if key in _SCHEMA_MAPS and isinstance(value, Mapping):
        return value.values()
    return (value,) if key in _SCHEMAS else ()


def _with_options(schema: Any) -> Any:
    """A schema with the options that llguidance reads from the schema itself."""
    if not isinstance(schema, Mapping):
        return schema
    return {**schema, "x-guidance": {"whitespace_pattern": WHITESPACE}}


def _choice(source: str) -> str:
    choices = _parsed(source)
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) for c in choices):
        raise UsageError("a choice must be a JSON list of texts", hint='for example ["yes", "no"]')
    texts = [text for text in dict.fromkeys(choices) if text]
    alternatives = " | ".join(_quoted(text) for text in texts)
    if not texts:
        return 'start: ""\n'
    return f"start: CHOICE{'?' * ('' in choices)}\nCHOICE: {alternatives}\n"


def _quoted(text: str) -> str:
    """A text as a literal of a Lark grammar."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


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
        "mistral": (f"{opening} {_quoted(' [' if style.spaced else '[')} call", '(", " call)* "]"'),
        "mistral_args": (f"{opening} call", f"({opening} call)*"),
    }[style.name]
    if not parallel:
        several = re.sub(r"\(.*\)\*", "", several)
    rules = [f"start: {shape} {several}".rstrip()]
    rules.append("call: " + " | ".join(f"call_{index}" for index in range(len(functions))))
    for index, (name, schema) in enumerate(functions.items()):
        try:
            _check_schema(schema)
        except UsageError as error:
            raise UsageError(f"the function {name!r}: {error.message}", hint=error.hint) from None
        arguments = f"%json {json.dumps(_with_options(schema))}"
        if style.name == "mistral_args":
            rules.append(f"call_{index}: {_quoted(name)} {_mark('[ARGS]', style)} {arguments}")
        else:
            before = f'{{"name": {json.dumps(name)}, "{style.arguments_key}": '
            rules.append(f'call_{index}: {_quoted(before)} {arguments} "}}"')
    return "\n".join(rules) + "\n"


def _mark(mark: str, style: ToolStyle) -> str:
    """A mark in Lark: special tokens by id, others by spelling."""
    if mark in style.special:
        return f"<[{style.special[mark]}]>"
    return _quoted(mark) if mark else ""
