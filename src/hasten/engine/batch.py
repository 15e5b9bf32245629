"""The work of one step, and its computation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hasten.engine.answer import Answer
from hasten.runtime.pages import Sequence as CachedSequence

if TYPE_CHECKING:
    from hasten.runtime.cpu import CpuExecutor

Floats = npt.NDArray[np.float32]


@dataclass
class Work:
    """What one answer has computed in a step: `count` known tokens, and drafts to verify behind them."""

    answer: Answer
    count: int
    is_prompt: bool
    completes: bool  # all its known tokens are computed then: a token can be drawn
    drafts: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, answer: Answer, count: int) -> Work:
        """The next `count` tokens of an answer, which are all prompt or all not."""
        return cls(answer, count, answer.in_prompt, count == answer.pending)

    def rows(self) -> range:
        """Which of its tokens' results are wanted."""
        total = self.count + len(self.drafts)
        if self.is_prompt and self.answer.every_row:
            return range(total)
        return range(self.count - 1, total) if self.completes else range(0)


def execute(executor: CpuExecutor, works: Sequence[Work]) -> list[Floats]:
    """Compute a step.

    Where prompts and answers take different kernels they go in two calls: a token's result must depend on
    which it is and on nothing else in the step.

    Returns:
        float32 [len(work.rows()), E] of each work, after the final norm.
    """
    results: dict[int, Floats] = {}
    calls: list[list[Work]] = [list(works)]
    if not executor.decodes_like_prefill:
        calls = [[w for w in works if not w.is_prompt], [w for w in works if w.is_prompt]]
    for call in calls:
        if call:
            results.update(zip(map(id, call), _compute(executor, call), strict=True))
    return [results[id(work)] for work in works]


def _compute(executor: CpuExecutor, works: list[Work]) -> list[Floats]:
    batch: list[tuple[CachedSequence, list[int]]] = []
    rows: list[int] = []
    sizes: list[int] = []
    first = 0
    for work in works:
        answer, done = work.answer, work.answer.cached.length
        batch.append((answer.cached, answer.tokens[done : done + work.count] + work.drafts))
        wanted = work.rows()
        rows.extend(first + row for row in wanted)
        sizes.append(len(wanted))
        first += work.count + len(work.drafts)
    hidden = executor.step(batch, rows, prefill=works[0].is_prompt)
    ends = np.cumsum(sizes)
    return [hidden[end - size : end] for size, end in zip(sizes, ends, strict=True)]
