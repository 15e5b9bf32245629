"""One HTTP request on its way through the server: who asks, what it cost, and how its body is read."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hasten.serve.problem import Problem

if TYPE_CHECKING:
    from hasten.serve.options import ServeOptions

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass
class Call:
    """Kept in the scope under `hasten.call`. Times are seconds of the event loop's clock."""

    request_id: str
    client: str  # whom the engine is to be fair to
    began: float = field(default_factory=time.monotonic)
    status: int | None = None
    started: bool = False  # the response's headers are out
    complete: bool = False  # all of the response is handed over
    left: bool = False  # the client went away
    sending_since: float | None = None  # a part of the response waits for the client to read
    stalled: bool = False  # and waited too long
    fields: dict[str, Any] = field(default_factory=dict)  # more for the log line


def call_of(scope: Scope) -> Call:
    """The call of a request."""
    call: Call = scope["hasten.call"]
    return call


async def read_body(receive: Receive, scope: Scope, options: ServeOptions) -> bytearray:
    """The request's body, whatever its content-length claims: counted as it comes, and within its time.

    Raises:
        Problem: 408 too slow, 413 too long, 415 no JSON.
    """
    headers = dict(scope["headers"])
    kind = headers.get(b"content-type", b"application/json").split(b";")[0].strip().lower()
    if kind != b"application/json":
        # refusing what a web page may send without asking first is what keeps strangers' pages out
        raise Problem(
            415,
            f"the body is declared as {kind.decode('latin-1')[:100]}; send content-type: application/json",
            code="unsupported_media_type",
        )
    limit = options.max_body_bytes
    announced = headers.get(b"content-length", b"")
    if announced.isdigit() and int(announced) > limit:
        raise _too_long(limit)
    try:
        return await asyncio.wait_for(_collect(receive, call_of(scope), limit), options.body_timeout_s)
    except asyncio.TimeoutError:
        raise Problem(
            408,
            f"the body did not arrive within {options.body_timeout_s:g} s",
            code="body_timeout",
            headers={"connection": "close"},
        ) from None


async def _collect(receive: Receive, call: Call, limit: int) -> bytearray:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            call.left = True
            raise asyncio.CancelledError
        body += message.get("body", b"")
        if len(body) > limit:
            raise _too_long(limit)
        if not message.get("more_body", False):
            return body


def _too_long(limit: int) -> Problem:
    return Problem(
        413,
        f"the body is longer than {limit:,} bytes",
        code="body_too_large",
        headers={"connection": "close"},
    )
