"""The learning rate over a run, and the order in which windows are read."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

WARM_UP = 0.03
"""Part of a run's steps in which the rate rises, 100 steps at most."""
FLOOR = 0.05
"""Part of the highest rate that a run ends with."""


def rate(step: int, steps: int, progress: float) -> float:
    """Part of the highest learning rate: up a line by steps, down a cosine by progress.

    The two are told apart because a time limit counts what is no step (compiling, loading): moments that have
    seen nothing must not begin at the full rate.

    Source: cosine annealing without restarts, Loshchilov and Hutter 2017 (arXiv:1608.03983).

    Args:
        step: steps done. steps: in all. progress: part of the run that is over, 0..1, by steps or by time.
    """
    rising = max(1, min(100, math.ceil(WARM_UP * steps)))
    falling = FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return min(1.0, (step + 1) / rising) * falling


def batch(step: int, windows: int, size: int, seed: int) -> npt.NDArray[np.int64]:
    """Which windows step `step` reads, [size]: shuffled anew for each pass over the text.

    A function of the step alone, so that a run that goes on reads what it would have read.
    """
    places = np.arange(step * size, (step + 1) * size)
    epochs, inside = np.divmod(places, windows)
    orders = {e: np.random.default_rng([seed, e]).permutation(windows) for e in np.unique(epochs).tolist()}
    return np.array([orders[e][i] for e, i in zip(epochs.tolist(), inside.tolist(), strict=True)], np.int64)
