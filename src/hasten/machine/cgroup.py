"""Linux control groups: what a container or a service manager lets this process use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_PROC = Path("/proc")


def cpu_quota(proc: Path = _PROC) -> float | None:
    """Processors' worth of time this process may use, the least of all levels; None where nothing limits it.

    Source: `cpu.max` of version 2 (Documentation/admin-guide/cgroup-v2.rst), `cpu.cfs_quota_us` over
    `cpu.cfs_period_us` of version 1 (Documentation/scheduler/sched-bwc.rst).
    """
    quotas: list[float] = []
    for folder in _folders("cpu", proc):
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        if not quota:
            quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal() and int(period) > 0:
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def memory_limit(proc: Path = _PROC) -> int | None:
    """Bytes of memory this process may use, the smallest of all levels; None where nothing limits it."""
    limits: list[int] = []
    for folder in _folders("memory", proc):
        text = _text(folder / "memory.max") or _text(folder / "memory.limit_in_bytes")
        if text.isdecimal() and int(text) < 1 << 60:  # version 1 writes a number near 2^63 for no limit
            limits.append(int(text))
    return min(limits, default=None)


def memory_used(proc: Path = _PROC) -> int | None:
    """Bytes that count against the limit, those the kernel could drop at once left out; None if unknown."""
    for folder in _folders("memory", proc):
        text = _text(folder / "memory.current") or _text(folder / "memory.usage_in_bytes")
        if text.isdecimal():
            return max(0, int(text) - _droppable(folder))
    return None


def _droppable(folder: Path) -> int:
    lines = (line.split() for line in _text(folder / "memory.stat").splitlines())
    values = {fields[0]: int(fields[1]) for fields in lines if len(fields) == 2 and fields[1].isdecimal()}
    return values.get("total_inactive_file", values.get("inactive_file", 0))


def _folders(controller: str, proc: Path) -> Iterator[Path]:
    """Folders of this process's group and of the groups above it that are visible here, innermost first."""
    groups = _groups(proc)
    for line in _text(proc / "self" / "mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if len(fields) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        name = "" if kind[0] == "cgroup2" else controller
        if name and controller not in kind[2].split(","):
            continue
        yield from _upwards(groups.get(name), root=fields[3], mount=Path(fields[4]))


def _groups(proc: Path) -> dict[str, PurePosixPath]:
    """The group of this process by controller; "" is version 2's."""
    groups: dict[str, PurePosixPath] = {}
    for line in _text(proc / "self" / "cgroup").splitlines():
        fields = line.split(":", 2)
        if len(fields) == 3:
            groups.update(dict.fromkeys(fields[1].split(","), PurePosixPath(fields[2])))
    return groups


def _upwards(group: PurePosixPath | None, root: str, mount: Path) -> Iterator[Path]:
    if group is None:
        return
    inside = group.relative_to(root) if group.is_relative_to(root) else PurePosixPath(".")
    for part in (inside, *inside.parents):
        yield mount / part


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
