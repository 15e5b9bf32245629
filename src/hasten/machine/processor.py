"""The processor's name and its caches, as the system describes them."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from pathlib import Path

from hasten.core import CacheLevel

_CPUINFO = Path("/proc/cpuinfo")
_CACHES = Path("/sys/devices/system/cpu")
_KEYS = ("model name", "Processor", "Hardware", "cpu model", "uarch")  # x86, older ARM, MIPS, RISC-V
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def processor_name(cpuinfo: Path = _CPUINFO) -> str:
    """The name the processor or the system gives, or its architecture where there is none."""
    if sys.platform == "darwin" and (brand := _sysctl("machdep.cpu.brand_string")):
        return brand
    fields = _cpuinfo(cpuinfo)
    for key in _KEYS:
        if fields.get(key):
            return " ".join(fields[key].split())
    if fields.get("CPU implementer"):
        return (
            f"{platform.machine()} implementer {fields['CPU implementer']} part {fields.get('CPU part', '?')}"
        )
    return platform.processor() or platform.machine()


def processor_id(cpuinfo: Path = _CPUINFO) -> str:
    """Maker, family, model and stepping as /proc/cpuinfo has them, else the name.

    Virtual machines hide the name ("AMD EPYC" for four generations), never these.
    """
    fields = _cpuinfo(cpuinfo)
    known = [fields.get(key, "") for key in ("vendor_id", "cpu family", "model", "stepping")]
    return " ".join(known) if all(known) else processor_name(cpuinfo)


def _cpuinfo(path: Path) -> dict[str, str]:
    """The first processor's fields."""
    fields: dict[str, str] = {}
    for line in _text(path).splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    return fields


def caches(core: int, root: Path = _CACHES) -> tuple[CacheLevel, ...]:
    """Caches that serve logical processor `core`, nearest first; empty if the system does not say."""
    if sys.platform == "darwin":
        return _mac_caches()
    found = [_cache(folder) for folder in (root / f"cpu{core}" / "cache").glob("index[0-9]*")]
    return tuple(sorted((c for c in found if c is not None), key=lambda c: (c.level, c.kind)))


def size_of(found: tuple[CacheLevel, ...], level: int) -> int | None:
    """Bytes of the data or unified cache of a level; None if unknown."""
    return next((c.bytes for c in found if c.level == level and c.kind != "instruction"), None)


def _cache(folder: Path) -> CacheLevel | None:
    size = re.fullmatch(r"(\d+)([KMG]?)", _text(folder / "size"))
    level = _text(folder / "level")
    if size is None or not level.isdecimal():
        return None
    return CacheLevel(
        level=int(level),
        kind=_text(folder / "type").lower() or "unified",
        bytes=int(size[1]) * _UNITS[size[2]],
        shared_by=max(1, len(numbers_in(_text(folder / "shared_cpu_list")))),
    )


def numbers_in(text: str) -> list[int]:
    """The numbers of a kernel list such as `0-3,8`."""
    numbers: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        if first.isdecimal() and (last or first).isdecimal():
            numbers += range(int(first), int(last or first) + 1)
    return numbers


def _mac_caches() -> tuple[CacheLevel, ...]:
    names = (
        ("hw.l1dcachesize", 1, "data"),
        ("hw.l2cachesize", 2, "unified"),
        ("hw.l3cachesize", 3, "unified"),
    )
    sizes = [(_sysctl(name), level, kind) for name, level, kind in names]
    return tuple(CacheLevel(level, kind, int(size), 1) for size, level, kind in sizes if size and int(size))


def _sysctl(name: str) -> str:
    try:
        done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
