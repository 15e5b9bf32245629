"""A search in a process of its own: a recipe that crashes or hangs takes nothing with it.

The search runs in a child (fork), which sends what it is doing through a pipe, and its result at the end.
When the child dies, or gives no sign of life for too long, it is killed, the recipe that it was at is
written down as broken, and a new child goes on: what was measured is kept on disk, so it takes up where the
other one was.

For a process that has done nothing with native threads or a GPU yet, which a fork would not take along: the
command line. A kernel that hangs keeps a core busy, so no sign of life means no news and not no work.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import select
import signal
import struct
import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from hasten.compress.result import Observer, Progress
from hasten.errors import HastenError, MachineError
from hasten.stopping import stop_of

T = TypeVar("T")

SILENT_S = 900.0
"""Without news for so long, a recipe hangs: packing the largest model that fits into a machine's memory, or
judging 512 tokens of it, takes a few minutes at most."""
_MOST_BROKEN = 5
_HEAD = struct.Struct("<Q")
_PR_SET_PDEATHSIG = 1

Search = Callable[[Observer, dict[str, str]], T]
"""Runs the search: told whom to tell, and which recipes are broken, and how."""


def isolated(search: Search[T], observer: Observer, silent_s: float = SILENT_S) -> T:
    """What a search returns or raises, whatever its recipes do.

    Args:
        search: see `Search`; what it returns must be picklable.
        observer: told in this process.
        silent_s: a child without news for longer is killed.

    Raises:
        MachineError: the process ended outside of any recipe, or with too many of them.
        And what the search raises.
    """
    broken: dict[str, str] = {}
    while True:
        child = _Child(search, broken)
        try:
            found: T = child.watch(observer, silent_s)
            return found
        except _Ended as ended:
            name = child.recipe
            if name is None or name in broken or len(broken) >= _MOST_BROKEN:
                where = child.doing or "starting"
                raise MachineError(
                    f"the search's process {ended.how} while {where}",
                    hint="run again with HASTEN_DEBUG=1, and give fewer --threads or a smaller model",
                ) from None
            broken[name] = ended.how
            observer(Progress("recipes", f"{name} is given up: the process {ended.how}"))
        finally:
            child.end()


class _Ended(Exception):
    """The child is gone."""

    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.how = how


class _Child:
    """A process that searches, seen from the one that waits for it."""

    def __init__(self, search: Search[Any], broken: dict[str, str]) -> None:
        self.doing = ""  # the last news
        self.recipe: str | None = None  # that it is at
        self._read, write = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # of Python 3.12: other threads are not forked
            self._pid = os.fork()
        if self._pid == 0:
            os.close(self._read)
            _search_and_exit(search, dict(broken), write)
        os.close(write)

    def watch(self, observer: Observer, silent_s: float) -> Any:
        """Pass news on until the result is there."""
        while True:
            kind, value = self._next(silent_s)
            if kind == "done":
                return value
            if kind == "raised":
                raise value
            self.doing = f"at {value.stage}: {value.detail}" if value.detail else f"at {value.stage}"
            self.recipe = _recipe_of(value, self.recipe)
            observer(value)

    def _next(self, silent_s: float) -> tuple[str, Any]:
        size = _HEAD.unpack(self._bytes(_HEAD.size, silent_s))[0]
        kind, value = pickle.loads(self._bytes(size, silent_s))
        return kind, value

    def _bytes(self, count: int, silent_s: float) -> bytes:
        found = b""
        while len(found) < count:
            ready, _, _ = select.select([self._read], [], [], silent_s)
            if not ready:
                raise _Ended(f"gave no sign of life for {silent_s:g} s")
            part = os.read(self._read, count - len(found))
            if not part:
                raise _Ended(self._how_it_ended())
            found += part
        return found

    def _how_it_ended(self) -> str:
        _, status = os.waitpid(self._pid, 0)
        self._pid = 0
        if os.WIFSIGNALED(status):
            name = signal.Signals(os.WTERMSIG(status)).name
            perhaps = ", for want of memory perhaps" if name == "SIGKILL" else ""
            return f"was killed by {name}{perhaps}"
        return f"ended with code {os.WEXITSTATUS(status)}"

    def end(self) -> None:
        """Kill it and all it started, if it is still there."""
        os.close(self._read)
        if self._pid:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)  # before it had a group of its own
            os.waitpid(self._pid, 0)
            self._pid = 0


def _recipe_of(news: Progress, before: str | None) -> str | None:
    """The recipe that the news are of; None: of none."""
    if news.stage == "race":
        return before
    if news.stage != "recipes" or news.candidate is not None:
        return None
    return news.detail.rsplit(": ", 1)[0]


def _search_and_exit(search: Search[Any], broken: dict[str, str], write: int) -> None:
    """The child's whole life. It never returns."""
    code = 0
    try:
        os.setpgid(0, 0)  # Ctrl-C reaches the parent alone, which ends this group
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        _send(write, _outcome(search, broken, write))
    except BaseException:  # noqa: BLE001  the pipe is gone, or what came out cannot be sent: the code tells
        code = 1
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _outcome(search: Search[Any], broken: dict[str, str], write: int) -> tuple[str, Any]:
    try:
        return "done", search(lambda news: _send(write, ("news", news)), broken)
    except (HastenError, KeyboardInterrupt, OSError, MemoryError) as error:
        return "raised", error
    except Exception as error:  # noqa: BLE001  a fault of ours: its text goes on, its traceback is printed here
        if os.environ.get("HASTEN_DEBUG"):
            import traceback

            traceback.print_exc()
        wrapped = stop_of(error)
        if wrapped is not None:
            return "raised", wrapped
        return "raised", RuntimeError(f"{type(error).__name__}: {error}")


def _send(write: int, message: tuple[str, Any]) -> None:
    data = pickle.dumps(message)
    data = _HEAD.pack(len(data)) + data
    while data:
        data = data[os.write(write, data) :]
