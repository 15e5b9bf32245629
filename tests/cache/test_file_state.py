"""A changed file never looks untouched."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from hasten.cache.reading import FileStates, look


def seen(*paths: Path) -> FileStates:
    found = look(paths)
    assert found is not None
    return found


def test_untouched(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("1")
    b.write_text("22")
    states = seen(a, b)
    assert states.bytes == 3 and states.is_unchanged() and seen(a, b).files == states.files
    a.read_text()
    assert states.is_unchanged()


@pytest.mark.parametrize("how", ["same size", "same size and time", "replaced", "longer", "touched", "gone"])
def test_changed(tmp_path: Path, how: str) -> None:
    path = tmp_path / "a"
    path.write_text("one")
    time.sleep(0.06)
    states = seen(path)
    before = path.stat()
    if how in ("same size", "same size and time"):
        path.write_text("two")
    elif how == "replaced":
        (tmp_path / "b").write_text("two")
        os.utime(tmp_path / "b", ns=(before.st_atime_ns, before.st_mtime_ns))
        (tmp_path / "b").replace(path)
    elif how == "longer":
        path.write_text("three")
    elif how == "touched":
        path.touch()
    else:
        path.unlink()
    if how == "same size and time":
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert states.is_settled and not states.is_unchanged()


def test_a_young_file_proves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("one")
    states = seen(path)
    assert not states.is_settled
    assert replace(states, seen_ns=states.seen_ns + 100_000_000).is_settled
    (file,) = states.files
    coarse = replace(file, ctime_ns=file.ctime_ns // 10**9 * 10**9)
    later = coarse.ctime_ns + 1_500_000_000
    assert not FileStates((coarse,), later).is_settled  # a clock of whole seconds needs longer
    assert FileStates((coarse,), later + 1_000_000_000).is_settled


def test_missing(tmp_path: Path) -> None:
    assert look([tmp_path / "none"]) is None
