"""A small HTTP/1.1 client that notes when each piece of an answer arrives.

It is made of the standard library alone, and while an answer runs it only notes time and bytes of what comes:
on two cores a heavier client would take its time from the server it measures. Source: RFC 9112 (HTTP/1.1),
and the "Server-sent events" chapter of the HTML standard for the lines that begin with `data:`.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hasten.errors import PeerError

READ_BYTES = 1 << 16
LAST_CHUNK = b"0\r\n\r\n"


@dataclass(frozen=True)
class Address:
    """Where a server listens."""

    host: str
    port: int


@dataclass(frozen=True)
class Event:
    """One server-sent event."""

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
    try:
        return await asyncio.wait_for(_exchange(address, method, path, body, headers, stop_after), limit_s)
    except (TimeoutError, asyncio.TimeoutError):
        raise PeerError(f"{method} {path} was not answered within {limit_s:.0f} s") from None
    except EOFError:
        raise PeerError(f"{method} {path}: the connection closed in the middle of the answer") from None
    except (OSError, ValueError) as error:
        raise PeerError(f"{method} {path}: {type(error).__name__}: {error}") from None


def send_now(
    address: Address, method: str, path: str, body: bytes = b"", *, limit_s: float = 60.0
) -> HttpAnswer:
    """`send` for callers that are not asynchronous, on a blocking socket: the lightest client there is.

    `limit_s` is the longest silence here, not the time of all.

    Raises:
        PeerError: as `send`.
    """
    try:
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
    except TimeoutError:
        raise PeerError(f"{method} {path} was not answered within {limit_s:.0f} s") from None
    except EOFError:
        raise PeerError(f"{method} {path}: the connection closed in the middle of the answer") from None
    except (OSError, ValueError) as error:
        raise PeerError(f"{method} {path}: {type(error).__name__}: {error}") from None


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
        """More of the answer."""
        self.pieces.append((time.perf_counter(), data))
        if self._wanted is not None:
            self._wanted -= data.count(b"data:")
            self.cut = self._wanted <= 0
        if self.cut or data.endswith(LAST_CHUNK):
            self._end(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """The server closed the connection."""
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


def _split(
    pieces: Sequence[tuple[float, bytes]],
) -> tuple[int, dict[str, str], list[tuple[float, bytes]]]:
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
