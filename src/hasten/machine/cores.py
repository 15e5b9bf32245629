"""What this process may use of the machine: processors and cores, and what control groups give.

Affinity (taskset, cpusets), the CPU quotas of Linux control groups (a container's or a service manager's;
versions 1 and 2, and what a container shows of either) and hyperthreads are all looked at here. Whoever
starts threads asks `usable_cores`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

from hasten.errors import UsageError

_TOPOLOGY = Path("/sys/devices/system/cpu")
_PROC = Path("/proc")
_NO_LIMIT = 1 << 60  # version 1 writes a number near 2^63 where there is none


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


def cpu_quota(proc: Path = _PROC) -> float | None:
    """Processors' worth of time this process may use, the least of all levels; None where nothing limits it.

    Source: `cpu.max` of version 2 (Documentation/admin-guide/cgroup-v2.rst), `cpu.cfs_quota_us` over
    `cpu.cfs_period_us` of version 1 (Documentation/scheduler/sched-bwc.rst).
    """
    quotas: list[float] = []
    for folder in group_folders("cpu", proc):
        quota, _, period = kernel_text(folder / "cpu.max").partition(" ")
        if not quota:
            quota, period = (
                kernel_text(folder / "cpu.cfs_quota_us"),
                kernel_text(folder / "cpu.cfs_period_us"),
            )
        if quota.isdecimal() and period.isdecimal() and int(period) > 0:
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def memory_limit(proc: Path = _PROC) -> int | None:
    """Bytes of memory this process may use, the smallest of all levels; None where nothing limits it."""
    return min((limit for _, limit in _limited(proc)), default=None)


def memory_left(proc: Path = _PROC) -> int | None:
    """Bytes this process can still take before a control group's limit is met; None where nothing limits it.

    Each level has its own limit and its own use, that of all groups below it: a group's neighbours take from
    what the group above allows. The least of all levels counts. Never below 0.
    """
    left: list[int] = []
    for folder, limit in _limited(proc):
        used = kernel_text(folder / "memory.current") or kernel_text(folder / "memory.usage_in_bytes")
        if used.isdecimal():
            left.append(max(0, limit - max(0, int(used) - _droppable(folder))))
    return min(left, default=None)


def _limited(proc: Path) -> Iterator[tuple[Path, int]]:
    """Groups around this process that have a memory limit, and the limit.

    Source: version 2's `memory.max`, and `memory.high`, above which the kernel slows a group down
    (Documentation/admin-guide/cgroup-v2.rst); version 1's `memory.limit_in_bytes`, and
    `hierarchical_memory_limit`, which names limits of groups that a container cannot see
    (Documentation/admin-guide/cgroup-v1/memory.rst).
    """
    for at, folder in enumerate(group_folders("memory", proc)):
        texts = [
            kernel_text(folder / name) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")
        ]
        if at == 0 and texts[2]:
            texts.append(str(_memory_stat(folder).get("hierarchical_memory_limit", "")))
        limits = [int(text) for text in texts if text.isdecimal() and int(text) < _NO_LIMIT]
        if limits:
            yield folder, min(limits)


def _droppable(folder: Path) -> int:
    """Bytes of a group's use that the kernel drops when the group needs memory.

    Those are pages of files, on the inactive and on the active list alike (the kernel's own estimate,
    MemAvailable, counts both: Documentation/filesystems/proc.rst), and half of the kernel's reclaimable
    objects, as in that estimate. Mapped file pages are left out as far as they can be on the active list:
    programs run from them, and would only read them again.
    """
    stat = _memory_stat(folder)

    def of(name: str) -> int:
        return stat.get(f"total_{name}", stat.get(name, 0))  # version 1 writes "total_" for the groups below

    mapped = stat.get("file_mapped", of("mapped_file"))
    return of("inactive_file") + max(0, of("active_file") - mapped) + of("slab_reclaimable") // 2


def _memory_stat(folder: Path) -> dict[str, int]:
    lines = (line.split() for line in kernel_text(folder / "memory.stat").splitlines())
    return {fields[0]: int(fields[1]) for fields in lines if len(fields) == 2 and fields[1].isdecimal()}


def group_folders(controller: str, proc: Path = _PROC) -> tuple[Path, ...]:
    """Folders of this process's group and of the groups above it that are visible here, innermost first."""
    return _found(controller, proc, kernel_text(proc / "self" / "cgroup"))


@lru_cache(maxsize=8)  # asked every second while a server runs; a process that is moved has another text
def _found(controller: str, proc: Path, text: str) -> tuple[Path, ...]:
    groups: dict[str, PurePosixPath] = {}  # by controller; "" is version 2's
    for line in text.splitlines():
        fields = line.split(":", 2)
        if len(fields) == 3:
            groups.update(dict.fromkeys(fields[1].split(","), PurePosixPath(fields[2])))
    found: list[Path] = []
    for line in kernel_text(proc / "self" / "mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if len(fields) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        name = "" if kind[0] == "cgroup2" else controller
        group, root, mount = groups.get(name), fields[3], Path(fields[4])
        if group is not None and (not name or controller in kind[2].split(",")):
            inside = group.relative_to(root) if group.is_relative_to(root) else PurePosixPath(".")
            found += [mount / part for part in (inside, *inside.parents)]
    return tuple(found)


def kernel_text(path: Path) -> str:
    """What a file of the kernel says, without blanks around it; empty where it is missing or unreadable."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
