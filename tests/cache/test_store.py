"""The disk store: atomic writes, refusals in plain words, digests, records."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import pytest

from hasten.cache import (
    cache_dir,
    digest,
    new_folder,
    read_json,
    read_record,
    write_atomic,
    write_json,
    write_record,
)
from hasten.core import Format
from hasten.errors import DiskError


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "here"))
    assert cache_dir() == tmp_path / "here"
    monkeypatch.delenv("HASTEN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    if sys.platform == "linux":
        assert cache_dir() == tmp_path / "xdg" / "hasten"
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")
        assert cache_dir() == Path.home() / ".cache" / "hasten"


def test_write_makes_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    write_atomic(path, b"one")
    write_atomic(path, lambda file: file.write(b"two"))
    assert path.read_bytes() == b"two"
    assert leftovers(path.parent) == []
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_write_follows_a_link(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_bytes(b"one")
    link.symlink_to(real)
    write_atomic(link, b"two")
    assert link.is_symlink() and real.read_bytes() == b"two"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_refused_write_keeps_the_old_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int, call: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(DiskError) as caught:
            write_atomic(path, b"new")
    assert str(path) in caught.value.message and "MB free" in caught.value.message
    assert "untouched" in caught.value.message and caught.value.hint
    assert path.read_bytes() == b"old" and leftovers(tmp_path) == []


def test_a_really_full_disk(tmp_path: Path) -> None:
    """The system itself refuses the bytes: a limit on file size stands in for a full disk."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    code = (
        "import resource, sys; from hasten.cache import write_atomic; from hasten.errors import DiskError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "try: write_atomic(sys.argv[1], bytes(1 << 20))\n"
        "except DiskError as e: print(e.message); sys.exit(7)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=30)
    assert done.returncode == 7, done.stderr
    assert str(path) in done.stdout
    assert path.read_bytes() == b"old" and leftovers(tmp_path) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == (soft, hard)


def test_interrupt_while_writing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def writer(file: BinaryIO) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, writer)
    assert path.read_bytes() == b"old" and leftovers(tmp_path) == []


def test_errors_of_other_files_pass_through(tmp_path: Path) -> None:
    with pytest.raises(PermissionError):
        write_atomic(
            tmp_path / "file", lambda file: (_ for _ in ()).throw(PermissionError(13, "no", "/else/where"))
        )


def test_a_folder_or_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "plain").write_bytes(b"")
    with pytest.raises(DiskError):
        write_atomic(tmp_path / "folder", b"x")
    with pytest.raises(DiskError):
        write_atomic(tmp_path / "plain" / "below", b"x")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_digest(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    (tmp_path / "f").write_bytes(data)
    assert digest(tmp_path / "f") == hashlib.sha256(data).hexdigest()


def test_json_of_nouns_and_misses(tmp_path: Path) -> None:
    path = write_json(tmp_path / "x.json", {"layout": Format.of(4), "who": "字"})
    assert read_json(path) == {"layout": "w4", "who": "字"}
    assert read_json(tmp_path / "none.json") is None
    path.write_bytes(path.read_bytes()[:-5])
    assert read_json(path) is None
    with pytest.raises(ValueError):
        write_json(path, float("nan"))


def test_record_is_a_miss_when_stale_or_altered(tmp_path: Path) -> None:
    path, key = tmp_path / "r.json", {"cpu": "x", "cores": (0, 1)}
    write_record(path, key, {"gb": 1.5})
    assert read_record(path, key) == {"gb": 1.5}
    assert read_record(path, {**key, "cores": (0,)}) is None
    assert read_record(tmp_path / "none", key) is None
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "value": {"gb": 9.5}}))
    assert read_record(path, key) is None
    path.write_text("[1]")
    assert read_record(path, key) is None


def test_new_folder_replaces_at_once(tmp_path: Path) -> None:
    target = tmp_path / "m.hasten"
    for text in ("one", "two"):
        with new_folder(target, marker="plan.json") as fresh:
            (fresh / "plan.json").write_text(text)
            assert not target.exists() or (target / "plan.json").read_text() == "one"
        assert (target / "plan.json").read_text() == text
    assert leftovers(tmp_path) == []


def test_new_folder_without_exchange(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("hasten.cache.folders._exchange", lambda a, b: False)
    test_new_folder_replaces_at_once(tmp_path)


def test_new_folder_keeps_the_old_one_on_failure(tmp_path: Path) -> None:
    target = tmp_path / "m.hasten"
    target.mkdir()
    (target / "plan.json").write_text("old")
    with pytest.raises(DiskError) as caught, new_folder(target):
        raise OSError(errno.ENOSPC, "full")
    assert str(target) in caught.value.message
    with pytest.raises(KeyboardInterrupt), new_folder(target):
        raise KeyboardInterrupt
    assert (target / "plan.json").read_text() == "old" and leftovers(tmp_path) == []


def test_new_folder_refuses_foreign_things(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"")
    (tmp_path / "file").write_bytes(b"")
    for name in ("photos", "file"):
        with pytest.raises(DiskError), new_folder(tmp_path / name, marker="plan.json"):
            pytest.fail("must not get here")


SCRATCH = """
import os, sys
from hasten.cache.folders import scratch
folder = scratch()
(folder / "weights").write_bytes(b"x")
print(folder, flush=True)
sys.stdin.readline()
if len(sys.argv) > 1:
    os.kill(os.getpid(), 9)
"""


def test_scratch_folders_of_dead_processes_go(tmp_path: Path) -> None:
    """One of a living process stays, one of a killed process goes at the next start, one's own at the end."""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}

    def begin(*arguments: str) -> tuple[subprocess.Popen[str], Path]:
        command = [sys.executable, "-c", SCRATCH, *arguments]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert process.stdout is not None
        return process, Path(process.stdout.readline().strip())

    def end(process: subprocess.Popen[str]) -> None:
        process.communicate("end\n", timeout=60)

    alive, kept = begin()
    killed, left = begin("kill")
    end(killed)
    assert kept.parent == left.parent == tmp_path and left.is_dir()
    (tmp_path / "hasten-models").mkdir()  # a user's own
    (tmp_path / "hasten-scratch-notmine!").write_text("a file")
    for path in (kept, left, tmp_path / "hasten-models"):
        os.utime(path, (1, 1))
    last, own = begin()
    assert own.is_dir() and kept.is_dir() and not left.exists()
    end(last)
    end(alive)
    assert {path.name for path in tmp_path.iterdir()} == {"hasten-models", "hasten-scratch-notmine!"}


def test_a_folder_that_the_system_will_not_make_is_an_error_of_the_disk() -> None:
    with pytest.raises(DiskError, match="cannot write"):
        write_atomic("/proc/self/hasten/file", b"x")
