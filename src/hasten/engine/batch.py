"""The work of one step: what the engine asks of the executor for each answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from hasten.engine.answer import Answer
from hasten.runtime.executor import Draw, Part, Scored
from hasten.runtime.sampling import Masks


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

    def drawn(self) -> list[Answer]:
        """The answers that get a token from its last row: its own, and siblings that wait for the prompt."""
        if not self.completes or self.answer.request.max_new_tokens == 0:
            return []
        return [self.answer, *self.answer.siblings]

    def part(self, masks: Callable[[], Masks] | None) -> Part:
        """The same for the executor. `masks`: its own grammar's, made while the model computes."""
        answer, done = self.answer, self.answer.cached.length
        request = answer.request
        draws = [
            Draw(
                one.sampler,
                len(answer.tokens),
                request.logprobs,
                masks if one is answer else one.first_masks if one.grammar is not None else None,
            )
            for one in self.drawn()
        ]
        every = self.is_prompt and answer.every_row
        hidden = 0
        if every and request.pooling == "mean":
            hidden = self.count
        elif self.completes and request.pooling == "last":
            hidden = 1
        return Part(
            answer.cached,
            answer.tokens[done : done + self.count],
            self.is_prompt,
            self.drafts,
            tuple(draws),
            hidden,
            self._scored(done) if every else None,
        )

    def _scored(self, done: int) -> Scored | None:
        """The prompt's tokens that this step predicts, but those that were scored before a preemption."""
        request, first = self.answer.request, max(done, self.answer.prompt_read)
        targets = request.prompt[first + 1 : done + self.count + 1]
        if request.prompt_logprobs is None or not targets:
            return None
        return Scored(first - done, tuple(targets), request.prompt_logprobs)
