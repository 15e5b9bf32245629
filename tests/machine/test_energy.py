"""Energy counters: sums, wraps, and machines that do not let anybody read them."""

from __future__ import annotations

from pathlib import Path

import pytest

from hasten.bench.measure import EnergyMeter
from hasten.errors import MachineError


def package(root: Path, name: str, used: int, wraps_at: int = 1_000_000) -> Path:
    folder = root / name
    folder.mkdir()
    (folder / "max_energy_range_uj").write_text(f"{wraps_at}\n")
    (folder / "energy_uj").write_text(f"{used}\n")
    return folder / "energy_uj"


def test_packages_are_summed_and_parts_are_not(tmp_path: Path) -> None:
    one, two = package(tmp_path, "intel-rapl:0", 100), package(tmp_path, "intel-rapl:1", 999_000)
    part = package(tmp_path, "intel-rapl:0:0", 5)
    meter = EnergyMeter(powercap=tmp_path)
    before = meter.read()
    one.write_text("500100\n")
    two.write_text("500\n")  # began again
    part.write_text("900000\n")
    assert meter.joules(before, meter.read()) == pytest.approx(0.5 + 0.0015)


def test_a_machine_that_cannot_be_read_is_no_zero(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="cannot be read here") as caught:
        EnergyMeter(powercap=tmp_path)
    assert "--for latency" in str(caught.value.hint)
    package(tmp_path, "intel-rapl:0", 1)
    (package(tmp_path, "intel-rapl:1", 1)).write_text("not a number")
    with pytest.raises(MachineError):
        EnergyMeter(powercap=tmp_path)
