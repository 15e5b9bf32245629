"""Faults of disks, files and processes: a miss and a line in the log, never a wrong page or an exception."""

from __future__ import annotations

import errno
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hasten.cache.kv_disk import KvDisk
from hasten.cache.kv_folder import HEADER_BYTES

PAGE = 4096
KEY, OTHER = b"\x01" * 16, b"\x02" * 16
DATA = np.random.default_rng(0).integers(0, 256, PAGE, dtype=np.uint8)
MARKS = [*range(HEADER_BYTES), HEADER_BYTES + 1, HEADER_BYTES + PAGE // 2, HEADER_BYTES + PAGE - 1]

WRITER = """
import sys, numpy as np
from pathlib import Path
from typing import Any
from hasten.cache.kv_folder import fingerprint_digest, write_entry
folder, seed = Path(sys.argv[1]), int(sys.argv[2])
import itertools, os, random
for shard in range(4):
    (folder / "1-model" / f"{shard:02x}").mkdir(parents=True, exist_ok=True)
for turn in itertools.count():
    if os.fork() == 0:
        rng = random.Random(os.getpid() * 1000 + seed)
        for count in itertools.count():
            n = rng.randrange(4) if count else turn % 4
            page = np.full(65536, n, np.uint8); page[1:9] = np.frombuffer(rng.randbytes(8), np.uint8)
            page[9:17] = page[1:9]
            name = bytes([n]) * 16
            path = folder / "1-model" / f"{n:02x}" / name.hex()
            write_entry(path, fingerprint_digest("model"), name, page, 0.1, b"")
            if not count:
                os.write(1, b".")
    if os.wait() and not sys.stdin.readline():
        break
"""


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """The file of one good page; the folder is tmp_path / "kv"."""
    disk = open_disk(tmp_path)
    disk.write(KEY, DATA, 0.5)
    disk.close()
    (path,) = [p for p in (tmp_path / "kv").rglob("*") if p.is_file()]
    return path


def open_disk(tmp_path: Path, pages: int = 100) -> KvDisk:
    return KvDisk(tmp_path / "kv", pages * (PAGE + HEADER_BYTES), "model", PAGE)


def is_miss(tmp_path: Path, caplog: pytest.LogCaptureFixture, scanned: bool = True, key: bytes = KEY) -> None:
    """The page is a miss, dropped and logged, and can be written again. `scanned`: before the folder is."""
    out = np.zeros(PAGE, np.uint8)
    caplog.clear()
    disk = open_disk(tmp_path)
    if scanned:
        disk.flush()
    assert not disk.read(key, out)
    assert not disk.has(key)
    assert any("damaged" in record.message and record.reason for record in caplog.records)  # type: ignore[attr-defined]
    disk.write(key, DATA, 0.5)
    disk.flush()
    assert disk.read(key, out) and (out == DATA).all()
    disk.close()


@pytest.mark.parametrize("at", MARKS)
def test_a_flipped_bit_anywhere(
    kept: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, at: int
) -> None:
    raw = bytearray(kept.read_bytes())
    raw[at] ^= 1 << at % 8
    kept.write_bytes(raw)
    is_miss(tmp_path, caplog, scanned=bool(at % 2) and at < HEADER_BYTES)


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("size", [0, 1, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + PAGE - 1, -1])
def test_truncated_empty_or_longer(
    kept: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, size: int, scanned: bool
) -> None:
    raw = kept.read_bytes()
    kept.write_bytes(raw[:size] if size >= 0 else raw + b"x")
    is_miss(tmp_path, caplog, scanned)


def test_a_page_under_another_name(kept: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = kept.parent.parent / OTHER.hex()[:2] / OTHER.hex()
    place.parent.mkdir()
    shutil.copy(kept, place)
    is_miss(tmp_path, caplog, False, OTHER)


def test_a_page_of_another_model(kept: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    disk = KvDisk(tmp_path / "kv", 10**6, "another", PAGE)
    disk.write(KEY, DATA, 0.5)
    disk.close()
    (foreign,) = [p for p in (tmp_path / "kv" / "1-another").rglob("*") if p.is_file()]
    shutil.copy(foreign, kept)
    is_miss(tmp_path, caplog, False)


_open = os.open


def open_as_a_plain_user(path: Any, *how: Any, **more: Any) -> int:
    """os.open that refuses what has no mode bits to the superuser too."""
    if (file := Path(path)).is_file() and file.stat().st_mode & 0o777 == 0:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
    return _open(path, *how, **more)


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to nothing", "loop", "forbidden"])
def test_something_else_in_its_place(
    kept: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if kind == "forbidden":
        kept.chmod(0)
        monkeypatch.setattr(os, "open", open_as_a_plain_user)
        return is_miss(tmp_path, caplog, False)
    kept.unlink()
    if kind == "folder":
        kept.mkdir()
    elif kind == "pipe":
        os.mkfifo(kept)
    else:
        kept.symlink_to(kept if kind == "loop" else tmp_path / "nothing")
    out = np.zeros(PAGE, np.uint8)
    disk = open_disk(tmp_path)
    assert not disk.has(KEY) and not disk.read(KEY, out)
    disk.write(KEY, DATA, 0.5)
    disk.flush()
    assert disk.read(KEY, out) and (out == DATA).all()
    disk.close()


def test_too_many_open_files_is_no_fault_of_the_page(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk, out = open_disk(tmp_path), np.zeros(PAGE, np.uint8)
    disk.flush()

    def refuse(*_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr("hasten.cache.kv_folder.os.open", refuse)
        assert not disk.read(KEY, out)
    assert kept.exists() and disk.read(KEY, out) and disk.stats().dropped == 0
    disk.close()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("call", ["open", "replace"])
def test_a_disk_that_refuses_is_named_once(
    kept: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    code: int,
    call: str,
) -> None:
    disk, out = open_disk(tmp_path), np.zeros(PAGE, np.uint8)
    disk.flush()
    real = getattr(os, call)

    def refuse(path: object, *rest: object) -> object:
        if ".tmp" in str(path):
            raise OSError(code, os.strerror(code))
        return real(path, *rest)

    monkeypatch.setattr(os, call, refuse)
    for n in range(3, 9):
        disk.write(bytes([n]) * 16, DATA, 0.5)
        disk.flush()
    assert disk.stats().write_drops == 6 and disk.stats().writes == 0
    assert [r.reason for r in caplog.records] == [os.strerror(code)]  # type: ignore[attr-defined]
    assert disk.read(KEY, out) and (out == DATA).all(), "what is there is still read"
    monkeypatch.undo()
    monkeypatch.setattr(disk, "_rest_until", 0.0)  # as after a while
    disk.write(OTHER, DATA, 0.5)
    disk.flush()
    assert disk.stats().writes == 1
    disk.close()
    assert not list((tmp_path / "kv").rglob("*.tmp"))


def test_a_really_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The system itself refuses the bytes half way: a limit on file size stands in for a full disk."""
    code = (
        "import resource, signal, sys, numpy as np; from pathlib import Path\n"
        "from hasten.cache.kv_disk import KvDisk\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))\n"
        "disk = KvDisk(Path(sys.argv[1]), 10**6, 'model', 4096)\n"
        "disk.write(b'k' * 16, np.zeros(4096, np.uint8), 0.1); disk.flush()\n"
        "assert disk.stats().write_drops == 1 and not disk.has(b'k' * 16); disk.close()\n"
    )
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "kv")], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    assert "not available" in done.stderr and "Traceback" not in done.stderr
    assert not [path for path in (tmp_path / "kv").rglob("*") if path.is_file()]
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == before


def test_a_folder_that_cannot_be_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "kv").write_bytes(b"a file")
    disk, out = open_disk(tmp_path), np.zeros(PAGE, np.uint8)
    for _ in range(3):
        assert not disk.has(KEY) and not disk.read(KEY, out)
        disk.write(KEY, DATA, 0.5)
        disk.flush()
    disk.close()
    assert len(caplog.records) == 1 and (tmp_path / "kv").read_bytes() == b"a file"


def test_the_folder_vanishes_while_running(tmp_path: Path) -> None:
    disk, out = open_disk(tmp_path), np.zeros(PAGE, np.uint8)
    disk.write(KEY, DATA, 0.5)
    disk.flush()
    shutil.rmtree(tmp_path / "kv")
    assert not disk.read(KEY, out) and not disk.has(KEY)
    disk.write(KEY, DATA, 0.5)
    disk.write(OTHER, DATA, 0.5)
    disk.flush()
    assert disk.read(KEY, out) and disk.read(OTHER, out) and disk.stats().entries == 2
    disk.close()


def test_two_processes_write_the_same_and_other_pages(tmp_path: Path) -> None:
    """A tight limit, so that each removes what the other is reading; every page read must be whole."""
    code = (
        "import sys, random, numpy as np; from pathlib import Path\n"
        "from hasten.cache import kv_disk; kv_disk._RESCAN_S = 0.02\n"
        "seed = int(sys.argv[2]); rng = random.Random(seed)\n"
        "disk = kv_disk.KvDisk(Path(sys.argv[1]), 12 * 4500, 'model', 4096); out = np.zeros(4096, np.uint8)\n"
        "hits = 0\n"
        "for turn in range(600):\n"
        "    n = rng.randrange(24); disk.write(bytes([n]) * 16, np.full(4096, n, np.uint8), 0.1)\n"
        "    if turn % 3 == 0: disk.flush()\n"
        "    n = rng.randrange(24)\n"
        "    if disk.read(bytes([n]) * 16, out): hits += 1; assert (out == n).all()\n"
        "disk.close(); s = disk.stats(); assert s.dropped == 0, s\n"
        "print(hits)\n"
    )
    run = [sys.executable, "-c", code, str(tmp_path / "kv")]
    both = [
        subprocess.Popen([*run, str(seed)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for seed in (1, 2)
    ]
    for process in both:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0 and "Traceback" not in err, err
        assert int(out) > 50
    left = [path for path in (tmp_path / "kv").rglob("*") if path.is_file()]
    assert not [path for path in left if path.suffix == ".tmp"]
    assert sum(path.stat().st_size for path in left) <= 2 * 12 * 4500


def kill_writers(tmp_path: Path, kills: int, seed: int) -> tuple[int, int]:
    """Kill a process that writes pages all the time, `kills` times; (pages found whole, leftovers seen)."""
    folder, rng = tmp_path / "kv", random.Random(seed)
    mother = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), str(seed)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    disk = KvDisk(folder, 10**8, "model", 65536)
    out, whole, leftovers = np.zeros(65536, np.uint8), 0, 0
    child = 0
    assert mother.stdin is not None and mother.stdout is not None
    for _ in range(kills):
        child = child_of(mother.pid, child)
        mother.stdout.read(1)  # it has written a page: on a busy machine a time says nothing of that
        time.sleep(rng.uniform(0.001, 0.015))
        os.kill(child, signal.SIGKILL)
        for n in range(4):
            if disk.read(bytes([n]) * 16, out):
                whole += 1
                assert out[0] == n == out[100] and (out[17:] == n).all() and (out[1:9] == out[9:17]).all()
        leftovers = max(leftovers, len(list(folder.rglob("*.tmp"))))
        mother.stdin.write("next\n")
        mother.stdin.flush()
    os.kill(child_of(mother.pid, child), signal.SIGKILL)
    mother.stdin.close()
    mother.wait(60)
    assert disk.stats().dropped == 0
    disk.close()
    for path in folder.rglob("*.tmp"):
        os.utime(path, (time.time() - 60,) * 2)
    again = KvDisk(folder, 10**8, "model", 65536)
    again.flush()
    assert not list(folder.rglob("*.tmp")) and again.stats().entries == 4
    again.close()
    return whole, leftovers


def child_of(mother: int, before: int) -> int:
    """The process that `mother` has forked after `before`, as soon as there is one."""
    children = Path(f"/proc/{mother}/task/{mother}/children")
    until = time.monotonic() + 20
    while time.monotonic() < until:
        if found := [int(child) for child in children.read_text().split() if int(child) != before]:
            return found[0]
        time.sleep(0.0005)
    raise AssertionError("no child was forked")


@pytest.mark.slow
@pytest.mark.parametrize("kills", [200])
def test_killed_at_any_moment(tmp_path: Path, kills: int) -> None:
    whole, leftovers = kill_writers(tmp_path, kills, seed=kills)
    assert whole > kills
    assert leftovers > 0, "no kill came in the middle of a write"


def test_log_lines_carry_fields(kept: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept.write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        disk = open_disk(tmp_path)
        disk.flush()
        disk.close()
    (record,) = caplog.records
    assert record.path == str(kept) and "header" in record.reason  # type: ignore[attr-defined]
