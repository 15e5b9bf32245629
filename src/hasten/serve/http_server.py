"""uvicorn, and what it does not do.

Of a connection: limits of its headers and of their time, offers to upgrade passed over, a client noticed that
left while its requests wait in line, one answered that only sends no more. Of the server: room made for who
comes when it is full, it announces itself, drains, and is stopped by signals.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from http import HTTPStatus
from types import FrameType
from typing import TYPE_CHECKING, Any

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from hasten.serve.call import Problem
from hasten.serve.metrics import Forward
from hasten.stopping import first_signal

if TYPE_CHECKING:
    from hasten.engine.async_engine import AsyncEngine
    from hasten.engine.model import LanguageModel
    from hasten.serve.options import ServeOptions
    from hasten.serve.pool import Served
    from hasten.serve.service import Service

MAX_HEADERS = 100
_PIPELINED = 16  # requests of a connection that are read while the first is answered
_INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n"  # any client passes over it, and one that is gone resets
_FIRST_LOOK_S, _LOOK_S = 0.005, 2.0
_TCP_CLOSE = 7  # of the kernel's states of a connection: it was reset
_CROWDED = Problem(503, "too many connections", code="too_many_connections", headers={"retry-after": "1"})


class _Parser:
    """The parser of httptools, for which offers to upgrade are no end of the request.

    A server may pass over an offer (RFC 9110, 7.8) and must then read the request as it is; Java's HTTP
    client offers h2c with each. httptools skips the body instead and stops. So the request's head is given
    once more, without the offer, to a parser that then reads what follows.

    Args:
        protocol: whose callbacks are called; `head_without_offer` gives the head.
    """

    def __init__(self, protocol: LimitedProtocol) -> None:
        self._protocol = protocol
        self._inner = self._new()

    def _new(self) -> Any:
        parser = httptools.HttpRequestParser(self._protocol)
        with contextlib.suppress(AttributeError):  # of old versions, which are lenient by themselves
            parser.set_dangerous_leniencies(lenient_data_after_close=True)
        return parser

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def feed_data(self, data: bytes) -> None:
        while True:
            try:
                self._inner.feed_data(data)
                return
            except httptools.HttpParserUpgrade as offer:
                head = self._protocol.head_without_offer()
                data = data[offer.args[0] :]
                self._inner = self._new()
                self._inner.feed_data(head)


class Waiting:
    """Connections that wait for their client: to ask, to send the rest of a request, or to ask again.

    By address, of IPv6 by network (a host has 2^64 addresses), the longest waiting first.
    """

    def __init__(self) -> None:
        self.leaving = 0  # that were told to close and are still there
        self._of: dict[str, dict[LimitedProtocol, None]] = {}

    def add(self, connection: LimitedProtocol) -> None:
        """It waits from now on."""
        self.discard(connection)
        self._of.setdefault(connection.network, {})[connection] = None

    def discard(self, connection: LimitedProtocol) -> None:
        """It waits no more, or never did."""
        mine = self._of.get(connection.network, {})
        mine.pop(connection, None)
        if not mine:
            self._of.pop(connection.network, None)

    def longest(self) -> LimitedProtocol | None:
        """The longest waiting one of the address that has the most of them."""
        most = max(self._of.values(), key=len, default=None)
        return next(iter(most), None) if most is not None else None


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with limits: a connection that breaks one gets a short answer and is closed.

    A client may close its sending side and wait for the answer. TCP does not tell it from one that is gone,
    which resets the connection when it is sent something: so such a client is sent an interim response now
    and then, until its answer begins. HTTP/1.0 has none, and who speaks it (nginx, unless told) is gone.
    """

    options: ServeOptions  # set by `limited`: uvicorn makes the objects
    waiting: Waiting  # of all connections of a server
    network = ""  # the client's
    _head_bytes = 0  # arrived while the headers were not complete
    _head_size = 0  # of the headers read
    _flooded = False
    _in_head = True
    _refused = False
    _unsent = -1  # bytes of a complete answer that the client had not read when it was last looked at
    _head_timer: asyncio.TimerHandle | None = None
    _offered = False  # the head that is read offers to upgrade: it comes again without
    _is_leaving = False  # it made room
    _look: asyncio.TimerHandle | None = None  # whether a client that sends no more is still there

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parser: Any = _Parser(self)
        self._unanswered: list[Any] = []  # cycles, the one that is answered first

    @property
    def _most_bytes(self) -> int:
        return int(self.options.max_header_kb * 1000)

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.network = _network(self.client[0] if self.client else "")
        most = self.options.max_connections
        if most is not None and len(self.connections) - self.waiting.leaving > most:
            other = self.waiting.longest()
            if other is None:
                self._refuse(_CROWDED)
                return
            other.make_room()
        self.waiting.add(self)
        self._await_head()

    def make_room(self) -> None:
        """Close, for somebody who may have something to ask."""
        self.waiting.discard(self)
        self.waiting.leaving += 1
        self._is_leaving = True
        if self.transport.get_write_buffer_size():
            self.transport.abort()  # closing would wait for a client that does not read
        elif self._head_bytes or not self._in_head:
            self._refuse(_CROWDED)
        else:
            self._stop_timer()
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self.waiting.discard(self)
        self.waiting.leaving -= self._is_leaving
        if self._look is not None:
            self._look.cancel()
        super().connection_lost(exc)  # which tells the last request only
        for cycle in self._unanswered:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        self._unanswered.clear()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Whether the connection stays open for answers, though the client sends no more."""
        asked = [one for one in self._unanswered if not one.response_complete]
        if not asked or self._refused or asked[-1].more_body or asked[0].scope["http_version"] == "1.0":
            return False
        asked[-1].keep_alive = False
        if self._look is None:
            self._look_for_client(_FIRST_LOOK_S)
        return True

    def _look_for_client(self, again_s: float) -> None:
        if self.transport.is_closing():
            return
        if _is_reset(self.transport):
            self.transport.abort()
            return
        now = next((one for one in self._unanswered if not one.response_complete), None)
        if now is not None and not now.response_started and not self.transport.get_write_buffer_size():
            self.transport.write(_INTERIM)
        self._look = self.loop.call_later(again_s, self._look_for_client, min(2 * again_s, _LOOK_S))

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
        self._offered = self.parser.should_upgrade()
        if self._offered:
            if self.parser.get_method() == b"CONNECT":
                raise ValueError("CONNECT asks for a proxy")  # answered with 400
            return
        self._in_head = False
        self._stop_timer()
        super().on_headers_complete()
        self._unanswered = [one for one in self._unanswered if not one.response_complete]
        self._unanswered.append(self.cycle)
        if len(self._unanswered) <= _PIPELINED:
            self.flow.resume_reading()  # else nobody would notice that the client leaves

    def on_message_complete(self) -> None:
        if self._offered:
            return
        super().on_message_complete()
        self._in_head, self._head_bytes = True, 0
        if not self.cycle.response_complete:
            self.waiting.discard(self)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.pipeline and not self.transport.is_closing():
            self.waiting.add(self)

    def head_without_offer(self) -> bytes:
        """The head that was read, without its offer to upgrade."""
        method, version = self.parser.get_method(), self.parser.get_http_version()
        lines = [b"%s %s HTTP/%s" % (method, self.url, version.encode())]
        for name, value in self.headers:
            if name == b"connection":
                options = [option.strip() for option in value.split(b",")]
                value = b", ".join(
                    one for one in options if one.lower() not in (b"upgrade", b"http2-settings")
                )
            if name != b"upgrade" and (value or name != b"connection"):
                lines.append(name + b": " + value)
        return b"\r\n".join([*lines, b"", b""])

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
    """The protocol of one server's connections."""
    return type("ServedProtocol", (LimitedProtocol,), {"options": options, "waiting": Waiting()})


def _network(address: str) -> str:
    """Whose address it is: of IPv6 the first half; one of IPv4 may be written as one of IPv6."""
    if ":" not in address:
        return address
    if "." in address:
        return address.rpartition(":")[2]
    return ":".join(ipaddress.ip_address(address).exploded.split(":")[:4])


def _is_reset(transport: asyncio.Transport) -> bool:
    """Whether a connection that is not read any more was reset."""
    known = transport.get_extra_info("socket")
    try:
        return bool(known.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_CLOSE)
    except OSError:  # a socket of another family
        return False


def _flood(most_bytes: int) -> Problem:
    said = f"the headers are longer than {most_bytes:,} bytes or more than {MAX_HEADERS}"
    return Problem(431, said, code="headers_too_large")


_STOPS = (signal.SIGINT, signal.SIGTERM)


class Server(uvicorn.Server):
    """uvicorn's server. It announces itself when the first model is there, tells the service that it drains,
    and leaves with code 0.

    Args:
        config: uvicorn's.
        service: whose pool takes the first model.
        first: its loading, which has begun already.
        ready: called when requests are answered.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        service: Service,
        first: Future[tuple[LanguageModel, AsyncEngine]],
        ready: Callable[[Served], None],
    ) -> None:
        super().__init__(config)
        self.service = service
        self.first = first
        self.ready = ready
        self.forward = Forward(service.log)
        self.loaded = False
        self.failure: BaseException | None = None  # why the first model is not there
        self.stopped_by: int | None = None
        self.loading: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        coming = self.service.pool.expect(self.first)
        logging.getLogger("hasten").addHandler(self.forward)
        await super().startup(sockets)
        self.loading = asyncio.get_running_loop().create_task(self.announce(coming))

    async def announce(self, coming: asyncio.Task[Served]) -> None:
        """Say that requests are answered, or stop."""
        try:
            served = await coming
        except Exception as error:  # noqa: BLE001  raised by `serve` when the loop has ended
            self.failure, self.should_exit = self.first.exception() or error, True
            return
        self.loaded = True
        self.ready(served)
        self.service.log.event("ready", models=list(self.service.pool.refs))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.draining = True
        self.service.pool.stop_watching()
        if self.loaded:
            self.service.log.event("draining", seconds=self.config.timeout_graceful_shutdown)
        else:  # all that runs waits for the model
            self.config.timeout_graceful_shutdown = 1
        await super().shutdown(sockets)
        if self.loading is not None:
            self.loading.cancel()
        await self.service.pool.close()  # a second signal skips the lifespan's end; threads must end first
        logging.getLogger("hasten").removeHandler(self.forward)
        if self.loaded:
            self.service.log.event("stopped")
        self.service.log.close()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # who starts a server in the background of a script has SIGINT ignored, and means it
        signals = [one for one in _STOPS if signal.getsignal(one) is not signal.SIG_IGN]
        before = {one: signal.signal(one, self.handle_exit) for one in signals}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.stopped_by = first_signal(sig)
        self.force_exit = self.should_exit  # the second time is meant
        self.should_exit = True
