"""`hasten optimize`: the closed loop from the command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from hasten.cli.console import Ticker, emit, note, print_table, show, speeds
from hasten.cli.flags import (
    DeviceOption,
    GpuMemoryOption,
    JsonOption,
    ModelArgument,
    TextOption,
    ThreadsOption,
    TokensOption,
    fraction,
    given,
    optional,
)
from hasten.core import Goal

if TYPE_CHECKING:
    from hasten.optimize.search import OptimizeResult
    from hasten.optimize.trials import Candidate

KEPT = "What was measured is kept: run the same command again to go on from there (--fresh starts over)."

BudgetOption = Annotated[str, given("--max-ppl-increase", "P", "Perplexity may rise by so much: 1% or 0.01.")]
GoalOption = Annotated[
    Goal, given("--for", None, "latency: time of one answer; throughput: 8 answers together; memory: bytes.")
]
OutOption = Annotated[Path | None, optional("--out", "DIR", "The artifact. Default: NAME.hasten here.")]
RunsOption = Annotated[int, given("--runs", "N", "Timed runs a recipe, after a warm-up.", min=1)]
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
    goal: GoalOption = "latency",
    out: OutOption = None,
    text: TextOption = None,
    tokens: TokensOption = 4096,
    runs: RunsOption = 3,
    threads: ThreadsOption = None,
    device: DeviceOption = "cpu",
    gpu_memory: GpuMemoryOption = None,
    fresh: FreshOption = False,
    calibrate: CalibrateOption = True,
    json: JsonOption = False,
) -> None:
    """Find the fastest recipe within a quality budget and write an artifact.

    Measures the model in bf16, tries uniform widths and a mixture by measured layer sensitivity, judges each
    against the source, times what passes, and writes the best one with plan.json and report.html. Where torch
    is installed, calibrated integers are tried too. All of it on the device that is named; which recipes are
    tried follows the device. Exit code 3: nothing met the budget.
    """
    from hasten.optimize.search import Effort, optimize

    budget = fraction(max_ppl_increase)
    with Ticker() as ticker:
        result = optimize(
            model,
            budget,
            goal,
            out,
            threads=threads,
            text=text,
            effort=Effort(tokens=tokens, runs=runs),
            fresh=fresh,
            calibrate=calibrate,
            observer=lambda progress: show(ticker, progress),
            device=device,
            gpu_memory=gpu_memory,
        )
    if json:
        emit(result.to_json())
        return
    _print(result)


_COLUMNS = (
    *("recipe", "bits", "decode\ntok/s", "prefill\ntok/s", "first\ntoken ms", "perplexity", "KL", "top-1"),
    "verdict",
)


def _print(result: OptimizeResult) -> None:
    start, chosen, speedup = result.baseline, result.chosen, result.speedup
    rows = [["bf16 (start)", "16.00", *speeds(start.measurement), f"{start.ppl:.3f}", "", "", ""]]
    rows += [_row(candidate, candidate is chosen) for candidate in result.candidates]
    print_table(None, _COLUMNS, rows, bold=1 + result.candidates.index(chosen), out=True)
    for one in result.candidates:
        sys.stdout.write(f"{'>' if one is chosen else ' '} {one.recipe.name}: {one.because}\n")
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
