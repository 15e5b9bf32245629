"""Work that can wait: done when nobody is likely to wait for the machine."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable

from hasten.errors import HastenError

_log = logging.getLogger("hasten.cache")
_pending: set[Deferred] = set()


class Deferred:
    """One piece of work for a thread of its own, at low priority.

    It begins when `owner` is gone, when the process ends, when `flush` is called, or after `delay_s`,
    whichever is first. The process waits for it; Ctrl-C while it waits gives the work up. What the work
    raises is logged.

    Args:
        work: what to do.
        owner: who used the machine so far; only watched.
        delay_s: seconds.
    """

    def __init__(self, work: Callable[[], object], owner: object, delay_s: float = 20.0) -> None:
        self._work: Callable[[], object] | None = work
        self._delay_s = delay_s
        self._go = threading.Event()
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
            if self._work is not None:
                self._work()
        except HastenError as error:
            _log.warning("%s", error.message)
        except Exception as error:  # noqa: BLE001  nobody else is there to hear of it
            _log.warning("work put off failed: %s: %s", type(error).__name__, error)
        finally:
            self._work = None
            _pending.discard(self)

    def finish(self) -> None:
        """Do it now, and return when it is done."""
        self._go.set()
        self._thread.join()


def flush() -> None:
    """Do all work that was put off, and return when it is done."""
    for deferred in tuple(_pending):
        deferred.finish()


def _at_exit() -> None:
    with contextlib.suppress(KeyboardInterrupt):
        flush()


atexit.register(_at_exit)
