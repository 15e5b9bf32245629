"""The learning rate over a run, and the order in which windows are read."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

WARM_UP = 0.03
"""Part of a run in which the rate rises."""
FLOOR = 0.05
"""Part of the highest rate that a run ends with."""


def rate(progress: float) -> float:
    """Part of the highest learning rate at a place 0..1 of the run: up a line, down a cosine.

    Source: cosine annealing without restarts, Loshchilov and Hutter 2017 (arXiv:1608.03983).
    """
    if progress < WARM_UP:
        return max(progress, WARM_UP / 100) / WARM_UP
    turned = min(1.0, (progress - WARM_UP) / (1 - WARM_UP))
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * turned))


def batch(step: int, windows: int, size: int, seed: int) -> npt.NDArray[np.int64]:
    """Which windows step `step` reads, [size]: shuffled anew for each pass over the text.

    A function of the step alone, so that a run that goes on reads what it would have read.
    """
    places = np.arange(step * size, (step + 1) * size)
    epochs, inside = np.divmod(places, windows)
    orders = {e: np.random.default_rng([seed, e]).permutation(windows) for e in np.unique(epochs).tolist()}
    return np.array([orders[e][i] for e, i in zip(epochs.tolist(), inside.tolist(), strict=True)], np.int64)
