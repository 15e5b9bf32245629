"""`hasten optimize`: the closed loop from the command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from hasten.cli.console import Ticker, emit, note, print_table, show, speeds
from hasten.cli.flags import (
    DeviceOption,
    GpuMemoryOption,
    JsonOption,
    ModelArgument,
    TextOption,
    ThreadsOption,
    TokensOption,
    WorkloadOption,
    fraction,
    given,
    optional,
    seconds,
)
from hasten.core import SCHEMA_VERSION, Budget, EngineOptions, as_json

if TYPE_CHECKING:
    from hasten.optimize.choice import Aims, Candidate
    from hasten.optimize.prospect import OptimizeResult, Prospect
    from hasten.optimize.search import Effort

KEPT = "What was measured is kept: run the same command again to go on from there (--fresh starts over)."

GOALS = (
    "What is made best: latency (time of one answer), throughput (8 answers together), memory (bytes), cost "
    "(of a million tokens, needs --price-per-hour) or energy (joules a token, where they can be read)."
)
BudgetOption = Annotated[str, given("--max-ppl-increase", "P", "Perplexity may rise by so much: 1% or 0.01.")]
KlOption = Annotated[
    float | None, optional("--max-kl", "X", "Mean KL divergence from the source may be so much, nats.")
]
MIN_TASK = (
    "Least share of right answers to a task of `hasten eval --task`, repeatable: json:90%. Its 95 % interval "
    "must be above."
)
TasksOption = Annotated[list[str] | None, optional("--min-task", "NAME:SHARE", MIN_TASK)]
GoalOption = Annotated[str, given("--for", "GOAL", GOALS)]
TtftOption = Annotated[
    str | None, optional("--ttft", "TIME", "First token of a request alone within so long, median: 500ms.")
]
TpotOption = Annotated[
    str | None, optional("--tpot", "TIME", "From a token to the next at most so long, median: 50ms.")
]
MemoryOption = Annotated[
    str | None,
    optional("--memory", "SIZE", "The whole process takes at most so much, predicted: 2GB, 0.5 (a share)."),
]
RateOption = Annotated[
    float | None, optional("--rate", "X", "Requests a second of the workload that one copy must carry.")
]
PriceOption = Annotated[
    float | None,
    optional("--price-per-hour", "X", "What the machine costs: says what a million tokens cost."),
]
OutOption = Annotated[Path | None, optional("--out", "DIR", "The artifact. Default: NAME.hasten here.")]
RunsOption = Annotated[int, given("--runs", "N", "Timed rounds at least, after a warm-up.", min=1)]
LimitOption = Annotated[
    str | None, optional("--time-limit", "TIME", "Choose from what was found after so long: 90s, 10m.")
]
DryOption = Annotated[bool, optional("--dry-run", None, "Say what would be tried, and measure nothing.")]
FreshOption = Annotated[bool, optional("--fresh", None, "Ignore what earlier searches found.")]

CalibrateOption = Annotated[
    bool,
    given(
        "--calibrate/--no-calibrate",
        None,
        "Try calibrated integers too where torch is installed; minutes the first time.",
    ),
]


def command(
    model: ModelArgument,
    max_ppl_increase: BudgetOption = "1%",
    max_kl: KlOption = None,
    min_task: TasksOption = None,
    ttft: TtftOption = None,
    tpot: TpotOption = None,
    memory: MemoryOption = None,
    rate: RateOption = None,
    goal: GoalOption = "latency",
    workload: WorkloadOption = None,
    price_per_hour: PriceOption = None,
    out: OutOption = None,
    text: TextOption = None,
    tokens: TokensOption = 4096,
    runs: RunsOption = 3,
    time_limit: LimitOption = None,
    threads: ThreadsOption = None,
    device: DeviceOption = "cpu",
    gpu_memory: GpuMemoryOption = None,
    fresh: FreshOption = False,
    calibrate: CalibrateOption = True,
    dry_run: DryOption = False,
    json: JsonOption = False,
) -> None:
    """Find the best recipe within a quality budget and write an artifact.

    Tries uniform widths and a mixture by measured layer sensitivity, judges each against the model in bf16,
    leaves out what cannot win, times what passed side by side, and writes the best one with plan.json and
    report.html. Where torch is installed, calibrated integers are tried too. All of it on the device that is
    named; which recipes are tried follows the device. A recipe that crashes or hangs is given up, and the
    search goes on. Exit code 3: nothing keeps all that is asked.
    """
    from hasten.optimize.search import Effort

    limit = None if time_limit is None else seconds("--time-limit", time_limit)
    asked = _Asked(
        model=model,
        aims=_aims(
            Budget(fraction(max_ppl_increase), max_kl, _wanted(min_task)),
            goal,
            workload,
            _milliseconds("--ttft", ttft),
            _milliseconds("--tpot", tpot),
            memory,
            rate,
            price_per_hour,
        ),
        effort=Effort(tokens=tokens, runs=runs, time_limit_s=limit),
        options=EngineOptions(threads=threads, device=device, gpu_memory=gpu_memory),
        out=out,
        text=text,
        fresh=fresh,
        calibrate=calibrate,
    )
    if dry_run:
        _show_plan(asked, json)
        return
    result = _searched(asked)
    if json:
        emit(result.to_json())
    else:
        _print(result)


def _wanted(given: Sequence[str] | None) -> tuple[tuple[str, float], ...] | None:
    """Tasks and least shares; of a task that is named twice the last counts."""
    if not given:
        return None
    from hasten.quality.tasks import wanted_of

    return tuple(dict(map(wanted_of, given)).items())


@dataclass(frozen=True)
class _Asked:
    """All that the flags say."""

    model: str
    aims: Aims
    effort: Effort
    options: EngineOptions
    out: Path | None
    text: Path | None
    fresh: bool
    calibrate: bool


def _searched(asked: _Asked) -> OptimizeResult:
    """The search, in a process of its own."""
    from hasten.optimize.isolated import isolated
    from hasten.optimize.search import optimize

    with Ticker() as ticker:
        return isolated(
            lambda tell, broken: optimize(
                asked.model,
                aims=asked.aims,
                out=asked.out,
                threads=asked.options.threads,
                text=asked.text,
                effort=asked.effort,
                fresh=asked.fresh and not broken,
                calibrate=asked.calibrate,
                observer=tell,
                device=asked.options.device,
                gpu_memory=asked.options.gpu_memory,
                broken=broken,
            ),
            lambda progress: show(ticker, progress),
        )


def _aims(
    budget: Budget,
    goal: str,
    workload: str | None,
    ttft_ms: float | None,
    tpot_ms: float | None,
    memory: str | None,
    rate: float | None,
    price: float | None,
) -> Aims:
    from hasten.bench.workload import traffic
    from hasten.machine.memory import installed_bytes, memory_amount
    from hasten.optimize.choice import Aims

    return Aims(
        budget=budget,
        goal=goal,  # type: ignore[arg-type]  # checked there, with the nearest name
        traffic=None if workload is None else traffic(workload),
        ttft_ms=ttft_ms,
        tpot_ms=tpot_ms,
        memory_bytes=None
        if memory is None
        else memory_amount(memory, installed_bytes() or 1 << 62, "--memory"),
        rate=rate,
        price_per_hour=price,
    )


def _milliseconds(flag: str, text: str | None) -> float | None:
    return None if text is None else 1e3 * seconds(flag, text)


# What would be tried ----------------------------------------------------------------------------------------


def _show_plan(asked: _Asked, json: bool) -> None:
    """The recipes in the order of their predicted cost, and what the search would do with them."""
    from hasten.optimize.search import Search, opened

    workshop, text = opened(asked.model, asked.options, asked.text)
    search = Search(workshop, asked.aims, text, asked.effort, calibrate=asked.calibrate)
    found = sorted(search.prospects(), key=lambda p: p.cost)
    if json:
        emit(_plan_document(asked, workshop.name, found, search.calibrated is not None))
        return
    least = min(p.cost for p in found)
    rows = [
        [p.recipe.name, f"{p.bits_per_weight:.2f}", f"{p.weight_bytes / 1e6:,.0f}", f"{p.cost / least:.2f}x"]
        for p in found
    ]
    columns = ("recipe", "bits", "MB a token", "predicted cost")
    print_table(f"{workshop.name}: recipes that may be tried", columns, rows, out=True)
    work = asked.aims.workload
    sys.stdout.write(
        f"goal: {asked.aims.goal}, on {work.prompt} tokens in, {work.output} out, {work.batch} at once\n"
        f"judged on {asked.effort.tokens:,} tokens of {text.name}, then a mixture of widths"
        f"{', calibrated too' if search.calibrated is not None else ''}; what passes is timed side by side\n"
    )
    note("nothing was measured or written; costs are relative, by what is known of this machine")


def _plan_document(asked: _Asked, model: str, found: Sequence[Prospect], calibrated: bool) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "model": model,
        "aims": as_json(asked.aims),
        "workload": as_json(asked.aims.workload),
        "calibrated": calibrated,
        "prospects": [
            {
                "recipe": p.recipe.name,
                "bits_per_weight": p.bits_per_weight,
                "weight_bytes": p.weight_bytes,
                "predicted_cost": p.cost,
            }
            for p in found
        ],
    }


# What was found ---------------------------------------------------------------------------------------------


_COLUMNS = (
    *("recipe", "bits", "decode\ntok/s", "prefill\ntok/s", "first\ntoken ms", "perplexity", "KL", "top-1"),
    "verdict",
)


def _print(result: OptimizeResult) -> None:
    start, chosen, speedup = result.baseline, result.chosen, result.speedup
    place = next(i for i, one in enumerate(result.candidates) if one.recipe == chosen.recipe)
    rows = [["bf16 (start)", "16.00", *speeds(start.measurement), f"{start.ppl:.3f}", "", "", ""]]
    rows += [_row(candidate, number == place) for number, candidate in enumerate(result.candidates)]
    print_table(None, _COLUMNS, rows, bold=1 + place, out=True)
    reasons = [(one.recipe, one.because) for one in result.candidates]
    for recipe, because in [*reasons, *((one.recipe, one.because) for one in result.untried)]:
        sys.stdout.write(f"{'>' if recipe == chosen.recipe else ' '} {recipe.name}: {because}\n")
    for more in result.plan.because[1:]:
        sys.stdout.write(f"  {more}\n")
    sys.stdout.write(
        f"\n{result.model} as {chosen.recipe.name}: decode {speedup.decode:.2f}x, "
        f"prefill {speedup.prefill:.2f}x, first token {speedup.ttft:.2f}x the speed of bf16\n"
        f"written to {result.artifact} (report.html in it)\n"
    )
    note(f'try it: hasten generate {result.artifact} -p "What is a mutex?"')


def _row(candidate: Candidate, chosen: bool) -> list[str]:
    verdict = candidate.verdict
    return [
        candidate.recipe.name,
        f"{candidate.bits_per_weight:.2f}",
        *speeds(candidate.measurement),
        f"{verdict.ppl_increase:+.2%}",
        f"{verdict.kl_mean:.4f}",
        f"{verdict.top1_agreement:.1%}",
        "chosen" if chosen else verdict.status,
    ]
