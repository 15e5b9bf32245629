"""The form of answers: JSON documents, or server-sent events as the outputs come.

A chunk is a prepared head, the escaped text and a prepared tail: formatting one costs about a microsecond.
What is long (log-probabilities) is written token by token as it comes: no answer holds the event loop up.
"""

from __future__ import annotations

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import orjson

import hasten
from hasten.engine.request import Output

if TYPE_CHECKING:
    from hasten.engine.request import Request
    from hasten.models.tokenizer import Tokenizer
    from hasten.runtime.sampling import TokenLogprob
    from hasten.serve.call import Problem
    from hasten.serve.metrics import Tally

FINGERPRINT = f"fp_hasten_{hasten.__version__}"
"""OpenAI's `system_fingerprint`: what beside the request decides an answer that has a seed."""

News = tuple[int, Output]  # (which of the requests, its output)

FLOOR = -9999.0
"""What stands for minus infinity, which JSON cannot say; OpenAI's own value."""


def dumped(value: Any) -> bytes:
    """Compact JSON in UTF-8. A number that is not finite becomes null.

    Raises:
        ValueError: such a number beside a whole number of more than 64 bits.
    """
    try:
        return orjson.dumps(value)
    except TypeError:  # whole numbers of more than 64 bits, and texts that are no UTF-8
        text = json.dumps(
            value, ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=_prepared
        )
        return text.encode("utf-8", "replace")


def _prepared(value: Any) -> Any:
    """What `joined` made ready, for the writer that does not know it."""
    if isinstance(value, orjson.Fragment):
        return json.loads(orjson.dumps(value))
    raise TypeError(f"{type(value).__name__} has no JSON form")


def dumps(value: Any) -> str:
    """Compact JSON as text."""
    return dumped(value).decode()


def joined(entries: Sequence[str]) -> Any:
    """A list of values that are JSON already, for `dumped`."""
    return orjson.Fragment(f"[{','.join(entries)}]")


def event(text: str, kind: str = "") -> str:
    """One server-sent event, with its type where the API names types."""
    return f"event: {kind}\ndata: {text}\n\n" if kind else f"data: {text}\n\n"


class TokenTexts:
    """Texts and bytes of a model's single tokens, and their log-probabilities as JSON."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @cached_property
    def values(self) -> Sequence[bytes]:
        """Bytes of every token. The first time takes up to half a second: in a worker thread."""
        return self._tokenizer.token_bytes().values

    def spelled(self, token: int) -> bytes:
        """The token's own bytes; nothing for ids without a meaning."""
        return self.values[token] if token < len(self.values) else b""

    def text(self, token: int) -> str:
        """The token alone as text; bytes that are no character of their own come as U+FFFD."""
        return self.spelled(token).decode("utf-8", "replace")

    def name(self, token: int) -> str:
        """What log-probabilities call the token."""
        return self.text(token)

    def chat(self, one: TokenLogprob) -> str:
        """An entry of `logprobs.content` of a chat choice."""
        top = [self._entry(*pair) for pair in one.top]
        return dumps({**self._entry(one.token, one.logprob), "top_logprobs": top})

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self.name(token), "logprob": finite(logprob), "bytes": list(self.spelled(token))}

    def prompt(self, logprobs: Sequence[TokenLogprob | None]) -> Any:
        """vLLM's `prompt_logprobs`: one entry a prompt token, by token id; null for the first.

        In a worker thread: a long prompt takes a second.
        """
        return joined(["null" if one is None else dumps(self._ranked(one)) for one in logprobs])

    def _ranked(self, one: TokenLogprob) -> dict[str, Any]:
        ranked = [(one.token, one.logprob, one.rank), *((*pair, at) for at, pair in enumerate(one.top, 1))]
        found: dict[str, Any] = {}
        for token, logprob, rank in ranked:
            entry = {"logprob": finite(logprob), "rank": rank, "decoded_token": self.text(token)}
            found.setdefault(str(token), entry)
        return found


class TokenNumbers(TokenTexts):
    """Names tokens by their ids (vLLM's `return_tokens_as_token_ids`): two may have the same text."""

    def __init__(self, texts: TokenTexts) -> None:
        super().__init__(texts._tokenizer)
        self.values = texts.values

    def name(self, token: int) -> str:
        """The id, in vLLM's form."""
        return f"token_id:{token}"


def finite(logprob: float) -> float:
    """The value, or OpenAI's for minus infinity."""
    return max(FLOOR, logprob)


@dataclass
class Part:
    """What has come of one answer."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)  # one a token, JSON in the form of the endpoint
    length: int = 0  # characters so far
    finish: str | None = None
    stop: str | int | None = None
    opened: bool = False  # the stream has said who speaks
    called: bool = False  # a tool
    token_ids: list[int] = field(default_factory=list)  # not sent yet, where they are asked for

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.texts)


class Answer(ABC):
    """One response on its way: `take` and `document`, or `chunks` and `last` or `failed`.

    Args:
        texts: spells tokens, for logprobs.
        tally: counts for `usage`.
    """

    def __init__(self, texts: TokenTexts, tally: Tally, is_checked: bool = False) -> None:
        self.texts = texts
        self.tally = tally
        self.is_checked = is_checked  # at its end, against a schema: it is then written in a worker thread
        self.prompt_logprobs: dict[int, Any] = {}  # by request, in the form of `TokenTexts.prompt`

    def spelled(self, logprobs: Sequence[TokenLogprob | None]) -> Any:
        """The prompt's log-probabilities as this response has them. In a worker thread."""
        return self.texts.prompt(logprobs)

    @abstractmethod
    def take(self, news: Sequence[News]) -> None:
        """Note outputs for a response in one piece."""

    @abstractmethod
    def document(self) -> dict[str, Any]:
        """The response in one piece."""

    @abstractmethod
    def chunks(self, news: Sequence[News]) -> bytes:
        """The events for outputs that came."""

    @abstractmethod
    def last(self) -> bytes:
        """The events at the end of a stream."""

    @abstractmethod
    def failed(self, problem: Problem) -> bytes:
        """The events of a stream that broke off."""


class Shape(Answer):
    """One response of `/v1/chat/completions` or `/v1/completions` on its way.

    Args:
        model: name to show.
        answers: answers a request has.
        requests: requests of the call.
    """

    prefix: str
    kind: str
    chunk_kind: str
    opens: bool = False  # the first chunk of an answer says who speaks, and nothing of what is said

    def __init__(
        self,
        model: str,
        texts: TokenTexts,
        tally: Tally,
        answers: int,
        requests: int = 1,
        is_checked: bool = False,
    ) -> None:
        super().__init__(texts, tally, is_checked)
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.model = model
        self.answers = answers
        self.parts = [Part() for _ in range(answers * requests)]
        self._prompts: Sequence[Sequence[int]] | None = None  # ids, where they are asked for
        self._so_far: list[int] | None = None  # prompt and answer tokens, where every chunk reports them
        head = {"id": self.id, "object": self.chunk_kind, "created": self.created, "model": model}
        head["system_fingerprint"] = FINGERPRINT
        self.head = event(dumps(head))[:-3] + ',"choices":['  # an open object, no closing brace
        self.with_usage = False
        self.tail = "]}\n\n"

    def report(self, options: Mapping[str, Any] | None, prompt_tokens: int) -> None:
        """Report usage as the `stream_options` ask: at the end of the stream, and (vLLM's) in every chunk."""
        if options and options.get("include_usage"):
            self.with_usage, self.tail = True, '],"usage":null}\n\n'
            if options.get("continuous_usage_stats"):
                self._so_far = [prompt_tokens, 0]

    def show_ids(self, requests: Sequence[Request]) -> None:
        """Show the token ids of prompts and answers: vLLM's `return_token_ids`."""
        self._prompts = [request.prompt for request in requests]

    def _note_ids(self, part: Part, output: Output) -> None:
        if self._prompts is not None:
            part.token_ids += output.token_ids

    def _ids(self, part: Part) -> str:
        """The ids that were not sent yet, as one more field of a choice."""
        if self._prompts is None:
            return ""
        ids, part.token_ids = part.token_ids, []
        return f',"token_ids":{dumps(ids)}'

    def take(self, news: Sequence[News]) -> None:
        for which, output in news:
            self.tally.take(which, output)
            part = self.parts[which * self.answers + output.index]
            self._note_ids(part, output)
            part.texts.append(output.text)
            part.logprobs += self._entries(part, output)
            if output.finish_reason is not None:
                part.finish, part.stop = output.finish_reason, output.stop

    def chunks(self, news: Sequence[News]) -> bytes:
        events = []
        for which, output in news:
            self.tally.take(which, output)
            number = which * self.answers + output.index
            part = self.parts[number]
            opens = self.opens and not part.opened
            events.append(self._running(self._chunk(number, part, output), output, opens))
        return "".join(events).encode("utf-8", "replace")

    def _running(self, chunks: str, output: Output, opens: bool) -> str:
        """The chunks with the usage so far; no text holds the tail, for it has a bare new line."""
        if self._so_far is None:
            return chunks
        if opens:
            chunks = chunks.replace(self.tail, self._tail_now(), 1)
        self._so_far[1] += len(output.token_ids)
        return chunks.replace(self.tail, self._tail_now())

    def _tail_now(self) -> str:
        prompt, answer = self._so_far or (0, 0)
        usage = {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
        return f'],"usage":{dumps(usage)}}}\n\n'

    def last(self) -> bytes:
        usage = f'{self.head}],"usage":{dumps(self._usage())}}}\n\n' if self.with_usage else ""
        return usage.encode() + b"data: [DONE]\n\n"

    def failed(self, problem: Problem) -> bytes:
        return (event(dumps(problem.document())) + event("[DONE]")).encode("utf-8", "replace")

    def document(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": self.kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
            "choices": [self._choice(number, part) for number, part in enumerate(self.parts)],
            "usage": self._usage(),
        }

    def _usage(self) -> dict[str, Any]:
        return self.tally.usage()

    @abstractmethod
    def _entries(self, part: Part, output: Output) -> list[Any]:
        """The log-probabilities of an output, one entry a token."""

    @abstractmethod
    def _chunk(self, number: int, part: Part, output: Output) -> str: ...

    @abstractmethod
    def _choice(self, number: int, part: Part) -> dict[str, Any]: ...
