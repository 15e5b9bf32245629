"""Reading an answer as it comes: what the model thought, what it says, which tools it calls.

Models that reason write a thought first, between marks of their family:

- `<think>...</think>`: DeepSeek R1, Qwen 3, SmolLM 3, Phi-4 reasoning, GLM; `<seed:think>`: Seed-OSS.
- `[THINK]...[/THINK]`: Magistral (https://docs.mistral.ai/capabilities/reasoning).
- `<thought>`: EXAONE; `<|START_THINKING|>`: Command A.
- channels: gpt-oss (https://cookbook.openai.com/articles/openai-harmony), see `HarmonyReader`.

Which one it is stands in the chat template. A template may also write the opening mark itself: the answer
then begins inside the thought.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from hasten.models.tool_calls import NAMED_CALL, ToolStyle, new_call_id, read_calls

_FENCE = re.compile(r"\s*(?:```(?:json)?\s*)?(?=\{)")
_BRACKET = re.compile(r"\s*(?=\[\s*[A-Za-z_])")
_HALF_BRACKET = re.compile(r"\s*\[?\s*")
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
class ThoughtDelta:
    """What the model thought before it answered."""

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


ToolEvent = TextDelta | ThoughtDelta | CallStarted | ArgumentsDelta

_HEAD = re.compile(
    r'[\s,;]*\[?\s*\{\s*"name"\s*:\s*"([\w.:/-]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_HEAD_CHARS = 512
_AFTER = " \t\r\n;,}]"
_LEXEME = re.compile(r'"|[{\[]|[}\]]|[^"{}\[\]]+')
_IN_TEXT = re.compile(r'\\.|"|[^"\\\x00-\x1f]+|[\x00-\x1f]', re.DOTALL)


class ArgumentsScan:
    """Follows a JSON object to its end, in any pieces. Control characters in texts become escapes."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_text = False
        self.done = False

    def feed(self, text: str) -> tuple[int, str]:
        """More of it -> (characters that belong to the object, what to pass on of them)."""
        at, out = 0, []
        while at < len(text) and not self.done:
            if self._in_text:
                found = _IN_TEXT.match(text, at)
                if found is None:  # a backslash at the end of what came
                    break
                piece = found.group()
                self._in_text = piece != '"'
                out.append(json.dumps(piece)[1:-1] if piece < " " else piece)
            else:
                found = _LEXEME.match(text, at)
                assert found is not None
                piece = found.group()
                self._in_text = piece == '"'
                self._depth += (piece in "{[") - (piece in "}]")
                self.done = self._depth == 0
                out.append(piece)
            at = found.end()
        return at, "".join(out)


class ToolCallStream:
    """Splits an answer into content and calls, whatever pieces it comes in.

    Content passes at once, but for what may be the beginning of a mark, and spaces that a call may follow. A
    call is held until it is whole and valid, so its arguments come in one piece: what a model leaves
    malformed is content, marks included, and nobody has acted on half of it. With `streamed`, arguments of a
    call in JSON pass on as they come, once its name is known.

    Args:
        style: the model's way.
        names: the functions that exist. Small models forget the marks: with the names known, an answer that
            is nothing but the JSON of a call to one of them, in a code fence perhaps, is a call too.
        new_id: names a call.
        streamed: arguments pass on as they come.
    """

    def __init__(
        self,
        style: ToolStyle,
        names: Collection[str] = (),
        new_id: Callable[[], str] | None = None,
        streamed: bool = False,
    ) -> None:
        self._streamed = streamed and style.name not in ("qwen_xml", "pythonic")
        self._scan: ArgumentsScan | None = None  # of a call whose arguments come
        self._after = False  # such a call is over, its marks are to come
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

    def flush(self, cut: bool = False) -> list[ToolEvent]:
        """What is left at the end of the answer: a call that lacks only its closing mark counts.

        Args:
            cut: the limit on tokens ended the answer: an unfinished call is left out, it is no content.
        """
        events: list[ToolEvent] = []
        while self._inside or self._open(events):
            if self._scan is not None or self._after:
                self._close(events)
                self._held, self._inside, self._scan, self._after = "", False, None, False
            elif self._inside and not self._close(events):
                if cut and self._is_unfinished():
                    self._held, self._inside = "", False
                    break
                self._finish(len(self._held), 0, events)
        rest, self._held = self._held, ""
        if cut and begun(rest, self._style.opening) > 1:
            rest = rest[: -begun(rest, self._style.opening)]
        self._text(rest, events)
        return events

    def _is_unfinished(self) -> bool:
        """Whether what is held began a call and is none yet."""
        body = self._held[self._opened :]
        if read_calls(body, self._style, self._bare) is not None:
            return False
        if not self._bare:
            return True
        name = re.match(r'\s*\[?\s*\{?\s*"?(?:name"\s*:\s*")?([\w.:/-]*)', body)
        begins = name.group(1) if name else ""
        return not self._names or any(one.startswith(begins) for one in self._names)

    def _open(self, events: list[ToolEvent]) -> bool:
        """Pass content on; True where a call begins."""
        held, mark = self._held, self._style.opening
        if self._at_start and (self._names or self._style.bare):
            fence = (_BRACKET if self._style.name == "pythonic" else _FENCE).match(held)
            if fence:
                self._inside = self._bare = True
                self._opened = fence.end()
                return True
            if (_HALF_BRACKET if self._style.name == "pythonic" else _HALF_FENCE).fullmatch(held):
                return False
        found = held.find(mark)
        free = found if found >= 0 else len(held) - begun(held, mark)
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
        if self._streamed and (self._scan or self._after or self._begins(self._held[self._opened :], events)):
            return self._go_on(events)
        closing = self._style.closing
        if self._bare:
            if self._style.name == "pythonic" or _may_be_call(
                self._held[self._opened : self._opened + _PREFIX]
            ):
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

    def _begins(self, body: str, events: list[ToolEvent]) -> bool:
        """Whether a body begins with the name of a call; its arguments then pass on as they come."""
        pattern = NAMED_CALL if self._style.name == "mistral_args" else _HEAD
        head = pattern.match(body[:_HEAD_CHARS])
        if head is None or (self._bare and head.group(1) not in self._names):
            return False
        events.append(CallStarted(self._count, self._new_id(), head.group(1)))
        self._count += 1
        self._held, self._scan, self._after = body[head.end() :], ArgumentsScan(), False
        return True

    def _go_on(self, events: list[ToolEvent]) -> bool:
        """Pass arguments on, or look for what follows them; True where the call is over."""
        if self._scan is not None:
            used, text = self._scan.feed(self._held)
            self._held = self._held[used:]
            if text:
                events.append(ArgumentsDelta(self._count - 1, text))
            if not self._scan.done:
                return False
            self._scan, self._after = None, True
        skipped = _AFTER + ("`" if self._bare else "")
        rest = self._held.lstrip(skipped)
        closing, opening = self._style.closing, self._style.opening
        if closing is not None and rest.startswith(closing) and not self._bare:
            self._held, self._inside, self._after = rest[len(closing) :], False, False
            self._at_start = True
            return True
        if rest.startswith(opening):
            rest = rest[len(opening) :].lstrip()
        if rest and self._begins(rest, events):
            return self._go_on(events)
        marks = (opening,) if closing is None or self._bare else (opening, closing)
        waits = not rest or any(mark.startswith(rest) for mark in marks)
        if waits or (rest[0] in "{[" and len(rest) < _HEAD_CHARS) or self._half_named(rest):
            return False
        self._held, self._inside, self._after, self._at_start = rest, False, False, True
        return True

    def _half_named(self, rest: str) -> bool:
        return self._style.name == "mistral_args" and re.fullmatch(r"[\w.:/\[\]-]{1,200}", rest) is not None

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


def begun(text: str, mark: str) -> int:
    """Characters at the end of a text that may be the beginning of a mark."""
    for size in range(min(len(text), len(mark) - 1), 0, -1):
        if text.endswith(mark[:size]):
            return size
    return 0


def _may_be_call(text: str) -> bool:
    """Whether JSON that begins so can become a call; a long JSON answer need not be held back."""
    match = _FIRST_KEY.match(text)
    if match is None:
        return False
    key, closed = match.group(1) or "", match.group(2)
    return key in _KEYS if closed else any(known.startswith(key) for known in _KEYS)


_PAIRS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<thought>", "</thought>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)


@dataclass(frozen=True)
class ThoughtMarks:
    """How a family marks its thoughts. `special` are those of its marks that decode would leave out."""

    opening: str = "<think>"
    closing: str = "</think>"
    special: Mapping[str, int] = field(default_factory=dict, hash=False)

    def is_open(self, prompt: str) -> bool:
        """Whether a prompt ends inside a thought: the template wrote the opening mark."""
        return prompt.rstrip().endswith(self.opening)

    @property
    def keep_ids(self) -> tuple[int, ...]:
        """Special tokens that a text stream must let through."""
        return tuple(sorted(self.special.values()))


def thought_marks(template: str, special: Mapping[str, int]) -> ThoughtMarks | None:
    """The marks that a chat template names; None: the model does not reason in marks.

    Args:
        template: Jinja source.
        special: the ids of the special tokens; marks may be among them.
    """
    for opening, closing in _PAIRS:
        if opening in template or closing in template:
            return ThoughtMarks(opening, closing, {m: special[m] for m in (opening, closing) if m in special})
    return None


class Reader(ABC):
    """What splits an answer: text goes in as it comes, what it means comes out."""

    @abstractmethod
    def push(self, text: str) -> list[ToolEvent]:
        """What more text makes certain."""

    @abstractmethod
    def flush(self, cut: bool = False) -> list[ToolEvent]:
        """What is left at the end; `cut`: the limit on tokens ended the answer, not the model."""

    def read(self, text: str, finish: str | None) -> list[ToolEvent]:
        """What more text makes certain, and what is left where the answer ends with it: `finish` says why."""
        news = self.push(text)
        return news if finish is None else [*news, *self.flush(finish == "length")]


class AnswerReader(Reader):
    """A thought first, then content and calls.

    Args:
        marks: of thoughts; None: there are none.
        inside: the answer begins inside a thought.
        calls: reads calls from what follows the thought; None: all of it is content.
        most_calls: further calls are left out; None: any number.
    """

    def __init__(
        self,
        marks: ThoughtMarks | None,
        inside: bool = False,
        calls: ToolCallStream | None = None,
        most_calls: int | None = None,
    ) -> None:
        self._marks = marks
        self._state = "content" if marks is None else "thought" if inside else "start"
        self._calls = calls
        self._most = most_calls
        self._held = ""
        self._thought = False  # some of the thought came: blanks before it are left out
        self._trim = False  # blanks between thought and content are left out

    def push(self, text: str) -> list[ToolEvent]:
        """What more text makes certain."""
        return self._bounded(self._read(text))

    def flush(self, cut: bool = False) -> list[ToolEvent]:
        """What is left at the end of the answer."""
        rest, self._held = self._held, ""
        events: list[ToolEvent] = []
        if self._state == "thought":
            rest = rest.rstrip()
            events = [ThoughtDelta(rest)] if rest else []
        elif rest:
            events = self._say(rest)
        if self._calls is not None:
            events += self._calls.flush(cut)
        return self._bounded(events)

    def _bounded(self, events: list[ToolEvent]) -> list[ToolEvent]:
        most = self._most
        if most is None:
            return events
        return [
            one for one in events if not isinstance(one, CallStarted | ArgumentsDelta) or one.index < most
        ]

    def _read(self, text: str) -> list[ToolEvent]:
        if self._state == "content" or self._marks is None:
            return self._say(text)
        self._held += text
        if self._state == "start":
            opening, ahead = self._marks.opening, self._held.lstrip()
            if ahead.startswith(opening):
                self._state, self._held = "thought", ahead[len(opening) :]
            elif opening.startswith(ahead):  # nothing yet, or the beginning of the mark
                return []
            else:
                self._state = "content"
                held, self._held = self._held, ""
                return self._say(held)
        return self._think()

    def _think(self) -> list[ToolEvent]:
        assert self._marks is not None
        closing = self._marks.closing
        if not self._thought:
            self._held = self._held.lstrip()
        found = self._held.find(closing)
        free = found if found >= 0 else len(self._held) - begun(self._held, closing)
        free = len(self._held[:free].rstrip())
        thought, self._held = self._held[:free], self._held[free:]
        self._thought = self._thought or bool(thought)
        events: list[ToolEvent] = [ThoughtDelta(thought)] if thought else []
        if found >= 0:
            rest = self._held.lstrip()[len(closing) :]
            self._held, self._state, self._trim = "", "content", True
            events += self._say(rest)
        return events

    def _say(self, text: str) -> list[ToolEvent]:
        if self._trim:
            text = text.lstrip()
            self._trim = not text
        if self._calls is not None:
            return self._calls.push(text)
        return [TextDelta(text)] if text else []


_TO = re.compile(r"to=(?:functions\.)?([\w.:/-]+)")
_CHANNEL_MARKS = (
    "<|start|>",
    "<|channel|>",
    "<|message|>",
    "<|constrain|>",
    "<|end|>",
    "<|call|>",
    "<|return|>",
)


class HarmonyReader(Reader):
    """gpt-oss's messages: `<|channel|>analysis<|message|>thought<|end|><|start|>assistant<|channel|>...`.

    The channel `analysis` is the thought, `final` the content; a message `to=functions.NAME` is a call, its
    text the arguments.
    """

    def __init__(self, style: ToolStyle | None = None, most_calls: int | None = None) -> None:
        self._style = style or ToolStyle()
        self._most = most_calls
        self._held = ""
        self._into: str | None = None  # thought, text, call; None: a header
        self._count = 0

    def push(self, text: str) -> list[ToolEvent]:
        """What more text makes certain."""
        self._held += text
        events: list[ToolEvent] = []
        while self._step(events):
            pass
        return events

    def flush(self, cut: bool = False) -> list[ToolEvent]:
        """What is left at the end of the answer."""
        events: list[ToolEvent] = []
        held, self._held = self._held, ""
        if self._into is None:
            if held and not any(mark in held for mark in _CHANNEL_MARKS):
                events.append(TextDelta(held))  # a model that forgot its channels
        elif held:
            self._emit(held, events)
        return events

    def _step(self, events: list[ToolEvent]) -> bool:
        if self._into is None:
            head, found, rest = self._held.partition("<|message|>")
            if not found:
                return False
            self._begin(head, events)
            self._held = rest
            return True
        ends = [
            at
            for mark in ("<|end|>", "<|call|>", "<|return|>", "<|start|>")
            if (at := self._held.find(mark)) >= 0
        ]
        if ends:
            at = min(ends)
            self._emit(self._held[:at], events)
            self._held, self._into = self._held[at:], None
            self._held = re.sub(r"^<\|(?:end|call|return)\|>", "", self._held)
            return True
        free = len(self._held) - max(begun(self._held, mark) for mark in _CHANNEL_MARKS)
        self._emit(self._held[:free], events)
        self._held = self._held[free:]
        return False

    def _begin(self, head: str, events: list[ToolEvent]) -> None:
        to = _TO.search(head)
        if to is None:
            self._into = "text" if "final" in head else "thought"
            return
        self._into = "call"
        if self._most is None or self._count < self._most:
            events.append(CallStarted(self._count, new_call_id(self._style), to.group(1)))
        self._count += 1

    def _emit(self, text: str, events: list[ToolEvent]) -> None:
        if not text:
            return
        if self._into == "call":
            if self._most is None or self._count <= self._most:
                events.append(ArgumentsDelta(self._count - 1, text))
        else:
            events.append(ThoughtDelta(text) if self._into == "thought" else TextDelta(text))


def gathered(events: Sequence[ToolEvent]) -> tuple[str, str, list[tuple[CallStarted, str]]]:
    """Thought, content and calls with their arguments of a whole answer."""
    thought, text = [], []
    calls: list[tuple[CallStarted, list[str]]] = []
    for one in events:
        if isinstance(one, TextDelta):
            text.append(one.text)
        elif isinstance(one, ThoughtDelta):
            thought.append(one.text)
        elif isinstance(one, CallStarted):
            calls.append((one, []))
        else:
            calls[-1][1].append(one.text)
    return "".join(thought), "".join(text), [(call, "".join(parts)) for call, parts in calls]
