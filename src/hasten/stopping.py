"""Signals that end a process which is the command line: Ctrl-C for every verb, SIGTERM for `serve` too.

The first signal decides how the process ends (exit code 130 for Ctrl-C, 0 for SIGTERM), whatever comes after
it. A signal that Python cannot raise where it came is sent again a moment later; without a note of the first
one, a SIGTERM that came in between would end a process that Ctrl-C had ended already.
"""

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

from hasten.errors import HastenError

INTERRUPTED = 130
"""Exit code after Ctrl-C."""

_first: list[int] = []  # the first signal that asked for the end and was not outlived
_on_its_way: list[bool] = []  # not empty: a signal that Python dropped is sent again and has not come yet


class Terminated(KeyboardInterrupt):
    """SIGTERM where it ends the process as Ctrl-C does, but with exit code 0: somebody stopped a service."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C.

    Not KeyboardInterrupt itself: where that one passes through `exec` (as dataclasses call it), CPython notes
    it and ends the process by SIGINT in the end, whatever exit code was meant.
    """


def stop_of(error: BaseException | None) -> KeyboardInterrupt | None:
    """The signal behind an error, None if there is none.

    One that comes while a class is made is wrapped by Python in a RuntimeError. A library in another language
    may drop it and raise an error of its own (pydantic, where it builds a model): once a signal was raised,
    an error that nobody meant for the user is its consequence.
    """
    found = error
    while found is not None and not isinstance(found, KeyboardInterrupt):
        found = found.__cause__ or found.__context__
    if found is None and _first and not isinstance(error, HastenError):
        return _obeyed()
    return found


def exit_code(stop: KeyboardInterrupt) -> int:
    """The exit code of a process that `stop` ends."""
    return 0 if isinstance(stop, Terminated) else INTERRUPTED


def first_signal(number: int) -> int:
    """The signal that decides how this process ends: `number`, unless another one came before it."""
    if not _first:
        _first.append(number)
    return _first[0]


def outlived() -> None:
    """Forget the signals so far: the process goes on after them, as a chat does after Ctrl-C."""
    _first.clear()
    _on_its_way.clear()


def listen_for_sigterm() -> None:
    """From now on SIGTERM raises `Terminated` in the main thread, until somebody else handles it."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _stop)


@contextmanager
def listening() -> Iterator[None]:
    """While this is open, Ctrl-C raises `Stopped` in the main thread; behind it, Ctrl-C does nothing.

    For the whole life of the process: what is left when it closes is Python's own end, which takes a moment
    and must not be disturbed. Where the parent process ignores Ctrl-C, so does this one.
    """
    listens = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    sys.unraisablehook = _again
    if listens:
        signal.signal(signal.SIGINT, _stop)
    try:
        yield
    finally:
        if listens:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def insist() -> None:
    """Raise a signal that Python dropped and that has not come again yet: the verb is at its end.

    Raises:
        Stopped, Terminated: there is one.
    """
    if _on_its_way:
        raise _obeyed()


def _obeyed() -> KeyboardInterrupt:
    """What is raised for the first signal, whichever came last."""
    _on_its_way.clear()
    return Terminated() if _first and _first[0] == signal.SIGTERM else Stopped()


def _stop(number: int, frame: FrameType | None) -> None:
    first_signal(number)
    if frame is not None and frame.f_code.co_filename.startswith("<frozen importlib"):
        _send_again(
            number
        )  # raised here it could leave the import lock held, and other threads waiting forever
        return
    raise _obeyed()


def _again(lost: Any) -> None:
    """Send a signal once more where Python dropped it: in the callback of a weak reference, in `__del__`."""
    if issubclass(lost.exc_type, KeyboardInterrupt):
        _send_again(signal.SIGTERM if issubclass(lost.exc_type, Terminated) else signal.SIGINT)
    else:
        sys.__unraisablehook__(lost)


def _send_again(number: int) -> None:
    """In a moment, and by a thread that takes no lock: whoever calls may hold any."""

    def send() -> None:
        time.sleep(0.005)
        os.kill(os.getpid(), number)  # to the process: a main thread that waits for input must wake

    _on_its_way.append(True)
    _thread.start_new_thread(send, ())
