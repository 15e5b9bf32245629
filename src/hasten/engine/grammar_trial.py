"""A process that may die: grammars are compiled there on trial, and answers checked against schemas.

What a client sends may overflow the stack of a library, or keep it busy for ever with the interpreter held;
no rule of ours finds all of that. So it happens elsewhere (`grammar_child`): with a smaller stack, less
memory and a limit on processor time that grows with the size of what is given.
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
from pathlib import Path
from typing import Any

from hasten.engine.grammar_child import CHECK, GRAMMAR, READ, READY, REQUEST, SIZE
from hasten.errors import MachineError

_SECONDS = 1.0  # of processor time, for anything
_SECONDS_A_BYTE = 1e-5  # and for its size: 3.6 s for the largest grammar
_WALL_S = 60.0  # the machine may be busy, or stopped

# Work that one grammar may cause: a few ms a mask, memory as the states. Its trial alone limits compiling.
LIMITS = {
    "initial_lexer_fuel": 200_000,
    "step_lexer_fuel": 40_000,
    "step_max_items": 50_000,
    "max_items_in_row": 8_000,
    "max_lexer_states": 20_000,  # 1 to 2 KB each
    "max_grammar_size": 100_000,
}


class GrammarTrial:
    """One process that does what it is asked, one thing after another. For several threads at once."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def reason_against(self, source: str) -> str:
        """Try a grammar, llguidance's text of it.

        Returns:
            Why it must not be compiled; empty where it may, though it may still be no valid grammar.

        Raises:
            MachineError: the process cannot be started, or does not answer.
        """
        reason, _ = self._asked(GRAMMAR, source.encode())
        return reason

    def violations(self, schema: Any, text: str, most: int) -> tuple[str, ...]:
        """What of a text does not match a JSON schema, in words.

        Returns:
            Also one line where it cannot be checked, or takes too long.

        Raises:
            MachineError: as `reason_against`.
        """
        asked = json.dumps({"schema": schema, "text": text, "most": most})
        reason, found = self._asked(CHECK, asked.encode())
        return (f"it cannot be checked: {reason}",) if reason else tuple(json.loads(found))

    def _asked(self, kind: bytes, raw: bytes) -> tuple[str, bytes]:
        """(why it could not be done, what came of it)."""
        seconds = _SECONDS + _SECONDS_A_BYTE * len(raw)
        with self._lock:
            for _ in range(2):  # it may have ended itself, being idle, just now
                process = self._started()
                until = time.monotonic() + _WALL_S
                sent = _send(process, REQUEST.pack(kind, len(raw), seconds) + raw, until)
                if sent and _answer(process, until, len(READ)) == READ:
                    size = _answer(process, until, SIZE.size)
                    found = _answer(process, until, SIZE.unpack(size)[0]) if len(size) == SIZE.size else b""
                    return "", found
                code = self._ended()
                if code != 0:
                    return _words(code, seconds), b""
        raise MachineError("the process that tries grammars ends by itself", hint="ask again")

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        child = Path(__file__).with_name("grammar_child.py")
        paths = [path for path in sys.path if path]
        command = [sys.executable, "-I", "-S", str(child), json.dumps(paths), json.dumps(LIMITS)]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
            )
        except OSError as error:
            raise _not_started(str(error)) from None
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        if _answer(self._process, time.monotonic() + _WALL_S, len(READY)) != READY:
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


def _answer(process: subprocess.Popen[bytes], until: float, size: int) -> bytes:
    """So many bytes; fewer where the process ended or takes too long."""
    assert process.stdout is not None
    found = b""
    news = select.poll()
    news.register(process.stdout.fileno(), select.POLLIN)
    while len(found) < size and news.poll(max(0.0, 1000 * (until - time.monotonic()))):
        part = os.read(process.stdout.fileno(), size - len(found))
        if not part:
            break
        found += part
    return found


def _words(code: int, seconds: float) -> str:
    if code in (-signal.SIGPROF, -signal.SIGXCPU):
        return f"too complex, reading it takes more than {seconds:.1f} s"
    if code in (-signal.SIGSEGV, -signal.SIGBUS):
        return "too complex, its rules or references lead too deep into one another"
    return f"too complex, reading it takes more memory than it may, or fails (it ended with {code})"


_trial: GrammarTrial | None = None


def shared_trial() -> GrammarTrial:
    """The one of this process; started with the first grammar."""
    global _trial
    if _trial is None:
        _trial = GrammarTrial()
    return _trial


def _forget() -> None:
    """After a fork: the process and its pipes are the parent's."""
    global _trial
    _trial = None


def _close() -> None:
    if _trial is not None:
        _trial.close()


os.register_at_fork(after_in_child=_forget)
atexit.register(_close)
