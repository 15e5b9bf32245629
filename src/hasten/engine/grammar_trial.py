"""Compiles a grammar on trial, in a process that may die of it, before the server compiles the same one.

llguidance follows references and rules by recursion: a chain of some thousand overflows the stack, which
ends a process without an exception. It also looks for a text that a lexeme matches, by a search without a
limit: eight expressions joined by `&`, 150 bytes, take minutes. No rule of ours on the text of a grammar is
sure to find all of these, so every grammar is tried: with a smaller stack, less memory and a limit on
processor time that grows with its size. The first costs about 0.15 s, a later one what compiling it costs.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from hasten.engine.grammar_child import COMPILE_STACK, READ, READY, REQUEST
from hasten.errors import MachineError

_T = TypeVar("_T")
_SECONDS = 1.0  # of processor time, for any grammar
_SECONDS_A_BYTE = 1e-5  # and for its size: 3.6 s for the largest
_WALL_S = 60.0  # the machine may be busy, or stopped
_STACK = 4 * COMPILE_STACK  # of the thread that compiles what the trial has passed
_stack_size = threading.Lock()


def with_large_stack(work: Callable[[], _T]) -> _T:
    """Run `work` on a thread with four times the stack of a trial; memory is only used where it is touched.

    Raises:
        MachineError: there is no room for the thread. What `work` raises.
    """
    result: Future[_T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as wrong:  # noqa: BLE001  passed on
            result.set_exception(wrong)

    with _stack_size:
        before = threading.stack_size(_STACK)
        try:
            threading.Thread(target=run, name="hasten-grammar-stack", daemon=True).start()
        except RuntimeError as error:
            raise MachineError(
                f"no memory for a thread that reads grammars: {error}",
                hint="raise the limit on address space",
            ) from None
        finally:
            threading.stack_size(before)
    return result.result()


class GrammarTrial:
    """One process that tries grammars, one after another. For several threads at once.

    Args:
        limits: llguidance's own limits, by name.
    """

    def __init__(self, limits: dict[str, int]) -> None:
        self._limits = limits
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def reason_against(self, source: str) -> str:
        """Try a grammar, llguidance's text of it.

        Returns:
            Why it must not be compiled; empty where it may, though it may still be no valid grammar.

        Raises:
            MachineError: the process cannot be started, or does not answer.
        """
        raw = source.encode()
        seconds = _SECONDS + _SECONDS_A_BYTE * len(raw)
        with self._lock:
            for _ in range(2):  # it may have ended itself, being idle, just now
                process = self._started()
                until = time.monotonic() + _WALL_S
                sent = _send(process, REQUEST.pack(len(raw), seconds) + raw, until)
                answer = _answer(process, until)
                if sent and answer == READ:
                    return ""
                code = self._ended()
                if code != 0:
                    return _words(code, seconds)
        raise MachineError("the process that tries grammars ends by itself", hint="ask again")

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        child = Path(__file__).with_name("grammar_child.py")
        paths = [path for path in sys.path if path]
        command = [sys.executable, "-I", "-S", str(child), json.dumps(paths), json.dumps(self._limits)]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
            )
        except OSError as error:
            raise _not_started(str(error)) from None
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        if _answer(self._process, time.monotonic() + _WALL_S) != READY:
            raise _not_started(f"it ended with {self._ended()}")
        return self._process

    def _ended(self) -> int:
        """End the process; how it ended, as `subprocess` counts."""
        process, self._process = self._process, None
        if process is None:
            return 0
        with process:  # closes the pipes
            try:
                return process.wait(1.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                return -signal.SIGXCPU

    def close(self) -> None:
        """End the process; the next grammar starts another."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
        self._ended()


def _not_started(reason: str) -> MachineError:
    return MachineError(
        f"the process that tries grammars does not start: {reason}",
        hint="structured output needs a second process: allow one, and memory for it",
    )


def _send(process: subprocess.Popen[bytes], data: bytes, until: float) -> bool:
    assert process.stdin is not None
    pipe, rest = process.stdin.fileno(), memoryview(data)
    room = select.poll()
    room.register(pipe, select.POLLOUT)
    while rest:
        if not room.poll(max(0.0, 1000 * (until - time.monotonic()))):
            return False
        try:
            rest = rest[os.write(pipe, rest) :]
        except BlockingIOError:
            continue
        except OSError:  # it ended
            return False
    return True


def _answer(process: subprocess.Popen[bytes], until: float) -> bytes:
    """One byte; none where the process ended or takes too long."""
    assert process.stdout is not None
    news = select.poll()
    news.register(process.stdout.fileno(), select.POLLIN)
    if not news.poll(max(0.0, 1000 * (until - time.monotonic()))):
        return b""
    return os.read(process.stdout.fileno(), 1)


def _words(code: int, seconds: float) -> str:
    if code in (-signal.SIGPROF, -signal.SIGXCPU):
        return f"too complex, reading it takes more than {seconds:.1f} s"
    if code in (-signal.SIGSEGV, -signal.SIGBUS):
        return "too complex, its rules or references lead too deep into one another"
    return f"too complex, reading it takes more memory than it may, or fails (it ended with {code})"


_trial: GrammarTrial | None = None


def shared_trial(limits: dict[str, int]) -> GrammarTrial:
    """The one of this process; started with the first grammar."""
    global _trial
    if _trial is None:
        _trial = GrammarTrial(limits)
    return _trial


def _forget() -> None:
    """After a fork: the process and its pipes are the parent's."""
    global _trial, _stack_size
    _trial, _stack_size = None, threading.Lock()


def _close() -> None:
    if _trial is not None:
        _trial.close()


os.register_at_fork(after_in_child=_forget)
atexit.register(_close)
