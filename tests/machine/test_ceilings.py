"""The measured ceilings: sane orders of magnitude, kept and dropped as told. No speed is judged here."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hasten import _native
from hasten.core import Ceiling, Machine, Stat, as_json
from hasten.errors import UsageError
from hasten.machine import ceilings
from hasten.machine.probe import probe

FLAGS = {
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512_vnni", "avx512_bf16"},
    "amx": {"amx_int8"},
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
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path))
    monkeypatch.setattr(ceilings, "buffer_bytes", lambda: 8 << 20)
    yield tmp_path


def test_instruction_sets_match_what_the_system_reports() -> None:
    isas = _native.probe_isas()
    assert isas[0] == "scalar"
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
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
    monkeypatch.setattr(ceilings, "available_bytes", lambda: None)
    assert 1 << 30 <= ceilings.buffer_bytes() <= 4 << 30
    monkeypatch.setattr(ceilings, "available_bytes", lambda: 400 << 20)
    assert ceilings.buffer_bytes() == 100 << 20


def test_stat_of() -> None:
    assert ceilings.stat_of([3.0]) == Stat(3.0, 3.0, 3.0, 1)
    stat = ceilings.stat_of([float(i) for i in range(11)])
    assert stat == Stat(5.0, 1.0, 9.0, 11)


def test_kept_until_too_old_or_another_machine(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = Stat(1.0, 1.0, 1.0, 1)
    runs: list[float] = []

    def fake(threads: int | None = None) -> ceilings.Ceilings:
        runs.append(1.0)
        peak = Ceiling("scalar", "int8", len(runs), stat)
        return ceilings.Ceilings(2, 10.0 + len(runs), stat, 1 << 30, (peak,))

    monkeypatch.setattr(ceilings, "measure", fake)
    first = ceilings.load_or_measure(60)
    assert ceilings.load_or_measure(60) == first and len(runs) == 1
    with monkeypatch.context() as later:
        later.setattr(ceilings.time, "time", lambda: 4e9)
        assert ceilings.load_or_measure(60) != first
    monkeypatch.setattr(ceilings, "processor_name", lambda: "another")
    assert ceilings.load_or_measure(1e10).read_gb_per_s == 13.0
    kept = cache / "machine" / "ceilings.json"
    kept.write_text(kept.read_text().replace("13.0", "99.0"))
    assert ceilings.load_or_measure(1e10).read_gb_per_s == 14.0


def test_measure_and_probe(cache: Path) -> None:
    measured = ceilings.measure(threads=1, read_seconds=0.02, peak_seconds=0.01)
    assert measured.threads == 1 and measured.read_buffer_bytes == 8 << 20
    assert measured.read_rounds and measured.read_gb_per_s
    assert measured.read_rounds.p10 <= measured.read_rounds.median <= measured.read_gb_per_s
    assert measured.best("int8") == max(c.tera_ops_per_s for c in measured.peaks if c.kind == "int8")
    with pytest.raises(UsageError):
        ceilings.measure(threads=0)


def test_no_memory_is_unknown_not_an_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "buffer_bytes", lambda: 1 << 60)
    measured = ceilings.measure(threads=1, read_seconds=0.01, peak_seconds=0.001)
    assert measured.read_gb_per_s is None and measured.read_buffer_bytes is None


def test_probe_without_measuring_says_unknown() -> None:
    from hasten.cli.probe import document, rows

    machine = probe(measure=False)
    assert machine.cores >= 1 and machine.cpu and machine.isa[0] == "scalar"
    assert machine.read_gb_per_s is None and machine.ceilings == ()
    assert dict(rows(machine))["read bandwidth"] == "unknown"
    json.dumps(document(machine), allow_nan=False)


def test_command_prints_every_field() -> None:
    from hasten.cli.probe import document, rows, table

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
    assert "limited" in shown["memory"] and "avx512 int8" in table(machine)
    written = document(machine)
    assert written["schema_version"] == 1 and written["read_gb_per_s"] == 45.6
    assert set(written) == {"schema_version", *(f for f in as_json(machine))}
    assert isinstance(machine, Machine) and math.isfinite(written["int8_tops"])
