"""How many threads are worth starting: affinity, hyperthreads, quotas."""

from __future__ import annotations

from pathlib import Path

import pytest

from hasten.machine import cores


def topology(root: Path, siblings: dict[int, str]) -> Path:
    """A folder like /sys/devices/system/cpu."""
    for core, text in siblings.items():
        folder = root / f"cpu{core}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("quota", "allowed", "expected"),
    [(None, 8, 8), (2.5, 8, 2), (1.0, 2, 1), (0.5, 2, 1), (16.0, 4, 4), (4.0, 8, 4)],
)
def test_a_quota_limits_threads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quota: float | None, allowed: int, expected: int
) -> None:
    monkeypatch.setattr(cores, "cpu_quota", lambda: quota)
    monkeypatch.setattr(cores, "core_ids", lambda: tuple(range(allowed)))
    found = cores.cores(tmp_path)
    assert found.threads == expected
    assert ("control group" in found.because) == (expected < allowed)


def test_two_hyperthreads_are_one_core(tmp_path: Path) -> None:
    root = topology(tmp_path, {0: "0,4", 1: "1,5", 2: "2-3", 3: "2-3", 4: "0,4", 5: "1,5"})
    assert cores.physical_cores(range(6), root) == 3
    assert cores.physical_cores([0, 1], root) == 2
    assert cores.physical_cores([4, 0], root) == 1, "both of one core"
    assert cores.physical_cores([4, 5], root) == 2, "the second threads of two cores"
    assert cores.physical_cores([0, 7], root) == 2, "a processor the system says nothing about"


def test_reasons(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = topology(tmp_path, {0: "0-1", 1: "0-1"})
    monkeypatch.setattr(cores, "core_ids", lambda: (0, 1))
    monkeypatch.setattr(cores, "cpu_quota", lambda: None)
    assert cores.cores(root) == cores.Cores((0, 1), 1, None)
    assert cores.cores(root).because == "2 hyperthreads on 1 core"
    assert cores.cores(tmp_path / "none").because == ""
    monkeypatch.setattr(cores, "cpu_quota", lambda: 0.5)
    assert "the time of 0.5 processors" in cores.cores(tmp_path / "none").because
