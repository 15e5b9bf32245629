"""Pages that are read ahead: in order, within a bound, and nobody waits for a disk that hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from hasten.cache.kv_disk import KvAhead, Reading

PAGE = 64


class Disk:
    """Pages of one value; a read passes a gate."""

    page_bytes = PAGE

    def __init__(self, *keys: bytes) -> None:
        self.keys = set(keys)
        self.gate = threading.Event()
        self.gate.set()
        self.reads: list[bytes] = []
        self.broken: set[bytes] = set()
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True

    def has(self, key: bytes) -> bool:
        assert self.gate.wait(30)
        return key in self.keys

    def knows(self, key: bytes) -> bool:
        return key in self.keys

    def read(self, key: bytes, out: np.ndarray) -> bool:
        self.reads.append(key)
        out[:] = key[0]
        return key not in self.broken

    def write(self, key: bytes, data: np.ndarray, cost: float, parent: bytes) -> None:
        self.keys.add(key)


@pytest.fixture
def open_ahead() -> Iterator[Callable[..., KvAhead]]:
    made: list[tuple[KvAhead, Disk]] = []

    def get(disk: Disk, pages: int = 100) -> KvAhead:
        made.append((KvAhead(disk, pages * PAGE), disk))
        return made[-1][0]

    yield get
    for ahead, disk in made:
        disk.gate.set()
        ahead.close()
        assert not ahead._thread.is_alive() and disk.is_closed


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def taken(ahead: KvAhead, key: bytes) -> bool:
    out = np.zeros(PAGE, np.uint8)
    return ahead.read(key, out) and bool((out == key[0]).all())


def ask(ahead: KvAhead, *keys: bytes) -> Reading:
    return ahead.ask(keys, time.monotonic() + 20)


def test_pages_arrive_in_order_up_to_the_first_that_is_missing(open_ahead: Callable[..., KvAhead]) -> None:
    disk = Disk(b"a", b"b", b"d")
    ahead = open_ahead(disk)
    reading = ask(ahead, b"a", b"b", b"c", b"d")
    until(lambda: reading.done)
    assert disk.reads == [b"a", b"b"]
    assert ahead.has(b"a") and not ahead.has(b"c") and not ahead.has(b"d")
    assert taken(ahead, b"a") and not taken(ahead, b"a") and taken(ahead, b"b")
    assert ahead.knows(b"d") and not ahead.knows(b"c")


def test_a_page_that_cannot_be_read_ends_it(open_ahead: Callable[..., KvAhead]) -> None:
    disk = Disk(b"a", b"b")
    disk.broken = {b"a"}
    reading = ask(ahead := open_ahead(disk), b"a", b"b")
    until(lambda: reading.done)
    assert not ahead.has(b"a") and disk.reads == [b"a"]


def test_an_error_nobody_foresaw_ends_that_text_alone(open_ahead: Callable[..., KvAhead]) -> None:
    disk = Disk(b"a", b"b")
    ahead = open_ahead(disk)
    reading = ask(ahead, b"", b"a")  # the stand-in looks at the first byte
    disk.keys.add(b"")
    bad, good = ask(ahead, b"", b"a"), ask(ahead, b"b")
    until(lambda: reading.done and bad.done and good.done)
    assert not ahead.has(b"a") and taken(ahead, b"b")


def test_a_page_that_two_want_is_read_once_and_stays_for_the_second(
    open_ahead: Callable[..., KvAhead],
) -> None:
    disk = Disk(b"a", b"b")
    disk.gate.clear()
    ahead = open_ahead(disk)
    first, second = ask(ahead, b"a"), ask(ahead, b"a", b"b")
    disk.gate.set()
    until(lambda: first.done and second.done)
    assert disk.reads == [b"a", b"b"]
    ahead.drop(first)
    assert ahead.has(b"a")
    ahead.drop(second)
    assert not ahead.has(b"a") and not ahead.has(b"b")


def test_what_arrived_is_bounded_and_taking_makes_room(open_ahead: Callable[..., KvAhead]) -> None:
    keys = [bytes((value,)) for value in range(10)]
    ahead = open_ahead(Disk(*keys), pages=3)
    reading = ask(ahead, *keys)
    for key in keys:
        until(lambda key=key: ahead.has(key))
        assert sum(map(ahead.has, keys)) <= 3
        assert taken(ahead, key)
    until(lambda: reading.done)


def test_dropping_one_that_fills_the_room_lets_others_on(open_ahead: Callable[..., KvAhead]) -> None:
    keys = [bytes((value,)) for value in range(10)]
    ahead = open_ahead(Disk(*keys, b"x"), pages=3)
    far, near = ask(ahead, *keys), ask(ahead, b"x")
    until(lambda: sum(map(ahead.has, keys)) == 3)
    ahead.drop(far)
    until(lambda: near.done)
    assert ahead.has(b"x") and not any(map(ahead.has, keys))


def test_more_may_be_asked_for(open_ahead: Callable[..., KvAhead]) -> None:
    disk = Disk(b"a", b"b")
    ahead = open_ahead(disk)
    reading = ask(ahead, b"a")
    until(lambda: reading.done)
    ahead.ask_more(reading, [b"a"])
    assert reading.done
    ahead.ask_more(reading, [b"a", b"b"])
    until(lambda: ahead.has(b"b"))
    assert disk.reads == [b"a", b"b"]


def test_a_disk_that_hangs_holds_nobody_and_is_known_to_be_slow(open_ahead: Callable[..., KvAhead]) -> None:
    disk = Disk(b"a")
    ahead = open_ahead(disk)
    assert ahead.seconds(100) == 0
    disk.gate.clear()
    reading = ask(ahead, b"a")
    until(lambda: ahead.seconds(1) > 0.02)
    assert not reading.done and not ahead.has(b"a")
    ahead.drop(reading)
    assert reading.done
    started = time.monotonic()
    ahead.close(0.05)
    assert time.monotonic() - started < 10


def test_slowness_is_doubted(open_ahead: Callable[..., KvAhead]) -> None:
    ahead = open_ahead(Disk(b"a"))
    reading = ask(ahead, b"a")
    until(lambda: reading.done)
    before = ahead.seconds(10)
    assert before > 0
    ahead.doubt()
    assert ahead.seconds(10) == pytest.approx(0.9 * before)
