"""How much memory there is, how much of it may still be used, and how much this process used."""

from __future__ import annotations

import os
from pathlib import Path

from hasten.machine.cgroup import memory_limit, memory_used

_MEMINFO = Path("/proc/meminfo")


def installed_bytes() -> int | None:
    """Memory of the machine; None if unknown."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def available_bytes(meminfo: Path = _MEMINFO) -> int | None:
    """Memory this process can take without swapping or meeting its control group's limit; None if unknown."""
    free = _kernel_estimate(meminfo)
    limit, used = memory_limit(), memory_used()
    left = None if limit is None else max(0, limit - (used or 0))
    known = [value for value in (free, left) if value is not None]
    return min(known, default=None)


def peak_rss_bytes() -> int | None:
    """This process's highest resident set, mapped files included; None where unknown.

    Source: VmHWM, proc(5). Not getrusage: its ru_maxrss starts at the size of the process that forked this
    one.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    lines = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(lines[0].split()[1]) * 1024 if lines else None


def _kernel_estimate(meminfo: Path) -> int | None:
    try:
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return None
    return None
