"""Memory: how much there is, how much this process may still fill, and one account for all that grows in it.

The KV caches of all models of a process take memory page by page, as pages are written. `MemoryRoom` measures
what is free once a second and keeps a reserve (`reserve_bytes`). Memory that was promised and is not yet
written is charged to it, so that two models never count the same free gigabyte twice.
"""

from __future__ import annotations

import os
import re
import resource
import threading
import time
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Protocol

from hasten.errors import MachineError, UsageError
from hasten.machine.cgroup import kernel_text, memory_left, memory_limit

_MEMINFO = Path("/proc/meminfo")
_LEAST_RESERVE, _MOST_RESERVE = 50_000_000, 1_500_000_000

LOOK_S = 1.0
"""Seconds between two looks at the system, each half a millisecond; a quarter where memory is nearly full."""

_LOW = 0.75  # of the reserve: memory is given back below it, until all of the reserve is free again
_POLL_S = 0.05


def installed_bytes() -> int | None:
    """Memory of the machine; None if unknown."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def available_bytes(meminfo: Path = _MEMINFO) -> int | None:
    """Memory this process can take without swapping or meeting a limit; None if unknown.

    The lesser of what the kernel could hand out and of what is left in every control group around this
    process.
    """
    known = [_kernel_estimate(meminfo), memory_left()]
    return min((value for value in known if value is not None), default=None)


_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(%|b?|[kmgt]i?b?)\s*", re.IGNORECASE)
_POWERS = {"b": 0, "k": 1, "m": 2, "g": 3, "t": 4, "": 3}


def memory_amount(text: str | float, whole: int, flag: str) -> int:
    """Bytes that a user's words for a part of a memory mean: `20GiB`, `20` (GiB), `900MB`, `0.9` or `90%`.

    A number alone is a share up to 1, and GiB above.

    Args:
        text: the words, or the number.
        whole: bytes of the memory.
        flag: what the words were given to; errors name it.

    Raises:
        UsageError: they cannot be read, or mean nothing at all or more than there is.
    """
    said = str(text).strip()
    match = _SIZE.fullmatch(said)
    if match is None:
        raise UsageError(
            f"{flag} takes GiB or a share, got {said!r}", hint=f"use {flag} 20GiB, {flag} 0.9 or {flag} 90%"
        )
    value, unit = float(match[1]), match[2].lower()
    if not unit and value <= 1:
        value, unit = 100 * value, "%"
    if unit == "%":
        found = whole * value / 100
    else:
        base = 1000 if "b" in unit and "i" not in unit else 1024
        found = value * base ** _POWERS[unit[:1]]
    if not 1 <= found <= whole:
        raise UsageError(
            f"{flag} {said} is {found / (1 << 30):.4g} GiB, and there are {whole / (1 << 30):.4g} GiB",
            hint=f"use {flag} 0.9 for nine tenths of it",
        )
    return int(found)


def reserve_bytes() -> int:
    """Memory that should stay free: for other processes, file pages, and what a step needs for a moment.

    A tenth of what this process may use at most, from 50 MB to 1.5 GB.
    """
    known = [value for value in (installed_bytes(), memory_limit()) if value is not None]
    return min(max(min(known, default=0) // 10, _LEAST_RESERVE), _MOST_RESERVE)


def peak_rss_bytes() -> int | None:
    """This process's highest resident set, mapped files included; None where unknown.

    Source: VmHWM, proc(5). Not getrusage: its ru_maxrss starts at the size of the process that forked this
    one.
    """
    return _kilobytes(Path("/proc/self/status")).get("VmHWM")


def _kernel_estimate(meminfo: Path) -> int | None:
    """MemAvailable: free memory and what the kernel can drop, its own needs left out (proc_meminfo(5)).

    Kernels before 3.14 do not say it: free memory and inactive file pages are a lower bound.
    """
    found = _kilobytes(meminfo)
    old = found["MemFree"] + found.get("Inactive(file)", 0) if "MemFree" in found else None
    return found.get("MemAvailable", old)


def _kilobytes(path: Path) -> dict[str, int]:
    """The sizes in a file of the kernel with lines such as `MemFree: 20 kB`: name -> bytes."""
    lines = (line.partition(":") for line in kernel_text(path).splitlines())
    sizes = ((name, value.split()) for name, _, value in lines)
    return {name: int(size[0]) * 1024 for name, size in sizes if size[1:] == ["kB"] and size[0].isdecimal()}


def address_space_left() -> int | None:
    """Bytes this process may still map, used or not (`ulimit -v`); None where nothing limits it."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    pages = kernel_text(Path("/proc/self/statm")).partition(" ")[0]
    if limit == resource.RLIM_INFINITY or not pages.isdecimal():
        return None
    return max(0, limit - int(pages) * os.sysconf("SC_PAGE_SIZE"))


class Giver(Protocol):
    """A holder of memory that it can give back when asked: a page pool."""

    def held_bytes(self) -> int:
        """Bytes it has filled, most of them a cache. From any thread."""

    def promised_bytes(self) -> int:
        """Bytes it is going to fill. From any thread."""

    def give_back_meanwhile(self) -> None:
        """Give back what `MemoryRoom.short` asks for, if that is possible now. From any thread."""


class MemoryRoom:
    """Bytes that may still be filled. For any number of threads.

    Args:
        available: bytes that are free now; None where that is unknown. Half of the machine is assumed then.
        reserve: bytes that stay free.
        clock: seconds.
    """

    def __init__(
        self,
        available: Callable[[], int | None] = available_bytes,
        reserve: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.reserve = reserve_bytes() if reserve is None else reserve
        self._available = available
        self.clock = clock
        self._lock = threading.Lock()
        self._givers: weakref.WeakSet[Giver] = weakref.WeakSet()
        self._wanted = 0  # asked of the givers
        self._left = 0  # above the reserve
        self._measured: float | None = None
        self._watch: threading.Thread | None = None

    def join(self, giver: Giver) -> None:
        """Add a giver. It must look at `short` every second and give back what is asked."""
        with self._lock:
            self._givers.add(giver)

    def look(self, max_age_s: float = LOOK_S) -> None:
        """Measure anew what was measured longer ago."""
        now = self.clock()
        with self._lock:
            if self._measured is None or now - self._measured >= max_age_s:
                self._measured = now
                self._left = self._free() - self.reserve

    def _free(self) -> int:
        """Bytes that are free and promised to nobody."""
        found = self._available()
        free = (installed_bytes() or 0) // 2 if found is None else found
        return free - sum(giver.promised_bytes() for giver in list(self._givers))

    def watch(self) -> None:
        """Look during steps too, in a thread of its own, from now on."""
        with self._lock:
            if self._watch is None:
                self._watch = threading.Thread(target=self._watching, name="hasten-memory", daemon=True)
                self._watch.start()

    def _watching(self) -> None:
        while True:
            time.sleep(self.look_s)
            self.look(self.look_s / 2)
            if self.short:
                for giver in list(self._givers):
                    giver.give_back_meanwhile()

    @property
    def left(self) -> int:
        """Bytes that may be taken, as of the last look; below 0: the reserve is touched."""
        return self._left

    @property
    def look_s(self) -> float:
        """Seconds until the next look: what others take until then has to fit in the reserve."""
        return LOOK_S if self._left > 4 * self.reserve else LOOK_S / 4

    @property
    def last(self) -> int:
        """Bytes of the reserve that may be filled before an answer fails."""
        return int(_LOW * self.reserve)

    @property
    def low(self) -> int:
        """Bytes that the reserve lacks, once it lacks more than a quarter; else 0."""
        return -self._left if self._left < (_LOW - 1.0) * self.reserve else 0

    @property
    def short(self) -> int:
        """Bytes to give back now: to fill the reserve again, or because `ask` wants them."""
        return max(self.low, self._wanted)

    def take(self, size: int) -> None:
        """Charge memory that a sequence was promised; below 0: it gives the promise back."""
        with self._lock:
            self._left -= size

    def gave(self, size: int) -> None:
        """Memory was given back to the system."""
        with self._lock:
            self._left += size
            self._wanted = max(0, self._wanted - size)

    def held(self) -> int:
        """Bytes that the givers have filled. They can give back those that no sequence uses."""
        return sum(giver.held_bytes() for giver in list(self._givers))

    def ask(self, size: int, patience_s: float = 3 * LOOK_S) -> int:
        """Bytes that are free. Where fewer than `size` are, the givers get time to free them first.

        Not from a giver's own thread: it has to do the giving.
        """
        free = self._free()
        until = self.clock() + patience_s
        while free < size and self.held() > 0 and self.clock() < until:
            with self._lock:
                self._wanted = size - free
            time.sleep(_POLL_S)
            free = self._free()
        with self._lock:
            self._wanted = 0
        return free

    def require(self, size: int, name: str) -> None:
        """Refuse to fill `size` bytes that are not free: the kernel would end the process.

        Raises:
            MachineError: so much memory is not free, though the givers were asked.
        """
        free = self.ask(size)
        if size > free:
            raise MachineError(
                f"{name} takes {size / 1e9:.2f} GB of memory, {free / 1e9:.2f} GB are free",
                hint="end other programs, raise the memory limit, or use a smaller model or recipe (w4)",
            )


@cache
def memory_room() -> MemoryRoom:
    """This process's account."""
    return MemoryRoom()
