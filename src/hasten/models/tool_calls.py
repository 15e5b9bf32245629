"""Tool calls: which way of writing them a model was taught, and reading them out of text as it comes.

The chat template shows the way.
The families and where their ways are written down:

- hermes: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, one each call. Templates of Qwen 2.5,
  Qwen 3, SmolLM 3 and Hermes (https://github.com/NousResearch/Hermes-Function-Calling).
- hermes_list: the same with a JSON list between the marks. Template of SmolLM 2.
- llama: `{"name": ..., "parameters": {...}}` as the whole message, perhaps after `<|python_tag|>`. Llama
  3.1 to 3.3 (https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1).
- mistral: `[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]`, and mistral_args:
  `[TOOL_CALLS]name[ARGS]{...}` (https://github.com/mistralai/mistral-common).
- phi: `<|tool_call|>[{"name": ..., "arguments": {...}}, ...]<|/tool_call|>`. Template of Phi-4-mini.

Templates of Gemma 3, OLMo 2 and Phi-3 know no tools: these models are told of them in words (`described`), in
hermes' way.
"""

from __future__ import annotations

import json
import math
import re
import secrets
import string
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

StyleName = Literal["hermes", "hermes_list", "llama", "mistral", "mistral_args", "phi"]

_MARKS: dict[StyleName, tuple[str, ...]] = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "hermes_list": ("<tool_call>", "</tool_call>"),
    "llama": ("<|python_tag|>",),
    "mistral": ("[TOOL_CALLS]",),
    "mistral_args": ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    "phi": ("<|tool_call|>", "<|/tool_call|>"),
}


@dataclass(frozen=True)
class ToolStyle:
    """One model's way. `special` are those of its marks that decode would leave out, with their ids."""

    name: StyleName = "hermes"
    described: bool = False  # the template knows no tools: they are put into words
    spaced: bool = False  # mistral: a space between mark and list
    special: Mapping[str, int] = field(default_factory=dict)

    @property
    def opening(self) -> str:
        """What a call begins with; llama's may be missing."""
        return _MARKS[self.name][0]

    @property
    def closing(self) -> str | None:
        """What a call ends with; None where it goes on to the end of the answer."""
        return _MARKS[self.name][1] if self.name in ("hermes", "hermes_list", "phi") else None

    @property
    def bare(self) -> bool:
        """Whether an answer that is nothing but JSON is a call."""
        return self.name == "llama"

    @property
    def arguments_key(self) -> str:
        """The arguments' name in the call's JSON."""
        return "parameters" if self.name == "llama" else "arguments"

    @property
    def keep_ids(self) -> tuple[int, ...]:
        """Special tokens that a text stream must let through: `tokenizer.stream(keep=style.keep_ids)`."""
        return tuple(sorted(self.special.values()))


def tool_style(templates: Mapping[str, str], architecture: str, special: Mapping[str, int]) -> ToolStyle:
    """The way of a model's chat template.

    Args:
        templates: the model's, by name.
        architecture: as the model's; decides where a template leaves it open.
        special: the ids of the special tokens; marks may be among them.
    """
    name, described, spaced = _read(template_of(templates), architecture)
    return ToolStyle(name, described, spaced, {m: special[m] for m in _MARKS[name] if m in special})


def template_of(templates: Mapping[str, str]) -> str:
    """The template that chats with tools use."""
    return templates.get("tool_use") or templates.get("default") or ""


def is_described(templates: Mapping[str, str]) -> bool:
    """Whether tools must be put into words because the template knows none."""
    return "tool_use" not in templates and _read(template_of(templates), "")[1]


def _read(template: str, architecture: str) -> tuple[StyleName, bool, bool]:
    """Style, described, spaced."""
    if "[TOOL_CALLS]" in template:
        return "mistral_args" if "[ARGS]" in template else "mistral", False, "[TOOL_CALLS] [" in template
    if "<|tool_call|>" in template or "<|tool|>" in template:
        return "phi", False, False
    if "<tool_call>" in template and "<function=" not in template:
        as_list = "<tool_call>[" in template.replace("\\n", "").replace(" ", "")
        return "hermes_list" if as_list else "hermes", False, False
    if "<|python_tag|>" in template or (architecture == "llama" and '"parameters"' in template):
        return "llama", False, False
    return "hermes", True, False


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


_FENCE = re.compile(r"\s*(?:```(?:json)?\s*)?(?=\{)")
_HALF_FENCE = re.compile(r"\s*`{1,3}(?:j|js|jso|json)?\s*")
_END_FENCE = re.compile(r"\s*```\s*$")
_FIRST_KEY = re.compile(r'\{\s*(?:"(\w*)("?)|$)')
_KEYS = ("name", "type", "function", "id", "arguments", "parameters")
_PREFIX = 256  # characters of a call within which its first key stands
_QUOTES = re.compile(r'\\.|"', re.DOTALL)


@dataclass(frozen=True)
class TextDelta:
    """Plain content."""

    text: str


@dataclass(frozen=True)
class CallStarted:
    """A call begins; `index` counts the calls of one answer from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ArgumentsDelta:
    """More of a call's arguments: JSON text."""

    index: int
    text: str


ToolEvent = TextDelta | CallStarted | ArgumentsDelta


class ToolCallStream:
    """Splits an answer into content and calls, whatever pieces it comes in.

    Content passes at once, but for what may be the beginning of a mark, and spaces that a call may follow. A
    call is held until it is whole and valid, so its arguments come in one piece: what a model leaves
    unfinished or malformed is content, marks included, and nobody has acted on half of it.

    Args:
        style: the model's way.
        names: the functions that exist. Small models forget the marks: with the names known, an answer that
            is nothing but the JSON of a call to one of them, in a code fence perhaps, is a call too.
        new_id: names a call.
    """

    def __init__(
        self, style: ToolStyle, names: Collection[str] = (), new_id: Callable[[], str] | None = None
    ) -> None:
        self._style = style
        self._names = frozenset(names)
        self._new_id = new_id or (lambda: new_call_id(style))
        self._held = ""  # may become a mark, or is a call, its opening included
        self._inside = False
        self._bare = False  # inside a call that began without a mark
        self._opened = 0  # characters of `_held` that began the call: spaces and the mark
        self._searched = 0  # of `_held`, for the closing mark
        self._quotes = 0  # in `_held` before `_searched`, escaped ones not counted
        self._at_start = True  # nothing but spaces came, since the last call if there was one
        self._count = 0

    def push(self, text: str) -> list[ToolEvent]:
        """What more text makes certain."""
        self._held += text
        events: list[ToolEvent] = []
        while self._close(events) if self._inside else self._open(events):
            pass
        return events

    def flush(self) -> list[ToolEvent]:
        """What is left at the end of the answer: a call that lacks only its closing mark counts."""
        events: list[ToolEvent] = []
        while self._inside or self._open(events):
            if self._inside and not self._close(events):
                self._finish(len(self._held), 0, events)
        rest, self._held = self._held, ""
        self._text(rest, events)
        return events

    def _open(self, events: list[ToolEvent]) -> bool:
        """Pass content on; True where a call begins."""
        held, mark = self._held, self._style.opening
        if self._at_start and (self._names or self._style.bare):
            fence = _FENCE.match(held)
            if fence:
                self._inside = self._bare = True
                self._opened = fence.end()
                return True
            if _HALF_FENCE.fullmatch(held):
                return False
        found = held.find(mark)
        free = found if found >= 0 else len(held) - _begun(held, mark)
        free = len(held[:free].rstrip())
        self._held = held[free:]
        self._text(held[:free], events)
        if found < 0:
            return False
        self._inside, self._bare = True, False
        self._opened = self._searched = found - free + len(mark)
        self._quotes = 0
        return True

    def _text(self, text: str, events: list[ToolEvent]) -> None:
        if self._count and self._at_start:
            text = text.lstrip()  # spaces after a call
        if text:
            self._at_start = self._at_start and not text.strip()
            events.append(TextDelta(text))

    def _close(self, events: list[ToolEvent]) -> bool:
        """Look for the end of a call; True where its mark came, be it inside a string."""
        closing = self._style.closing
        if self._bare:
            if _may_be_call(self._held[self._opened : self._opened + _PREFIX]):
                return False
            self._give_up(events)
            return True
        if closing is None:
            return False
        found = self._held.find(closing, self._searched)
        if found < 0:
            return False
        self._quotes += sum(m.group() == '"' for m in _QUOTES.finditer(self._held, self._searched, found))
        self._searched = found + len(closing)
        if self._quotes % 2 == 0:
            self._finish(found, len(closing), events)
        return True

    def _finish(self, end: int, closing: int, events: list[ToolEvent]) -> None:
        """The call's body ends at `end` of what is held: calls, or content after all."""
        self._inside = False
        body = self._held[self._opened : end]
        read = read_calls(_END_FENCE.sub("", body) if self._bare else body, self._style, self._bare)
        if read is not None and self._bare and self._names:
            read = read if all(call.name in self._names for call in read[0]) else None
        if read is None or ((closing or self._bare) and read[1].strip()):
            self._give_up(events)
            return
        for call in read[0]:
            events.append(CallStarted(self._count, self._new_id(), call.name))
            events.append(ArgumentsDelta(self._count, call.arguments))
            self._count += 1
        self._at_start = True
        self._held = self._held[end + closing :] if closing else read[1]

    def _give_up(self, events: list[ToolEvent]) -> None:
        """What began a call is content; what follows is looked at anew."""
        self._inside = False
        size = max(self._opened, 1)
        text, self._held = self._held[:size], self._held[size:]
        self._text(text, events)


def _begun(text: str, mark: str) -> int:
    """Characters at the end of a text that may be the beginning of a mark."""
    for size in range(min(len(text), len(mark) - 1), 0, -1):
        if text.endswith(mark[:size]):
            return size
    return 0


def _may_be_call(begun: str) -> bool:
    """Whether JSON that begins so can become a call; a long JSON answer need not be held back."""
    match = _FIRST_KEY.match(begun)
    if match is None:
        return False
    key, closed = match.group(1) or "", match.group(2)
    return key in _KEYS if closed else any(known.startswith(key) for known in _KEYS)
