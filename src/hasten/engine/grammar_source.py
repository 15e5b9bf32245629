"""A `Grammar` as llguidance's own text, checked: size, nesting, and keywords that would be ignored."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from hasten.engine.grammar import Grammar
from hasten.errors import UsageError

if TYPE_CHECKING:
    from llguidance import LLParserLimits

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


# Work that one grammar may cause: a few ms a mask, memory as the states. Its trial alone limits compiling.
LIMITS = {
    "initial_lexer_fuel": 200_000,
    "step_lexer_fuel": 40_000,
    "step_max_items": 50_000,
    "max_items_in_row": 8_000,
    "max_lexer_states": 20_000,  # 1 to 2 KB each
    "max_grammar_size": 100_000,
}


@functools.cache
def limits() -> LLParserLimits:
    """`LIMITS` as llguidance takes them."""
    from llguidance import LLParserLimits

    known: dict[str, Any] = {**LIMITS, "verbose_errors": False}
    return LLParserLimits(**known)


def source_of(grammar: Grammar) -> str:
    """The text that llguidance compiles.

    Raises:
        UsageError: the source is too long, too deep, no Unicode or JSON, or a schema has an unknown keyword.
    """
    from llguidance import LLMatcher, regex_to_lark

    _check_text(grammar.source)
    match grammar.kind:
        case "json_schema":
            schema = parsed(grammar.source)
            check_schema(schema)
            return LLMatcher.grammar_from_json_schema(json.dumps(with_options(schema)))
        case "json_object":
            return LLMatcher.grammar_from_json_schema(json.dumps(with_options(ANY_OBJECT)))
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


def parsed(source: str) -> Any:
    """JSON text as values.

    Raises:
        UsageError: it is no JSON.
    """
    try:
        return json.loads(source)
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"the schema is no JSON: {error}", hint='send a JSON schema such as {"type": "object"}'
        ) from None


def check_schema(schema: Any) -> None:
    """Walk a JSON schema's nested schemas.

    llguidance refuses what it knows and lacks (`not`, `uniqueItems`); what it does not know it would pass
    over, as the standard wants of annotations. A misspelt `requierd` is none: both are refused by name.

    Raises:
        UsageError: a keyword is neither a rule nor a known annotation, or the nesting is too deep.
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


def with_options(schema: Any) -> Any:
    """A schema with the options that llguidance reads from the schema itself."""
    if not isinstance(schema, Mapping):
        return schema
    return {**schema, "x-guidance": {"whitespace_pattern": WHITESPACE}}


def _choice(source: str) -> str:
    choices = parsed(source)
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) for c in choices):
        raise UsageError("a choice must be a JSON list of texts", hint='for example ["yes", "no"]')
    texts = [text for text in dict.fromkeys(choices) if text]
    alternatives = " | ".join(quoted(text) for text in texts)
    if not texts:
        return 'start: ""\n'
    return f"start: CHOICE{'?' * ('' in choices)}\nCHOICE: {alternatives}\n"


def quoted(text: str) -> str:
    """A text as a literal of a Lark grammar."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
