"""Measured ceilings: what memory and arithmetic can give at most here, with every usable core at work.

Read bandwidth: all threads read one buffer that no cache can hold, in huge pages, and the fastest of a few
ways of reading (1, 2 or 4 streams a thread, with and without prefetch). Arithmetic: loops of nothing but
multiply-adds on registers, for every instruction set here. The best round counts: others' work on a shared
machine can only slow a round down. Median, p10 and p90 of the rounds are kept beside it and tell how noisy
the machine is.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from hasten.cache import cache_dir, read_record, write_record
from hasten.core import Ceiling, Stat
from hasten.errors import DiskError, UsageError
from hasten.machine.cores import core_ids, usable_cores
from hasten.machine.memory import available_bytes
from hasten.machine.processor import caches, processor_name, size_of

Kind = Literal["int8", "bf16", "fp32"]

READ_SECONDS = 2.0  # of reading; getting the buffer costs up to twice as much again
PEAK_SECONDS = 0.25  # a ceiling
_LEAST_BUFFER = 1 << 30
_MOST_BUFFER = 4 << 30
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Ceilings:
    """What was measured, with `threads` threads."""

    threads: int
    read_gb_per_s: float | None  # best round
    read_rounds: Stat | None  # GB/s of all rounds
    read_buffer_bytes: int | None
    peaks: tuple[Ceiling, ...]

    def best(self, kind: Kind) -> float | None:
        """The highest ceiling of this kind here, 1e12 operations a second; None if unknown."""
        return max((c.tera_ops_per_s for c in self.peaks if c.kind == kind), default=None)


def measure(
    threads: int | None = None, read_seconds: float = READ_SECONDS, peak_seconds: float = PEAK_SECONDS
) -> Ceilings:
    """Measure every ceiling of this machine: under 15 s with the default times, with all usable cores.

    Raises:
        UsageError: `threads` is below one.
    """
    from hasten import _native

    count = usable_cores() if threads is None else threads
    if count < 1:
        raise UsageError(
            f"threads must be at least 1, not {count}", hint="leave threads out to use every core"
        )
    size, rates = _read(count, read_seconds)
    return Ceilings(
        threads=count,
        read_gb_per_s=max(rates, default=None),
        read_rounds=stat_of(rates) if rates else None,
        read_buffer_bytes=size or None,
        peaks=tuple(
            _peak(isa, kind, _native.probe_peak_tera_per_s(isa, kind, count, peak_seconds))
            for isa, kind in _native.probe_peaks()
        ),
    )


def load_or_measure(max_age_s: float = 3600.0, threads: int | None = None) -> Ceilings:
    """Ceilings measured here at most `max_age_s` seconds ago, else new ones.

    Here is: this processor, these cores, this boot, this version. Kept in `cache_dir() / "machine"`; a disk
    that cannot be written only costs the next caller the measurement.
    """
    path = cache_dir() / "machine" / "ceilings.json"
    key = _key(usable_cores() if threads is None else threads)
    kept = _fresh(read_record(path, key), max_age_s)
    if kept is not None:
        return kept
    measured = measure(threads)
    try:
        write_record(path, key, {"measured_at": time.time(), "ceilings": measured})
    except DiskError:
        return measured
    return measured


def stat_of(values: Sequence[float]) -> Stat:
    """Median, p10 and p90 of at least one value, between neighbours by straight lines."""
    deciles = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else [values[0]] * 9
    return Stat(median=statistics.median(values), p10=deciles[0], p90=deciles[8], n=len(values))


def buffer_bytes() -> int:
    """Bytes to read: four times the last cache, 1 to 4 GiB, and never more than a quarter of what is free."""
    last = size_of(caches(core_ids()[0]), 3) or size_of(caches(core_ids()[0]), 2) or 0
    wanted = min(max(4 * last, _LEAST_BUFFER), _MOST_BUFFER)
    free = available_bytes()
    return wanted if free is None else min(wanted, free // 4)


def _read(threads: int, seconds: float) -> tuple[int, list[float]]:
    from hasten import _native

    try:
        size, rates = _native.probe_read_gb_per_s(threads, buffer_bytes(), seconds)
    except MemoryError:  # not even the quarter that is said to be free: the bandwidth stays unknown
        return 0, []
    return int(size), [float(rate) for rate in rates]


def _peak(isa: str, kind: str, rates: Sequence[float]) -> Ceiling:
    return Ceiling(isa=isa, kind=cast(Kind, kind), tera_ops_per_s=max(rates), rounds=stat_of(rates))


def _key(threads: int) -> dict[str, Any]:
    from hasten import __version__, _native

    try:
        boot = _BOOT_ID.read_text().strip()
    except OSError:
        boot = ""
    return {
        "cpu": processor_name(),
        "cores": core_ids(),
        "threads": threads,
        "boot": boot,
        "isa": _native.probe_isas(),
        "version": __version__,
    }


def _fresh(record: Any, max_age_s: float) -> Ceilings | None:
    if record is None or not 0 <= time.time() - record["measured_at"] <= max_age_s:
        return None
    kept = record["ceilings"]
    rounds = kept["read_rounds"]
    peaks = tuple(Ceiling(**{**peak, "rounds": Stat(**peak["rounds"])}) for peak in kept["peaks"])
    return Ceilings(**{**kept, "read_rounds": None if rounds is None else Stat(**rounds), "peaks": peaks})
