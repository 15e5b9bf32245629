"""What all endpoints share: the service, and the exchange of one request and its response.

An endpoint gets an `Exchange`: a checked body comes in; JSON or server-sent events go out.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.responses import Response

from hasten.machine.cores import usable_cores
from hasten.machine.memory import memory_room
from hasten.serve.body import Ignored, Strict, parse
from hasten.serve.call import NO_FAULT, Call, Deadline, LibraryPanic, Problem, Receive, Scope, Send, call_of
from hasten.serve.kept import Recorder, ResponseMemory, ResponseStore
from hasten.serve.metrics import Metrics, Tally
from hasten.serve.shape import dumped

if TYPE_CHECKING:
    from hasten.serve.metrics import Log
    from hasten.serve.options import ServeOptions
    from hasten.serve.pool import ModelPool
    from hasten.serve.prepare import Form

Item = TypeVar("Item", bound=Strict)
T = TypeVar("T")

_LONG = 500_000  # bytes of a body whose preparing may take longer than others should wait
_PIECE = 1 << 17  # bytes of an answer that are handed to the connection at once
_ALWAYS = 32_000_000  # bytes that bodies may take together, however little memory is free
_COPIES = 4  # of a body: itself, checked values, a text of the template, token ids
_SMALL = 8192  # bytes: a body that is checked within a millisecond, whatever it holds, and is not counted

_EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect tokens
]
_MOST_TOLD = 1000  # fields that the log names in all
_HEADER_NAME = re.compile(r"[\w.$/-]{1,60}", re.ASCII)
_FROM_BROWSERS = (b"origin", b"sec-fetch-site", b"sec-fetch-mode")


class Service:
    """The options, the models, the numbers and the threads of one server."""

    def __init__(self, options: ServeOptions, pool: ModelPool, metrics: Metrics, log: Log) -> None:
        self.options = options
        self.pool = pool
        self.metrics = metrics
        self.log = log
        self.stored = ResponseStore()
        ttl_s, most = options.response_cache_ttl, int(options.response_cache_mb * 1_000_000)
        self.memory = None if ttl_s is None else ResponseMemory(ttl_s, most)
        self.recorder = Recorder(options.record, log) if options.record is not None else None
        self.bodies = BodyRoom(_memory_left)
        self.draining = False
        self.told: set[str] = set()  # fields that the log has named as ignored
        self.began = time.monotonic()
        # templates and tokenizers run here: a long prompt or a slow template stops nobody's stream
        self._workers = ThreadPoolExecutor(max(2, usable_cores()), thread_name_prefix="hasten-prepare")
        # a text of megabytes takes seconds: one at a time, and never all threads that others need
        self._long = ThreadPoolExecutor(1, thread_name_prefix="hasten-prepare-long")

    async def work(self, task: Callable[[], T], body_bytes: int = 0) -> T:
        """Run something in a thread; what it is for came in a body of so many bytes.

        Raises:
            LibraryPanic: a library panicked; else what the task raises.
        """
        threads = self._workers if body_bytes < _LONG else self._long
        return await asyncio.get_running_loop().run_in_executor(threads, lambda: _unpanicked(task))

    @property
    def ready(self) -> bool:
        """Whether new requests are welcome."""
        return self.pool.ready and not self.draining

    def close(self) -> None:
        self._workers.shutdown(wait=False, cancel_futures=True)
        self._long.shutdown(wait=False, cancel_futures=True)
        if self.recorder is not None:
            self.recorder.close()


def _unpanicked(task: Callable[[], T]) -> T:
    try:
        return task()
    except (Exception, *NO_FAULT):
        raise
    except BaseException as panic:
        raise LibraryPanic(str(panic)) from panic


class Exchange:
    """Handed to an endpoint."""

    def __init__(self, service: Service, scope: Scope, receive: Receive, send: Send) -> None:
        self.service = service
        self.scope = scope
        self.call: Call = call_of(scope)
        self.sent = 0.0  # when events were sent last, seconds of the monotonic clock
        self.reserved = 0  # bytes of the body that are counted in the room for bodies
        self._size = 0  # bytes of the body
        self._receive = receive
        self._send = send

    async def body(self, model: type[Item]) -> Item:
        """The request's body, checked; counted as it comes, whatever its content-length claims.

        Raises:
            Problem: 408 too slow, 413 too long, 415 no JSON, 503 no room for it, 400 not what the model says.
        """
        options = self.service.options
        check_kind(self.scope["headers"])
        announced = dict(self.scope["headers"]).get(b"content-length", b"")
        self._expect(int(announced) if announced.isdigit() else 0)
        data: bytearray | None = None
        with Deadline(options.body_timeout_s):
            data = await self._collect()
        if data is None:
            said = f"the body did not arrive within {options.body_timeout_s:g} s"
            raise Problem(408, said, code="body_timeout", headers={"connection": "close"})
        self._size = len(data)
        ignored = None if options.strict else Ignored()
        if self._size <= _SMALL:
            found = parse(model, data, ignored)
        else:
            found = await self.work(lambda: parse(model, data, ignored))
        self.note_ignored(ignored or Ignored())
        return found

    def note_ignored(self, names: Ignored) -> None:
        """Say which fields were left out: in a header, in the metrics, and once in the log."""
        if not names:
            return
        listed = sorted(names)
        before = self.call.headers.get("x-hasten-ignored")
        shown = [before] if before else []
        shown += [name for name in listed if _HEADER_NAME.fullmatch(name)]
        self.call.headers["x-hasten-ignored"] = ", ".join(shown) or str(len(names))
        self.service.metrics.ignored(listed)
        new = [name for name in listed if name not in self.service.told]
        if new and len(self.service.told) < _MOST_TOLD:
            self.service.told.update(new)
            self.service.log.event("fields_ignored", "warning", fields=new, path=self.scope["path"][:200])

    def note_form(self, form: Form) -> None:
        """Say what of a schema the grammar leaves to a check at the end."""
        if form.checked:
            self.call.headers["x-hasten-schema"] = f"checked after generation: {', '.join(form.checked)}"

    def _expect(self, size: int) -> None:
        """The body will have so many bytes.

        Raises:
            Problem: 413, that is too long; 503, there is no room for it.
        """
        limit = self.service.options.max_body_bytes
        if size > limit:
            said = f"the body is longer than {limit:,} bytes"
            raise Problem(413, said, code="body_too_large", headers={"connection": "close"})
        more = size - self.reserved
        if size > _SMALL and more > 0:
            self.service.bodies.take(more)
            self.reserved += more

    async def _collect(self) -> bytearray:
        body = bytearray()
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self.call.left = True
                raise asyncio.CancelledError
            body += message.get("body", b"")
            self._expect(len(body))
            if not message.get("more_body", False):
                return body

    def tally(self, model: str) -> Tally:
        """What counts the answers of this request, for `usage`, the metrics and the log."""
        return Tally(self.service.metrics, model, self.call)

    async def work(self, task: Callable[[], T]) -> T:
        """Run something for this request in a thread; large bodies wait in a line of their own."""
        return await self.service.work(task, self._size)

    async def json(self, document: Any, status: int = 200) -> None:
        """Answer with a JSON document. What takes more than some milliseconds to write is written before."""
        await self.raw([dumped(document)], "application/json", status)

    async def raw(self, body: Sequence[bytes], kind: str, status: int = 200) -> None:
        """Answer with a body of any kind, given in pieces: a long one is sent as the client reads it."""
        length = sum(map(len, body))
        lines = [(b"content-type", kind.encode()), (b"content-length", str(length).encode())]
        await self._send({"type": "http.response.start", "status": status, "headers": lines})
        if length > _PIECE:
            for piece in _even(body):
                await self._send({"type": "http.response.body", "body": piece, "more_body": True})
                await asyncio.sleep(0)
            body = ()
        await self._send({"type": "http.response.body", "body": b"".join(body)})

    async def events(self, data: bytes) -> None:
        """Send events that stand ready; the first call sends the headers too."""
        if not self.call.started:
            await self._send({"type": "http.response.start", "status": 200, "headers": list(_EVENT_HEADERS)})
        self.sent = time.monotonic()
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self, data: bytes = b"") -> None:
        """Send the last events and end the stream."""
        await self._send({"type": "http.response.body", "body": data})


def _even(body: Sequence[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces of about `_PIECE`."""
    waiting, size = [], 0
    for part in body:
        for at in range(0, len(part), _PIECE):
            waiting.append(part[at : at + _PIECE])
            size += len(waiting[-1])
            if size >= _PIECE:
                yield b"".join(waiting)
                waiting, size = [], 0
    yield b"".join(waiting)


Endpoint = Callable[[Exchange], Awaitable[None]]


class Handled(Response):
    """What a route returns: the endpoint then answers by itself, without a response object in between."""

    def __init__(self, service: Service, endpoint: Endpoint) -> None:
        super().__init__()
        self._service = service
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(self._service, scope, receive, send)
        try:
            await self._endpoint(exchange)
        finally:
            self._service.bodies.held -= exchange.reserved  # what was asked lives as long as its answer


def check_kind(headers: Sequence[tuple[bytes, bytes]]) -> None:
    """Refuse a body that a web page may send without being asked: a form, plain text, or one of no type.

    The pages of strangers can make a browser send those to any address (the Fetch standard's CORS-safelisted
    requests); they cannot declare JSON. Whoever is no browser may leave the type out.

    Raises:
        Problem: 415.
    """
    kinds = [value for name, value in headers if name == b"content-type"]
    if not kinds:
        if not any(name in _FROM_BROWSERS for name, _ in headers):
            return
        said = "the body comes from a web page and has no content-type"
    elif len(kinds) > 1:
        said = "there is more than one content-type"
    elif kinds[0].split(b";")[0].strip().lower() == b"application/json":
        return
    else:
        said = f"the body is declared as {kinds[0].decode('latin-1')[:100]!r}"
    raise Problem(
        415,
        f"{said}; send content-type: application/json (curl: -H 'content-type: application/json')",
        code="unsupported_media_type",
    )


class BodyRoom:
    """Bytes of the bodies that are read and worked on now: together no more than memory allows.

    Args:
        left: bytes of memory that may still be filled.
    """

    def __init__(self, left: Callable[[], int]) -> None:
        self._left = left
        self.held = 0

    def take(self, size: int) -> None:
        """Count a body, or more of it.

        Raises:
            Problem: 503, there is no room for it now.
        """
        most = max(_ALWAYS, self._left() // _COPIES)
        if self.held + size > most:
            said = f"bodies of other requests take {self.held:,} bytes; {size:,} more have no room now"
            raise Problem(503, said, code="overloaded", headers={"retry-after": "1"})
        self.held += size


def _memory_left() -> int:
    room = memory_room()
    room.look()
    return room.left
