"""The outputs of one or more engine requests as one stream, in as few pieces as the reader is slow."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING

from hasten.engine.request import Output, Request
from hasten.serve.problem import NO_FAULT, Problem

if TYPE_CHECKING:
    from hasten.serve.pool import ServedEngine

News = tuple[int, Output]  # (which of the requests, its output)

AT_ONCE = 64
"""Requests of one call that the engine has at a time: more than it computes together, fewer than may wait, so
that a call with a thousand inputs neither fills the queue for others nor is refused by an idle engine."""


class Feed:
    """Collects outputs while the client is being written to: what waits goes out in one piece.

    What waits is bounded by the answers' own length. An async context manager: leaving it cancels what still
    runs, within one step of the engine.
    """

    def __init__(self, engine: ServedEngine, requests: Sequence[Request]) -> None:
        self._engine = engine
        self._requests = requests
        self._news: list[News] = []
        self._arrived = asyncio.Event()
        self._error: BaseException | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._open = len(requests)
        self._began = time.monotonic()
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._only: AsyncGenerator[list[Output], None] | None = None

    async def __aenter__(self) -> Feed:
        if len(self._requests) == 1:  # no task between engine and client: each would cost a token's way 30 us
            self._only = self._engine.batches(self._requests[0])
            return self
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._pump(i, one)) for i, one in enumerate(self._requests)]
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._only is not None:
            await self._only.aclose()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def batches(self) -> AsyncIterator[list[News]]:
        """All news since the last batch, at least one.

        Raises:
            Problem: an answer ended by an error or its deadline.
            HastenError: what the engine says to a request it does not take.
        """
        if self._only is not None:
            async for outputs in self._only:
                yield [(0, _sound(output)) for output in outputs]
            return
        while self._open or self._news:
            await self._arrived.wait()
            self._arrived.clear()
            news, self._news = self._news, []
            if news:
                yield news
            if self._error is not None:
                raise self._error

    async def _pump(self, which: int, request: Request) -> None:
        try:
            async with self._turns:
                await self._run(which, request if which < AT_ONCE else self._in_time(request))
        except NO_FAULT:
            raise
        except BaseException as error:  # noqa: BLE001  the reader raises it, in the task that serves the client
            self._error = self._error or error
        finally:
            self._open -= 1
            self._arrived.set()

    def _in_time(self, request: Request) -> Request:
        """The request as it is when its turn comes: the deadline counts from the call's arrival."""
        if request.deadline_ms is None:
            return request
        left = request.deadline_ms - 1000 * (time.monotonic() - self._began)
        if left <= 0:
            raise Problem(504, "the deadline passed", code="deadline_exceeded")
        return replace(request, deadline_ms=left)

    async def _run(self, which: int, request: Request) -> None:
        async with aclosing(self._engine.batches(request)) as batches:
            async for outputs in batches:
                self._news += [(which, _sound(output)) for output in outputs]
                self._arrived.set()


def _sound(output: Output) -> Output:
    """The output itself.

    Raises:
        Problem: it says that the answer broke off.
    """
    if output.finish_reason in ("error", "deadline", "cancelled"):
        raise _failure(output)
    return output


def _failure(output: Output) -> Problem:
    if output.finish_reason == "deadline":
        return Problem(504, output.error or "the deadline passed", code="deadline_exceeded")
    if output.finish_reason == "cancelled":
        return Problem(503, "the server stopped the request", code="cancelled")
    return Problem(500, output.error or "the answer could not be finished", code="generation_failed")
