"""A small HTTP/1.1 client that notes when each piece of an answer arrives.

It is made of the standard library alone and parses nothing while an answer runs: on two cores a heavier
client would take its time from the server it measures. Source: RFC 9112 (HTTP/1.1), and the "Server-sent
events" chapter of the HTML standard for the lines that begin with `data:`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hasten.errors import PeerError

READ_BYTES = 1 << 16
LINE_LIMIT = 1 << 22
"""Longest line of a body we accept: an event that carries all logprobs of a step is long."""


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


@dataclass
class _Head:
    status: int
    headers: dict[str, str] = field(default_factory=dict)


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
    except asyncio.IncompleteReadError:
        raise PeerError(f"{method} {path}: the connection closed in the middle of the answer") from None
    except (OSError, ValueError) as error:
        raise PeerError(f"{method} {path}: {type(error).__name__}: {error}") from None


def send_now(
    address: Address, method: str, path: str, body: bytes = b"", limit_s: float = 60.0
) -> HttpAnswer:
    """`send` for callers that are not asynchronous."""
    return asyncio.run(send(address, method, path, body, limit_s=limit_s))


async def _exchange(
    address: Address,
    method: str,
    path: str,
    body: bytes,
    headers: Mapping[str, str] | None,
    stop_after: int | None,
) -> HttpAnswer:
    reader, writer = await asyncio.open_connection(address.host, address.port, limit=LINE_LIMIT)
    try:
        sent = time.perf_counter()
        writer.write(_request(address, method, path, body, headers or {}))
        await writer.drain()
        head = await _read_head(reader)
        pieces = _pieces(reader, head.headers)
        if head.headers.get("content-type", "").startswith("text/event-stream"):
            events, cut = await _events(pieces, stop_after)
            return HttpAnswer(head.status, head.headers, sent, time.perf_counter(), events, cut=cut)
        whole = b"".join([piece async for piece in pieces])
        return HttpAnswer(head.status, head.headers, sent, time.perf_counter(), body=whole)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def _request(address: Address, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> bytes:
    fields = {
        "Host": f"{address.host}:{address.port}",
        "Connection": "close",
        **({"Content-Type": "application/json", "Content-Length": str(len(body))} if body else {}),
        **headers,
    }
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


async def _read_head(reader: asyncio.StreamReader) -> _Head:
    version, _, rest = (await reader.readuntil(b"\r\n")).decode("latin-1").partition(" ")
    if not version.startswith("HTTP/1"):
        raise ValueError(f"the answer begins with {version[:40]!r}, which is not HTTP/1")
    head = _Head(int(rest[:3]))
    while line := (await reader.readuntil(b"\r\n")).strip():
        name, _, value = line.decode("latin-1").partition(":")
        head.headers[name.strip().lower()] = value.strip()
    return head


async def _pieces(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
    """The body as it comes: chunked, of known length, or up to the end of the connection."""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            yield await reader.readexactly(size)
            await reader.readexactly(2)
        await reader.readuntil(b"\r\n")
    elif "content-length" in headers:
        yield await reader.readexactly(int(headers["content-length"]))
    else:
        while piece := await reader.read(READ_BYTES):
            yield piece


async def _events(pieces: AsyncIterator[bytes], stop_after: int | None) -> tuple[tuple[Event, ...], bool]:
    """Events until the stream ends or enough have come."""
    events: list[Event] = []
    rest = b""
    if stop_after == 0:
        return (), True
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        now = time.perf_counter()
        events.extend(Event(now, line[5:].strip()) for line in lines if line.startswith(b"data:"))
        if stop_after is not None and len(events) >= stop_after:
            return tuple(events), True
    return tuple(events), False
