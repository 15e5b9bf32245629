"""How many cores this process may use."""

from __future__ import annotations

import os

from hasten.machine.cgroup import cpu_quota


def core_ids() -> tuple[int, ...]:
    """Logical processors this process may run on, where the system says; else all of them by number."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def usable_cores() -> int:
    """Threads worth starting: the cores of the affinity mask, or fewer where a control group gives less time.

    A quota of 2.5 processors gives 2: the kernel would stop a third thread while the others wait for it.
    """
    quota = cpu_quota()
    allowed = len(core_ids())
    return allowed if quota is None else max(1, min(allowed, int(quota)))
