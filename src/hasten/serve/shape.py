"""The form of answers: JSON documents, or server-sent events as the outputs come.

A chunk is a prepared head, the escaped text and a prepared tail: formatting one costs about a microsecond.
"""

from __future__ import annotations

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hasten.engine.request import Output

if TYPE_CHECKING:
    from hasten.engine.sampling import TokenLogprob
    from hasten.serve.metrics import Tally
    from hasten.serve.problem import Problem


News = tuple[int, Output]  # (which of the requests, its output)

FLOOR = -9999.0
"""What stands for minus infinity, which JSON cannot say; OpenAI's own value."""


class TokenTexts:
    """Texts and bytes of single tokens.

    Args:
        values: bytes of every token; called once, when the first is needed. Reading a large vocabulary takes
            half a second: a worker thread has done it before.
    """

    def __init__(self, values: Callable[[], Sequence[bytes]]) -> None:
        self._get_values = values

    @cached_property
    def _values(self) -> Sequence[bytes]:
        return self._get_values()

    def spelled(self, token: int) -> bytes:
        """The token's own bytes; nothing for ids without a meaning."""
        return self._values[token] if token < len(self._values) else b""

    def text(self, token: int) -> str:
        """The token alone as text; bytes that are no character of their own come as U+FFFD."""
        return self.spelled(token).decode("utf-8", "replace")

    def chat(self, logprobs: Iterable[TokenLogprob]) -> list[dict[str, Any]]:
        """`logprobs.content` of a chat choice."""
        return [
            {**self._entry(one.token, one.logprob), "top_logprobs": [self._entry(*pair) for pair in one.top]}
            for one in logprobs
        ]

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self.text(token), "logprob": finite(logprob), "bytes": list(self.spelled(token))}

    def completion(self, logprobs: Iterable[TokenLogprob], offset: int) -> dict[str, Any]:
        """`logprobs` of a completion choice; `offset` is where in the text the first token begins."""
        result: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for one in logprobs:
            text = self.text(one.token)
            result["tokens"].append(text)
            result["token_logprobs"].append(finite(one.logprob))
            top = {self.text(token): finite(logprob) for token, logprob in reversed(one.top)}
            result["top_logprobs"].append(top or None)
            result["text_offset"].append(offset)
            offset += len(text)
        return result

    def prompt(self, logprobs: Sequence[TokenLogprob | None]) -> list[dict[str, Any] | None]:
        """vLLM's `prompt_logprobs`: one entry a prompt token, by token id; null for the first."""
        return [None if one is None else self._ranked(one) for one in logprobs]

    def _ranked(self, one: TokenLogprob) -> dict[str, Any]:
        entries = {
            str(token): {"logprob": finite(logprob), "rank": rank, "decoded_token": self.text(token)}
            for rank, (token, logprob) in enumerate(one.top, start=1)
        }
        own = {"logprob": finite(one.logprob), "rank": one.rank, "decoded_token": self.text(one.token)}
        return {str(one.token): own, **{k: v for k, v in entries.items() if k != str(one.token)}}


def finite(logprob: float) -> float:
    """The value, or OpenAI's for minus infinity."""
    return max(FLOOR, logprob)


def dumps(value: Any) -> str:
    """Compact JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def event(text: str) -> str:
    """One server-sent event."""
    return f"data: {text}\n\n"


@dataclass
class Part:
    """What has come of one answer."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    length: int = 0  # characters so far
    finish: str | None = None
    stop: str | int | None = None
    opened: bool = False  # the stream has said who speaks
    called: bool = False  # a tool

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.texts)


class Shape(ABC):
    """One response on its way.

    Args:
        model: name to show.
        texts: spells tokens, for logprobs.
        tally: counts for `usage`.
        answers: answers a request has.
        requests: requests of the call.
        with_usage: the stream reports usage.
    """

    prefix: str
    kind: str
    chunk_kind: str

    def __init__(
        self, model: str, texts: TokenTexts, tally: Tally, answers: int, requests: int, with_usage: bool
    ) -> None:
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.model = model
        self.texts = texts
        self.tally = tally
        self.answers = answers
        self.parts = [Part() for _ in range(answers * requests)]
        self.with_usage = with_usage
        self.prompt_logprobs: dict[int, Any] = {}
        self._so_far: list[int] | None = None  # prompt and answer tokens, where every chunk reports them
        head = {"id": self.id, "object": self.chunk_kind, "created": self.created, "model": model}
        self.head = event(dumps(head))[:-3] + ',"choices":['  # an open object, no closing brace
        self.tail = '],"usage":null}\n\n' if with_usage else "]}\n\n"

    def report_running(self, prompt_tokens: int) -> None:
        """Report the usage so far in every chunk, as vLLM does for `continuous_usage_stats`."""
        self._so_far = [prompt_tokens, 0]

    def take(self, news: Sequence[News]) -> None:
        """Note outputs for a response in one piece."""
        for which, output in news:
            self.tally.take(which, output)
            part = self._note(which, output)
            part.texts.append(output.text)

    def chunks(self, news: Sequence[News]) -> bytes:
        """The events for outputs that came."""
        events = []
        for which, output in news:
            self.tally.take(which, output)
            number = which * self.answers + output.index
            part = self._note(which, output)
            events.append(self._running(self._chunk(number, part, output), output))
        return "".join(events).encode("utf-8", "replace")

    def _running(self, chunks: str, output: Output) -> str:
        """The chunks with the usage so far; no text holds the tail, for it has a bare new line."""
        if self._so_far is None:
            return chunks
        self._so_far[1] += len(output.token_ids)
        prompt, answer = self._so_far
        usage = {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
        return chunks.replace(self.tail, f'],"usage":{dumps(usage)}}}\n\n')

    def _note(self, which: int, output: Output) -> Part:
        part = self.parts[which * self.answers + output.index]
        if output.prompt_logprobs is not None:
            self.prompt_logprobs[which] = self.texts.prompt(output.prompt_logprobs)
        if output.logprobs:
            part.logprobs.extend(output.logprobs)
        if output.finish_reason is not None:
            part.finish, part.stop = output.finish_reason, output.stop
        return part

    def last(self) -> bytes:
        """The events at the end of a stream."""
        if not self.with_usage:
            return b"data: [DONE]\n\n"
        usage = f'{self.head}],"usage":{dumps(self.tally.usage())}}}\n\n'
        return usage.encode() + b"data: [DONE]\n\n"

    def failed(self, problem: Problem) -> bytes:
        """The events of a stream that broke off."""
        return (event(dumps(problem.document())) + event("[DONE]")).encode("utf-8", "replace")

    def document(self) -> dict[str, Any]:
        """The response in one piece."""
        return {
            "id": self.id,
            "object": self.kind,
            "created": self.created,
            "model": self.model,
            "choices": [self._choice(number, part) for number, part in enumerate(self.parts)],
            "usage": self.tally.usage(),
        }

    @abstractmethod
    def _chunk(self, number: int, part: Part, output: Output) -> str: ...

    @abstractmethod
    def _choice(self, number: int, part: Part) -> dict[str, Any]: ...
