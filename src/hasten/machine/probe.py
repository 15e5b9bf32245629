"""What this machine is, what it gives at most, and which kernels are the fastest on it: measured here.

Read bandwidth: all threads read one buffer that no cache can hold, in huge pages, and the fastest of a few
ways of reading (1, 2 or 4 streams a thread, with and without prefetch). Arithmetic: loops of nothing but
multiply-adds on registers, for every instruction set here. The best round counts: others' work on a shared
machine can only slow a round down. Median, p10 and p90 of the rounds are kept beside it and tell how noisy
the machine is.

Kernels of integer layers are chosen for each format and number of rows by timing them, for the name of an
instruction set chooses wrongly. On a Zen 4, one token of 4-bit weights is 1.5 times as fast with one panel
and no software prefetch as with four and prefetch; on a Zen 3 prefetch is what makes it fast. The first model
of some size that is loaded has its formats timed, some tenths of a second each. What was found is kept in
`cache_dir() / "machine"` by processor, instruction set, threads and version. All ways give the same bits: a
wrong choice costs speed and nothing else.
"""

from __future__ import annotations

import contextlib
import logging
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from hasten.cache import cache_dir, read_record, write_record
from hasten.core import Accelerator, CacheLevel, Ceiling, Machine, Stat, as_json
from hasten.errors import DiskError, UsageError
from hasten.machine.cgroup import kernel_text, memory_limit
from hasten.machine.cores import core_ids, cores, numbers_in, usable_cores
from hasten.machine.memory import available_bytes, installed_bytes

READ_SECONDS = 2.0  # of reading; getting the buffer costs up to twice as much again
PEAK_SECONDS = 0.25  # a ceiling
_LEAST_BUFFER, _MOST_BUFFER = 1 << 30, 4 << 30
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_CPUINFO = Path("/proc/cpuinfo")
_CPUS = Path("/sys/devices/system/cpu")
_NAME_KEYS = ("model name", "Processor", "Hardware", "cpu model", "uarch")  # x86, older ARM, MIPS, RISC-V
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_MAC_CACHES = (
    ("hw.l1dcachesize", 1, "data"),
    ("hw.l2cachesize", 2, "unified"),
    ("hw.l3cachesize", 3, "unified"),
)
_PROGRAM_S = 5.0  # a driver's own program that takes longer does not answer


def probe(
    measure: bool = True,
    max_age_s: float = 0.0,
    threads: int | None = None,
    devices: Sequence[str] = ("cpu", "cuda"),
) -> Machine:
    """Describe this machine.

    Args:
        measure: measure the ceilings (read bandwidth in GB/s; int8, bf16, fp32 in 1e12 operations a second;
            a GPU's in `accelerators`). Takes under 15 s for the CPU and 5 s for a GPU, and wants an otherwise
            idle machine. Without it they are None: unknown.
        max_age_s: take ceilings measured at most so many seconds ago on this processor, these cores and this
            boot instead of measuring; 0 always measures.
        threads: to measure the ceilings with; None: `usable_cores`.
        devices: whose ceilings are measured. A GPU's need torch; where it is not there, there are none.

    Returns:
        The machine; what could not be found out is None.

    Raises:
        UsageError: `threads` is below one.
    """
    found = _described()
    if measure and "cpu" in devices:
        own = load_or_measure(max_age_s, threads) if max_age_s > 0 else measure_ceilings(threads)
        found = replace(found, **own)
    if measure and "cuda" in devices and (found.gpus or "cpu" not in devices):  # asked for by name
        found = replace(found, accelerators=gpu_ceilings(max_age_s))
    return found


def _described() -> Machine:
    from hasten import _native

    here, found = cores(), caches(core_ids()[0])
    limit = memory_limit()
    known = [value for value in (installed_bytes(), limit) if value is not None]
    return Machine(
        cpu=processor_name(),
        isa=tuple(_native.probe_isas()),
        cores=here.threads,
        cores_because=here.because,
        l1d_bytes=size_of(found, 1),
        l2_bytes=size_of(found, 2),
        l3_bytes=size_of(found, 3),
        memory_bytes=min(known, default=None),
        gpus=gpus(),
        os=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=f"{platform.python_implementation()} {platform.python_version()}",
        caches=found,
        memory_limit_bytes=limit,
    )


# Ceilings ---------------------------------------------------------------------------------------------------


def measure_ceilings(
    threads: int | None = None, read_seconds: float = READ_SECONDS, peak_seconds: float = PEAK_SECONDS
) -> dict[str, Any]:
    """Measure every ceiling: under 15 s with the default times, with all usable cores.

    Returns:
        The fields of `Machine` that are measured: name -> value.

    Raises:
        UsageError: `threads` is below one.
    """
    from hasten import _native

    count = usable_cores() if threads is None else threads
    if count < 1:
        raise UsageError(
            f"threads must be at least 1, not {count}", hint="leave threads out to use every core"
        )
    try:
        size, rates = _native.probe_read_gb_per_s(count, buffer_bytes(), read_seconds)
    except MemoryError:  # not even the quarter that is said to be free: the bandwidth stays unknown
        size, rates = 0, []
    rounds = {
        (isa, kind): _native.probe_peak_tera_per_s(isa, kind, count, peak_seconds)
        for isa, kind in _native.probe_peaks()
    }

    def best(kind: str) -> float | None:
        return max((max(of) for (_, other), of in rounds.items() if other == kind), default=None)

    return {
        "read_gb_per_s": max(rates, default=None),
        "read_rounds": stat_of(rates) if rates else None,
        "read_buffer_bytes": size or None,
        "int8_tops": best("int8"),
        "bf16_tflops": best("bf16"),
        "fp32_tflops": best("fp32"),
        "ceilings": tuple(
            Ceiling(isa, cast(Any, kind), max(of), stat_of(of)) for (isa, kind), of in rounds.items()
        ),
    }


def load_or_measure(
    max_age_s: float = 3600.0,
    threads: int | None = None,
    read_seconds: float = READ_SECONDS,
    peak_seconds: float = PEAK_SECONDS,
) -> dict[str, Any]:
    """Ceilings measured here at most `max_age_s` seconds ago, else new ones, as `measure_ceilings`.

    Here is: this processor, these cores, this boot, this version. Kept in `cache_dir() / "machine"`; a disk
    that cannot be written only costs the next caller the measurement.
    """
    path = cache_dir() / "machine" / "ceilings.json"
    key = _key(usable_cores() if threads is None else threads)
    kept = read_record(path, key)
    if kept is not None and 0 <= time.time() - kept["measured_at"] <= max_age_s:
        rounds = kept["ceilings"]["read_rounds"]
        peaks = tuple(Ceiling(**{**c, "rounds": Stat(**c["rounds"])}) for c in kept["ceilings"]["ceilings"])
        return {**kept["ceilings"], "read_rounds": rounds and Stat(**rounds), "ceilings": peaks}
    measured = measure_ceilings(threads, read_seconds, peak_seconds)
    with contextlib.suppress(DiskError):
        write_record(path, key, {"measured_at": time.time(), "ceilings": measured})
    return measured


def stat_of(values: Sequence[float]) -> Stat:
    """Median, p10 and p90 between neighbours by straight lines; UsageError where there is no value."""
    import statistics  # brings fractions and decimal: most starts need none of them

    if not values:
        raise UsageError("a figure needs at least one run, got none", hint="give --runs 1 or more")
    deciles = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else [values[0]] * 9
    return Stat(median=statistics.median(values), p10=deciles[0], p90=deciles[8], n=len(values))


def buffer_bytes() -> int:
    """Bytes to read: four times the last cache, 1 to 4 GiB, and never more than a quarter of what is free."""
    found = caches(core_ids()[0])
    last = size_of(found, 3) or size_of(found, 2) or 0
    wanted = min(max(4 * last, _LEAST_BUFFER), _MOST_BUFFER)
    free = available_bytes()
    return wanted if free is None else min(wanted, free // 4)


def _key(threads: int) -> dict[str, Any]:
    from hasten import __version__, _native

    return {
        "cpu": processor_name(),
        "cores": core_ids(),
        "threads": threads,
        "boot": kernel_text(_BOOT_ID),
        "isa": _native.probe_isas(),
        "version": __version__,
        "form": 2,
    }


# A GPU's ceilings -------------------------------------------------------------------------------------------

_GPU_BYTES = 2 << 30  # of each of two buffers, at most an eighth of what is free
_GPU_SIDE = 8192  # of matrices
_HOST_BYTES = 256 << 20
_LAUNCHES = 500
_GPU_ROUNDS = 8
FP8_CAPABILITY = (8, 9)
"""Compute capability from which on a GPU multiplies e4m3."""


def gpu_ceilings(max_age_s: float = 0.0) -> tuple[Accelerator, ...]:
    """What torch's current GPU gives, measured or as kept; empty where torch is missing or sees none."""
    try:
        import torch
    except ImportError:
        return ()
    if not torch.cuda.is_available():
        return ()
    path, key = cache_dir() / "machine" / "gpu.json", _gpu_key(torch)
    kept = read_record(path, key) if max_age_s > 0 else None
    if kept is not None and 0 <= time.time() - kept["measured_at"] <= max_age_s:
        return (Accelerator(**kept["gpu"]),)
    try:
        found = measure_gpu(torch)
    except RuntimeError as wrong:  # it has no memory left, or is lost: unknown
        _log.warning("the GPU's ceilings could not be measured: %s", str(wrong).partition("\n")[0])
        return ()
    with contextlib.suppress(DiskError):
        write_record(path, key, {"measured_at": time.time(), "gpu": as_json(found)})
    return (found,)


def _gpu_key(torch: Any) -> dict[str, Any]:
    from hasten import __version__

    here = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": here.name,
        "uuid": str(getattr(here, "uuid", "")),
        "memory": here.total_memory,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "boot": kernel_text(_BOOT_ID),
        "version": __version__,
    }


def measure_gpu(torch: Any, device: str = "cuda", scale: float = 1.0) -> Accelerator:
    """Measure a GPU in some seconds.

    Args:
        torch: the module.
        device: "cpu" measures the same on the CPU, for tests.
        scale: of all sizes, for tests.
    """
    timer, size = _DeviceTimer(torch, device), int(_GPU_BYTES * scale)
    name, memory, capability = "CPU", installed_bytes() or 0, (0, 0)
    if device == "cuda":
        here = torch.cuda.get_device_properties(torch.cuda.current_device())
        name, memory, capability = here.name, here.total_memory, (here.major, here.minor)
        size = min(size, torch.cuda.mem_get_info()[0] // 8)
    try:
        return Accelerator(
            name=name,
            memory_bytes=memory,
            capability=f"{capability[0]}.{capability[1]}",
            **timer.copies(size, min(int(_HOST_BYTES * scale), size)),
            **timer.products(max(64, int(_GPU_SIDE * scale) // 64 * 64), capability >= FP8_CAPABILITY),
            **timer.launches(),
        )
    finally:
        if device == "cuda":
            torch.cuda.empty_cache()  # other processes need it


@dataclass(frozen=True)
class _DeviceTimer:
    """Times calls of torch on a device, by the fields of `Accelerator`."""

    torch: Any
    device: str

    def wait(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], times: int) -> float:
        """Of one of so many calls in a row; the best round."""
        best = float("inf")
        for _ in range(_GPU_ROUNDS + 1):  # the first one warms up
            self.wait()
            started = time.perf_counter()
            for _ in range(times):
                work()
            self.wait()
            best = min(best, (time.perf_counter() - started) / times)
        return best

    def copies(self, size: int, host_size: int) -> dict[str, float]:
        torch = self.torch
        source = torch.zeros(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        host = torch.zeros(host_size, dtype=torch.uint8, pin_memory=self.device == "cuda")
        part = target[:host_size]
        return {
            "copy_gb_per_s": 2 * size / self.seconds(lambda: target.copy_(source), 4) / 1e9,
            "to_device_gb_per_s": host_size
            / self.seconds(lambda: part.copy_(host, non_blocking=True), 2)
            / 1e9,
            "from_device_gb_per_s": host_size
            / self.seconds(lambda: host.copy_(part, non_blocking=True), 2)
            / 1e9,
        }

    def products(self, side: int, has_fp8: bool) -> dict[str, Any]:
        torch, operations = self.torch, 2 * side**3 / 1e12
        a, b = (torch.randn(side, side, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        found = {"bf16_tflops": operations / self.seconds(lambda: a @ b, 4)}
        if not has_fp8:
            return {**found, "fp8_tflops": None}
        narrow = [one.to(torch.float8_e4m3fn) for one in (a, b)]
        down, along = torch.ones(side, 1, device=self.device), torch.ones(1, side, device=self.device)

        def product() -> object:
            return torch._scaled_mm(narrow[0], narrow[1].t(), down, along, out_dtype=torch.bfloat16)

        return {**found, "fp8_tflops": operations / self.seconds(product, 4)}

    def launches(self) -> dict[str, float]:
        one = self.torch.zeros(1, device=self.device)

        def there_and_back() -> None:
            one.add_(1)
            self.wait()

        return {
            "launch_us": 1e6 * self.seconds(lambda: one.add_(1), _LAUNCHES),
            "round_trip_us": 1e6 * self.seconds(there_and_back, 20),
        }


# Processor, caches, GPUs ------------------------------------------------------------------------------------


def processor_name(cpuinfo: Path = _CPUINFO) -> str:
    """The name the processor or the system gives, or its architecture where there is none."""
    if sys.platform == "darwin" and (brand := _said("sysctl", "-n", "machdep.cpu.brand_string")):
        return brand[0]
    fields = _cpuinfo(cpuinfo)
    for key in _NAME_KEYS:
        if fields.get(key):
            return " ".join(fields[key].split())
    if maker := fields.get("CPU implementer"):
        return f"{platform.machine()} implementer {maker} part {fields.get('CPU part', '?')}"
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
    for line in kernel_text(path).splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    return fields


def caches(core: int, root: Path = _CPUS) -> tuple[CacheLevel, ...]:
    """Caches that serve logical processor `core`, nearest first; empty if the system does not say."""
    if sys.platform == "darwin":
        sizes = [(_said("sysctl", "-n", name), level, kind) for name, level, kind in _MAC_CACHES]
        return tuple(CacheLevel(level, kind, int(of[0]), 1) for of, level, kind in sizes if of and int(of[0]))
    found = [_cache(folder) for folder in (root / f"cpu{core}" / "cache").glob("index[0-9]*")]
    return tuple(sorted((c for c in found if c is not None), key=lambda c: (c.level, c.kind)))


def _cache(folder: Path) -> CacheLevel | None:
    size = re.fullmatch(r"(\d+)([KMG]?)", kernel_text(folder / "size"))
    level = kernel_text(folder / "level")
    if size is None or not level.isdecimal():
        return None
    return CacheLevel(
        level=int(level),
        kind=kernel_text(folder / "type").lower() or "unified",
        bytes=int(size[1]) * _UNITS[size[2]],
        shared_by=max(1, len(numbers_in(kernel_text(folder / "shared_cpu_list")))),
    )


def size_of(found: tuple[CacheLevel, ...], level: int) -> int | None:
    """Bytes of the data or unified cache of a level; None if unknown."""
    return next((c.bytes for c in found if c.level == level and c.kind != "instruction"), None)


def gpus() -> tuple[str, ...]:
    """One line a GPU, its name and memory, from the drivers' own programs; empty where none answers."""
    nvidia = _said("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
    return tuple(nvidia_names(nvidia) + amd_names(_said("rocm-smi", "--showproductname", "--csv")))


def nvidia_names(lines: list[str]) -> list[str]:
    """From `NVIDIA H200, 143771 MiB` to `NVIDIA H200 (143771 MiB)`."""
    rows = [[field.strip() for field in line.split(",")] for line in lines]
    return [f"{row[0]} ({row[1]})" for row in rows if len(row) == 2]


def amd_names(lines: list[str]) -> list[str]:
    """The column `Card Series` (or `Card series`) of rocm-smi's table."""
    import csv

    rows = csv.DictReader(line.replace("Card Series", "Card series") for line in lines if "," in line)
    return [row["Card series"].strip() for row in rows if row.get("Card series")]


def _said(program: str, *arguments: str) -> list[str]:
    """Lines that a program prints; none where it is missing, fails or hangs."""
    found = shutil.which(program)
    if found is None:
        return []
    try:
        done = subprocess.run(
            [found, *arguments], capture_output=True, text=True, timeout=_PROGRAM_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


# Kernels of integer layers -------------------------------------------------------------------------------

Format = tuple[int, int, bool]  # bits, group, symmetric

LEAST_BYTES = 32 << 20
"""A format with fewer bytes in a model is left as it is: caches hold it, and timing it would not pay."""

_ROUNDS = 5
_PROMPT = 256  # tokens: a way that is the fastest for 64 can lose when their activations outgrow a cache
_log = logging.getLogger(__name__)

KNOWN: dict[tuple[str, str], tuple[str, ...]] = {
    ("AuthenticAMD 25 1 1", "avx2"): (  # Zen 3 servers
        *["avx2 stream, prefetch"] * 3,
        *["avx2 unpack, prefetch"] * 2,
        "avx2 unpack",
    ),
    ("AuthenticAMD 26 2 1", "avx512"): (  # Zen 5 servers
        *["avx512 one panel"] * 2,
        "avx512 two panels, prefetch",
        *["avx512 two panels, eight tokens"] * 3,
    ),
    ("GenuineIntel 6 207 2", "avx512"): (  # Xeon with AVX512-VNNI that shows no AMX
        "avx512 four panels, prefetch",
        *["avx512 two panels, prefetch"] * 2,
        *["avx512 two panels, eight tokens"] * 2,
        "avx512 unpack",
    ),
}
"""(processor, instruction set) -> the way of each class of rows, for every format. Measured by
benchmarks/kernels.py on machines of 2 cores; saves the first start there some seconds. The Xeon
would read prompts of w8 1.09 and of w4-g128 1.05 times as fast by the way of eight tokens (kernels.json)."""


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
    bound by arithmetic and need a small matrix only. What is in use stays, unless another is 3 % faster
    twice: the fastest of ten in one timing may owe it to a moment in which other work held the rest up.
    """
    names = native.int_ways()
    bits, group, symmetric = fmt
    row_bytes = columns * bits / 8 + columns / group * (2 if symmetric else 4)
    found = []
    for rows in native.row_classes():
        tokens = min(rows, _PROMPT)
        height = max(16, int(((8 << 20) if tokens <= 8 else 2 << 20) / row_bytes) // 16 * 16)
        taken = names.index(native.way_for(*fmt, rows))
        seconds = native.time_ways(*fmt, height, columns, tokens, threads, _ROUNDS)
        best = min(range(len(names)), key=seconds.__getitem__)
        if seconds[best] < 0.97 * seconds[taken]:
            again = native.time_ways(*fmt, height, columns, tokens, threads, _ROUNDS)
            taken = best if again[best] < 0.97 * again[taken] else taken
        found.append(names[taken])
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
