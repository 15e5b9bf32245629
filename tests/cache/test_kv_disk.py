"""Pages on disk: what was written comes back to the bit, the limit holds, models and processes share."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from hasten.cache.kv_disk import KvDisk
from hasten.cache.kv_folder import HEADER_BYTES

PAGE = 4096
FILE = PAGE + HEADER_BYTES


def key_of(number: int) -> bytes:
    return number.to_bytes(2, "big") * 8


def page_of(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, PAGE, dtype=np.uint8)


@pytest.fixture
def open_disk(tmp_path: Path) -> Iterator[Callable[..., KvDisk]]:
    """(fingerprint="model", pages=1000, **more) -> the tier in one folder; closed after the test."""
    opened = []

    def get(fingerprint: str = "model", pages: int = 1000, **more: object) -> KvDisk:
        disk = KvDisk(tmp_path / "kv", pages * FILE, fingerprint, PAGE, **more)
        opened.append(disk)
        return disk

    yield get
    for disk in opened:
        disk.close()


def put(disk: KvDisk, *numbers: int, **more: object) -> None:
    for number in numbers:
        disk.write(key_of(number), page_of(number), 0.01, **more)
        assert disk.flush(10)


def there(disk: KvDisk, numbers: range | list[int]) -> list[int]:
    """Which pages are read, each compared to the bit."""
    out = np.zeros(PAGE, np.uint8)
    found = []
    for number in numbers:
        if disk.read(key_of(number), out):
            np.testing.assert_array_equal(out, page_of(number))
            found.append(number)
    return found


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_pages_come_back_after_a_restart(open_disk: Callable[..., KvDisk], tmp_path: Path) -> None:
    disk = open_disk()
    assert not disk.has(key_of(1)) and there(disk, range(5)) == []
    put(disk, 1, 2, 3)
    assert disk.has(key_of(1)) and there(disk, range(5)) == [1, 2, 3]
    disk.close()
    again = open_disk()
    assert again.has(key_of(2)) and there(again, range(5)) == [1, 2, 3]
    again.flush()
    stats = again.stats()
    assert (stats.entries, stats.bytes, stats.hits, stats.misses) == (3, 3 * FILE, 3, 2)
    assert sum(path.stat().st_size for path in files(tmp_path)) == stats.bytes
    name = key_of(2).hex()
    path = tmp_path / "kv" / "1-model" / name[:2] / name
    assert path.stat().st_mode & 0o077 == 0, "keys and values tell what was said"


def test_a_page_can_be_read_before_it_is_written_and_is_a_copy(open_disk: Callable[..., KvDisk]) -> None:
    disk, data = open_disk(), page_of(1)
    with disk._changed:  # nothing is written meanwhile
        disk.write(key_of(1), data, 0.0)
        data[:] = 0
        assert disk.has(key_of(1)) and there(disk, [1]) == [1]
    disk.flush()
    assert there(disk, [1]) == [1]


def test_a_full_queue_drops_and_counts(
    open_disk: Callable[..., KvDisk], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hasten.cache.kv_disk._QUEUE_BYTES", 6 * PAGE)
    disk = open_disk()
    with disk._changed:
        for number in range(10):
            disk.write(key_of(number), page_of(number), 0.0)
        disk.write(key_of(3), page_of(3), 0.0)  # is queued already
    disk.flush()
    assert disk.stats().writes == 6 and disk.stats().write_drops == 4
    assert there(disk, range(10)) == [0, 1, 2, 3, 4, 5]


def test_the_limit_holds_and_the_longest_unused_goes(
    open_disk: Callable[..., KvDisk], tmp_path: Path
) -> None:
    disk = open_disk(pages=5)
    put(disk, 0, 1, 2, 3, 4)
    there(disk, [0, 1])
    put(disk, 5, 6)
    assert there(disk, range(7)) == [0, 1, 4, 5, 6]
    assert sum(path.stat().st_size for path in files(tmp_path)) == disk.stats().bytes == 5 * FILE
    disk.close()
    smaller = open_disk(pages=2)  # the order is known after a restart, from the files' times
    smaller.flush()
    assert smaller.stats().entries == 2 and there(smaller, [5, 6]) == [5, 6]


def test_a_page_goes_after_those_behind_it(open_disk: Callable[..., KvDisk]) -> None:
    disk = open_disk(pages=4)
    put(disk, 0)
    for number in (1, 2, 3):
        put(disk, number, parent=key_of(number - 1))
    put(disk, 9)
    assert there(disk, range(10)) == [0, 1, 2, 9]
    disk.close()
    again = open_disk(pages=3)  # parents are in the files
    again.flush()
    assert there(again, range(10)) == [0, 1, 9]


def test_no_page_fits(open_disk: Callable[..., KvDisk]) -> None:
    disk = open_disk(pages=0)
    put(disk, 1)
    assert disk.stats().write_drops == 1 and there(disk, [1]) == []


def test_other_models_are_left_alone_until_room_is_needed(open_disk: Callable[..., KvDisk]) -> None:
    old, new = open_disk("old-model", pages=6), open_disk("new-model", pages=6)
    put(old, 1, 2, 3, 4)
    assert there(new, [1, 2, 3, 4]) == []
    new.close()
    new = open_disk("new-model", pages=6)
    put(new, 5, 6)
    assert there(old, [1, 2, 3, 4]) == [1, 2, 3, 4]
    assert new.stats().foreign_bytes == 4 * FILE
    put(new, 7)
    assert there(old, [1, 2, 3, 4]) == [2, 3, 4] and there(new, [5, 6, 7]) == [5, 6, 7]
    put(new, 8, 9, 10, 11)
    assert there(new, range(12)) == [6, 7, 8, 9, 10, 11] and new.stats().foreign_bytes == 0


def test_files_of_others_are_neither_counted_nor_removed(
    open_disk: Callable[..., KvDisk], tmp_path: Path
) -> None:
    strange = [
        tmp_path / "kv" / name for name in ("notes.txt", "1-model/ab/notes", "photos/ab/abab", "1-m x/ab/ab")
    ]
    for path in strange:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(10 * FILE))
    disk = open_disk(pages=2)
    put(disk, 1, 2, 3)
    assert disk.stats().bytes == 2 * FILE and disk.stats().foreign_bytes == 0
    assert all(path.exists() for path in strange)


def test_leftovers_of_dead_processes_go(open_disk: Callable[..., KvDisk], tmp_path: Path) -> None:
    shard = tmp_path / "kv" / "1-model" / "ab"
    shard.mkdir(parents=True)
    dead = int(
        subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True).stdout
    )
    names = {
        f".abab.{dead}-00ff.tmp": (60, False),
        f".abac.{dead}-00ff.tmp": (0, True),  # perhaps another machine's
        f".abad.{os.getpid()}-00ff.tmp": (60, True),
        f".abae.{os.getpid()}-00ff.tmp": (7200, False),
    }
    for name, (age, _) in names.items():
        (shard / name).write_bytes(b"half")
        os.utime(shard / name, (time.time() - age,) * 2)
    open_disk().flush()
    assert {name for name, (_, stays) in names.items() if stays} == {path.name for path in files(shard)}


def test_what_another_process_wrote_is_found_and_what_it_removed_is_missed(
    open_disk: Callable[..., KvDisk], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = open_disk(pages=4), open_disk(pages=4)
    put(one, 1, 2)
    assert other.has(key_of(1)) and there(other, [1, 2]) == [1, 2]
    monkeypatch.setattr("hasten.cache.kv_disk._RESCAN_S", 0.0)
    put(other, 3, 4, 5)  # knows of 1 and 2 by now
    assert other.stats().entries == 4
    assert there(one, range(6)) == [2, 3, 4, 5]
    assert not one.has(key_of(1))
    put(one, 1)
    assert one.stats().entries == 4 and one.stats().bytes == 4 * FILE


@pytest.mark.parametrize("policy", ["lru", "lfu", "s3fifo", "cost"])
def test_every_policy_keeps_the_limit(open_disk: Callable[..., KvDisk], tmp_path: Path, policy: str) -> None:
    disk = open_disk(pages=8, policy=policy)
    for number in range(40):
        disk.write(key_of(number), page_of(number), 0.01)
        there(disk, [number % 5])
    disk.flush()
    assert disk.stats().entries == 8 == len(files(tmp_path))
    assert len(there(disk, range(40))) == 8


def test_two_in_one_folder_keep_one_limit(
    open_disk: Callable[..., KvDisk], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each counted only what it had written itself since it looked, up to a minute ago."""
    monkeypatch.setattr("hasten.cache.kv_disk._IDLE_S", 0.05)
    limit = 64
    disks = [open_disk(pages=limit), open_disk(pages=limit)]
    most = 0
    for number in range(3 * limit):
        put(disks[number % 2], number)
        most = max(most, len(files(tmp_path)))
    assert most <= limit + 2 * (limit // 32 + 1), "while they write, each may be ahead of the other's look"
    until = time.monotonic() + 20
    while len(files(tmp_path)) > limit:
        assert time.monotonic() < until, "at rest the limit holds"
        time.sleep(0.01)
    assert len(files(tmp_path)) > limit // 2


def test_knowing_a_page_never_looks_at_the_disk(
    open_disk: Callable[..., KvDisk], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, other = open_disk(), open_disk()
    other.flush()
    put(writer, 1)
    assert writer.knows(key_of(1)) and not other.knows(key_of(1)) and other.has(key_of(1))
    monkeypatch.setattr(Path, "is_file", None)
    assert not writer.knows(key_of(2))


def test_close_twice_and_use_after(open_disk: Callable[..., KvDisk]) -> None:
    disk = open_disk()
    put(disk, 1)
    disk.close()
    disk.close()
    disk.write(key_of(2), page_of(2), 0.0)
    assert disk.stats().write_drops == 1 and there(disk, [1, 2]) == [1] and disk.flush(1)
