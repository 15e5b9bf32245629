"""What a prompt itself gives: the log-probabilities of its tokens, or an embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hasten.engine.answer import Answer, Floats
from hasten.engine.sampling import score

if TYPE_CHECKING:
    from hasten.runtime.cpu import CpuExecutor

_ROWS = 32  # positions whose logits exist at a time: 19 MB with a vocabulary of 150,000


def read_prompt(executor: CpuExecutor, answer: Answer, hidden: Floats, start: int) -> None:
    """Take in the results of prompt tokens `start` and on, float32 [T, E]; what was read before is left out.

    Raises:
        HastenError: a logit is NaN.
    """
    read, answer.prompt_read = answer.prompt_read, max(answer.prompt_read, start + len(hidden))
    hidden, start = hidden[max(0, read - start) : len(answer.request.prompt) - start], max(start, read)
    if answer.request.pooling == "mean":
        total = hidden.sum(axis=0, dtype=np.float64)
        answer.pooled = total if answer.pooled is None else answer.pooled + total
    if answer.request.prompt_logprobs is None:
        return
    if start == 0:
        answer.prompt_logprobs.append(None)  # nothing comes before the first token
    targets = answer.request.prompt[start + 1 : start + 1 + len(hidden)]
    for at in range(0, len(targets), _ROWS):
        some = targets[at : at + _ROWS]
        logits = executor.head(hidden[at : at + len(some)])
        answer.prompt_logprobs += score(
            logits, some, answer.request.prompt_logprobs, threads=executor.threads
        )


def embedding(answer: Answer, last: Floats) -> Floats | None:
    """The prompt's embedding float32 [E], if one was asked for; `last` [E] is its last token's result."""
    if answer.request.pooling == "mean" and answer.pooled is not None:
        return (answer.pooled / len(answer.request.prompt)).astype(np.float32)
    return last.copy() if answer.request.pooling == "last" else None
