"""Control groups of both versions, in folders made up like the kernel's."""

from __future__ import annotations

from pathlib import Path

import pytest

from hasten.machine.cgroup import cpu_quota, memory_limit, memory_used


def system(tmp_path: Path, groups: str, mounts: list[tuple[str, str, str]]) -> Path:
    """A /proc whose mountinfo names folders under tmp_path: (folder, root, "cgroup2 cgroup2 rw")."""
    own = tmp_path / "proc" / "self"
    own.mkdir(parents=True)
    (own / "cgroup").write_text(groups)
    lines = ["22 1 0:20 / / rw - ext4 /dev/vda rw"]
    lines += [
        f"3{i} 22 0:2{i} {root} {tmp_path / at} rw - {kind}" for i, (at, root, kind) in enumerate(mounts)
    ]
    (own / "mountinfo").write_text("\n".join(lines))
    return tmp_path / "proc"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def test_version_2_takes_the_tightest_level(tmp_path: Path) -> None:
    proc = system(tmp_path, "0::/a.slice/b\n", [("cg", "/", "cgroup2 cgroup2 rw")])
    write(tmp_path / "cg/a.slice/b/cpu.max", "400000 100000")
    write(tmp_path / "cg/a.slice/cpu.max", "150000 100000")
    write(tmp_path / "cg/a.slice/b/memory.max", "max")
    write(tmp_path / "cg/a.slice/memory.max", "2147483648")
    write(tmp_path / "cg/a.slice/b/memory.current", "1000000")
    write(tmp_path / "cg/a.slice/b/memory.stat", "anon 5\ninactive_file 400000")
    assert cpu_quota(proc) == 1.5
    assert memory_limit(proc) == 2 << 30
    assert memory_used(proc) == 600_000


def test_version_1_in_a_container_that_sees_its_host_path(tmp_path: Path) -> None:
    proc = system(
        tmp_path,
        "5:cpu,cpuacct:/docker/f00\n4:memory:/docker/f00\n",
        [
            ("cpu", "/docker/f00", "cgroup cgroup rw,cpu,cpuacct"),
            ("mem", "/docker/f00", "cgroup cgroup rw,memory"),
        ],
    )
    write(tmp_path / "cpu/cpu.cfs_quota_us", "250000")
    write(tmp_path / "cpu/cpu.cfs_period_us", "100000")
    write(tmp_path / "mem/memory.limit_in_bytes", "1073741824")
    assert cpu_quota(proc) == 2.5
    assert memory_limit(proc) == 1 << 30


def test_no_limit_is_none(tmp_path: Path) -> None:
    proc = system(
        tmp_path,
        "5:cpu:/\n4:memory:/\n",
        [("cpu", "/", "cgroup c rw,cpu"), ("mem", "/", "cgroup c rw,memory")],
    )
    write(tmp_path / "cpu/cpu.cfs_quota_us", "-1")
    write(tmp_path / "cpu/cpu.cfs_period_us", "100000")
    write(tmp_path / "mem/memory.limit_in_bytes", "9223372036854771712")
    assert cpu_quota(proc) is None
    assert memory_limit(proc) is None
    assert memory_used(proc) is None
    assert cpu_quota(tmp_path / "nothing") is None


@pytest.mark.parametrize(
    ("quota", "allowed", "expected"), [(None, 8, 8), (2.5, 8, 2), (0.5, 8, 1), (16.0, 4, 4), (4.0, 8, 4)]
)
def test_usable_cores(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, allowed: int, expected: int
) -> None:
    from hasten.machine import cores

    monkeypatch.setattr(cores, "cpu_quota", lambda: quota)
    monkeypatch.setattr(cores, "core_ids", lambda: tuple(range(allowed)))
    assert cores.usable_cores() == expected
