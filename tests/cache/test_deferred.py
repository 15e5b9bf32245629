"""Work that was put off is done: when its owner goes, when it is asked for, at the end of the process."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hasten.cache.store import Deferred, flush
from hasten.errors import DiskError


class Owner:
    """Something that can be let go."""


def wait_for(done: list[Any]) -> None:
    until = time.monotonic() + 5
    while not done and time.monotonic() < until:
        time.sleep(0.002)
    assert done


def test_nothing_happens_while_the_owner_is_there() -> None:
    done: list[int] = []
    owner = Owner()
    Deferred(lambda: done.append(1), owner)
    time.sleep(0.03)
    assert not done
    del owner
    wait_for(done)


def test_after_a_while() -> None:
    done: list[int] = []
    owner = Owner()
    Deferred(lambda: done.append(1), owner, delay_s=0.01)
    wait_for(done)
    assert owner is not None


def test_flush() -> None:
    done: list[int] = []
    owner = Owner()
    for i in range(3):
        Deferred(lambda i=i: done.append(i), owner)
    flush()
    assert sorted(done) == [0, 1, 2]
    flush()
    assert len(done) == 3


@pytest.mark.parametrize("error", [DiskError("disk is full"), ValueError("disk is full")])
def test_what_goes_wrong_is_logged(error: Exception, caplog: Any) -> None:
    def fail() -> None:
        raise error

    owner = Owner()
    Deferred(fail, owner)
    flush()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "disk is full" in record.getMessage() and not record.exc_info


SCRIPT = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
from hasten.cache import store
store._TIDY_S = 0.5
class Owner: pass
owner = Owner()
def work():
    print("begun", flush=True)
    time.sleep(float(sys.argv[1]))
    print("done", flush=True)
store.Deferred(work, owner)
print("end", flush=True)
"""


def test_at_the_end_of_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, "0.1"], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["end", "begun", "done"] and done.stderr == "" and done.returncode == 0


def test_ctrl_c_gives_it_up() -> None:
    began = time.monotonic()
    program = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, "60"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with program:
        assert program.stdout is not None and program.stderr is not None
        assert [program.stdout.readline().strip() for _ in range(2)] == ["end", "begun"]
        program.send_signal(signal.SIGINT)
        assert program.stdout.read() == "" and program.stderr.read() == ""
    assert time.monotonic() - began < 30


TIDY = """
import sys, time
from pathlib import Path
from hasten.cache import write_atomic
from hasten.cache.store import Deferred
class Owner: pass
owner = Owner()
def parts(file):
    print("begun", flush=True)
    for _ in range(6000):
        file.write(b"x")
        time.sleep(0.01)
Deferred(lambda: write_atomic(Path(sys.argv[1]) / "entry", parts), owner)
print("end", flush=True)
"""


def test_what_is_given_up_leaves_nothing_behind(tmp_path: Path) -> None:
    program = subprocess.Popen(
        [sys.executable, "-c", TIDY, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    with program:
        assert program.stdout is not None and program.stderr is not None
        assert [program.stdout.readline().strip() for _ in range(2)] == ["end", "begun"]
        program.send_signal(signal.SIGINT)
        assert program.stderr.read() == ""
    assert program.returncode == 0 and not list(tmp_path.iterdir())
