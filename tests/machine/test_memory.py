"""The account of memory: measured now and then, charged for promises, asked by who loads a model."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from hasten.errors import MachineError, UsageError
from hasten.machine import memory
from hasten.machine.memory import LOOK_S, MemoryRoom

RESERVE = 100


class Cache:
    """A giver with some bytes filled, and some promised."""

    def __init__(self, held: int = 0, promised: int = 0) -> None:
        self.held, self.promised = held, promised

    def held_bytes(self) -> int:
        return self.held

    def promised_bytes(self) -> int:
        return self.promised

    def give_back_meanwhile(self) -> None:
        """Its thread does."""


def test_it_measures_once_a_second() -> None:
    now, free, looks = [0.0], [1000], []

    def available() -> int:
        looks.append(now[0])
        return free[0]

    room = MemoryRoom(available, RESERVE, lambda: now[0])
    room.look()
    assert room.left == 900
    free[0] = 500
    room.look()
    assert room.left == 900 and len(looks) == 1
    now[0] += LOOK_S
    room.look()
    assert room.left == 400 and len(looks) == 2
    room.take(150)
    assert room.left == 250
    room.look(0.0)
    assert room.left == 400, "the promise was nobody's"


def test_promises_are_charged_until_their_pool_is_gone() -> None:
    room = MemoryRoom(lambda: 1000, RESERVE)
    giver = Cache(promised=300)
    room.join(giver)
    room.look(0.0)
    assert room.left == 600
    del giver
    room.look(0.0)
    assert room.left == 900


def test_low_needs_a_quarter_of_the_reserve() -> None:
    free = [RESERVE]
    room = MemoryRoom(lambda: free[0], RESERVE)
    for value, low in ((100, 0), (75, 0), (74, 26), (0, 100)):
        free[0] = value
        room.look(0.0)
        assert room.low == room.short == low
    room.gave(60)
    assert room.low == 40


def test_unknown_memory_is_half_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hasten.machine.memory.installed_bytes", lambda: 2000)
    room = MemoryRoom(lambda: None, RESERVE)
    room.look()
    assert room.left == 900


def test_who_loads_a_model_gets_what_others_give_back() -> None:
    free = [200]
    room, giver, stop = MemoryRoom(lambda: free[0], RESERVE), Cache(held=1000), threading.Event()
    room.join(giver)

    def give() -> None:  # an engine between its steps
        while not stop.wait(0.005):
            if short := min(room.short, giver.held):
                free[0], giver.held = free[0] + short, giver.held - short
                room.gave(short)

    thread = threading.Thread(target=give)
    thread.start()
    try:
        assert room.ask(700) == 700
        room.require(900, "the model")
        assert giver.held == 300
        with pytest.raises(MachineError, match=r"big takes 0\.00 GB of memory"):
            room.require(1201, "big")
    finally:
        stop.set()
        thread.join()
    assert room.short == 0, "nobody asks any more"


def test_nobody_is_waited_for_who_holds_nothing() -> None:
    room = MemoryRoom(lambda: 200, RESERVE)
    room.join(Cache())
    began = time.monotonic()
    assert room.ask(10_000) == 200
    with pytest.raises(MachineError, match="are free"):
        room.require(10_000, "the model")
    assert time.monotonic() - began < LOOK_S


def test_a_watched_room_asks_its_givers() -> None:
    room, asked = MemoryRoom(lambda: 0, RESERVE), threading.Event()

    class Watched(Cache):
        def give_back_meanwhile(self) -> None:
            asked.set()

    def watching() -> int:
        return sum(thread.name == "hasten-memory" for thread in threading.enumerate())

    giver, before = Watched(held=500), watching()
    room.join(giver)
    room.watch()
    room.watch()
    assert asked.wait(60 * LOOK_S)
    assert watching() == before + 1


def test_what_the_kernel_says_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "meminfo"
    info.write_text("MemTotal: 100 kB\nMemAvailable:   50 kB\n")
    monkeypatch.setattr(memory, "memory_left", lambda: None)
    assert memory.available_bytes(info) == 50 * 1024
    monkeypatch.setattr(memory, "memory_left", lambda: 20_000)
    assert memory.available_bytes(info) == 20_000
    monkeypatch.setattr(memory, "memory_left", lambda: None)
    assert memory.available_bytes(tmp_path / "none") is None
    info.write_text("MemTotal: 100 kB\nMemFree: 20 kB\nActive(file): 40 kB\nInactive(file): 10 kB\n")
    assert memory.available_bytes(info) == 30 * 1024, "a kernel before 3.14"
    info.write_text("MemFree: what\n")
    assert memory.available_bytes(info) is None
    assert (memory.installed_bytes() or 0) > 1 << 26


GIB = 1 << 30


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("20", 20 * GIB),
        (20, 20 * GIB),
        ("20GiB", 20 * GIB),
        ("20 gib", 20 * GIB),
        ("20g", 20 * GIB),
        ("20GB", 20 * 10**9),
        ("512MiB", 512 << 20),
        ("1.5", 3 * GIB // 2),
        ("4096b", 4096),
        ("0.5", 20 * GIB),
        (0.5, 20 * GIB),
        (".5", 20 * GIB),
        ("50%", 20 * GIB),
        ("1", 40 * GIB),
        ("1GiB", GIB),
    ],
)
def test_an_amount_is_gib_a_unit_or_a_share(text: object, wanted: int) -> None:
    assert memory.memory_amount(text, 40 * GIB, "--gpu-memory") == wanted  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    ["", "much", "-1", "0", "0%", "nan", "41", "1t", "101%", "20ib", "20i", "9" * 400, "20 GiB free", True],
)
def test_what_is_no_amount_is_refused_with_one_that_works(text: object) -> None:
    with pytest.raises(UsageError, match="--gpu-memory") as refused:
        memory.memory_amount(text, 40 * GIB, "--gpu-memory")  # type: ignore[arg-type]
    hint = refused.value.hint or ""
    assert memory.memory_amount(hint.split()[2].strip(","), 40 * GIB, "--gpu-memory")
