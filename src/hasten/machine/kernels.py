"""Which way computes integer layers: chosen for each format and number of rows by timing it here.

The name of an instruction set chooses wrongly. On a Zen 4, one token of 4-bit weights is 1.5 times as fast
with one panel and no software prefetch as with four and prefetch; on a Zen 3 prefetch is what makes it fast.
So the first model of some size that is loaded has its formats timed, some tenths of a second each, and what
was found is kept in `cache_dir() / "machine"` by processor, instruction set, threads and version. All ways
give the same bits: a wrong choice costs speed and nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from hasten.cache import cache_dir, read_record, write_record
from hasten.errors import DiskError
from hasten.machine.probe import processor_id

Format = tuple[int, int, bool]  # bits, group, symmetric

LEAST_BYTES = 32 << 20
"""A format with fewer bytes in a model is left as it is: caches hold it, and timing it would not pay."""

_ROUNDS = 5
_log = logging.getLogger(__name__)

KNOWN: dict[tuple[str, str], tuple[str, ...]] = {
    ("AuthenticAMD 25 1 1", "avx2"): (  # Zen 3 servers
        *["avx2 stream, prefetch"] * 3,
        *["avx2 unpack, prefetch"] * 2,
        "avx2 unpack",
    ),
}
"""(processor, instruction set) -> the way of each class of rows, for every format. Measured by
benchmarks/kernels.py on machines of 2 cores; saves the first start there a second."""


def choose_kernels(
    matrices: Iterable[tuple[Format, int, int]], threads: int
) -> dict[Format, tuple[str, ...]]:
    """Take the fastest way for each format of a model that is large enough to matter.

    Args:
        matrices: (format, columns, bytes) of each packed matrix with integer weights.
        threads: threads that will compute; a choice holds for this number.

    Returns:
        What was chosen: format -> the way of each class of rows (`_native.row_classes()`).
    """
    from hasten import _native

    columns = _large(matrices)
    if not columns:
        return {}
    known = KNOWN.get((processor_id(), _native.isa()))
    chosen = dict.fromkeys(columns, known) if known is not None else _measured(columns, threads)
    for fmt, ways in chosen.items():
        for row_class, way in enumerate(ways):
            _native.choose_way(*fmt, row_class, way)
    return chosen


def measure_ways(native: Any, fmt: Format, columns: int, threads: int) -> tuple[str, ...]:
    """Time every way of every class of rows; the fastest of each.

    Few rows are bound by memory: their weights are put out of the caches before each round. Many rows are
    bound by arithmetic and need a small matrix only.
    """
    names = native.int_ways()
    bits, group, symmetric = fmt
    row_bytes = columns * bits / 8 + columns / group * (2 if symmetric else 4)
    found = []
    for rows in native.row_classes():
        tokens = min(rows, 64)
        height = max(16, int(((16 << 20) if tokens <= 8 else 2 << 20) / row_bytes) // 16 * 16)
        seconds = native.time_ways(*fmt, height, columns, tokens, threads, _ROUNDS)
        before = names.index(native.way_for(*fmt, rows))
        best = min(range(len(names)), key=seconds.__getitem__)
        # what is there stays, unless another is faster by more than noise
        found.append(names[best if seconds[best] < 0.97 * seconds[before] else before])
    return tuple(found)


def _large(matrices: Iterable[tuple[Format, int, int]]) -> dict[Format, int]:
    """Format -> columns of its largest matrix, for formats with LEAST_BYTES in all."""
    total: dict[Format, int] = {}
    largest: dict[Format, tuple[int, int]] = {}
    for fmt, columns, size in matrices:
        total[fmt] = total.get(fmt, 0) + size
        largest[fmt] = max(largest.get(fmt, (0, 0)), (size, columns))
    return {fmt: largest[fmt][1] for fmt, size in total.items() if size >= LEAST_BYTES}


def _measured(columns: Mapping[Format, int], threads: int) -> dict[Format, tuple[str, ...]]:
    """Kept choices; what is missing is measured and kept too."""
    from hasten import __version__, _native

    path = cache_dir() / "machine" / f"kernels-{_native.isa()}-{threads}.json"
    key = {
        "cpu": processor_id(),
        "isa": _native.isa(),
        "ways": _native.int_ways(),
        "classes": _native.row_classes(),
        "threads": threads,
        "version": __version__,
    }
    kept = read_record(path, key) or {}
    chosen = {fmt: tuple(kept[_name(fmt)]) for fmt in columns if _name(fmt) in kept}
    missing = [fmt for fmt in columns if fmt not in chosen]
    if not missing:
        return chosen
    _log.info("timing kernels for %s: once on this machine", ", ".join(_name(fmt) for fmt in missing))
    for fmt in missing:
        chosen[fmt] = measure_ways(_native, fmt, columns[fmt], threads)
    try:
        write_record(path, key, {**kept, **{_name(fmt): list(chosen[fmt]) for fmt in missing}})
    except DiskError:
        _log.debug("the choice of kernels cannot be kept in %s", path)
    return chosen


def _name(fmt: Format) -> str:
    bits, group, symmetric = fmt
    return f"w{bits}-g{group}{'' if symmetric else '-asym'}"
