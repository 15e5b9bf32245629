"""JSON schemas as people write them, in the words that llguidance follows.

Pydantic, Zod, OpenAPI and Gemini write schemas of many dialects. Here annotations are left out, dialects are
rewritten, and what a grammar cannot follow (`uniqueItems`, `not`, `if`, `contains`, look-around in a pattern)
is left out too and named: the answer is checked against the whole schema when it is there.

What llguidance follows: https://github.com/guidance-ai/llguidance/blob/main/docs/json_schema.md. What is
checked: JSON Schema 2020-12, by jsonschema-rs (https://github.com/Stranger6667/jsonschema), in a process of
its own: a schema of 40 definitions, each with two references to the next one, takes it for ever.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hasten.engine.grammar_trial import shared_trial
from hasten.errors import MachineError

MAX_NESTING = 50  # schemas inside each other

SCHEMAS = frozenset(["items", "additionalProperties", "additionalItems"])
SCHEMA_LISTS = frozenset(["allOf", "anyOf", "oneOf", "prefixItems", "items"])
SCHEMA_MAPS = frozenset(["properties", "patternProperties", "$defs", "definitions"])
FOLLOWED = SCHEMAS | SCHEMA_LISTS | SCHEMA_MAPS
FOLLOWED |= {"type", "enum", "const", "multipleOf", "maximum", "minimum", "exclusiveMaximum", "format"}
FOLLOWED |= {"exclusiveMinimum", "maxLength", "minLength", "pattern", "maxItems", "minItems", "$ref"}
FOLLOWED |= {"maxProperties", "minProperties", "required", "$schema", "$id", "$anchor", "id"}
CHECKED = {"uniqueItems", "propertyNames", "contains", "minContains", "maxContains", "not", "if", "then"}
CHECKED |= {"else", "unevaluatedItems", "unevaluatedProperties", "dependentRequired", "dependentSchemas"}
CHECKED |= {"dependencies", "$dynamicRef", "$recursiveRef"}
_FORMATS = {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}
_TYPES = {
    "int": "integer",
    "long": "integer",
    "float": "number",
    "double": "number",
    "decimal": "number",
    "str": "string",
    "text": "string",
    "bool": "boolean",
    "dict": "object",
    "map": "object",
    "list": "array",
    "tuple": "array",
    "none": "null",
    "nil": "null",
}
_OF_OBJECT = ("properties", "required", "additionalProperties", "patternProperties", "minProperties")
_OF_ARRAY = ("items", "prefixItems", "minItems", "maxItems", "uniqueItems")
_DECIDED = ("type", "enum", "const", "$ref", "anyOf", "oneOf", "allOf", "not", "if")
_AROUND = re.compile(r"\(\?(?:[=!]|<[=!])")
_BACK = re.compile(r"\\[1-9]|\\k<\w+>")


@dataclass(frozen=True)
class Followed:
    """A schema that a grammar follows, and what of the original it leaves out."""

    schema: Any
    checked: tuple[str, ...] = ()  # keywords that narrow: the answer is checked against them


def followed(schema: Any) -> Followed:
    """A schema without what llguidance cannot follow; every answer to the original still matches it."""
    checked: set[str] = set()
    return Followed(_rewritten(schema, checked, 0), tuple(sorted(checked)))


def violations(schema: Any, text: str, most: int = 3) -> tuple[str, ...]:
    """What of an answer does not match a schema, in words; nothing where it does. Waits for another process.

    Returns:
        Also one line where the answer is no JSON, or cannot be checked.
    """
    try:
        return shared_trial().violations(_plain(schema, 0), text, most)
    except MachineError as error:
        return (f"it cannot be checked: {error.message}",)


def _plain(schema: Any, depth: int) -> Any:
    """The schema in the standard's own words: dialects rewritten, nothing left out."""
    if isinstance(schema, list):
        return [_plain(one, depth + 1) for one in schema]
    if not isinstance(schema, Mapping) or depth > 2 * MAX_NESTING:
        return schema
    here = {
        key: value if key in ("enum", "const") else _plain(value, depth + 1) for key, value in schema.items()
    }
    return _undialected(here) if "type" in here or "nullable" in here else here


def _rewritten(schema: Any, checked: set[str], depth: int) -> Any:
    if not isinstance(schema, Mapping) or depth > MAX_NESTING:
        return schema
    here = _undialected(dict(schema))
    _names(here)
    _unevaluated(here)
    kept: dict[str, Any] = {}
    for key, value in here.items():
        if key in CHECKED:
            if not _says_nothing(key, value):
                checked.add(key)
        elif key in FOLLOWED:
            kept[key] = _inner(key, value, checked, depth + 1)
    _patterns(kept, checked)
    if kept.get("format") not in _FORMATS:
        kept.pop("format", None)
    if isinstance(kept.get("oneOf"), list) and "anyOf" not in kept:
        if not _is_told_apart(kept["oneOf"]):
            checked.add("oneOf")
        kept["anyOf"] = kept.pop("oneOf")
    return _bounded(here, _typed(kept, here))


def _inner(key: str, value: Any, checked: set[str], depth: int) -> Any:
    if key in SCHEMA_LISTS and isinstance(value, list):
        return [_rewritten(one, checked, depth) for one in value]
    if key in SCHEMA_MAPS and isinstance(value, Mapping):
        return {name: _rewritten(one, checked, depth) for name, one in value.items()}
    return _rewritten(value, checked, depth) if key in SCHEMAS else value


def _undialected(here: dict[str, Any]) -> dict[str, Any]:
    """OpenAPI's `nullable`, Gemini's `STRING`, Python's `int`, draft 4's `exclusiveMinimum: true`."""
    kind = here.get("type")
    if isinstance(kind, str):
        kind = _TYPES.get(kind.lower(), kind.lower())
        here["type"] = kind
        if kind == "any":
            del here["type"]
    for bound, limit in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if isinstance(here.get(bound), bool):
            is_open = here.pop(bound)
            if is_open and limit in here:
                here[bound] = here.pop(limit)
    if isinstance(here.get("nullable"), bool) and here.pop("nullable"):
        return _nullable(here)
    return here


def _nullable(here: dict[str, Any]) -> dict[str, Any]:
    kind = here.get("type")
    if isinstance(here.get("enum"), list) and None not in here["enum"]:
        here["enum"] = [*here["enum"], None]
    if isinstance(kind, str) and kind != "null":
        here["type"] = [kind, "null"]
        return here
    if kind is None and any(key in here for key in ("$ref", "allOf", "anyOf", "oneOf")):
        return {"anyOf": [here, {"type": "null"}]}
    return here


def _names(here: dict[str, Any]) -> None:
    """`propertyNames` as properties or a pattern of names, where it is all that is said of them."""
    rule = here.get("propertyNames")
    if not isinstance(rule, Mapping) or any(key in here for key in ("properties", "patternProperties")):
        return
    said = {
        key for key in rule if key in ("enum", "pattern", "minLength", "maxLength", "const", "$ref", "format")
    }
    value = here.get("additionalProperties", True)
    if said == {"enum"} and isinstance(rule["enum"], list):
        here["properties"] = {name: value for name in rule["enum"] if isinstance(name, str)}
    elif said == {"pattern"} and isinstance(rule["pattern"], str) and not _AROUND.search(rule["pattern"]):
        here["patternProperties"] = {rule["pattern"]: value}
    else:
        return
    here["additionalProperties"] = False
    here.setdefault("type", "object")
    del here["propertyNames"]


def _unevaluated(here: dict[str, Any]) -> None:
    """`unevaluatedProperties: false` is `additionalProperties: false` where nothing else adds properties."""
    if here.get("unevaluatedProperties") is not False or "additionalProperties" in here:
        return
    if not any(key in here for key in ("allOf", "anyOf", "oneOf", "$ref", "if", "dependentSchemas")):
        del here["unevaluatedProperties"]
        here["additionalProperties"] = False


def _says_nothing(key: str, value: Any) -> bool:
    if key in ("then", "else", "minContains", "maxContains"):
        return True  # belongs to `if` or `contains`, which are named
    if key == "propertyNames" and isinstance(value, Mapping):
        return set(value) <= {"type", "title", "description"}
    if key.startswith("unevaluated"):
        return value is True
    return value is False and key in ("uniqueItems", "not", "if")


def _patterns(kept: dict[str, Any], checked: set[str]) -> None:
    """Patterns without look-around and back references: a wider language, so they are checked."""
    if isinstance(pattern := kept.get("pattern"), str):
        kept["pattern"] = _wider(pattern)
        if kept["pattern"] != pattern:
            checked.add("pattern")
        if not kept["pattern"]:
            del kept["pattern"]
    names = kept.get("patternProperties")
    if isinstance(names, Mapping):
        kept["patternProperties"] = {(_wider(name) or ".*"): rule for name, rule in names.items()}
        if set(kept["patternProperties"]) != set(names):
            checked.add("patternProperties")


def _wider(pattern: str) -> str:
    """A regular expression without look-around, back references, word borders; empty: nothing is left."""
    if re.fullmatch(
        r"/.*/[a-z]*", pattern, re.DOTALL
    ):  # a JavaScript literal; its flags are another language
        pattern = pattern[1 : pattern.rindex("/")]
    while (found := _AROUND.search(pattern)) is not None:
        end = _closing(pattern, found.start())
        if end < 0:
            return ""
        pattern = pattern[: found.start()] + pattern[end + 1 :]
    pattern = _BACK.sub(".*", pattern)
    return re.sub(r"(?<!\\)((?:\\\\)*)\\[bB]", r"\1", pattern)


def _closing(pattern: str, start: int) -> int:
    """Where the group that opens at `start` closes; -1 where it does not."""
    depth, at, in_set = 0, start, False
    while at < len(pattern):
        sign = pattern[at]
        if sign == "\\":
            at += 1
        elif in_set:
            in_set = sign != "]"
        elif sign == "[":
            in_set = True
        elif sign in "()":
            depth += 1 if sign == "(" else -1
            if depth == 0:
                return at
        at += 1
    return -1


def _is_told_apart(branches: list[Any]) -> bool:
    """Whether no value can match two of the branches: another type, or another constant of one property."""
    kinds = [one.get("type") for one in branches if isinstance(one, Mapping)]
    names = {kind for kind in kinds if isinstance(kind, str)}
    if len(names) == len(branches) and not {"integer", "number"} <= names:
        return True
    tags = [_constants(one) for one in branches]
    shared = set(tags[0]).intersection(*tags[1:]) if tags else set()
    return any(len({tag[name] for tag in tags}) == len(tags) for name in shared)


def _constants(branch: Any) -> dict[str, str]:
    if not isinstance(branch, Mapping):
        return {}
    if "const" in branch:
        return {"": json.dumps(branch["const"], sort_keys=True)}
    needed = branch.get("required") or ()
    found = {}
    for name, rule in (branch.get("properties") or {}).items():
        if name in needed and isinstance(rule, Mapping):
            one = rule.get("enum") if isinstance(rule.get("enum"), list) and len(rule["enum"]) == 1 else None
            if "const" in rule or one:
                found[name] = json.dumps(rule.get("const", one[0] if one else None), sort_keys=True)
    return found


def _typed(kept: dict[str, Any], here: Mapping[str, Any]) -> dict[str, Any]:
    """A schema of properties means an object, one of items a list, though the standard lets all else pass."""
    if any(key in here for key in _DECIDED):
        return kept
    if any(key in here for key in _OF_OBJECT):
        return {"type": "object", **kept}
    if any(key in here for key in _OF_ARRAY):
        return {"type": "array", **kept}
    return kept


def _bounded(here: Mapping[str, Any], kept: dict[str, Any]) -> dict[str, Any]:
    """What can be said in numbers of what is left out: a set of an enumeration's values ends."""
    rule = kept.get("items")
    if here.get("uniqueItems") is True and isinstance(rule, Mapping) and isinstance(rule.get("enum"), list):
        kept["maxItems"] = min(kept.get("maxItems", len(rule["enum"])), len(rule["enum"]))
    if "contains" in here and here.get("minContains", 1) and kept.get("type") in ("array", None):
        kept["minItems"] = max(kept.get("minItems", 0), here.get("minContains", 1))
    return kept
