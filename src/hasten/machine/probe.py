"""What is here: one call gives the whole Machine."""

from __future__ import annotations

import platform
from typing import get_args

from hasten.core import Ceiling, Machine
from hasten.machine.ceilings import Ceilings, Kind, load_or_measure
from hasten.machine.ceilings import measure as measure_ceilings
from hasten.machine.cgroup import memory_limit
from hasten.machine.cores import core_ids, cores
from hasten.machine.gpus import gpus
from hasten.machine.memory import installed_bytes
from hasten.machine.processor import caches, processor_name, size_of


def probe(measure: bool = True, max_age_s: float = 0.0, threads: int | None = None) -> Machine:
    """Describe this machine.

    Args:
        measure: measure the ceilings (read bandwidth in GB/s; int8, bf16, fp32 in 1e12 operations a second).
            Takes under 15 s and wants an otherwise idle machine. Without it they are None: unknown.
        max_age_s: take ceilings measured at most so many seconds ago on this processor, these cores and this
            boot instead of measuring; 0 always measures.
        threads: to measure the ceilings with; None: `usable_cores`.

    Returns:
        The machine; what could not be found out is None.
    """
    if not measure:
        return _describe(None)
    return _describe(load_or_measure(max_age_s, threads) if max_age_s > 0 else measure_ceilings(threads))


def _describe(measured: Ceilings | None) -> Machine:
    from hasten import _native

    here, found = cores(), caches(core_ids()[0])
    installed, limit = installed_bytes(), memory_limit()
    known = [value for value in (installed, limit) if value is not None]
    peaks: tuple[Ceiling, ...] = () if measured is None else measured.peaks
    int8, bf16, fp32 = (None if measured is None else measured.best(kind) for kind in get_args(Kind))
    return Machine(
        cpu=processor_name(),
        isa=tuple(_native.probe_isas()),
        cores=here.threads,
        cores_because=here.because,
        l1d_bytes=size_of(found, 1),
        l2_bytes=size_of(found, 2),
        l3_bytes=size_of(found, 3),
        memory_bytes=min(known, default=None),
        read_gb_per_s=None if measured is None else measured.read_gb_per_s,
        int8_tops=int8,
        bf16_tflops=bf16,
        fp32_tflops=fp32,
        gpus=gpus(),
        os=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=f"{platform.python_implementation()} {platform.python_version()}",
        caches=found,
        memory_limit_bytes=limit,
        read_rounds=None if measured is None else measured.read_rounds,
        read_buffer_bytes=None if measured is None else measured.read_buffer_bytes,
        ceilings=peaks,
    )
