"""Programs that are locked in: what they may do, what they may not, and how they end."""

from __future__ import annotations

from pathlib import Path

import pytest

from hasten.quality.sandbox import Limits, run

SHORT = Limits(cpu_s=1, wall_s=20.0)

pytestmark = pytest.mark.skipif(run("") == "impossible", reason="this system cannot lock a process in")


@pytest.mark.parametrize(
    "program",
    [
        "assert sorted([3, 1, 2]) == [1, 2, 3]",
        "import decimal, fractions, re, statistics\nassert statistics.mean([1, 3]) == 2",
        "print('x' * 1_000_000)",
        "import time\ntime.sleep(0.01)",
        "import os\nassert os.listdir('.') == []",  # an empty folder
        "import os\nassert not {'HOME', 'PATH', 'HASTEN_CACHE', 'PYTHONPATH'} & set(os.environ)",
    ],
)
def test_what_computes_is_right(program: str) -> None:
    assert run(program) == "right"


@pytest.mark.parametrize(
    "program",
    [
        "assert 1 + 1 == 3",
        "def f(:",
        "raise SystemExit(0)",
        "import os\nos._exit(0)",
        "x = bytearray(1 << 30)",
        "x = " + "(" * 10_000 + ")" * 10_000,
    ],
)
def test_what_fails_or_ends_early_is_wrong(program: str) -> None:
    assert run(program) == "wrong"


@pytest.mark.parametrize("program", ["while True: pass", "import os\nwhile True: os.write(1, b'x' * 60_000)"])
def test_what_does_not_end_is_stopped(program: str) -> None:
    assert run(program, SHORT) == "stopped"


def test_what_sleeps_is_stopped() -> None:
    assert run("import time\ntime.sleep(60)", Limits(wall_s=0.5)) == "stopped"


@pytest.mark.parametrize(
    "call",
    [
        "socket.socket()",
        "socket.socket(socket.AF_UNIX)",
        "socket.socketpair()",
        "os.fork()",
        "os.execv('/bin/true', ['true'])",
        "os.kill(os.getppid(), 0)",
        "os.open('made', os.O_WRONLY | os.O_CREAT)",
        "os.open(VICTIM, os.O_RDWR)",
        "os.open(VICTIM, os.O_RDONLY | os.O_TRUNC)",
        "os.unlink(VICTIM)",
        "os.rename(VICTIM, VICTIM + '2')",
        "os.chmod(VICTIM, 0)",
        "os.truncate(VICTIM, 0)",
        "os.symlink(VICTIM, 'link')",
        "os.mkdir('made')",
        "os.rmdir('.')",
        "os.memfd_create('code')",
        "os.setuid(1)",
    ],
)
def test_what_reaches_outside_is_not_permitted(call: str, tmp_path: Path) -> None:
    """Each call raises PermissionError inside; without the filter most of them work, so that is tried too."""
    victim = tmp_path / "victim"
    victim.write_text("as it was")
    program = f"""
import os, socket
VICTIM = {str(victim)!r}
try:
    {call}
except PermissionError:
    pass
else:
    raise SystemExit("it was permitted")
"""
    assert run(program) == "right"
    assert victim.read_text() == "as it was"


def test_threads_cannot_start() -> None:
    program = (
        "import threading\ntry: threading.Thread(target=print).start()\nexcept RuntimeError: pass\nelse: 1/0"
    )
    assert run(program) == "right"


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    for program in ("", "1/0", "while True: pass"):
        run(program, SHORT)
    assert list(tmp_path.iterdir()) == []
