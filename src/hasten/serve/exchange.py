"""One request and its response, as the endpoints handle them: a body in; JSON or server-sent events out."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.responses import Response

from hasten.serve.call import Call, Receive, Scope, Send, call_of, read_body
from hasten.serve.protocol.strict import Strict, parse

if TYPE_CHECKING:
    from hasten.serve.service import Service

Item = TypeVar("Item", bound=Strict)
T = TypeVar("T")

_SMALL = 8192  # bytes: a body that is checked within a millisecond, whatever it holds

DONE = b"data: [DONE]\n\n"
_EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect tokens
]


class Exchange:
    """Handed to an endpoint."""

    def __init__(self, service: Service, scope: Scope, receive: Receive, send: Send) -> None:
        self.service = service
        self.scope = scope
        self.call: Call = call_of(scope)
        self.sent = 0.0  # when events were sent last, seconds of the monotonic clock
        self._size = 0  # bytes of the body
        self._receive = receive
        self._send = send

    async def body(self, model: type[Item]) -> Item:
        """The request's body, checked.

        Raises:
            Problem: too long, too slow, or not what the model says.
        """
        data = await read_body(self._receive, self.scope, self.service.options)
        self._size = len(data)
        if self._size <= _SMALL:
            return parse(model, data)
        return await self.work(lambda: parse(model, data))

    async def work(self, task: Callable[[], T]) -> T:
        """Run something for this request in a thread; large bodies wait in a line of their own."""
        return await self.service.work(task, self._size)

    async def json(self, document: Any, status: int = 200) -> None:
        """Answer with a JSON document."""
        text = json.dumps(document, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        await self.raw(text.encode("utf-8", "replace"), "application/json", status)

    async def raw(
        self, body: bytes, kind: str, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        """Answer with a body of any kind."""
        lines = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode())]
        lines += [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
        await self._send({"type": "http.response.start", "status": status, "headers": lines})
        await self._send({"type": "http.response.body", "body": body})

    async def events(self, data: bytes) -> None:
        """Send events that stand ready; the first call sends the headers too."""
        if not self.call.started:
            await self._send({"type": "http.response.start", "status": 200, "headers": list(_EVENT_HEADERS)})
        self.sent = time.monotonic()
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self, data: bytes = b"") -> None:
        """Send the last events and end the stream."""
        await self._send({"type": "http.response.body", "body": data})


Endpoint = Callable[[Exchange], Awaitable[None]]


class Handled(Response):
    """What a route returns: the endpoint then answers by itself, without a response object in between."""

    def __init__(self, service: Service, endpoint: Endpoint) -> None:
        super().__init__()
        self._service = service
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the endpoint."""
        await self._endpoint(Exchange(self._service, scope, receive, send))
