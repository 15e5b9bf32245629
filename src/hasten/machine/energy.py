"""Energy that processors and GPUs have used, from the counters of this machine.

Processors: RAPL, `energy_uj` of each package below /sys/class/powercap (Linux; on most systems root alone may
read it, since 2020: CVE-2020-8694). It counts up and begins again at `max_energy_range_uj`. Memory, fans and
power supplies are not in it. NVIDIA GPUs: NVML's total energy, millijoules since the driver was loaded. What
cannot be read is unknown, and so is the sum.

Other processes' energy is in the counters too: on a busy machine a figure is too high.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.errors import MachineError

_POWERCAP = Path("/sys/class/powercap")
_NVML = "libnvidia-ml.so.1"


@dataclass(frozen=True)
class _Counter:
    """One package's RAPL counter."""

    path: Path
    wraps_at: int | None  # microjoules

    def read(self) -> int:
        return int(self.path.read_text())


class EnergyMeter:
    """Sums what was used between two looks.

    Raises:
        MachineError: no counter can be read here.
    """

    def __init__(self, gpus: bool = False, powercap: Path = _POWERCAP) -> None:
        """`gpus`: add what NVIDIA GPUs used, all that this process sees."""
        self._counters = _packages(powercap)
        self._cards = _Cards() if gpus else None
        if not self._counters:
            raise MachineError(
                f"the energy that processors use cannot be read here: no readable energy_uj in {powercap}",
                hint="let an administrator make it readable, or search --for latency or --for cost",
            )

    def read(self) -> tuple[int, ...]:
        """All counters as they are now."""
        cards = self._cards.read() if self._cards is not None else ()
        return (*(counter.read() for counter in self._counters), *cards)

    def joules(self, before: Sequence[int], after: Sequence[int]) -> float:
        """What was used between two looks; a counter that began again in between is put right."""
        total = 0.0
        for place, (first, last) in enumerate(zip(before, after, strict=True)):
            if place >= len(self._counters):
                total += (last - first) / 1e3
                continue
            wraps_at = self._counters[place].wraps_at
            used = last - first if last >= first or wraps_at is None else last - first + wraps_at
            total += used / 1e6
        return total


def _packages(powercap: Path) -> list[_Counter]:
    """Whole packages: `intel-rapl:0`, on AMD too; parts of one (`intel-rapl:0:1`) are in it already."""
    found = []
    for folder in sorted(powercap.glob("*-rapl:*")):
        if folder.name.count(":") != 1 or folder.name.startswith("intel-rapl-mmio"):
            continue
        try:
            counter = _Counter(folder / "energy_uj", int((folder / "max_energy_range_uj").read_text()))
            counter.read()
        except (OSError, ValueError):
            return []  # a sum without one package would be wrong
        found.append(counter)
    return found


class _Cards:
    """NVIDIA's GPUs through NVML."""

    def __init__(self) -> None:
        try:
            self._nvml: Any = ctypes.CDLL(_NVML)
        except OSError:
            self._nvml = None
        count = ctypes.c_uint()
        if (
            self._nvml is None
            or self._nvml.nvmlInit_v2()
            or self._nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        ):
            raise MachineError(
                f"the energy that GPUs use cannot be read here: {_NVML} does not answer",
                hint="install NVIDIA's driver library, or search --for latency",
            )
        self._handles = []
        for index in range(count.value):
            handle = ctypes.c_void_p()
            self._nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle))
            self._handles.append(handle)
        self.read()

    def read(self) -> tuple[int, ...]:
        """Millijoules of each card."""
        found = []
        for handle in self._handles:
            used = ctypes.c_ulonglong()
            if self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(used)):
                raise MachineError(
                    "a GPU does not count its energy", hint="search --for latency or --for cost"
                )
            found.append(used.value)
        return tuple(found)
