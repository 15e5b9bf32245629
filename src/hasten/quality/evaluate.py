"""One model against the source: what `hasten eval` measures."""

from __future__ import annotations

from collections.abc import Callable

from hasten.core import Budget, Verdict
from hasten.quality.divergence import Divergence, Reference, Runnable
from hasten.quality.judge import judge

Step = Callable[[int, int], None]  # windows done, windows in all


def evaluate(
    candidate: Runnable, reference: Reference, budget: Budget, step: Step = lambda done, total: None
) -> Verdict:
    """Compares every window and judges.

    Args:
        candidate: the model in question.
        reference: the source in bf16 over the windows to read.
        budget: what a perplexity increase is held against.
        step: told before each window.
    """
    total = len(reference.windows)
    parts = []
    for index in range(total):
        step(index, total)
        parts.append(reference.compare(candidate, index))
    step(total, total)
    return judge(Divergence.join(parts), budget)
