"""`hasten probe`: what this machine is and what it measures."""

from __future__ import annotations

import sys
from typing import Annotated, Any

from hasten.cli.console import aligned, emit, note, shown
from hasten.cli.flags import JsonOption, given
from hasten.core import SCHEMA_VERSION, Accelerator, CacheLevel, Machine, Stat, as_json

KEPT = "Nothing was kept: a probe always measures anew."


def command(
    measure: Annotated[
        bool, given("--measure/--no-measure", None, "Measure the ceilings (under 15 s), or only look.")
    ] = True,
    json: JsonOption = False,
) -> None:
    """Measure this machine: cores, caches, memory bandwidth, compute ceilings.

    Reads a buffer larger than any cache with all threads and runs loops of nothing but multiply-adds, for
    every instruction set here. The best round counts; the spread over the rounds says how noisy the machine
    is. Where torch finds a GPU: its memory, its bf16 and fp8 products, copies between host and GPU, and how
    long a launch takes.
    """
    from hasten.machine.probe import probe

    if measure:
        note("measuring with all cores, under 15 s: other work on this machine lowers the figures ...")
    machine = probe(measure=measure)
    if json:
        emit(document(machine))
    else:
        sys.stdout.write(aligned(rows(machine)))


def document(machine: Machine) -> dict[str, Any]:
    """The JSON document: `schema_version`, then every field of `Machine`."""
    return {"schema_version": SCHEMA_VERSION, **as_json(machine)}


def rows(machine: Machine) -> list[tuple[str, str]]:
    """The table's lines, what and how much; what is not known says `unknown`."""
    because = f" ({machine.cores_because})" if machine.cores_because else ""
    limited = "" if machine.memory_limit_bytes is None else " (limited by the control group)"
    lines = [
        ("processor", machine.cpu),
        ("instruction sets", ", ".join(machine.isa)),
        ("cores this process may use", f"{machine.cores}{because}"),
        ("caches", ", ".join(map(_cache, machine.caches)) or "unknown"),
        ("memory", _size(machine.memory_bytes) + limited),
        ("GPUs", ", ".join(machine.gpus) or "none found"),
        ("system", machine.os),
        ("Python", machine.python),
        ("read bandwidth", shown(machine.read_gb_per_s, "GB/s") + _spread(machine.read_rounds)),
        ("int8 ceiling", shown(machine.int8_tops, "TOPS", 2)),
        ("bf16 ceiling", shown(machine.bf16_tflops, "TFLOPS", 2)),
        ("fp32 ceiling", shown(machine.fp32_tflops, "TFLOPS", 2)),
    ]
    for c in machine.ceilings:
        unit = "TOPS" if c.kind == "int8" else "TFLOPS"
        lines.append((f"  {c.isa} {c.kind}", shown(c.tera_ops_per_s, unit, 3) + _spread(c.rounds, 3)))
    return lines + [line for one in machine.accelerators for line in _gpu_rows(one)]


def _gpu_rows(gpu: Accelerator) -> list[tuple[str, str]]:
    to, back = shown(gpu.to_device_gb_per_s, "GB/s"), shown(gpu.from_device_gb_per_s, "GB/s")
    each, trip = shown(gpu.launch_us, "us"), shown(gpu.round_trip_us, "us")
    return [
        (gpu.name, f"{_size(gpu.memory_bytes)}, compute capability {gpu.capability}"),
        ("  memory copy, read and written", shown(gpu.copy_gb_per_s, "GB/s", 0)),
        ("  bf16 ceiling", shown(gpu.bf16_tflops, "TFLOPS", 0)),
        ("  fp8 ceiling", shown(gpu.fp8_tflops, "TFLOPS", 0)),
        ("  host to GPU, GPU to host", f"{to}, {back}"),
        ("  a kernel's launch, and with waiting for it", f"{each}, {trip}"),
    ]


def _cache(cache: CacheLevel) -> str:
    kind = {"data": "d", "instruction": "i"}.get(cache.kind, "")
    shared = f" shared by {cache.shared_by}" if cache.shared_by > 1 else ""
    return f"L{cache.level}{kind} {_size(cache.bytes)}{shared}"


def _size(count: int | None) -> str:
    if count is None:
        return "unknown"
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if count >= factor:
            return f"{count / factor:.4g} {unit}"
    return f"{count / 1024:.4g} KiB"


def _spread(rounds: Stat | None, digits: int = 1) -> str:
    if rounds is None:
        return ""
    low, middle, high = (f"{v:,.{digits}f}" for v in (rounds.p10, rounds.median, rounds.p90))
    return f"  best of {rounds.n} rounds; p10 {low}, median {middle}, p90 {high}"
