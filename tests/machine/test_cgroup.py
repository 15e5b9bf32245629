"""Control groups of both versions, in folders made up like the kernel's."""

from __future__ import annotations

from pathlib import Path

import pytest

from hasten.machine.cgroup import cpu_quota, memory_left, memory_limit


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
    assert memory_left(proc) is None, "no level says both a limit and its use"


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
    assert memory_left(proc) is None
    assert cpu_quota(tmp_path / "nothing") is None


def limited(folder: Path, limit: str, used: int, stat: str = "anon 5") -> None:
    """A version 2 group with a limit, bytes in use and a memory.stat."""
    write(folder / "memory.max", limit)
    write(folder / "memory.current", str(used))
    write(folder / "memory.stat", stat)


def test_what_is_left_counts_level_by_level(tmp_path: Path) -> None:
    """The group's own use is small, but its neighbours have filled the group above."""
    proc = system(tmp_path, "0::/a/b\n", [("cg", "/", "cgroup2 cgroup2 rw")])
    limited(tmp_path / "cg/a/b", "3000000", 500_000)
    limited(tmp_path / "cg/a", "4000000", 3_900_000)
    assert memory_limit(proc) == 3_000_000
    assert memory_left(proc) == 100_000
    limited(tmp_path / "cg/a", "4000000", 600_000)
    assert memory_left(proc) == 2_500_000
    limited(tmp_path / "cg/a", "4000000", 4_100_000)
    assert memory_left(proc) == 0


def test_a_group_without_a_limit_limits_nothing(tmp_path: Path) -> None:
    proc = system(tmp_path, "0::/a/b\n", [("cg", "/", "cgroup2 cgroup2 rw")])
    limited(tmp_path / "cg/a/b", "max", 500_000)
    limited(tmp_path / "cg/a", "4000000", 1_000_000)
    assert memory_left(proc) == 3_000_000


def test_memory_high_is_a_limit(tmp_path: Path) -> None:
    """Above it the kernel slows the group down until it is useless."""
    proc = system(tmp_path, "0::/a\n", [("cg", "/", "cgroup2 cgroup2 rw")])
    limited(tmp_path / "cg/a", "4000000", 1_000_000)
    write(tmp_path / "cg/a/memory.high", "3000000")
    assert memory_limit(proc) == 3_000_000
    assert memory_left(proc) == 2_000_000


@pytest.mark.parametrize(
    ("stat", "dropped"),
    [
        ("inactive_file 300000\nactive_file 200000", 500_000),
        ("inactive_file 300000\nactive_file 200000\nfile_mapped 150000", 350_000),  # mapped ones stay
        ("inactive_file 300000\nactive_file 100000\nfile_mapped 350000", 300_000),
        ("inactive_file 300000\nslab_reclaimable 100000", 350_000),
        (
            "inactive_file 1\ntotal_inactive_file 300000\ntotal_active_file 50000\ntotal_mapped_file 10000",
            340_000,
        ),
    ],
)
def test_pages_of_files_can_be_dropped(tmp_path: Path, stat: str, dropped: int) -> None:
    proc = system(tmp_path, "0::/a\n", [("cg", "/", "cgroup2 cgroup2 rw")])
    limited(tmp_path / "cg/a", "2000000", 1_000_000, stat)
    assert memory_left(proc) == 1_000_000 + dropped


def test_version_1_names_limits_of_groups_that_a_container_does_not_see(tmp_path: Path) -> None:
    proc = system(tmp_path, "4:memory:/x\n", [("mem", "/", "cgroup cgroup rw,memory")])
    write(tmp_path / "mem/x/memory.limit_in_bytes", "9223372036854771712")
    write(tmp_path / "mem/x/memory.usage_in_bytes", "1000")
    write(tmp_path / "mem/x/memory.stat", "hierarchical_memory_limit 5000\ntotal_inactive_file 400")
    assert memory_limit(proc) == 5000
    assert memory_left(proc) == 4400


def test_a_process_that_is_moved_is_found_again(tmp_path: Path) -> None:
    proc = system(tmp_path, "0::/a\n", [("cg", "/", "cgroup2 cgroup2 rw")])
    write(tmp_path / "cg/a/cpu.max", "100000 100000")
    write(tmp_path / "cg/b/cpu.max", "300000 100000")
    assert cpu_quota(proc) == 1.0
    (proc / "self" / "cgroup").write_text("0::/b\n")
    assert cpu_quota(proc) == 3.0
