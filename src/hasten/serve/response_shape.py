"""Answers in the form of `/v1/responses`, whole or as its typed events."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from json.encoder import encode_basestring
from typing import TYPE_CHECKING, Any

from hasten.models.tool_calls import ArgumentsDelta, CallStarted, TextDelta, ToolEvent
from hasten.serve.shape import dumps

if TYPE_CHECKING:
    from hasten.engine.request import Output
    from hasten.engine.sampling import TokenLogprob
    from hasten.models.tool_calls import ToolCallStream
    from hasten.serve.feed import News
    from hasten.serve.logprobs import TokenTexts
    from hasten.serve.problem import Problem
    from hasten.serve.tally import Tally


class ResponseShape:
    """One response.

    Args:
        fields: what the document says beside status, output and usage: the request's own values.
        texts: spells tokens, for logprobs.
        tally: counts for `usage`.
        reader: finds tool calls; None: there are no tools.
    """

    def __init__(
        self,
        fields: Mapping[str, Any],
        texts: TokenTexts,
        tally: Tally,
        reader: ToolCallStream | None,
    ) -> None:
        self.id = f"resp_{secrets.token_hex(16)}"
        self.output: list[dict[str, Any]] = []
        self._fields = fields
        self._texts = texts
        self.tally = tally
        self._reader = reader
        self._status = "in_progress"
        self._error: dict[str, Any] | None = None
        self._sequence = 0
        self._pieces: list[str] = []  # of the open item: text or arguments
        self._logprobs: list[TokenLogprob] = []  # of tokens whose text is held back or comes with the next

    def take(self, news: Sequence[News]) -> None:
        """Note outputs; the events they would be are made and dropped, which costs little."""
        self.chunks(news)

    def chunks(self, news: Sequence[News]) -> bytes:
        """The events for outputs that came."""
        events: list[str] = []
        if self._sequence == 0:
            events.append(self._event("response.created", response=self.document()))
            events.append(self._event("response.in_progress", response=self.document()))
        for which, output in news:
            self.tally.take(which, output)
            self._logprobs += output.logprobs
            for one in self._read(output):
                events += self._follow(one)
            if output.finish_reason is not None:
                if not self.output or (self._logprobs and self._is_open("message")):
                    events += self._add_text("")
                self._status = "completed" if output.finish_reason == "stop" else "incomplete"
                events += self._close(self._status)
        return "".join(events).encode("utf-8", "replace")

    def last(self) -> bytes:
        """The event at the end."""
        return self._event(f"response.{self._status}", response=self.document()).encode("utf-8", "replace")

    def failed(self, problem: Problem) -> bytes:
        """The events of a response that broke off."""
        self._status = "failed"
        self._error = {"code": "server_error", "message": problem.message}
        return self._event("response.failed", response=self.document()).encode("utf-8", "replace")

    def document(self) -> dict[str, Any]:
        """The response in one piece."""
        usage = {
            "input_tokens": self.tally.prompt_tokens,
            "input_tokens_details": {"cached_tokens": self.tally.cached_tokens},
            "output_tokens": self.tally.output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.tally.prompt_tokens + self.tally.output_tokens,
        }
        cut = {"reason": "max_output_tokens"} if self._status == "incomplete" else None
        return {
            "id": self.id,
            "object": "response",
            "status": self._status,
            "error": self._error,
            "incomplete_details": cut,
            **self._fields,
            "output": [dict(item) for item in self.output],
            "usage": None if self._status == "in_progress" else usage,
        }

    def _read(self, output: Output) -> list[ToolEvent]:
        if self._reader is None:
            return [TextDelta(output.text)] if output.text or output.logprobs else []
        news = self._reader.push(output.text)
        return [*news, *self._reader.flush()] if output.finish_reason is not None else news

    def _follow(self, one: ToolEvent) -> list[str]:
        if isinstance(one, TextDelta):
            return self._add_text(one.text)
        self._logprobs = []  # a call has none
        if isinstance(one, CallStarted):
            return [*self._close("completed"), self._open_call(one)]
        return [self._add_arguments(one)]

    def _add_text(self, text: str) -> list[str]:
        events = []
        if not self._is_open("message"):
            events = self._close("completed")
            item = {"id": f"msg_{secrets.token_hex(16)}", "type": "message", "status": "in_progress"}
            self.output.append({**item, "role": "assistant", "content": []})
            events.append(self._item_event("response.output_item.added", item=self.output[-1]))
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            events.append(self._part_event("response.content_part.added", part=part))
            self.output[-1]["content"] = [part]
        self._pieces.append(text)
        entries = "[]"
        if self._logprobs:
            found, self._logprobs = self._texts.chat(self._logprobs), []
            self.output[-1]["content"][0]["logprobs"] += found
            entries = dumps(found)
        kind = "response.output_text.delta"
        head = f'"item_id":"{self.output[-1]["id"]}","output_index":{len(self.output) - 1},"content_index":0'
        body = f'"type":"{kind}","sequence_number":{self._sequence},{head}'
        self._sequence += 1
        delta = f'{{{body},"delta":{encode_basestring(text)},"logprobs":{entries}}}'
        return [*events, f"event: {kind}\ndata: {delta}\n\n"]

    def _open_call(self, call: CallStarted) -> str:
        item = {"id": f"fc_{secrets.token_hex(16)}", "type": "function_call", "status": "in_progress"}
        self.output.append({**item, "call_id": call.id, "name": call.name, "arguments": ""})
        return self._item_event("response.output_item.added", item=self.output[-1])

    def _add_arguments(self, delta: ArgumentsDelta) -> str:
        self._pieces.append(delta.text)
        return self._item_event(
            "response.function_call_arguments.delta", item_id=self.output[-1]["id"], delta=delta.text
        )

    def _is_open(self, kind: str) -> bool:
        return (
            bool(self.output)
            and self.output[-1]["type"] == kind
            and self.output[-1]["status"] == "in_progress"
        )

    def _close(self, status: str) -> list[str]:
        """End the item that is open, if one is."""
        if not self.output or self.output[-1]["status"] != "in_progress":
            return []
        item, text = self.output[-1], "".join(self._pieces)
        self._pieces = []
        item["status"] = status
        if item["type"] == "function_call":
            item["arguments"] = text
            kind = "response.function_call_arguments.done"
            events = [self._item_event(kind, item_id=item["id"], name=item["name"], arguments=text)]
        else:
            part = item["content"][0]
            part["text"] = text
            kind = "response.output_text.done"
            events = [self._part_event(kind, text=text, logprobs=part["logprobs"])]
            events.append(self._part_event("response.content_part.done", part=part))
        return [*events, self._item_event("response.output_item.done", item=item)]

    def _part_event(self, kind: str, **fields: Any) -> str:
        return self._item_event(kind, item_id=self.output[-1]["id"], content_index=0, **fields)

    def _item_event(self, kind: str, **fields: Any) -> str:
        return self._event(kind, output_index=len(self.output) - 1, **fields)

    def _event(self, kind: str, **fields: Any) -> str:
        document = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return f"event: {kind}\ndata: {dumps(document)}\n\n"
