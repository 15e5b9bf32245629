"""Work that can wait: done when nobody is likely to wait for the machine."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable

from hasten.errors import HastenError

_log = logging.getLogger("hasten.cache")
_TIDY_S = 5.0  # a disk that hangs is not waited for longer
_pending: set[Deferred] = set()


class GivenUp(BaseException):
    """Raised inside work that is given up, so that it leaves nothing half done behind."""


class Deferred:
    """One piece of work for a thread of its own, at low priority.

    It begins when `owner` is gone, when the process ends, when `flush` is called, or after `delay_s`,
    whichever is first. The process waits for it; Ctrl-C while it waits gives the work up: `GivenUp` is
    raised inside it. What the work raises otherwise is logged.

    Args:
        work: what to do.
        owner: who used the machine so far; only watched.
        delay_s: seconds.
    """

    def __init__(self, work: Callable[[], object], owner: object, delay_s: float = 20.0) -> None:
        self._work: Callable[[], object] | None = work
        self._delay_s = delay_s
        self._go = threading.Event()
        self._ended = threading.Event()  # join() takes a thread for dead once it was interrupted
        weakref.finalize(owner, self._go.set).atexit = False
        self._thread = threading.Thread(target=self._run, name="hasten-deferred", daemon=True)
        _pending.add(self)
        self._thread.start()

    def _run(self) -> None:
        self._go.wait(self._delay_s)
        if sys.platform == "linux":  # there a thread has its own priority
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        try:
            work = self._work
            if work is not None:
                work()
        except GivenUp:
            pass
        except HastenError as error:
            _log.warning("%s", error.message)
        except Exception as error:  # noqa: BLE001  nobody else is there to hear of it
            _log.warning("work put off failed: %s: %s", type(error).__name__, error)
        finally:
            self._work = None
            _pending.discard(self)
            self._ended.set()

    def finish(self) -> None:
        """Do it now, and return when it is done."""
        self._go.set()
        while not self._ended.wait(0.1):  # a signal that comes just before a wait begins does not end it
            pass

    def give_up(self) -> None:
        """End it at its next line of Python, and return when it has tidied up, or after some seconds."""
        self._work = None
        self._go.set()
        thread = ctypes.c_ulong(self._thread.ident or 0)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(GivenUp))
        until = time.monotonic() + _TIDY_S
        while not self._ended.is_set() and (left := until - time.monotonic()) > 0:
            with contextlib.suppress(KeyboardInterrupt):
                self._ended.wait(left)


def flush() -> None:
    """Do all work that was put off, and return when it is done. Ctrl-C gives it up.

    Raises:
        KeyboardInterrupt: it was given up; none of it runs any more.
    """
    try:
        for deferred in tuple(_pending):
            deferred.finish()
    except KeyboardInterrupt:
        for deferred in tuple(_pending):
            deferred.give_up()
        raise


def _at_exit() -> None:
    with contextlib.suppress(KeyboardInterrupt):
        flush()


atexit.register(_at_exit)
