"""What this process may use of the machine: processors and cores.

Affinity (taskset, cpusets), the CPU quotas of control groups and hyperthreads are all looked at here. Whoever
starts threads asks `usable_cores`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hasten.errors import UsageError
from hasten.machine.cgroup import cpu_quota, kernel_text

_TOPOLOGY = Path("/sys/devices/system/cpu")


@dataclass(frozen=True)
class Cores:
    """What limits the threads of this process."""

    allowed: tuple[int, ...]  # logical processors of the affinity mask
    physical: int  # cores they lie on: two hyperthreads of a core count once
    quota: float | None  # processors' worth of time that control groups give; None: no limit

    @property
    def threads(self) -> int:
        """Threads worth starting: one a physical core, and no more than the quota gives time to.

        A decode step waits for memory, and a core's second hyperthread waits for the same memory. Under a
        quota of 2.5 processors a third thread would be stopped for half of each period while the others wait
        for it; below one processor there is still one thread.
        """
        return self.physical if self.quota is None else max(1, min(self.physical, int(self.quota)))

    @property
    def because(self) -> str:
        """Why `threads` is not the number of allowed processors; empty where it is."""
        reasons = []
        if self.physical < len(self.allowed):
            reasons.append(
                f"{len(self.allowed)} hyperthreads on {self.physical} core" + "s" * (self.physical != 1)
            )
        if self.quota is not None and int(self.quota) < self.physical:
            reasons.append(
                f"a control group gives the time of {self.quota:g} processor" + "s" * (self.quota != 1)
            )
        return ", ".join(reasons)


def cores(topology: Path = _TOPOLOGY) -> Cores:
    """What this process may use now."""
    allowed = core_ids()
    return Cores(allowed, physical_cores(allowed, topology), cpu_quota())


def usable_cores() -> int:
    """Threads worth starting here: `Cores.threads`."""
    return cores().threads


def threads_of(wanted: int | None) -> int:
    """Threads to compute with: as many as are asked for, `usable_cores` where nothing is.

    Raises:
        UsageError: below one, or more than four a processor.
    """
    if wanted is None:
        return usable_cores()
    allowed = len(core_ids())
    if wanted < 1 or wanted > 4 * allowed:
        raise UsageError(
            f"{wanted} threads asked for, this process may use {allowed} processors",
            hint=f"use --threads {usable_cores()}, the default here",
        )
    return wanted


def core_ids() -> tuple[int, ...]:
    """Logical processors this process may run on, where the system says; else all of them by number."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def physical_cores(allowed: Iterable[int], topology: Path = _TOPOLOGY) -> int:
    """How many physical cores these logical processors lie on; one each where the system does not say.

    Source: `thread_siblings_list` (Documentation/admin-guide/cputopology.rst), for older kernels too.
    """
    return len({min(_siblings(core, topology), default=core) for core in allowed})


def _siblings(core: int, topology: Path) -> list[int]:
    return numbers_in(kernel_text(topology / f"cpu{core}" / "topology" / "thread_siblings_list"))


def numbers_in(text: str) -> list[int]:
    """The numbers of a kernel list such as `0-3,8`."""
    numbers: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        if first.isdecimal() and (last or first).isdecimal():
            numbers += range(int(first), int(last or first) + 1)
    return numbers
