"""Our engine timed in this process, the energy it takes, and what every engine's runs are boiled down to.

How each figure is defined, for every engine alike:

    ttft_ms             prompt ids in to first token out; a batch: until every sequence has its first
    prefill_tok_per_s   prompt tokens of all sequences / ttft; every prompt is new, no prefix is reused
    decode_tok_per_s    tokens after that moment, of all sequences, / time until the last of them;
                        for one sequence: (output - 1) / (first token to last)
    tpot_ms             that time / tokens a sequence

Prompts have exactly N token ids: the same for every engine, none twice in a run.

Energy is what this machine's counters say. Processors: RAPL, `energy_uj` of each package below
/sys/class/powercap (Linux; on most systems root alone may read it, since 2020: CVE-2020-8694). It counts up
and begins again at `max_energy_range_uj`. Memory, fans and power supplies are not in it. NVIDIA GPUs: NVML's
total energy, millijoules since the driver was loaded. What cannot be read is unknown, and so is the sum.
Other processes' energy is in the counters too: on a busy machine a figure is too high.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.bench.figures import Sample, TokenClock, percentile, steady
from hasten.core import GAP_SHARES, Machine, Measurement, ServingOptions, Stat, Workload
from hasten.errors import MachineError, UsageError
from hasten.machine.cgroup import kernel_text
from hasten.machine.memory import peak_rss_bytes
from hasten.machine.probe import stat_of
from hasten.speed.cost import Cost, cost, on_gpu

if TYPE_CHECKING:
    from hasten.engine.model import LanguageModel

_POWERCAP = Path("/sys/class/powercap")
_NVML = "libnvidia-ml.so.1"


@dataclass(frozen=True)
class _Counter:
    """One package's RAPL counter."""

    path: Path
    wraps_at: int | None  # microjoules

    def read(self) -> int:
        return int(kernel_text(self.path))


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
            counter = _Counter(folder / "energy_uj", int(kernel_text(folder / "max_energy_range_uj")))
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


TEXT_CHARACTERS = 400_000
"""How much of the default text is tokenized at most: about 100k tokens, tokenized in well under a second."""


def default_text() -> str:
    """The prose and code of `pydoc_data.topics`, which every CPython carries, in sorted order of topics."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))[:TEXT_CHARACTERS]


def check(workload: Workload) -> Workload:
    """The workload, if it can be measured.

    Raises:
        UsageError: a length below its smallest useful value.
    """
    for name, value, least in (
        ("prompt", workload.prompt, 1),
        ("output", workload.output, 2),
        ("batch", workload.batch, 1),
    ):
        if value < least:
            raise UsageError(
                f"--{name} must be at least {least}, got {value}",
                hint=f"use --{name} {least} or more"
                + (": one token has no decode time" if name == "output" else ""),
            )
    if not 0 <= workload.shared < workload.prompt:
        raise UsageError(
            f"{workload.shared} shared tokens leave none of a prompt of {workload.prompt} to compute",
            hint="give each request tokens of its own",
        )
    return workload


class PromptRing:
    """Cuts prompts out of one long list of ids.

    Every prompt starts where the one before ended, wrapping at the end. So each round's prompts are new to
    the engines and no prefix cache can answer for the prefill, yet every run of the program gives the same
    ids.
    """

    def __init__(self, ids: Sequence[int]) -> None:
        if not ids:
            raise UsageError("the benchmark text gave no tokens", hint="check the model's tokenizer")
        self.ids = list(ids)

    def prompt(self, index: int, length: int) -> list[int]:
        """Prompt number `index` of `length` ids."""
        start = index * length % len(self.ids)
        ring = self.ids[start:] + self.ids[:start]
        while len(ring) < length:
            ring += ring
        return ring[:length]

    def round(self, number: int, workload: Workload) -> list[list[int]]:
        """The prompts of one round: `batch` lists of `prompt` ids, the first `shared` of all the same."""
        first, own = number * workload.batch, workload.prompt - workload.shared
        return [self.shared(workload) + self.prompt(first + i, own) for i in range(workload.batch)]

    def shared(self, workload: Workload) -> list[int]:
        """What all prompts of a workload begin with."""
        return self.prompt(0, workload.shared) if workload.shared else []


def measure_model(
    model: LanguageModel,
    workload: Workload,
    runs: int = 5,
    *,
    machine: Machine | None = None,
) -> Measurement:
    """Time a loaded model alone: one warm-up and `runs` runs, each on a prompt of its own.

    Runs that other work disturbed are taken again (`hasten.bench.figures`).

    Args:
        machine: with measured ceilings; without it the fractions of them are None.

    Raises:
        UsageError: a workload or a number of runs that cannot be measured.
    """
    check(workload)
    ids = model.tokenizer.encode(default_text(), add_special=False)
    ring = PromptRing(ids)

    def run(number: int) -> Sample:
        return run_once(model, ring.round(number, workload), workload.output, ring.shared(workload))

    run(0)
    found = steady(run, rates_of, runs)
    return measurement_of_model(model, found.rounds, workload, found.disturbed, machine)


def measurement_of_model(
    model: LanguageModel,
    samples: Sequence[Sample],
    workload: Workload,
    disturbed: int,
    machine: Machine | None,
) -> Measurement:
    """The medians of runs of a model in this process.

    Args:
        samples: the runs that other work did not disturb.
        disturbed: how many runs other work disturbed.
        machine: with measured ceilings; without it the fractions of them are None.

    Raises:
        UsageError: there is no run.
    """
    import hasten

    found = measurement_of(
        samples,
        workload,
        engine="hasten",
        version=hasten.__version__,
        form=model.recipe.name,
        weight_bytes=model.weight_bytes,
        threads=model.threads,
        peak_rss_bytes=peak_rss_bytes(),
        disturbed_rounds=disturbed,
        device=model.device,
    )
    return found if machine is None else with_ceilings(found, model_cost(model, workload), machine)


def run_once(
    model: LanguageModel, prompts: list[list[int]], output: int, shared: Sequence[int] = ()
) -> Sample:
    """One timed run of all prompts together on the served road: greedy, past the end token, nothing drafted.

    No prefix is reused but `shared`, what all prompts begin with: it is computed before the clock starts.
    """
    from hasten.engine.request import Request
    from hasten.runtime.sampling import SamplingOptions

    options = SamplingOptions(temperature=0.0, ignore_eos=True)
    requests = [Request(tuple(ids), output, options, id=str(i)) for i, ids in enumerate(prompts)]
    with model.engine(ServingOptions(prefix_cache=bool(shared), speculate=False)) as engine:
        if shared:
            for _ in engine.run([Request((*shared, *shared[:1]), 1, options, id="shared")]):
                pass
        clock = TokenClock(prompts)
        for news in engine.run(requests):
            for token in news.token_ids:
                clock.push(int(news.request_id), token)
    return clock.finish()


def model_cost(model: LanguageModel, workload: Workload) -> Cost:
    """What the workload asks of the machine with this model in its recipe."""
    return cost(
        model.config, workload, model.recipe, model.weight_bytes, keeps_integers=model.bits_per_weight < 16
    )


def measurement_of(
    samples: Sequence[Sample],
    workload: Workload,
    *,
    engine: str,
    version: str,
    form: str,
    weight_bytes: int | None,
    threads: int,
    peak_rss_bytes: int | None,
    disturbed_rounds: int = 0,
    device: str = "cpu",
) -> Measurement:
    """The medians of an engine's runs.

    Raises:
        UsageError: there is no run.
    """
    gaps = sorted(gap for sample in samples for gap in sample.gaps_s)
    return Measurement(
        engine=engine,
        version=version,
        format=form,
        weight_bytes=weight_bytes,
        prefill_tok_per_s=_kept([s.prefill_tok_per_s for s in samples]),
        decode_tok_per_s=_kept([s.decode_tok_per_s for s in samples]),
        ttft_ms=_kept([1000 * s.ttft_s for s in samples]),
        tpot_ms=_kept([s.tpot_ms for s in samples]),
        peak_rss_bytes=peak_rss_bytes,
        workload=workload,
        threads=threads,
        disturbed_rounds=disturbed_rounds,
        device=device,
        gaps_ms=tuple(1000 * percentile(gaps, share) for share in GAP_SHARES) if gaps else (),
    )


def _kept(values: Sequence[float]) -> Stat:
    """The figure with its rounds, which later comparisons need."""
    return dataclasses.replace(stat_of(values), values=tuple(values))


def rates_of(sample: Sample) -> tuple[float, float]:
    """What tells whether other work slowed a run down: its decode and its prefill rate."""
    return sample.decode_tok_per_s, sample.prefill_tok_per_s


def with_ceilings(measurement: Measurement, cost: Cost, machine: Machine) -> Measurement:
    """The measurement with what it asked of the machine, and its fractions of the ceilings of what computed
    (formulas: `hasten.speed`)."""
    workload = measurement.workload
    measurement = dataclasses.replace(
        measurement,
        decode_bytes=cost.weight_bytes + cost.kv_bytes,
        decode_ops=cost.int8_ops + cost.bf16_ops + cost.attention_ops,
        prompt_bytes=float(cost.weight_bytes),
        prompt_ops=cost.prompt_int8_ops + cost.prompt_bf16_ops + cost.prompt_attention_ops,
    )
    if measurement.device == "cuda":
        gpu = on_gpu(machine, measurement.format.startswith("fp8"))
        decode, prefill = measurement.decode_tok_per_s.median, measurement.prefill_tok_per_s.median
        return dataclasses.replace(
            measurement,
            fraction_of_read_ceiling=cost.read_fraction(decode, workload, gpu),
            fraction_of_gpu_ceiling=cost.gpu_fraction(prefill, workload, gpu),
        )
    return dataclasses.replace(
        measurement,
        fraction_of_read_ceiling=cost.read_fraction(measurement.decode_tok_per_s.median, workload, machine),
        fraction_of_int8_ceiling=cost.int8_fraction(measurement.prefill_tok_per_s.median, workload, machine),
    )
