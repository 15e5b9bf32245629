"""Asking an asynchronous engine, and holding it while a test looks."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Callable

from hasten.engine.async_engine import AsyncEngine
from hasten.engine.request import Output


async def all_of(stream: AsyncIterator[Output]) -> list[Output]:
    return [output async for output in stream]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def hold_after_a_step(engine: AsyncEngine) -> threading.Event:
    """Let the engine take one step and no second one before the event is set: an answer that runs does not
    end before the test looks, however fast the machine is and however late the test's turn comes."""
    goes_on, step, taken = threading.Event(), engine.engine.step, itertools.count()

    def held() -> list[Output]:
        if next(taken):
            assert goes_on.wait(60)
        return step()

    engine.engine.step = held  # type: ignore[method-assign]
    return goes_on
