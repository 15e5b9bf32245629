"""What becomes of what a verb raises."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from hasten import stopping
from hasten.cli.frame import guarded
from hasten.stopping import Terminated


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt, 130), (Terminated, 0)])
def test_a_signal_that_python_wrapped_is_still_a_stop(
    stop: type[BaseException], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """A signal while a class is made: `RuntimeError: Error calling __set_name__`, before Python 3.12."""

    class Interrupts:
        def __set_name__(self, owner: type, name: str) -> None:
            raise stop

    def make() -> int:
        type("Made", (), {"one": Interrupts()})
        return 1

    assert guarded(make) == code
    assert "stopped" in capsys.readouterr().err


LATE = """
import os, signal, sys, time
from hasten import stopping
stopping.{listen}()
exec(compile('''
def send():
    os.kill(os.getpid(), signal.{one})
    time.sleep(0.001)  # the signal is handled here, in a file that is named like the import machinery
    os.kill(os.getpid(), signal.{two})
''', "<frozen importlib._bootstrap>", "exec"))
from hasten import stopping
from hasten.cli.frame import guarded
def verb():
    send()
    time.sleep(5)
    return 1
with stopping.listening():
    code = guarded(verb, last=True)
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("one", "two", "code"), [("SIGINT", "SIGTERM", 130), ("SIGTERM", "SIGINT", 0), ("SIGTERM", "SIGTERM", 0)]
)
def test_the_first_signal_decides_though_it_is_raised_later(one: str, two: str, code: int) -> None:
    """While a module is imported no signal is raised. It comes again a moment later, after the second one."""
    script = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script += LATE.format(listen="listen_for_sigterm", one=one, two=two)
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ended.returncode == code, ended.stderr
    assert "stopped" in ended.stderr and "Traceback" not in ended.stderr


def test_an_error_after_a_signal_that_ended_one_answer_is_told() -> None:
    """A chat goes on after Ctrl-C; what fails in it later is no consequence of that signal."""
    stopping.first_signal(signal.SIGINT)
    try:
        assert stopping.stop_of(RuntimeError("a library dropped the signal")) is not None
        stopping.outlived()
        assert stopping.stop_of(RuntimeError("a fault of its own")) is None
    finally:
        stopping.outlived()


def test_a_second_signal_while_the_first_is_said_keeps_its_code() -> None:
    told: list[int] = []

    def verb() -> int:
        raise Terminated

    def say_and_be_stopped(code: int, *_: object) -> int:
        told.append(code)
        if len(told) == 1:
            raise Terminated
        return code

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hasten.cli.frame._say", say_and_be_stopped)
        assert guarded(verb) == 0
    assert told == [0, 0]
