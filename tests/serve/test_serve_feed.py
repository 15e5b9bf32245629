"""The stream of outputs: joined where the reader is slow, cancelled where it leaves."""

from __future__ import annotations

import asyncio

import pytest
from stand_in_engine import FULL, StandInEngine

from hasten.engine.request import Request
from hasten.errors import QueueFull
from hasten.serve.generate import Feed


def request(text: str = "x") -> Request:
    return Request(prompt=tuple(text.encode()))


def test_what_waits_comes_in_one_piece() -> None:
    async def scenario() -> None:
        engine = StandInEngine("abcdefgh")
        sizes, text = [], ""
        async with Feed(engine, [request()]) as feed:
            async for news in feed.batches():
                sizes.append(len(news))
                text += "".join(output.text for _, output in news)
                if len(sizes) == 2:
                    await asyncio.sleep(0.05)  # a client that reads slowly
        assert text == "abcdefgh"
        assert sizes[0] == sizes[1] == 1
        assert sizes[2:] == [6]

    asyncio.run(scenario())


def test_leaving_cancels_all() -> None:
    async def scenario() -> None:
        engine = StandInEngine("a" * 1000, delay_s=0.001)
        async with Feed(engine, [request("x"), request("y")]) as feed:
            async for _ in feed.batches():
                break
        assert engine.running == 0
        assert len(engine.cancelled) == 2

    asyncio.run(scenario())


def test_a_refusal_is_raised_where_the_client_is_served() -> None:
    async def scenario() -> None:
        async with Feed(StandInEngine(error=FULL), [request()]) as feed:
            with pytest.raises(QueueFull):
                async for _ in feed.batches():
                    pass

    asyncio.run(scenario())
