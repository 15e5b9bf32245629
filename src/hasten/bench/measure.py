"""Our engine timed in this process, and the figures every engine's runs are boiled down to.

How each figure is defined, for every engine alike:

    ttft_ms             prompt ids in to first token out; a batch: until every sequence has its first
    prefill_tok_per_s   prompt tokens of all sequences / ttft; every prompt is new, no prefix is reused
    decode_tok_per_s    tokens after that moment, of all sequences, / time until the last of them;
                        for one sequence: (output - 1) / (first token to last)
    tpot_ms             that time / tokens a sequence
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from hasten.bench import workloads
from hasten.bench.figures import Sample, TokenClock, steady
from hasten.core import Machine, Measurement, ServingOptions, Stat, Workload
from hasten.machine.memory import peak_rss_bytes
from hasten.speed import Cost, cost

if TYPE_CHECKING:
    from hasten.engine.model import LanguageModel


def measure_model(
    model: LanguageModel,
    workload: Workload,
    runs: int = 5,
    *,
    machine: Machine | None = None,
    first: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> Measurement:
    """Time a loaded model alone: one warm-up and `runs` runs, each on a prompt of its own.

    Runs that other work disturbed are taken again (`hasten.bench.figures`).

    Args:
        workload: lengths in tokens and the number of sequences run together. machine: with measured
        ceilings, to fill `fraction_of_read_ceiling` and `fraction_of_int8_ceiling`; without
            it they are None.
        first: number of the first prompt; give another one to measure a model twice.
        say: told of rounds that are taken again.
    Raises:
        UsageError: a workload or a number of runs that cannot be measured.
    """
    import hasten

    workloads.check(workload)
    ids = model.tokenizer.encode(workloads.default_text(), add_special=False)
    ring = workloads.PromptRing(ids)
    run_once(model, ring.round(first, workload), workload.output)
    found = steady(
        lambda number: run_once(model, ring.round(first + number, workload), workload.output),
        rates_of,
        runs,
        say,
    )
    measurement = measurement_of(
        found.rounds,
        workload,
        engine="hasten",
        version=hasten.__version__,
        form=model.recipe.name,
        weight_bytes=model.weight_bytes,
        threads=model.threads,
        peak_rss_bytes=peak_rss_bytes(),
        disturbed_rounds=found.disturbed,
    )
    return (
        measurement if machine is None else with_ceilings(measurement, model_cost(model, workload), machine)
    )


def run_once(model: LanguageModel, prompts: list[list[int]], output: int) -> Sample:
    """One timed run of all prompts together on the served road: greedy, past the end token, nothing drafted
    and no prefix reused."""
    from hasten.engine.request import Request
    from hasten.runtime.sampling import SamplingOptions

    options = SamplingOptions(temperature=0.0, ignore_eos=True)
    requests = [Request(tuple(ids), output, options, id=str(i)) for i, ids in enumerate(prompts)]
    clock = TokenClock(prompts)
    with model.engine(ServingOptions(prefix_cache=False, speculate=False)) as engine:
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
) -> Measurement:
    """The medians of an engine's runs.

    Raises:
        UsageError: there is no run.
    """
    return Measurement(
        engine=engine,
        version=version,
        format=form,
        weight_bytes=weight_bytes,
        prefill_tok_per_s=Stat.of([s.prefill_tok_per_s for s in samples]),
        decode_tok_per_s=Stat.of([s.decode_tok_per_s for s in samples]),
        ttft_ms=Stat.of([1000 * s.ttft_s for s in samples]),
        tpot_ms=Stat.of([s.tpot_ms for s in samples]),
        peak_rss_bytes=peak_rss_bytes,
        workload=workload,
        threads=threads,
        disturbed_rounds=disturbed_rounds,
    )


def rates_of(sample: Sample) -> tuple[float, float]:
    """What tells whether other work slowed a run down: its decode and its prefill rate."""
    return sample.decode_tok_per_s, sample.prefill_tok_per_s


def with_ceilings(measurement: Measurement, cost: Cost, machine: Machine) -> Measurement:
    """The measurement with its fractions of the machine's ceilings (formulas: `hasten.speed`)."""
    workload = measurement.workload
    return dataclasses.replace(
        measurement,
        fraction_of_read_ceiling=cost.read_fraction(measurement.decode_tok_per_s.median, workload, machine),
        fraction_of_int8_ceiling=cost.int8_fraction(measurement.prefill_tok_per_s.median, workload, machine),
    )
