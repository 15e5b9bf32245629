"""One HTTP request on its way through the server: who asks, and what it cost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

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


class Deadline:
    """Cancels what is inside when the time is over, and ends that quietly: what follows then runs.

    `asyncio.wait_for` is no choice: before Python 3.12 it drops a cancellation that comes in the same turn of
    the loop as the result, and a client that left at once was served to the end. 3.10 has no `timeout`.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._passed = False

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._pass)

    def _pass(self) -> None:
        self._passed = True
        self._task.cancel()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        self._timer.cancel()
        return self._passed and kind is asyncio.CancelledError
