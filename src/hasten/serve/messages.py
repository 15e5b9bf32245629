"""`POST /v1/messages` and `/v1/messages/count_tokens`: Anthropic's way to ask, on the road of chats.

Source of fields and events: https://docs.anthropic.com/en/api/messages and its page on streaming.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from hasten.models.answers import ArgumentsDelta, CallStarted, TextDelta, ThoughtDelta, ToolEvent
from hasten.serve.body import DrawingFields, Ignored, JsonObject, Strict, Text, checked
from hasten.serve.call import refused
from hasten.serve.chat import ChatRequest, counted, prepare_chat
from hasten.serve.generate import asker_of, respond
from hasten.serve.metrics import Tally
from hasten.serve.shape import Answer, News, TokenTexts, dumps, event

if TYPE_CHECKING:
    from hasten.engine.request import Output
    from hasten.serve.call import Problem
    from hasten.serve.prepare import Reading
    from hasten.serve.service import Exchange

Blocks = Text | Annotated[list[JsonObject], Field(max_length=10_000, fail_fast=True)]


class Turn(Strict):
    """What the user or the assistant said: text, or blocks of text, thoughts, calls and results."""

    role: Literal["user", "assistant", "system"]
    content: Blocks


class AskedFields(Strict):
    """What a conversation is made of."""

    messages: Annotated[list[Turn], Field(min_length=1, max_length=10_000, fail_fast=True)]
    system: Blocks | None = None
    tools: Annotated[list[JsonObject], Field(max_length=256, fail_fast=True)] | None = None
    tool_choice: JsonObject | None = None
    thinking: JsonObject | None = Field(None, description="type (enabled, disabled), budget_tokens")
    output_format: JsonObject | None = Field(None, description="type json_schema, schema")
    reasoning_effort: str | None = Field(None, max_length=40)

    @classmethod
    def understood(cls, document: dict[str, Any], ignored: set[str]) -> dict[str, Any]:
        """Numbers and fields as elsewhere; keys of messages that ask for nothing are left out."""
        document = dict(document)
        config = document.pop("output_config", None)
        if isinstance(config, dict):
            document.setdefault("output_format", config.get("format"))
            document.setdefault("reasoning_effort", config.get("effort"))
        found = super().understood(document, ignored)
        turns = found.get("messages")
        if isinstance(turns, list):
            found["messages"] = [_kept(turn) if isinstance(turn, dict) else turn for turn in turns]
        return found


def _kept(turn: dict[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {name: turn[name] for name in ("role", "content") if name in turn}
    return {**kept, "content": "" if kept.get("content") is None else kept["content"]}


def _is_others(kind: Any) -> bool:
    """Whether a block tells of a tool that another server ran by itself: its text says what came of it."""
    return kind in ("server_tool_use", "mcp_tool_use", "compaction", "container_upload") or (
        isinstance(kind, str) and kind.endswith("_tool_result")
    )


class MessagesRequest(DrawingFields, AskedFields):
    """The body of `/v1/messages`."""

    max_tokens: int | None = Field(None, ge=0, lt=2**31)
    stop_sequences: Annotated[list[Text], Field(max_length=256, fail_fast=True)] | None = None
    metadata: JsonObject | None = Field(None, description="user_id: users share the machine evenly")


class CountRequest(AskedFields):
    """The body of `/v1/messages/count_tokens`."""

    model: str | None = Field(None, max_length=1000)


def as_chat(spec: AskedFields, ignored: set[str]) -> ChatRequest:
    """The same question as a chat request.

    Args:
        ignored: gets the names of what is left out.

    Raises:
        Problem: 400, a block that is not served.
    """
    told: list[dict[str, Any]] = []
    if spec.system:
        told.append({"role": "system", "content": _words(spec.system, "system")})
    for number, turn in enumerate(spec.messages):
        told += _messages(turn.role, turn.content, f"messages.{number}", ignored)
    choice = dict(spec.tool_choice or {})
    document: dict[str, Any] = {
        "messages": told,
        "tools": spec.tools,
        "tool_choice": choice or None,
        "thinking": spec.thinking,
        "response_format": spec.output_format,
        "reasoning_effort": spec.reasoning_effort,
        "include_reasoning": (spec.thinking or {}).get("type") in ("enabled", "adaptive"),
        "continue_final_message": True if told[-1]["role"] == "assistant" else None,
    }
    if choice.get("disable_parallel_tool_use") is True:
        document["parallel_tool_calls"] = False
    if isinstance(spec, MessagesRequest):
        same = ("model", "stream", "temperature", "top_p", "top_k", "seed", "max_tokens", "priority")
        document |= {name: getattr(spec, name) for name in same}
        document["stop"] = [text for text in spec.stop_sequences or () if text] or None
        document["user"] = (spec.metadata or {}).get("user_id")
    return checked(ChatRequest, ChatRequest.understood(document, ignored))


def _messages(
    role: str, content: str | Sequence[Mapping[str, Any]], place: str, ignored: set[str]
) -> list[dict[str, Any]]:
    """A turn as chat messages: results of calls are messages of their own, before what else is said."""
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    results: list[dict[str, Any]] = []
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for number, block in enumerate(content):
        kind = block.get("type")
        if kind == "tool_result":
            words = _words(block.get("content") or "", f"{place}.content.{number}")
            failed = "Error: " if block.get("is_error") is True and not words.startswith("Error") else ""
            name = str(block.get("tool_use_id"))
            results.append({"role": "tool", "tool_call_id": name, "content": failed + words})
        elif kind == "tool_use":
            arguments = json.dumps(block.get("input") or {}, ensure_ascii=False)
            function = {"name": block.get("name"), "arguments": arguments}
            calls.append({"id": str(block.get("id")), "type": "function", "function": function})
        elif kind in ("thinking", "redacted_thinking"):
            thoughts.append(str(block.get("thinking") or ""))
        elif _is_others(kind):
            ignored.add(f"messages.{kind}")
        else:
            texts.append(_words([block], f"{place}.content.{number}"))
    said: dict[str, Any] = {"role": role, "content": "\n".join(texts)}
    if calls:
        said["tool_calls"] = calls
    if any(thoughts):
        said["reasoning_content"] = "\n".join(thoughts)
    return [*results, said] if texts or calls or not results else results


def _words(content: Any, place: str) -> str:
    """The text of blocks.

    Raises:
        Problem: 400, a block that is no text, or something else than text or a list of blocks.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(block, Mapping) for block in content):
        raise refused(f"{place}: should be text or a list of blocks", place, "invalid_value")
    texts = []
    for block in content:
        text = block.get("text")
        if block.get("type") == "search_result":
            text = _words(block.get("content") or "", place)
        if block.get("type") == "document" and isinstance(block.get("source"), Mapping):
            text = block["source"].get("data") if block["source"].get("type") == "text" else None
        if not isinstance(text, str):
            kind = str(block.get("type"))[:40]
            raise refused(f"{place}: a block of type {kind!r}; this model reads text alone", place)
        texts.append(text)
    return "\n".join(texts)


_REASONS = {"stop": "end_turn", "length": "max_tokens"}


class MessageShape(Answer):
    """One message on its way.

    Args:
        model: name to show.
        reading: how the answer is read.
        prompt_tokens: of the question.
        streamed: it goes out as it comes.
    """

    def __init__(
        self,
        model: str,
        texts: TokenTexts,
        tally: Tally,
        reading: Reading,
        prompt_tokens: int,
        streamed: bool,
    ) -> None:
        super().__init__(texts, tally)
        self.id = f"msg_{secrets.token_hex(12)}"
        self._model = model
        self._reading = reading
        self._reader = None if reading.is_plain else reading.reader(streamed)
        self._prompt_tokens = prompt_tokens
        self._blocks: list[dict[str, Any]] = []
        self._pieces: list[str] = []  # of the open block
        self._is_open = False
        self._begun = False
        self._reason: str | None = None
        self._stop: str | None = None

    def take(self, news: Sequence[News]) -> None:
        """Note outputs; the events they would be are made and dropped, which costs little."""
        self.chunks(news)

    def chunks(self, news: Sequence[News]) -> bytes:
        events: list[str] = []
        if not self._begun:
            self._begun = True
            events.append(self._event("message_start", message=self.document()))
            events.append(self._event("ping"))
        for which, output in news:
            self.tally.take(which, output)
            for one in self._read(output):
                events += self._follow(one)
            if output.finish_reason is not None:
                events += self._end(output)
        return "".join(events).encode("utf-8", "replace")

    def _read(self, output: Output) -> list[ToolEvent]:
        if self._reader is None:
            return [TextDelta(output.text)] if output.text else []
        news = self._reader.read(output.text, output.finish_reason)
        return news if self._reading.thoughts else [one for one in news if not isinstance(one, ThoughtDelta)]

    def _follow(self, one: ToolEvent) -> list[str]:
        if isinstance(one, CallStarted):
            return self._open({"type": "tool_use", "id": one.id, "name": one.name, "input": {}})
        events: list[str] = []
        if isinstance(one, TextDelta | ThoughtDelta):
            kind = "text" if isinstance(one, TextDelta) else "thinking"
            if not self._is_open or self._blocks[-1]["type"] != kind:
                more = {"signature": ""} if kind == "thinking" else {}
                events = self._open({"type": kind, kind: "", **more})
            delta: dict[str, Any] = {"type": f"{kind}_delta", kind: one.text}
        else:
            assert isinstance(one, ArgumentsDelta)
            delta = {"type": "input_json_delta", "partial_json": one.text}
        self._pieces.append(one.text)
        return [*events, self._event("content_block_delta", index=len(self._blocks) - 1, delta=delta)]

    def _open(self, block: dict[str, Any]) -> list[str]:
        events = self._close()
        self._blocks.append(block)
        self._is_open = True
        shown = dict(block)
        return [*events, self._event("content_block_start", index=len(self._blocks) - 1, content_block=shown)]

    def _close(self) -> list[str]:
        if not self._is_open:
            return []
        block, text = self._blocks[-1], "".join(self._pieces)
        self._is_open, self._pieces = False, []
        if block["type"] == "tool_use":
            try:
                block["input"] = json.loads(text or "{}")
            except ValueError:  # it was cut
                block["input"] = {}
        else:
            block[block["type"]] = text
        return [self._event("content_block_stop", index=len(self._blocks) - 1)]

    def _end(self, output: Output) -> list[str]:
        called = any(block["type"] == "tool_use" for block in self._blocks)
        reason = output.finish_reason or "stop"
        self._reason = "tool_use" if called and reason == "stop" else _REASONS.get(reason, "end_turn")
        stop = output.stop
        if isinstance(stop, str) and stop != self._reading.stop and not called:
            self._reason, self._stop = "stop_sequence", stop
        if not self._blocks:
            return [*self._open({"type": "text", "text": ""}), *self._close()]
        return self._close()

    def last(self) -> bytes:
        delta = {"stop_reason": self._reason, "stop_sequence": self._stop}
        told = self._event("message_delta", delta=delta, usage=self._usage())
        return (told + self._event("message_stop")).encode("utf-8", "replace")

    def failed(self, problem: Problem) -> bytes:
        return self._event("error", error=problem.document()["error"]).encode("utf-8", "replace")

    def document(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": [dict(block) for block in self._blocks],
            "stop_reason": self._reason,
            "stop_sequence": self._stop,
            "usage": self._usage(),
        }

    def _usage(self) -> dict[str, Any]:
        cached = min(self.tally.cached_tokens, self._prompt_tokens)
        return {
            "input_tokens": self._prompt_tokens - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": self.tally.output_tokens,
        }

    def _event(self, kind: str, **fields: Any) -> str:
        return event(dumps({"type": kind, **fields}), kind)


async def messages(exchange: Exchange) -> None:
    """Answer a conversation in Anthropic's form."""
    spec = await exchange.body(MessagesRequest)
    asked = as_chat(spec, ignored := Ignored())
    exchange.note_ignored(ignored)
    async with exchange.service.pool.use(spec.model) as served:
        request, reading = await exchange.work(lambda: prepare_chat(asked, asker_of(exchange, served)))
        tally, streamed = exchange.tally(served.name), bool(spec.stream)
        shape = MessageShape(served.name, served.texts, tally, reading, len(request.prompt), streamed)
        await respond(exchange, served, asked, [request], shape)


async def count_tokens(exchange: Exchange) -> None:
    """Tokens of a conversation, tools included."""
    spec = await exchange.body(CountRequest)
    asked = as_chat(spec, Ignored()).model_copy(update={"model": spec.model})
    await exchange.json({"input_tokens": await counted(exchange, asked)})
