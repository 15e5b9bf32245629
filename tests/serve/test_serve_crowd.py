"""Ten thousand connections at once."""

from __future__ import annotations

import asyncio
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from running_server import Running, chat

MANY = 10_000
HELD = 500

PROGRAM = f"""
import sys
sys.path[:0] = {sys.path!r}
from stand_in_engine import StandInEngine, StandInModel
from hasten.serve.options import ServeOptions
from hasten.serve.server import ServeSetup, serve
options = ServeOptions(port=0, log=False, max_connections={HELD}, header_timeout_s=60)
serve(ServeSetup({{"echo": "echo"}}, options), lambda url: print(url, flush=True),
      lambda ref: (StandInModel(ref), StandInEngine()))
"""


@pytest.fixture
def crowded() -> Iterator[tuple[Running, int]]:
    """A server in a process of its own, and its id."""
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield Running(process.stdout.readline().strip(), None), process.pid
    process.terminate()
    assert process.wait(60) == 0


def memory_of(process: int) -> int:
    """Resident bytes."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


async def crowd(address: tuple[str, int]) -> tuple[int, int]:
    """Open 10,000 connections and keep them: how many are held, and how many were closed for others."""
    gate = asyncio.Semaphore(200)
    writers, readers = [], []

    async def one() -> None:
        async with gate:
            try:
                reader, writer = await asyncio.open_connection(*address)
            except OSError:
                return
            writers.append(writer)
            readers.append(reader)

    async def closed(reader: asyncio.StreamReader) -> bool:
        try:
            return await asyncio.wait_for(reader.read(1000), 1) == b""
        except (asyncio.TimeoutError, OSError):
            return False

    await asyncio.gather(*(one() for _ in range(MANY)))
    told = sum(await asyncio.gather(*map(closed, readers)))
    held = len(writers) - told
    for writer in writers:
        writer.transport.abort()
    return held, told


@pytest.mark.slow
def test_ten_thousand_connections(crowded: tuple[Running, int]) -> None:
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < MANY + 500:
        pytest.skip("this system allows fewer open files")
    server, process = crowded
    assert server.ask("/v1/chat/completions", chat()).status == 200
    before = memory_of(process)
    held, told = asyncio.run(crowd(server.address))
    assert told > MANY - HELD - 400
    assert held <= HELD
    assert memory_of(process) - before < 100e6
    assert server.ask("/v1/chat/completions", chat("still here")).status == 200
