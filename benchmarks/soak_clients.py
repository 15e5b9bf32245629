"""The clients of the soak: good requests, changes of mind, and requests that are wrong."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from chat_workloads import TOPICS
from hasten.bench.figures import Answer
from hasten.bench.load import Address, Call, read_answer, send, stream_call
from hasten.bench.measure import default_text
from hasten.errors import PeerError

LIMIT_S = 300.0
"""Longest a client waits for an answer: with 64 clients and little memory a long one takes a minute."""

KINDS = {"chat": 45, "whole": 8, "known": 12, "form": 5, "hang-up": 15, "leave": 3, "bad": 12}
"""What a client does next, by weight."""

CHAT = "/v1/chat/completions"

FORM: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 40}, "hard": {"type": "boolean"}},
    "required": ["name", "hard"],
    "additionalProperties": False,
}

WRONG_FIELDS: tuple[dict[str, Any], ...] = (
    {"temperature": -1},
    {"temperature": "hot"},
    {"max_tokens": -5},
    {"top_p": 7},
    {"n": 0},
    {"messages": []},
    {"messages": [{"role": "wizard", "content": "x"}]},
    {"messages": "hello"},
    {"no_such_field": 1},
    {"logit_bias": {"x": 1}},
    {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": {"type": "nonsense"}},
        }
    },
    {"messages": [{"role": "user", "content": "word " * 40_000}]},
    {"model": "../../etc/passwd"},
)
"""Each makes a good body wrong; every one must be answered with a status from 400 to 499."""

WRONG_BODIES = (b"{", b"[]", b"null", b'"text"', b"{}", b"\xff\xfe", b'{"messages": [}', b"[" * 5000)


@dataclass
class Tally:
    """What happened, over all clients."""

    done: Counter[str] = field(default_factory=Counter)  # by kind
    failed_good: list[str] = field(default_factory=list)
    wrong_answers: list[str] = field(default_factory=list)  # a known question was answered otherwise
    bad_accepted: list[str] = field(default_factory=list)  # a wrong request without a 4xx
    ttft_s: list[float] = field(default_factory=list)
    output_tokens: int = 0

    def good(self, kind: str, answer: Answer, most: int) -> bool:
        """Count a good request; whether it was answered as it must be."""
        self.done[kind] += 1
        fault = answer.error
        if not fault and answer.finish_reason not in ("stop", "length"):
            fault = f"finish reason {answer.finish_reason}"
        if not fault and not 0 < answer.output_tokens <= most:
            fault = f"{answer.output_tokens} tokens of at most {most}"
        if fault:
            self.failed_good.append(f"{kind}: {fault}")
            return False
        self.output_tokens += answer.output_tokens
        if answer.first_s is not None:
            self.ttft_s.append(answer.first_s)
        return True


@dataclass
class Client:
    """One client, who goes on until told to stop."""

    address: Address
    model: str
    seed: int
    tally: Tally
    known: dict[str, str] = field(default_factory=dict)  # question -> the answer it must get

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._text = default_text()

    async def run(self, until: float) -> None:
        """Act until that time of time.perf_counter(); what runs then is finished."""
        actions = {
            "chat": self._chat,
            "whole": self._whole,
            "known": self._known,
            "form": self._form,
            "hang-up": self._hang_up,
            "leave": self._leave,
            "bad": self._bad,
        }
        while time.perf_counter() < until:
            kind = self._random.choices(list(KINDS), list(KINDS.values()))[0]
            await actions[kind]()
            await asyncio.sleep(self._random.random() * 0.2)

    def body(self) -> dict[str, Any]:
        """A good request: a shared or an own beginning, short or long, greedy or sampled.

        A third asks little and wants much: such answers are all let in, then grow out of the pages.
        """
        pick = self._random
        start = pick.choice((0, 0, 5000, 9000, pick.randrange(300_000)))
        long_answer = pick.random() < 0.33
        context = "" if long_answer else self._text[start : start + pick.choice((40, 300, 1200, 3000))]
        question = f"Explain {pick.choice(TOPICS)} at length. Number {pick.randrange(1000)}.\n{context}"
        messages = [{"role": "user", "content": question}]
        if context and pick.random() < 0.5:
            messages.insert(0, {"role": "system", "content": self._text[: pick.choice((200, 1500))]})
        most = 384 if long_answer else pick.choice((1, 8, 32, 64, 128))
        body = {**self._shared(), "messages": messages, "max_tokens": most}
        body |= {"temperature": pick.choice((0, 0, 0.8)), "seed": pick.randrange(2**31)}
        return {**body, "priority": pick.choice((0, 0, 0, 0, 1)), "user": f"client {self.seed}"}

    def _shared(self) -> dict[str, Any]:
        return {"model": self.model, "stream_options": {"include_usage": True}}

    async def _chat(self) -> None:
        body = self.body()
        self.tally.good("chat", await stream_call(self.address, Call(body), LIMIT_S), body["max_tokens"])

    async def _known(self) -> None:
        question, right = self._random.choice(list(self.known.items()))
        answer = await ask_known(self.address, self.model, question)
        if self.tally.good("known", answer, KNOWN_TOKENS) and answer.text != right:
            self.tally.wrong_answers.append(f"{question!r}: {answer.text!r} in place of {right!r}")

    async def _form(self) -> None:
        """An answer that must be JSON of a schema, once it is whole."""
        form = {"type": "json_schema", "json_schema": {"name": "form", "schema": FORM}}
        body = {**self.body(), "response_format": form, "max_tokens": 96}
        answer = await stream_call(self.address, Call(body), LIMIT_S)
        if self.tally.good("form", answer, 96) and answer.finish_reason == "stop":
            try:
                good = set(json.loads(answer.text)) == {"name", "hard"}
            except ValueError:
                good = False
            if not good:
                self.tally.wrong_answers.append(f"not of the schema: {answer.text!r}")

    async def _whole(self) -> None:
        """An answer in one piece."""
        body = self.body()
        del body["stream_options"]
        try:
            got = await send(self.address, "POST", CHAT, json.dumps(body).encode(), limit_s=LIMIT_S)
            answer = _whole_answer(got.status, got.json())
        except PeerError as error:
            answer = Answer(None, 0.0, 0, status=0, error=error.message)
        self.tally.good("whole", answer, body["max_tokens"])

    async def _hang_up(self) -> None:
        """Read some events, then close the connection."""
        body = {**self.body(), "stream": True}
        self.tally.done["hang-up"] += 1
        data = json.dumps(body).encode()
        try:
            got = await send(
                self.address, "POST", CHAT, data, stop_after=self._random.randrange(30), limit_s=LIMIT_S
            )
            fault = "" if got.cut else read_answer(got, body).error
        except PeerError as error:
            fault = error.message
        if fault:
            self.tally.failed_good.append(f"hang-up: {fault}")

    async def _leave(self) -> None:
        """Send a request and go before anything has come."""
        self.tally.done["leave"] += 1
        data = json.dumps({**self.body(), "stream": True}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        _, writer = await asyncio.open_connection(self.address.host, self.address.port)
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        await asyncio.sleep(self._random.random() * 0.3)
        writer.transport.abort()

    async def _bad(self) -> None:
        """A wrong request, which must be refused as the client's fault."""
        self.tally.done["bad"] += 1
        wrong = self._random.choice((*WRONG_FIELDS, *WRONG_BODIES))
        data = wrong if isinstance(wrong, bytes) else json.dumps({**self.body(), **wrong}).encode()
        try:
            got = await send(self.address, "POST", CHAT, data, limit_s=LIMIT_S)
            fault = "" if 400 <= got.status < 500 else f"status {got.status}"
        except PeerError as error:
            fault = error.message
        if fault:
            self.tally.bad_accepted.append(f"{data[:120]!r}: {fault}")


KNOWN_TOKENS = 24


async def ask_known(address: Address, model: str, question: str) -> Answer:
    """The greedy answer to a question that is asked again and again."""
    body = {
        "model": model,
        "stream_options": {"include_usage": True},
        "messages": [{"role": "user", "content": question}],
        "max_tokens": KNOWN_TOKENS,
        "temperature": 0,
    }
    return await stream_call(address, Call(body), LIMIT_S)


def _whole_answer(status: int, document: Any) -> Answer:
    if status != 200:
        return Answer(None, 0.0, 0, status, error=f"status {status}: {json.dumps(document)[:300]}")
    choice = document["choices"][0]
    return Answer(
        None,
        0.0,
        document["usage"]["completion_tokens"],
        text=choice["message"]["content"] or "",
        finish_reason=choice["finish_reason"],
    )
