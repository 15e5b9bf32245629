"""Many clients at once: what is sent, what each of them saw, and the figures of the whole.

The HTTP/1.1 client notes when each piece of an answer arrives. It is made of the standard library alone, and
while an answer runs it only notes time and bytes of what comes: on two cores a heavier client would take its
time from the server it measures. Source: RFC 9112 (HTTP/1.1), and the chapter "Server-sent events" of the
HTML standard for the lines that begin with `data:`.

A load may be closed, so many clients at once (`run_calls`), or open: requests come when they come, whatever
became of those before, as users do (`run_open`). Of an open load the share answered in time is its goodput.

Source of the figures' names and definitions: TTFT (time to first token), TPOT (time per output token after
the first) and end-to-end latency as the field's serving benchmarks use them.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from hasten.bench.figures import Answer, percentile
from hasten.errors import PeerError

if TYPE_CHECKING:
    from hasten.bench.workload import Arrival, Traffic

READ_BYTES = 1 << 16
LAST_CHUNK = b"0\r\n\r\n"


@dataclass(frozen=True)
class Address:
    host: str
    port: int


@dataclass(frozen=True)
class Event:
    at_s: float  # time.perf_counter() when its last byte was read
    data: bytes  # what followed `data: `


@dataclass(frozen=True)
class HttpAnswer:
    """What a server gave. `events` is filled for an event stream, `body` for anything else."""

    status: int
    headers: Mapping[str, str]  # names in lower case
    sent_s: float  # time.perf_counter() just before the request was written
    done_s: float
    events: tuple[Event, ...] = ()
    body: bytes = b""
    cut: bool = False  # we closed the connection after `stop_after` events

    def json(self) -> Any:
        """The body as JSON.

        Raises:
            PeerError: it is none.
        """
        try:
            return json.loads(self.body)
        except ValueError:
            raise PeerError(f"the answer (status {self.status}) is not JSON: {self.body[:200]!r}") from None


async def send(
    address: Address,
    method: str,
    path: str,
    body: bytes = b"",
    headers: Mapping[str, str] | None = None,
    *,
    stop_after: int | None = None,
    limit_s: float = 600.0,
) -> HttpAnswer:
    """One request on a connection of its own.

    Args:
        body: sent as it is, with `Content-Type: application/json` unless `headers` says otherwise.
        stop_after: close the connection once this many events have come (0: once the head has).
        limit_s: for the whole exchange.

    Raises:
        PeerError: no connection, an answer that is not HTTP, one that ends early, or the time limit.
    """
    with _told(f"{method} {path}", limit_s):
        return await asyncio.wait_for(_exchange(address, method, path, body, headers, stop_after), limit_s)


@contextmanager
def _told(what: str, limit_s: float) -> Iterator[None]:
    """Says what went wrong with a request as a PeerError."""
    try:
        yield
    except (TimeoutError, asyncio.TimeoutError):
        raise PeerError(f"{what} was not answered within {limit_s:.0f} s") from None
    except EOFError:
        raise PeerError(f"{what}: the connection closed in the middle of the answer") from None
    except (OSError, ValueError) as error:
        raise PeerError(f"{what}: {type(error).__name__}: {error}") from None


def send_now(
    address: Address, method: str, path: str, body: bytes = b"", *, limit_s: float = 60.0
) -> HttpAnswer:
    """`send` for callers that are not asynchronous, on a blocking socket: the lightest client there is.

    `limit_s` is the longest silence here, not the time of all.

    Raises:
        PeerError: as `send`.
    """
    with _told(f"{method} {path}", limit_s):
        with socket.create_connection((address.host, address.port), limit_s) as line:
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sent = time.perf_counter()
            line.sendall(_request(address, method, path, body, {}))
            pieces: list[tuple[float, bytes]] = []
            while data := line.recv(READ_BYTES):
                pieces.append((time.perf_counter(), data))
                if data.endswith(LAST_CHUNK):
                    break
        return _read(pieces, sent)


async def _exchange(
    address: Address,
    method: str,
    path: str,
    body: bytes,
    headers: Mapping[str, str] | None,
    stop_after: int | None,
) -> HttpAnswer:
    loop = asyncio.get_running_loop()
    tape = _Tape(stop_after)
    transport, _ = await loop.create_connection(lambda: tape, address.host, address.port)
    try:
        sent = time.perf_counter()
        transport.write(_request(address, method, path, body, headers or {}))
        await tape.ended
    finally:
        transport.abort() if tape.cut else transport.close()
    return _read(tape.pieces, sent, tape.cut)


class _Tape(asyncio.Protocol):
    """Notes what comes and when, until the answer ends or enough events have come."""

    def __init__(self, stop_after: int | None) -> None:
        self.pieces: list[tuple[float, bytes]] = []
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.cut = False
        self._wanted = stop_after

    def data_received(self, data: bytes) -> None:
        self.pieces.append((time.perf_counter(), data))
        if self._wanted is not None:
            self._wanted -= data.count(b"data:")
            self.cut = self._wanted <= 0
        if self.cut or data.endswith(LAST_CHUNK):
            self._end(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(exc)

    def _end(self, fault: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_exception(fault) if fault else self.ended.set_result(None)


def _request(address: Address, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> bytes:
    fields = {
        "Host": f"{address.host}:{address.port}",
        "Connection": "close",
        **({"Content-Type": "application/json", "Content-Length": str(len(body))} if body else {}),
        **headers,
    }
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def _read(pieces: Sequence[tuple[float, bytes]], sent: float, cut: bool = False) -> HttpAnswer:
    """Make an answer of what was noted.

    Raises:
        EOFError: it is not whole, and not because we hung up.
        ValueError: it is not HTTP.
    """
    status, headers, bodies = _split(pieces)
    chunked = headers.get("transfer-encoding", "").lower() == "chunked"
    reader = _Dechunker() if chunked else None
    body = [(at, reader.feed(data) if reader else data) for at, data in bodies]
    length = headers.get("content-length")
    whole = sum(len(data) for _, data in body)
    if not cut and ((reader and not reader.ended) or (length is not None and whole < int(length))):
        raise EOFError
    done = pieces[-1][0]
    if headers.get("content-type", "").startswith("text/event-stream"):
        return HttpAnswer(status, headers, sent, done, _events(body), cut=cut)
    return HttpAnswer(status, headers, sent, done, body=b"".join(data for _, data in body), cut=cut)


def _split(pieces: Sequence[tuple[float, bytes]]) -> tuple[int, dict[str, str], list[tuple[float, bytes]]]:
    """Status, headers, and the pieces of the body."""
    head = b""
    for number, (at, data) in enumerate(pieces):
        head += data
        text, end, rest = head.partition(b"\r\n\r\n")
        if not end:
            continue
        first, *lines = text.decode("latin-1").split("\r\n")
        if not first.startswith("HTTP/1"):
            break
        fields = (line.partition(":") for line in lines)
        headers = {name.strip().lower(): value.strip() for name, _, value in fields}
        return int(first.split(" ")[1]), headers, [(at, rest), *pieces[number + 1 :]]
    if head and not head.startswith(b"HTTP/1"):
        raise ValueError(f"the answer begins with {head[:40]!r}, which is not HTTP/1")
    raise EOFError


class _Dechunker:
    """Takes chunked coding off, whatever pieces it comes in."""

    def __init__(self) -> None:
        self.ended = False
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """More in, the bytes of the chunks that are whole now out."""
        self._held += data
        out = []
        while not self.ended:
            line, end, rest = self._held.partition(b"\r\n")
            size = int(line.split(b";")[0], 16) if end else 0
            if not end or len(rest) < size + 2:
                break
            self.ended = size == 0
            out.append(rest[:size])
            self._held = rest[size + 2 :]
        return b"".join(out)


def _events(body: Sequence[tuple[float, bytes]]) -> tuple[Event, ...]:
    """The events of a body, each with the time of its last byte."""
    events: list[Event] = []
    rest = b""
    for at, data in body:
        *lines, rest = (rest + data).split(b"\n")
        events.extend(Event(at, line[5:].strip()) for line in lines if line.startswith(b"data:"))
    return tuple(events)


@dataclass(frozen=True)
class Call:
    """One streamed request of a client. `body` lacks `stream`: it is added."""

    body: Mapping[str, Any]
    path: str = "/v1/chat/completions"
    stop_after: int | None = None  # hang up after this many events
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def sent(self) -> bytes:
        return json.dumps({**self.body, "stream": True}).encode()


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
        raise PeerError("the load has no answers, so it has no figures")
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
        only = calls[0]  # on the lightest client: what that takes is counted as the server's
        try:
            return [read_answer(send_now(address, "POST", only.path, only.sent, limit_s=limit_s), only.body)]
        except PeerError as error:
            return [Answer.none(error)]
    return asyncio.run(_run(address, calls, concurrency or max(1, len(calls)), limit_s))


async def _run(address: Address, calls: Sequence[Call], concurrency: int, limit_s: float) -> list[Answer]:
    gate = asyncio.Semaphore(concurrency)

    async def one(call: Call) -> Answer:
        async with gate:
            return await stream_call(address, call, limit_s)

    return await asyncio.gather(*(one(call) for call in calls))


async def stream_call(address: Address, call: Call, limit_s: float = 600.0) -> Answer:
    """One call; what went wrong is in the Answer's `error`."""
    try:
        answer = await send(
            address, "POST", call.path, call.sent, call.headers, stop_after=call.stop_after, limit_s=limit_s
        )
        return read_answer(answer, call.body)
    except PeerError as error:
        return Answer.none(error)


def read_answer(answer: HttpAnswer, body: Mapping[str, Any]) -> Answer:
    """The client's view of a finished stream of chat or text completion chunks.

    Tokens are counted by the server's usage where it sends one; else an answer that ended by length has as
    many as were asked for, and any other as many as there were events with text.
    """
    if answer.status != 200:
        reason = f"status {answer.status}: {answer.body[:300].decode('utf-8', 'replace')}"
        waited = answer.done_s - answer.sent_s
        return Answer(None, waited, 0, answer.status, error=reason, sent_s=answer.sent_s)
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


Ask = Callable[[Sequence[Call]], "list[Answer]"]
"""Sends calls to whatever is measured."""


# Open loads -------------------------------------------------------------------------------------------------

REFUSALS = (429, 503)
"""Statuses by which a server says early that it will not answer: it is full, or a deadline cannot be kept."""
TOO_LATE = ("deadline_exceeded", "status 504")
"""In the error of an answer whose deadline passed while it was made: it counts as late, not as failed."""
SHARES = {"goodput": "met", "refused": "refused", "failed": "failed"}
"""Share of a load's record -> what says of one of its requests whether it counts."""


@dataclass(frozen=True)
class Asked:
    """An open load on a server."""

    traffic: Traffic  # lengths, and what users wait for
    rate: float | None  # requests a second, at random moments; None: as the traffic was recorded
    count: int
    seed: int = 0

    def arrivals(self, ids: Sequence[int]) -> list[Arrival]:
        """The requests, cut out of one text's token ids."""
        return list(self.traffic.requests(ids, self.count, self.rate, seed=self.seed))

    def call(self, arrival: Arrival, model: str) -> Call:
        """One request as it is sent: token ids, greedy, past end tokens, its deadline where there is one."""
        body = {
            "model": model,
            "prompt": list(arrival.prompt),
            "max_tokens": arrival.output,
            "temperature": 0,
            "ignore_eos": True,
            "stream_options": {"include_usage": True},
        }
        if self.traffic.deadline_ms is not None:
            body["deadline_ms"] = self.traffic.deadline_ms
        return Call(body, "/v1/completions")


def run_open(address: Address, asked: Asked, ids: Sequence[int], limit_s: float = 600.0) -> dict[str, Any]:
    """Sends every request at its moment, whatever became of those before, and waits for all.

    Two requests of another seed come first and are not counted: a service that has begun knows what all
    prompts begin with. Times count from the moment a request was due, so that a client that is late itself
    makes no server look fast.

    Returns:
        The record: what was asked, one object a request, and the shares and rates of all.

    Raises:
        PeerError: the server says no model's name.
    """
    model = served_model(address)
    first = replace(asked, count=2, seed=asked.seed + 1_000_003, rate=None)
    run_calls(address, [asked.call(one, model) for one in first.arrivals(ids)], 1, limit_s)
    arrivals = asked.arrivals(ids)
    calls = [asked.call(one, model) for one in arrivals]
    begun, answers = asyncio.run(_at_their_moments(address, arrivals, calls, limit_s))
    rows = [
        _row(arrival, answer, begun, asked.traffic) for arrival, answer in zip(arrivals, answers, strict=True)
    ]
    return _record(asked, rows, figures(answers))


def served_model(address: Address) -> str:
    """The first model that a server names.

    Raises:
        PeerError: it names none.
    """
    answer = send_now(address, "GET", "/v1/models")
    try:
        return str(answer.json()["data"][0]["id"])
    except (KeyError, IndexError, TypeError):
        raise PeerError(
            f"http://{address.host}:{address.port}/v1/models names no model (status {answer.status})",
            hint="give the address of a server with OpenAI's API",
        ) from None


async def _at_their_moments(
    address: Address, arrivals: Sequence[Arrival], calls: Sequence[Call], limit_s: float
) -> tuple[float, list[Answer]]:
    """When the load began, on the clock of answers, and the answers in the order of the requests."""
    begun = time.perf_counter()

    async def one(arrival: Arrival, call: Call) -> Answer:
        await asyncio.sleep(max(0.0, begun + arrival.at_s - time.perf_counter()))
        asked = time.perf_counter()
        answer = await stream_call(address, call, limit_s)
        return answer if answer.sent_s else replace(answer, sent_s=asked)

    return begun, await asyncio.gather(*map(one, arrivals, calls))


def _row(arrival: Arrival, answer: Answer, begun: float, traffic: Traffic) -> dict[str, Any]:
    """What became of one request; milliseconds from the moment it was due."""
    late_s = answer.sent_s - begun - arrival.at_s
    refused = answer.status in REFUSALS
    first = None if answer.first_s is None else 1000 * (late_s + answer.first_s)
    pace = None if answer.tpot_s is None else 1000 * answer.tpot_s
    whole = None if answer.error else 1000 * (late_s + answer.last_s)
    return {
        "at_s": arrival.at_s,
        "prompt_tokens": len(arrival.prompt),
        "cached_tokens": answer.cached_tokens,
        "output_tokens": answer.output_tokens,
        "ttft_ms": None if answer.error else first,
        "tpot_ms": None if answer.error else pace,
        "latency_ms": whole,
        "met": first is not None and whole is not None and traffic.in_time(first, pace, whole),
        "refused": refused,
        "refused_after_ms": 1000 * (late_s + answer.last_s) if refused else None,
        "failed": bool(answer.error) and not refused and not any(one in answer.error for one in TOO_LATE),
        "error": answer.error or None,
        "client_late_ms": 1000 * late_s,
    }


def _record(asked: Asked, rows: Sequence[Mapping[str, Any]], whole: LoadFigures) -> dict[str, Any]:
    traffic, count = asked.traffic, len(rows)
    shares = {name: sum(row[key] for row in rows) / count for name, key in SHARES.items()}
    prompts = [row for row in rows if row["cached_tokens"] is not None]
    known = sum(row["prompt_tokens"] for row in prompts)
    return {
        "workload": traffic.name,
        "rate": asked.rate,
        "count": count,
        "seed": asked.seed,
        "limits": {
            "ttft_ms": traffic.ttft_ms,
            "tpot_ms": traffic.tpot_ms,
            "deadline_ms": traffic.deadline_ms,
        },
        **shares,
        "late": max(0.0, 1.0 - sum(shares.values())),
        "cached": sum(row["cached_tokens"] for row in prompts) / known if known else None,
        "wall_s": whole.wall_s,
        "output_tok_per_s": whole.tok_per_s,
        "good_per_s": shares["goodput"] * count / whole.wall_s if whole.wall_s else None,
        "requests": list(rows),
    }
