"""Many clients at once: what is sent, what each of them saw, and the figures of the whole.

Source of the figures' names and definitions: TTFT (time to first token), TPOT (time per output token after
the first) and end-to-end latency as the field's serving benchmarks use them.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hasten.bench.figures import percentile
from hasten.bench.http_stream import Address, Event, HttpAnswer, send, send_now
from hasten.errors import PeerError


@dataclass(frozen=True)
class Answer:
    """What one client saw. Times in seconds since the moment it asked."""

    first_s: float | None  # the first token's text; None: there was none
    last_s: float  # the last token's text, or the end where there was none
    output_tokens: int
    status: int = 200
    text: str = ""
    finish_reason: str | None = None
    error: str = ""  # why it is no good answer; empty: it is one
    sent_s: float = 0.0  # when it asked, on the clock of all answers of the run
    prompt_tokens: int | None = None
    cached_tokens: int | None = None

    @property
    def tpot_s(self) -> float | None:
        """Seconds a token after the first; None with fewer than two."""
        if self.first_s is None or self.output_tokens < 2:
            return None
        return (self.last_s - self.first_s) / (self.output_tokens - 1)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Answer:
        """Inverse of `core.as_json`."""
        return cls(**record)


@dataclass(frozen=True)
class Call:
    """One streamed request of a client. `body` lacks `stream`: it is added."""

    body: Mapping[str, Any]
    path: str = "/v1/chat/completions"
    stop_after: int | None = None  # hang up after this many events
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LoadFigures:
    """A round of load: all clients together."""

    requests: int
    failed: int
    output_tokens: int
    wall_s: float  # first request sent to last token read
    tok_per_s: float
    ttft_p50_ms: float | None
    ttft_p95_ms: float | None
    tpot_p50_ms: float | None


def figures(answers: Sequence[Answer]) -> LoadFigures:
    """Figures of answers that share a clock.

    Raises:
        PeerError: there is no answer.
    """
    if not answers:
        raise PeerError("there is no answer to make figures of")
    start = min(answer.sent_s for answer in answers)
    wall = max(answer.sent_s + answer.last_s for answer in answers) - start
    tokens = sum(answer.output_tokens for answer in answers)
    firsts = [answer.first_s for answer in answers if answer.first_s is not None]
    paces = [pace for answer in answers if (pace := answer.tpot_s) is not None]
    return LoadFigures(
        requests=len(answers),
        failed=sum(bool(answer.error) for answer in answers),
        output_tokens=tokens,
        wall_s=wall,
        tok_per_s=tokens / wall if wall > 0 else 0.0,
        ttft_p50_ms=_ms(firsts, 0.5),
        ttft_p95_ms=_ms(firsts, 0.95),
        tpot_p50_ms=_ms(paces, 0.5),
    )


def _ms(seconds: Sequence[float], fraction: float) -> float | None:
    return 1000 * percentile(seconds, fraction) if seconds else None


def run_calls(
    address: Address, calls: Sequence[Call], concurrency: int | None = None, limit_s: float = 600.0
) -> list[Answer]:
    """Send calls, at most `concurrency` at once (None: all together), and read every stream to its end.

    A call that fails is an Answer whose `error` says how: one bad answer does not end the others.
    """
    if len(calls) == 1 and calls[0].stop_after is None and not calls[0].headers:
        return [_answer_now(address, calls[0], limit_s)]
    return asyncio.run(_run(address, calls, concurrency or max(1, len(calls)), limit_s))


def _answer_now(address: Address, call: Call, limit_s: float) -> Answer:
    """A single call, on the lightest client: what it takes is counted as the server's."""
    try:
        body = json.dumps({**call.body, "stream": True}).encode()
        return read_answer(send_now(address, "POST", call.path, body, limit_s=limit_s), call.body)
    except PeerError as error:
        return Answer(None, 0.0, 0, status=0, error=error.message)


async def _run(address: Address, calls: Sequence[Call], concurrency: int, limit_s: float) -> list[Answer]:
    gate = asyncio.Semaphore(concurrency)

    async def one(call: Call) -> Answer:
        async with gate:
            return await stream_call(address, call, limit_s)

    return await asyncio.gather(*(one(call) for call in calls))


async def stream_call(address: Address, call: Call, limit_s: float = 600.0) -> Answer:
    """One call; what went wrong is in the Answer's `error`."""
    body = json.dumps({**call.body, "stream": True}).encode()
    try:
        answer = await send(
            address, "POST", call.path, body, call.headers, stop_after=call.stop_after, limit_s=limit_s
        )
        return read_answer(answer, call.body)
    except PeerError as error:
        return Answer(None, 0.0, 0, status=0, error=error.message)


def read_answer(answer: HttpAnswer, body: Mapping[str, Any]) -> Answer:
    """The client's view of a finished stream of chat or text completion chunks.

    Tokens are counted by the server's usage where it sends one; else an answer that ended by length has as
    many as were asked for, and any other as many as there were events with text.
    """
    if answer.status != 200:
        return Answer(
            None, answer.done_s - answer.sent_s, 0, answer.status, error=_reason(answer), sent_s=answer.sent_s
        )
    seen = _Seen()
    for event in answer.events:
        seen.take(event)
    usage = seen.usage or {}
    tokens = usage.get("completion_tokens")
    if tokens is None:
        tokens = int(body.get("max_tokens", 0)) if seen.finish_reason == "length" else seen.texts
    error = seen.error
    if not error and not answer.cut and seen.finish_reason is None:
        error = "the stream ended without a finish reason"
    return Answer(
        first_s=None if seen.first_s is None else seen.first_s - answer.sent_s,
        last_s=(answer.done_s if seen.last_s is None else seen.last_s) - answer.sent_s,
        output_tokens=tokens,
        text="".join(seen.parts),
        finish_reason=seen.finish_reason,
        error=error,
        sent_s=answer.sent_s,
        prompt_tokens=usage.get("prompt_tokens"),
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens"),
    )


@dataclass
class _Seen:
    """What a stream's events said so far."""

    first_s: float | None = None
    last_s: float | None = None
    texts: int = 0
    parts: list[str] = field(default_factory=list)
    usage: dict[str, Any] | None = None
    finish_reason: str | None = None
    error: str = ""

    def take(self, event: Event) -> None:
        """One event."""
        if event.data == b"[DONE]":
            return
        try:
            chunk = json.loads(event.data)
        except ValueError:
            self.error = f"an event is not JSON: {event.data[:100]!r}"
            return
        if "error" in chunk:
            self.error = json.dumps(chunk["error"])[:300]
            return
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk.get("choices", ()):
            text = (choice.get("delta") or {}).get("content") or choice.get("text")
            if text:
                self.first_s = self.first_s or event.at_s
                self.last_s = event.at_s
                self.texts += 1
                self.parts.append(text)
            self.finish_reason = choice.get("finish_reason") or self.finish_reason


def _reason(answer: HttpAnswer) -> str:
    return f"status {answer.status}: {answer.body[:300].decode('utf-8', 'replace')}"


Ask = Callable[[Sequence[Call]], "list[Answer]"]
"""Sends calls to whatever is measured."""
