"""A tool call, and the JSON that models write it in."""

from __future__ import annotations

import json
import math
import re
import secrets
import string
from dataclasses import dataclass
from typing import Any

from hasten.models.tools.style import ToolStyle

_NAMED = re.compile(r"\s*([\w.:/-]+)(?:\[CALL_ID\]\w+)?\s*(?:\[ARGS\])?\s*(?=\{)")
_BETWEEN = " \t\r\n;,"


@dataclass(frozen=True)
class ToolCall:
    """A function and its arguments as JSON text."""

    name: str
    arguments: str


def new_call_id(style: ToolStyle) -> str:
    """A name for a call; Mistral's templates take nothing but nine letters and digits."""
    letters = string.ascii_letters + string.digits
    if style.name.startswith("mistral"):
        return "".join(secrets.choice(letters) for _ in range(9))
    return "call_" + secrets.token_hex(12)


def read_calls(body: str, style: ToolStyle, bare: bool = False) -> tuple[list[ToolCall], str] | None:
    """The calls between a style's marks.

    Args:
        bare: there were no marks, so an object without arguments is no call.

    Returns:
        The calls and the text after them; None where the body is no call.
    """
    calls: list[ToolCall] = []
    rest = body.lstrip()
    while rest:
        named = _NAMED.match(rest) if style.name.startswith("mistral") else None
        try:
            value, end = _DECODER.raw_decode(rest, named.end() if named else 0)
        except (ValueError, RecursionError):
            break
        if named:
            value = {"name": named.group(1), "arguments": value}
        found = [_call(item, style, bare) for item in (value if isinstance(value, list) else [value])]
        good = [call for call in found if call is not None]
        if not good or len(good) < len(found):
            break
        calls += good
        rest = rest[end:]
        after = rest.lstrip(_BETWEEN)
        if after.startswith(style.opening):
            after = after[len(style.opening) :].lstrip()
        if after and after[0] not in "{[" and not (style.name == "mistral_args" and _NAMED.match(after)):
            break
        rest = after
    return (calls, rest) if calls else None


def _call(value: Any, style: ToolStyle, bare: bool) -> ToolCall | None:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not _is_name(value.get("name")):
        return None
    given = [value[key] for key in (style.arguments_key, "arguments", "parameters") if key in value]
    if bare and not given:
        return None  # any JSON object with a name is no call
    arguments = given[0] if given else {}
    if isinstance(arguments, str):
        try:
            arguments = _DECODER.decode(arguments or "{}")
        except (ValueError, RecursionError):
            return None
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        return None
    text = json.dumps(arguments, ensure_ascii=False)
    return ToolCall(value["name"], text if _is_unicode(text) else json.dumps(arguments))


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value != "" and _is_unicode(value)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no JSON number that can be written again")
    return value


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_finite, strict=False)
