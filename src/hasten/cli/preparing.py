"""Shows what a recipe that takes work is doing, where a model is opened."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hasten.cli.progress import Ticker

if TYPE_CHECKING:
    from hasten.optimize.candidate import Candidate
    from hasten.optimize.progress import Observer, Progress

KEPT = "What was calibrated is kept."


@contextmanager
def watched() -> Iterator[Observer]:
    """An observer whose live line appears with the first thing it is told; most recipes tell nothing."""
    opened: list[Ticker] = []

    def tell(progress: Progress) -> None:
        if not opened:
            opened.append(Ticker().__enter__())
        show(opened[0], progress)

    try:
        yield tell
    finally:
        for ticker in opened:
            ticker.__exit__(None, None, None)


def show(ticker: Ticker, progress: Progress) -> None:
    """One moment of making a model, on a ticker."""
    if progress.candidate is not None:
        ticker.line("  " + _summary(progress.candidate))
        return
    ticker.count(_subject(progress), progress.done, progress.total)


def _subject(progress: Progress) -> str:
    if progress.stage == "sensitivity":  # a hundred groups are one subject
        return "layer sensitivity"
    if progress.stage == "calibrate":
        return progress.detail
    return f"{progress.stage}: {progress.detail}"


def _summary(candidate: Candidate) -> str:
    verdict, measured = candidate.verdict, candidate.measurement
    speed = "" if measured is None else f", {measured.decode_tok_per_s.median:.1f} tok/s"
    return (
        f"{candidate.recipe.name}: {candidate.bits_per_weight:.2f} bits, "
        f"perplexity {verdict.ppl_increase:+.2%}, KL {verdict.kl_mean:.4f}: {verdict.status}{speed}"
    )
