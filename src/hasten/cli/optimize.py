"""`hasten optimize`: the closed loop from the command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from hasten.cli.console import Ticker, console, emit, show
from hasten.cli.flags import (
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
    from rich.table import Table

    from hasten.optimize.search import OptimizeResult

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
    fresh: FreshOption = False,
    calibrate: CalibrateOption = True,
    json: JsonOption = False,
) -> None:
    """Find the fastest recipe within a quality budget and write an artifact.

    Measures the model in bf16, tries uniform widths and a mixture by measured layer sensitivity, judges each
    against the source, times what passes, and writes the best one with plan.json and report.html. Where torch
    is installed, calibrated integers are tried too. Exit code 3: nothing met the budget.
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
        )
    if json:
        emit(result.to_json())
        return
    _print(result)


def _print(result: OptimizeResult) -> None:
    from rich.console import Console

    screen = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    screen.print(_table(result))
    for candidate in result.candidates:
        mark = ">" if candidate is result.chosen else " "
        screen.print(f"{mark} {candidate.recipe.name}: {candidate.because}", markup=False, soft_wrap=True)
    speedup = result.speedup
    screen.print(
        f"\n{result.model} as {result.chosen.recipe.name}: decode {speedup.decode:.2f}x, "
        f"prefill {speedup.prefill:.2f}x, first token {speedup.ttft:.2f}x the speed of bf16",
        markup=False,
        soft_wrap=True,
    )
    screen.print(f"written to {result.artifact} (report.html in it)", markup=False, soft_wrap=True)
    console().print(f'try it: hasten generate {result.artifact} -p "What is a mutex?"', markup=False)


def _table(result: OptimizeResult) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    for name in ("bits", "decode tok/s", "prefill tok/s", "first token ms", "perplexity", "KL", "top-1"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    start = result.baseline
    table.add_row("bf16 (start)", "16.00", *_speeds(start.measurement), f"{start.ppl:.3f}", "", "", "")
    for candidate in result.candidates:
        verdict = candidate.verdict
        table.add_row(
            candidate.recipe.name,
            f"{candidate.bits_per_weight:.2f}",
            *_speeds(candidate.measurement),
            f"{verdict.ppl_increase:+.2%}",
            f"{verdict.kl_mean:.4f}",
            f"{verdict.top1_agreement:.1%}",
            "chosen" if candidate is result.chosen else verdict.status,
            style="bold" if candidate is result.chosen else None,
        )
    return table


def _speeds(measured: Any) -> tuple[str, str, str]:
    if measured is None:
        return ("not timed", "not timed", "not timed")
    return (
        f"{measured.decode_tok_per_s.median:,.1f}",
        f"{measured.prefill_tok_per_s.median:,.0f}",
        f"{measured.ttft_ms.median:,.0f}",
    )
