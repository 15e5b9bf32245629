"""Tool calls out of text as it comes."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from hasten.models.tools.call import ToolCall, new_call_id, read_calls
from hasten.models.tools.style import ToolStyle

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


def parse_tool_calls(text: str, style: ToolStyle, names: Collection[str] = ()) -> tuple[str, list[ToolCall]]:
    """Content and calls of a whole answer: what the stream gives, put together."""
    stream = ToolCallStream(style, names)
    content, names, arguments = "", [], []
    for event in [*stream.push(text), *stream.flush()]:
        if isinstance(event, TextDelta):
            content += event.text
        elif isinstance(event, CallStarted):
            names.append(event.name)
        else:
            arguments.append(event.text)
    return content, [ToolCall(*pair) for pair in zip(names, arguments, strict=True)]


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
