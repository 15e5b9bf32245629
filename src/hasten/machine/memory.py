"""How much memory there is, how much of it may still be used, and how much this process used."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from hasten.machine.cgroup import memory_left, memory_limit

_MEMINFO = Path("/proc/meminfo")
_LEAST_RESERVE, _MOST_RESERVE = 50_000_000, 1_500_000_000


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
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    lines = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(lines[0].split()[1]) * 1024 if lines else None


def _kernel_estimate(meminfo: Path) -> int | None:
    """MemAvailable: free memory and what the kernel can drop, its own needs left out (proc_meminfo(5)).

    Kernels before 3.14 do not say it: free memory and inactive file pages are a lower bound.
    """
    found: dict[str, int] = {}
    try:
        for line in meminfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name in ("MemAvailable", "MemFree", "Inactive(file)"):
                found[name] = int(value.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        return None
    if "MemFree" not in found:
        return found.get("MemAvailable")
    return found.get("MemAvailable", found["MemFree"] + found.get("Inactive(file)", 0))


def address_space_left() -> int | None:
    """Bytes this process may still map, used or not (`ulimit -v`); None where nothing limits it."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError, IndexError):
        return None
    return max(0, limit - pages * os.sysconf("SC_PAGE_SIZE"))
