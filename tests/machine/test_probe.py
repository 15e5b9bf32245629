"""Names, caches and GPUs as systems describe them, and measured ceilings. No speed is judged here."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hasten import _native
from hasten.core import Accelerator, CacheLevel, Ceiling, Machine, Stat, as_json
from hasten.errors import UsageError
from hasten.machine import probe as machine_probe
from hasten.machine.probe import probe

FLAGS = {
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512_vnni", "avx512_bf16"},
    "amx": {"amx_int8"},
    "neon": {"asimd"},
    "dotprod": {"asimddp"},
    "i8mm": {"i8mm"},
}


OPS_A_CYCLE = {  # one core
    ("scalar", "int8"): 64,
    ("scalar", "bf16"): 64,
    ("scalar", "fp32"): 64,
    ("avx2", "int8"): 128,
    ("avx2", "bf16"): 32,
    ("avx2", "fp32"): 32,
    ("avx512", "int8"): 256,
    ("avx512", "bf16"): 128,
    ("avx512", "fp32"): 64,
    ("amx", "int8"): 2048,
    ("amx", "bf16"): 1024,
    ("neon", "int8"): 128,
    ("dotprod", "int8"): 128,
    ("i8mm", "int8"): 256,
    **{(isa, kind): 32 for isa in ("neon", "dotprod", "i8mm") for kind in ("bf16", "fp32")},
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path))
    monkeypatch.setattr(machine_probe, "buffer_bytes", lambda: 8 << 20)
    yield tmp_path


def test_instruction_sets_match_what_the_system_reports() -> None:
    isas = _native.probe_isas()
    assert isas[0] == "scalar"
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    line = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    reported = set(line.split())
    for isa in isas[1:]:
        assert reported >= FLAGS[isa]
    if reported >= FLAGS["avx2"]:
        assert "avx2" in isas


def test_every_peak_runs_and_counts_its_operations() -> None:
    """No processor does more than OPS_A_CYCLE at more than 6 GHz: counting twice would show."""
    for isa, kind in _native.probe_peaks():
        rates = _native.probe_peak_tera_per_s(isa, kind, 1, 0.01)
        assert len(rates) >= 5
        assert all(1e-4 < rate < 0.006 * OPS_A_CYCLE[isa, kind] for rate in rates), (isa, kind, rates)


def test_wider_sets_do_more() -> None:
    best = {pair: max(_native.probe_peak_tera_per_s(*pair, 1, 0.05)) for pair in _native.probe_peaks()}
    if ("avx2", "int8") in best:
        assert best["avx2", "int8"] > best["scalar", "int8"]
    if ("avx512", "int8") in best:
        assert best["avx512", "int8"] > best["avx512", "fp32"]


@pytest.mark.parametrize(("isa", "kind"), [("avx9", "int8"), ("scalar", "int3"), ("amx", "fp32")])
def test_unknown_peaks_are_refused(isa: str, kind: str) -> None:
    with pytest.raises(ValueError):
        _native.probe_peak_tera_per_s(isa, kind, 1, 0.01)


@pytest.mark.parametrize("size", [0, 1, (2 << 20) + 1, 6 << 20])
def test_read_takes_any_size(size: int) -> None:
    read, rates = _native.probe_read_gb_per_s(2, size, 0.02)
    assert read == max(size >> 21, 1) << 21
    assert rates and all(0.01 < rate < 10_000 for rate in rates)


def test_buffer_is_larger_than_the_cache_and_leaves_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_probe, "available_bytes", lambda: None)
    assert 1 << 30 <= machine_probe.buffer_bytes() <= 4 << 30
    monkeypatch.setattr(machine_probe, "available_bytes", lambda: 400 << 20)
    assert machine_probe.buffer_bytes() == 100 << 20


def test_stat_of() -> None:
    assert machine_probe.stat_of([3.0]) == Stat(3.0, 3.0, 3.0, 1)
    stat = machine_probe.stat_of([float(i) for i in range(11)])
    assert stat == Stat(5.0, 1.0, 9.0, 11)


def test_kept_until_too_old_or_another_machine(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = Stat(1.0, 1.0, 1.0, 1)
    runs: list[float] = []

    def fake(threads: int | None, read_seconds: float, peak_seconds: float) -> dict[str, Any]:
        runs.append(1.0)
        peak = Ceiling("scalar", "int8", len(runs), stat)
        return {"read_gb_per_s": 10.0 + len(runs), "read_rounds": stat, "ceilings": (peak,)}

    monkeypatch.setattr(machine_probe, "measure_ceilings", fake)
    first = machine_probe.load_or_measure(60)
    assert machine_probe.load_or_measure(60) == first and len(runs) == 1
    with monkeypatch.context() as later:
        later.setattr(machine_probe.time, "time", lambda: 4e9)
        assert machine_probe.load_or_measure(60) != first
    monkeypatch.setattr(machine_probe, "processor_name", lambda: "another")
    assert machine_probe.load_or_measure(1e10)["read_gb_per_s"] == 13.0
    kept = cache / "machine" / "ceilings.json"
    kept.write_text(kept.read_text().replace("13.0", "99.0"))
    assert machine_probe.load_or_measure(1e10)["read_gb_per_s"] == 14.0


def test_measure_and_probe(cache: Path) -> None:
    found = machine_probe.measure_ceilings(threads=1, read_seconds=0.02, peak_seconds=0.01)
    measured = replace(probe(measure=False), **found)
    assert measured.read_buffer_bytes == 8 << 20
    assert measured.read_rounds and measured.read_gb_per_s
    assert measured.read_rounds.p10 <= measured.read_rounds.median <= measured.read_gb_per_s
    assert measured.int8_tops == max(c.tera_ops_per_s for c in measured.ceilings if c.kind == "int8")
    with pytest.raises(UsageError):
        machine_probe.measure_ceilings(threads=0)


def test_no_memory_is_unknown_not_an_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_probe, "buffer_bytes", lambda: 1 << 60)
    measured = machine_probe.measure_ceilings(threads=1, read_seconds=0.01, peak_seconds=0.001)
    assert measured["read_gb_per_s"] is None and measured["read_buffer_bytes"] is None


def test_probe_without_measuring_says_unknown() -> None:
    from hasten.cli.probe import document, rows

    machine = probe(measure=False)
    assert machine.cores >= 1 and machine.cpu and machine.isa[0] == "scalar"
    assert machine.read_gb_per_s is None and machine.ceilings == ()
    assert dict(rows(machine))["read bandwidth"] == "unknown"
    json.dumps(document(machine), allow_nan=False)


def test_command_prints_every_field() -> None:
    from hasten.cli.console import aligned
    from hasten.cli.probe import document, rows

    stat = Stat(40.0, 38.0, 45.5, 12)
    machine = replace(
        probe(measure=False),
        read_gb_per_s=45.6,
        read_rounds=stat,
        int8_tops=1.25,
        memory_limit_bytes=1 << 30,
        ceilings=(Ceiling("avx512", "int8", 1.25, stat),),
        l1d_bytes=None,
        caches=(),
    )
    shown = dict(rows(machine))
    assert shown["caches"] == "unknown"
    assert shown["read bandwidth"] == "45.6 GB/s  best of 12 rounds; p10 38.0, median 40.0, p90 45.5"
    assert shown["int8 ceiling"] == "1.25 TOPS" and shown["bf16 ceiling"] == "unknown"
    assert "limited" in shown["memory"] and "avx512 int8" in aligned(rows(machine))
    written = document(machine)
    assert written["schema_version"] == 1 and written["read_gb_per_s"] == 45.6
    assert set(written) == {"schema_version", *(f for f in as_json(machine))}
    assert isinstance(machine, Machine) and math.isfinite(written["int8_tops"])


def test_processor_names(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: AMD  EPYC 9R45\n\nprocessor\t: 1\nmodel name\t: other\n")
    assert machine_probe.processor_name(info) == "AMD EPYC 9R45"
    info.write_text("processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n")
    assert "implementer 0x41 part 0xd40" in machine_probe.processor_name(info)
    assert machine_probe.processor_name(tmp_path / "none")


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
    found = machine_probe.caches(3, tmp_path)
    assert found == (
        CacheLevel(1, "data", 48 << 10, 1),
        CacheLevel(1, "instruction", 32 << 10, 1),
        CacheLevel(3, "unified", 1 << 20, 9),
    )
    assert machine_probe.size_of(found, 1) == 48 << 10
    assert machine_probe.size_of(found, 2) is None
    assert machine_probe.caches(0, tmp_path) == ()


def test_gpu_names() -> None:
    assert machine_probe.nvidia_names(["NVIDIA H200, 143771 MiB", "", "odd"]) == ["NVIDIA H200 (143771 MiB)"]
    lines = ["WARNING: something", "device,Card Series,Card Model", "card0,AMD Instinct MI300X,0x74a1"]
    assert machine_probe.amd_names(lines) == ["AMD Instinct MI300X"]
    assert machine_probe.amd_names([]) == []


def test_gpu_programs_that_fail_or_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine_probe.gpus() == ()
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    program.chmod(0o755)
    assert machine_probe.gpus() == ()
    program.write_text("#!/bin/sh\necho 'Some GPU, 8 MiB'\n")
    assert machine_probe.gpus() == ("Some GPU (8 MiB)",)
    assert os.environ["PATH"] == str(tmp_path)


# A GPU's ceilings -------------------------------------------------------------------------------------------


def gpu(**changed: Any) -> Accelerator:
    return Accelerator(
        **{"name": "Some GPU", "memory_bytes": 80 << 30, "capability": "9.0", "copy_gb_per_s": 4000.0,
           "bf16_tflops": 800.0, "fp8_tflops": 1500.0, "to_device_gb_per_s": 50.0,
           "from_device_gb_per_s": 51.0, "launch_us": 3.0, "round_trip_us": 9.0} | changed
    )  # fmt: skip


def test_a_device_is_measured_through_torch() -> None:
    """On the CPU, with small sizes: every figure is there, and a copy counts both ways."""
    import torch

    found = machine_probe.measure_gpu(torch, "cpu", scale=1 / 128)
    figures = (found.copy_gb_per_s, found.bf16_tflops, found.to_device_gb_per_s, found.from_device_gb_per_s)
    assert all(0 < figure < 1e6 for figure in (*figures, found.launch_us, found.round_trip_us))
    assert found.fp8_tflops is None and found.capability == "0.0"


class FakeCuda:
    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def get_device_properties(self, _: int) -> Any:
        return SimpleNamespace(name="Some GPU", total_memory=80 << 30, uuid="1-2")


def test_a_gpu_is_measured_once_until_something_changes(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = SimpleNamespace(cuda=FakeCuda(), __version__="2.11", version=SimpleNamespace(cuda="13.0"))
    monkeypatch.setitem(sys.modules, "torch", torch)
    measured: list[Accelerator] = []
    monkeypatch.setattr(machine_probe, "measure_gpu", lambda _: measured.append(gpu()) or measured[-1])
    assert machine_probe.gpu_ceilings(60.0) == machine_probe.gpu_ceilings(60.0) == (gpu(),)
    assert len(measured) == 1
    assert machine_probe.gpu_ceilings() == (gpu(),) and len(measured) == 2
    torch.__version__ = "2.12"
    machine_probe.gpu_ceilings(60.0)
    assert len(measured) == 3


def test_a_gpu_that_fails_is_unknown(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = SimpleNamespace(cuda=FakeCuda(), __version__="2.11", version=SimpleNamespace(cuda="13.0"))
    monkeypatch.setitem(sys.modules, "torch", torch)

    def lost(_: Any) -> Accelerator:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(machine_probe, "measure_gpu", lost)
    assert machine_probe.gpu_ceilings() == ()


def test_the_table_has_a_gpus_rows() -> None:
    from hasten.cli.probe import rows

    machine = replace(machine_probe.probe(measure=False), accelerators=(gpu(fp8_tflops=None),))
    lines = dict(rows(machine))
    assert lines["Some GPU"] == "80 GiB, compute capability 9.0"
    assert lines["  memory copy, read and written"] == "4,000 GB/s"
    assert (lines["  bf16 ceiling"], lines["  fp8 ceiling"]) == ("800 TFLOPS", "unknown")
    assert lines["  host to GPU, GPU to host"] == "50.0 GB/s, 51.0 GB/s"
    assert lines["  a kernel's launch, and with waiting for it"] == "3.0 us, 9.0 us"
