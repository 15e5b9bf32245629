"""What uvicorn does not limit: connections, headers and the time they may take."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from hasten.serve.problem import Problem

if TYPE_CHECKING:
    from hasten.serve.options import ServeOptions

MAX_HEADERS = 100
_CROWDED = Problem(503, "too many connections", code="too_many_connections", headers={"retry-after": "1"})


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with limits: a connection that breaks one gets a short answer and is closed."""

    options: ServeOptions  # set by `limited`: uvicorn makes the objects
    _head_bytes = 0  # arrived while the headers were not complete
    _head_size = 0  # of the headers read
    _flooded = False
    _in_head = True
    _refused = False
    _unsent = -1  # bytes of a complete answer that the client had not read when it was last looked at
    _head_timer: asyncio.TimerHandle | None = None

    @property
    def _most_bytes(self) -> int:
        return int(self.options.max_header_kb * 1000)

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.options.max_connections:
            self._refuse(_CROWDED)
            return
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > self._most_bytes:
            self._refuse(_flood(self._most_bytes))

    def send_400_response(self, msg: str) -> None:
        self._refuse(_flood(self._most_bytes) if self._flooded else Problem(400, msg, code="invalid_http"))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_size = 0
        self.scope["hasten.abort"] = self.transport.abort  # type: ignore[typeddict-unknown-key]
        if self._head_timer is None:
            self._await_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._head_size += len(name) + len(value) + 4
        if len(self.headers) > MAX_HEADERS or self._head_size + len(self.url) > self._most_bytes:
            self._flooded = True
            raise ValueError("too many headers")  # the parser stops and uvicorn asks for a 400

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head, self._head_bytes = True, 0

    def timeout_keep_alive_handler(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        if unsent == 0:
            super().timeout_keep_alive_handler()
        elif unsent == self._unsent:
            self.transport.abort()  # closing would wait for a client that does not read
        else:  # slow, but reading
            self._unsent = unsent
            again = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)
            self.timeout_keep_alive_task = again

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self.options.header_timeout_s, self._too_slow)

    def _too_slow(self) -> None:
        self._refuse(
            Problem(408, f"no request came within {self.options.header_timeout_s:g} s", code="header_timeout")
        )

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, problem: Problem) -> None:
        self._refused = True
        self._stop_timer()
        if self.transport.is_closing():
            return
        body = problem.body()
        more = "".join(f"{name}: {value}\r\n" for name, value in problem.headers.items())
        head = (
            f"HTTP/1.1 {problem.status} {HTTPStatus(problem.status).phrase}\r\n"
            f"content-type: application/json\r\n{more}"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


def limited(options: ServeOptions) -> type[LimitedProtocol]:
    """The protocol with the limits of one server."""
    return type("ServedProtocol", (LimitedProtocol,), {"options": options})


def _flood(most_bytes: int) -> Problem:
    said = f"the headers are longer than {most_bytes:,} bytes or more than {MAX_HEADERS}"
    return Problem(431, said, code="headers_too_large")
