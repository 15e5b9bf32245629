"""One step of an executor over known tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from hasten.runtime.executor import Executor, Part
from hasten.runtime.pages import CachedSequence

Ids = npt.NDArray[np.int32]


def hidden_after(
    executor: Executor,
    texts: Sequence[tuple[CachedSequence, Ids]],
    last: int | None = None,
    as_prompt: bool = False,
) -> list[npt.NDArray[np.float32]]:
    """Compute the next tokens of sequences together; hidden states of the `last` of each, None: of all."""
    parts = [
        Part(sequence, ids.tolist(), as_prompt, hidden=len(ids) if last is None else last)
        for sequence, ids in texts
    ]
    results = executor.collect(executor.submit(parts))
    return [result.hidden for result in results if result.hidden is not None]
