"""Answers in the form of `/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from json.encoder import encode_basestring
from typing import Any

from hasten.engine.request import Output
from hasten.models.tool_calls import ArgumentsDelta, CallStarted, TextDelta, ToolCallStream, ToolEvent
from hasten.serve.logprobs import TokenTexts
from hasten.serve.shape import Part, Shape, dumps
from hasten.serve.tally import Tally

_NO_FINISH = '},"logprobs":null,"finish_reason":null}'


class ChatShape(Shape):
    """`/v1/chat/completions`.

    Args:
        reader: makes what finds tool calls in an answer's text, one for each answer; None: no tools.
        with_logprobs: logprobs were asked for.
    """

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(
        self,
        model: str,
        texts: TokenTexts,
        tally: Tally,
        answers: int,
        with_usage: bool,
        *,
        reader: Callable[[], ToolCallStream] | None = None,
        with_logprobs: bool = False,
    ) -> None:
        super().__init__(model, texts, tally, answers, 1, with_usage)
        self._readers = [reader() for _ in range(answers)] if reader else []
        self._with_logprobs = with_logprobs
        self._starts = [f'{self.head}{{"index":{i},"delta":{{"content":' for i in range(answers)]
        self._end = f"{_NO_FINISH}{self.tail}"

    def _chunk(self, number: int, part: Part, output: Output) -> str:
        events = ""
        if not part.opened:
            part.opened = True
            events = self._delta(number, '"role":"assistant","content":""')
            if 0 in self.prompt_logprobs:
                head = events[: -len(self.tail)]
                events = f'{head[:-1]},"prompt_logprobs":{dumps(self.prompt_logprobs.pop(0))}}}{self.tail}'
        if self._readers:
            return events + self._read(number, part, output)
        if output.logprobs:
            logprobs = dumps({"content": self.texts.chat(output.logprobs), "refusal": None})
            events += self._delta(number, f'"content":{encode_basestring(output.text)}', logprobs)
        elif output.text:
            events += self._starts[number] + encode_basestring(output.text) + self._end
        if output.finish_reason is not None:
            events += self._finish(number, output.finish_reason, output.stop)
        return events

    def _read(self, number: int, part: Part, output: Output) -> str:
        """Events of an answer that may call tools."""
        reader, events = self._readers[number], []
        logprobs = "null"
        if output.logprobs:
            logprobs = dumps({"content": self.texts.chat(output.logprobs), "refusal": None})
        news = reader.push(output.text)
        if output.finish_reason is not None:
            news = [*news, *reader.flush()]
        for one in news:
            events.append(self._delta(number, _delta_of(one), logprobs))
            logprobs = "null"
            part.called = part.called or isinstance(one, CallStarted)
        if logprobs != "null":
            events.append(self._delta(number, '"content":""', logprobs))
        if output.finish_reason is not None:
            called = part.called and output.finish_reason == "stop"
            reason = "tool_calls" if called else output.finish_reason
            events.append(self._finish(number, reason, output.stop))
        return "".join(events)

    def _delta(self, number: int, delta: str, logprobs: str = "null") -> str:
        return (
            f'{self.head}{{"index":{number},"delta":{{{delta}}},"logprobs":{logprobs},"finish_reason":null}}'
            f"{self.tail}"
        )

    def _finish(self, number: int, reason: str, stop: str | int | None) -> str:
        return (
            f'{self.head}{{"index":{number},"delta":{{}},"logprobs":null,"finish_reason":"{reason}",'
            f'"stop_reason":{dumps(stop)}}}{self.tail}'
        )

    def _choice(self, number: int, part: Part) -> dict[str, Any]:
        content: str | None = part.text
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content,
            "refusal": None,
            "annotations": [],
        }
        reason = part.finish
        if self._readers:
            reader = self._readers[number]
            text, calls = _gathered([*reader.push(part.text), *reader.flush()])
            message["content"] = text or (None if calls else "")
            if calls:
                message["tool_calls"] = calls
                reason = "tool_calls" if reason == "stop" else reason
        logprobs = None
        if self._with_logprobs:
            logprobs = {"content": self.texts.chat(part.logprobs), "refusal": None}
        return {
            "index": number,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": reason,
            "stop_reason": part.stop,
        }

    def document(self) -> dict[str, Any]:
        """The response in one piece; vLLM puts the prompt's logprobs beside the choices."""
        document = super().document()
        if 0 in self.prompt_logprobs:
            document["prompt_logprobs"] = self.prompt_logprobs[0]
        return document


def _delta_of(one: ToolEvent) -> str:
    """A piece of an answer as the inside of a `delta`."""
    if isinstance(one, TextDelta):
        return f'"content":{encode_basestring(one.text)}'
    call: dict[str, Any] = {"index": one.index, "function": {}}
    if isinstance(one, CallStarted):
        call |= {"id": one.id, "type": "function", "function": {"name": one.name, "arguments": ""}}
    else:
        call["function"] = {"arguments": one.text}
    return f'"tool_calls":[{dumps(call)}]'


def _gathered(news: Sequence[ToolEvent]) -> tuple[str, list[dict[str, Any]]]:
    """Text and calls of a whole answer."""
    text = ""
    calls: list[dict[str, Any]] = []
    for one in news:
        if isinstance(one, TextDelta):
            text += one.text
        elif isinstance(one, CallStarted):
            calls.append({"id": one.id, "type": "function", "function": {"name": one.name, "arguments": ""}})
        elif isinstance(one, ArgumentsDelta):
            calls[one.index]["function"]["arguments"] += one.text
    return text, calls
