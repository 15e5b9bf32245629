"""One token a row of logits, each drawn as a sequence of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from hasten.errors import HastenError
from hasten.runtime.sampling import SamplingOptions, SequenceSampler, choose


def one_each(
    logits: npt.NDArray[np.float32], options: SamplingOptions, positions: Sequence[int], threads: int = 1
) -> list[int]:
    """The tokens that rows float32 [R, V] give at R positions.

    Raises:
        HastenError: a row has NaN, or no token above minus infinity.
    """
    samplers = [SequenceSampler(options, [], logits.shape[1]) for _ in positions]
    none: list[None] = [None] * len(logits)
    choices = choose(logits, samplers, [[]] * len(logits), positions, none, none, threads=threads)
    for choice in choices:
        if choice.error:
            raise HastenError(choice.error)
    return [choice.tokens[0] for choice in choices]
