"""Ctrl-C in a process that is the command line: it always ends the verb, and is said in one line."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_on_its_way: list[bool] = []  # not empty: a Ctrl-C that Python dropped is sent again and has not come yet


class Stopped(KeyboardInterrupt):
    """Ctrl-C.

    Not KeyboardInterrupt itself: where that one passes through `exec` (as dataclasses call it), CPython notes
    it and ends the process by SIGINT in the end, whatever exit code was meant.
    """


@contextmanager
def listening() -> Iterator[None]:
    """While this is open, Ctrl-C raises `Stopped` in the main thread; behind it, Ctrl-C does nothing.

    For the whole life of the process: what is left when it closes is Python's own end, which takes a moment
    and must not be disturbed. Where the parent process ignores Ctrl-C, so does this one.
    """
    listens = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if listens:
        sys.unraisablehook = _again
        signal.signal(signal.SIGINT, _stop)
    try:
        yield
    finally:
        if listens:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def insist() -> None:
    """Raise a Ctrl-C that Python dropped and that has not come again yet: the verb is at its end.

    Raises:
        Stopped: there is one.
    """
    if _on_its_way:
        _on_its_way.clear()
        raise Stopped


def _stop(number: int, frame: FrameType | None) -> None:
    if frame is not None and frame.f_code.co_filename.startswith("<frozen importlib"):
        _send_again()  # raised here it could leave the import lock held, and other threads waiting forever
        return
    _on_its_way.clear()
    raise Stopped


def _again(lost: Any) -> None:
    """Send Ctrl-C once more where Python dropped it: in the callback of a weak reference, in `__del__`."""
    if issubclass(lost.exc_type, KeyboardInterrupt):
        _send_again()
    else:
        sys.__unraisablehook__(lost)


def _send_again() -> None:
    """In a moment, and by a thread that takes no lock: whoever calls may hold any."""

    def send() -> None:
        time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)  # to the process: a main thread that waits for input must wake

    _on_its_way.append(True)
    _thread.start_new_thread(send, ())
