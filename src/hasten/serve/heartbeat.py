"""Signs of life in a stream with nothing to say for long: proxies cut what is silent, often after 60 s."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hasten.serve.exchange import Exchange

EVERY_S = 15.0
COMMENT = b": waiting\n\n"
"""A line that readers of server-sent events pass over. Source: WHATWG HTML, 9.2.7 (authoring notes)."""


class Heartbeat:
    """While it is entered, a stream that sent nothing for `EVERY_S` gets a comment, headers first.

    Costs a timer a stream; the task is made when the timer first runs out, which few streams live to see.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._task: asyncio.Task[None] | None = None

    def __enter__(self) -> None:
        self._exchange.sent = time.monotonic()
        self._timer = asyncio.get_running_loop().call_later(EVERY_S, self._start)

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        if self._task is not None:
            self._task.cancel()

    def _start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._beat())

    async def _beat(self) -> None:
        exchange = self._exchange
        while True:
            silent = time.monotonic() - exchange.sent
            if silent < EVERY_S:
                await asyncio.sleep(EVERY_S - silent)
            elif exchange.call.sending_since is None:
                await exchange.events(COMMENT)
            else:  # what was sent is not read yet: more would not help
                await asyncio.sleep(EVERY_S)
