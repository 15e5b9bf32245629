"""Answers in the form of `/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Callable
from json.encoder import encode_basestring
from typing import Any

from hasten.engine.request import Output
from hasten.serve.calls import CallDelta, CallReader
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
        reader: Callable[[], CallReader] | None = None,
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
            news = [*news, *reader.end()]
        for one in news:
            if isinstance(one, CallDelta):
                events.append(self._delta(number, f'"tool_calls":[{dumps(one.chunk())}]', logprobs))
            else:
                events.append(self._delta(number, f'"content":{encode_basestring(one)}', logprobs))
            logprobs = "null"
        if logprobs != "null":
            events.append(self._delta(number, '"content":""', logprobs))
        if output.finish_reason is not None:
            reason = (
                "tool_calls" if reader.called and output.finish_reason == "stop" else output.finish_reason
            )
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
            news = [*reader.push(part.text), *reader.end()]
            text = "".join(one for one in news if isinstance(one, str))
            message["content"] = text or (None if reader.called else "")
            if reader.called:
                message["tool_calls"] = reader.calls()
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
