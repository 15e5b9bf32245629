"""What goes when a store is full, and how full is full."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from hasten.cache import folders
from hasten.cache.folders import Held, last_change, limit_bytes, make_room, tree_bytes
from hasten.errors import UsageError


def held(*sizes: int) -> list[Held]:
    """Entries "0", "1" ..., used in this order."""
    return [Held(Path(str(i)), size, float(i)) for i, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("sizes", "need", "limit", "gone"),
    [
        ((10, 20, 30), 40, 100, []),
        ((10, 20, 30), 41, 100, ["0"]),
        ((10, 20, 30), 60, 100, ["0", "1"]),
        ((10, 20, 30), 100, 100, ["0", "1", "2"]),
        ((10, 20, 30), 101, 100, []),  # would not fit an empty store either
        ((80, 90), 5, 100, ["0"]),  # the limit was lowered
        ((), 5, 100, []),
    ],
)
def test_make_room(sizes: tuple[int, ...], need: int, limit: int, gone: list[str]) -> None:
    dropped: list[str] = []
    found = make_room(reversed(held(*sizes)), need, limit, lambda path: dropped.append(str(path)))
    assert dropped == gone == [str(one.path) for one in found]


def test_what_is_in_use_counts_and_stays() -> None:
    there = [replace(one, in_use=one.path.name in "02") for one in held(10, 20, 30, 40)]
    dropped: list[Path] = []
    make_room(there, 40, 100, dropped.append)
    assert dropped == [Path("1"), Path("3")]  # 100 were there: 20 and 40 make room for 40
    dropped.clear()
    make_room(there, 60, 60, dropped.append)  # not enough even so
    assert dropped == [Path("1"), Path("3")]


def test_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HASTEN_CACHE_GB", raising=False)
    for free, kept, limit in ((100e9, 0, 20e9), (6e9, 2e9, 4e9), (0, 2e9, 1e9), (None, 0, 20e9)):
        monkeypatch.setattr(folders, "free_bytes", lambda path, free=free: free)
        assert limit_bytes(tmp_path, int(kept)) == limit
    monkeypatch.setenv("HASTEN_CACHE_GB", " 2.5 ")
    assert limit_bytes(tmp_path, 0) == 2_500_000_000
    monkeypatch.setenv("HASTEN_CACHE_GB", "lots")
    with pytest.raises(UsageError, match="lots"):
        limit_bytes(tmp_path, 0)


def test_tree_bytes(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "x").write_bytes(bytes(10))
    (tmp_path / "a" / "b" / "y").write_bytes(bytes(5))
    (tmp_path / "a" / "link").symlink_to(tmp_path / "a" / "x")
    assert tree_bytes(tmp_path / "a") == 15 and tree_bytes(tmp_path / "a" / "x") == 10
    assert tree_bytes(tmp_path / "none") == 0


def test_last_change(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x").write_bytes(b"x")
    for path, moment in ((tmp_path / "a", 10.0), (tmp_path / "a" / "b", 20.0), (tmp_path / "a/b/x", 30.0)):
        os.utime(path, (moment, moment))
    assert last_change(tmp_path / "a") == 30 == last_change(tmp_path / "a/b/x")
    os.utime(tmp_path / "a", (40.0, 40.0))
    assert last_change(tmp_path / "a") == 40 and last_change(tmp_path / "none") == 0
