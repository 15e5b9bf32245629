"""Names, caches, memory and GPUs as systems describe them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from hasten.core import CacheLevel
from hasten.machine import gpus, memory, processor


def test_processor_names(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: AMD  EPYC 9R45\n\nprocessor\t: 1\nmodel name\t: other\n")
    assert processor.processor_name(info) == "AMD EPYC 9R45"
    info.write_text("processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n")
    assert "implementer 0x41 part 0xd40" in processor.processor_name(info)
    assert processor.processor_name(tmp_path / "none")


def test_caches_of_a_core(tmp_path: Path) -> None:
    def level(index: int, **files: str) -> None:
        folder = tmp_path / "cpu3" / "cache" / f"index{index}"
        folder.mkdir(parents=True)
        for name, text in files.items():
            (folder / name).write_text(text + "\n")

    level(0, level="1", type="Data", size="48K", shared_cpu_list="3")
    level(1, level="1", type="Instruction", size="32K", shared_cpu_list="3")
    level(2, level="3", type="Unified", size="1M", shared_cpu_list="0-3,8-11,16")
    level(3, level="4", type="Unified", size="")
    found = processor.caches(3, tmp_path)
    assert found == (
        CacheLevel(1, "data", 48 << 10, 1),
        CacheLevel(1, "instruction", 32 << 10, 1),
        CacheLevel(3, "unified", 1 << 20, 9),
    )
    assert processor.size_of(found, 1) == 48 << 10
    assert processor.size_of(found, 2) is None
    assert processor.caches(0, tmp_path) == ()


@pytest.mark.skipif(sys.platform != "linux", reason="MemAvailable is Linux's")
def test_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "meminfo"
    info.write_text("MemTotal: 100 kB\nMemAvailable:   50 kB\n")
    monkeypatch.setattr(memory, "memory_left", lambda: None)
    assert memory.available_bytes(info) == 50 * 1024
    monkeypatch.setattr(memory, "memory_left", lambda: 20_000)
    assert memory.available_bytes(info) == 20_000
    monkeypatch.setattr(memory, "memory_left", lambda: None)
    assert memory.available_bytes(tmp_path / "none") is None
    info.write_text("MemTotal: 100 kB\nMemFree: 20 kB\nActive(file): 40 kB\nInactive(file): 10 kB\n")
    assert memory.available_bytes(info) == 30 * 1024, "a kernel before 3.14"
    info.write_text("MemFree: what\n")
    assert memory.available_bytes(info) is None
    assert (memory.installed_bytes() or 0) > 1 << 26


def test_gpu_names() -> None:
    assert gpus.nvidia_names(["NVIDIA H200, 143771 MiB", "", "odd line"]) == ["NVIDIA H200 (143771 MiB)"]
    lines = ["WARNING: something", "device,Card Series,Card Model", "card0,AMD Instinct MI300X,0x74a1"]
    assert gpus.amd_names(lines) == ["AMD Instinct MI300X"]
    assert gpus.amd_names([]) == []


def test_gpu_programs_that_fail_or_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus.gpus() == ()
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    program.chmod(0o755)
    assert gpus.gpus() == ()
    program.write_text("#!/bin/sh\necho 'Some GPU, 8 MiB'\n")
    assert gpus.gpus() == ("Some GPU (8 MiB)",)
    assert os.environ["PATH"] == str(tmp_path)
