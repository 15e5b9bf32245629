"""One HTTP request on its way through the server: who asks, what it cost, and what is told if it fails.

An error is OpenAI's error object, with the status it comes with:

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}

Source: https://platform.openai.com/docs/guides/error-codes and the API's own answers.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hasten.engine.async_engine import EngineClosed
from hasten.errors import DeadlineError, HastenError, QueueFull, TokenizerError, UsageError

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
    headers: dict[str, str] = field(default_factory=dict)  # more of the response


def call_of(scope: Scope) -> Call:
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


_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class Problem(Exception):
    """A request that ends with an error.

    Args:
        status: HTTP status.
        message: what is wrong and what would be right.
        param: the field at fault, as a path (`messages.0.content`).
        code: a word for programs.
        headers: more response headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        """OpenAI's word for this kind of error."""
        return _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def document(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}

    def body(self) -> bytes:
        return json.dumps(self.document()).encode()


def refused(message: str, param: str | None = None, code: str | None = "invalid_value") -> Problem:
    """What is told of a request that is wrong: 400."""
    return Problem(400, message, param=param, code=code)


class LibraryPanic(Exception):
    """A library gave up by an exception that no handler expects: those of Rust derive theirs (pyo3's
    PanicException) from BaseException, as if the process had to end."""


NO_FAULT = (asyncio.CancelledError, KeyboardInterrupt, SystemExit, GeneratorExit)
"""What derives from BaseException because it is meant to pass every handler."""

_TOLD: Sequence[tuple[type[BaseException], int, str, Mapping[str, str]]] = (
    # 503 and not 408 for a deadline: the client was not slow, the server is busy
    (DeadlineError, 503, "deadline_unreachable", {"retry-after": "1"}),
    (EngineClosed, 503, "engine_stopped", {"retry-after": "1"}),
    (UsageError, 400, "invalid_value", {}),
    (TokenizerError, 400, "invalid_prompt", {}),
    (HastenError, 500, "engine_error", {}),
)


def problem_of(error: BaseException) -> Problem:
    """How an exception is told to the client. What nobody foresaw is told without its text, which may hold
    another client's words; the log has it."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, HastenError):
        said = f"{error.message}; {error.hint}" if error.hint else error.message
        if isinstance(error, QueueFull):
            wait = str(max(1, math.ceil(error.retry_after_s)))
            return Problem(429, said, code="queue_full", headers={"retry-after": wait})
        _, status, code, headers = next(line for line in _TOLD if isinstance(error, line[0]))
        return Problem(status, said, code=code, headers=headers)
    if isinstance(error, MemoryError):
        return Problem(503, "the server is out of memory", code="out_of_memory", headers={"retry-after": "5"})
    if not isinstance(error, Exception) or isinstance(error, LibraryPanic):
        name = type(error.__cause__ or error).__name__
        return Problem(
            500, f"a library of the server gave up ({name}); its log says more", code="library_fault"
        )
    said = f"a fault of the server ({type(error).__name__}); its log says more"
    return Problem(500, said, code="internal_error")
