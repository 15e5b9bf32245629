"""From token figures to a Verdict: pass, fail, or not enough text to tell.

The candidate and the source read the same tokens, so the difference of their losses is paired: its interval
is far narrower than either perplexity's. Interval: percentile bootstrap over blocks of neighbouring tokens,
whose losses are not independent (Efron, 1979; Künsch, 1989), seeded, so that the same figures give the same
verdict.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hasten.core import Budget, Status, Verdict
from hasten.quality.divergence import Divergence, Reference, Runnable

Step = Callable[[int, int], None]  # windows done, windows in all

BLOCK = 64
"""Tokens that are drawn together."""
FEWEST_BLOCKS = 16
"""Below this many blocks (1,024 tokens) no interval is trusted."""
_RESAMPLES = 2000


def judge(found: Divergence, budget: Budget, *, seed: int = 0) -> Verdict:
    """Holds a comparison against a budget.

    `pass`: the whole 95 % interval of the perplexity increase is within the budget. `fail`: the whole
    interval is above it. `insufficient`: the budget lies inside the interval, or there are fewer than 1,024
    tokens; more tokens narrow it. A comparison without any difference passes at any length.
    """
    low, high = ppl_interval(found, seed=seed)
    identical = bool(np.array_equal(found.nll, found.nll_source))
    enough = identical or found.tokens >= BLOCK * FEWEST_BLOCKS
    status: Status = "insufficient"
    if enough and high <= budget.max_ppl_increase:
        status = "pass"
    elif enough and low > budget.max_ppl_increase:
        status = "fail"
    return Verdict(
        status=status,
        ppl=float(np.exp(found.nll.mean())),
        ppl_source=float(np.exp(found.nll_source.mean())),
        ppl_increase=float(np.expm1((found.nll - found.nll_source).mean())),
        ppl_increase_low=low,
        ppl_increase_high=high,
        kl_mean=float(found.kl.mean()),
        kl_p99=float(np.quantile(found.kl, 0.99)),
        top1_agreement=float(found.agree.mean()),
        tokens=found.tokens,
    )


def ppl_interval(found: Divergence, *, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the perplexity increase (0.01 = +1 %), paired, over blocks of 64 tokens."""
    starts = np.arange(0, found.tokens, BLOCK)
    sums = np.add.reduceat(found.nll - found.nll_source, starts)
    sizes = np.diff(np.append(starts, found.tokens))
    drawn = np.random.default_rng(seed).integers(0, starts.size, size=(_RESAMPLES, starts.size))
    means = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(np.expm1(low)), float(np.expm1(high))


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
