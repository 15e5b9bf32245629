"""What Linux control groups (a container's or a service manager's) give this process: time and memory.

Versions 1 and 2, and what a container shows of either. Each group above counts too.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath

_PROC = Path("/proc")
_NO_LIMIT = 1 << 60  # version 1 writes a number near 2^63 where there is none


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
