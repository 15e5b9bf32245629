"""One answer while it is made: its tokens, what of them is computed, and everything that follows it along."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hasten.engine.prefix import Chain
from hasten.engine.request import FinishReason, Output, Request, Usage
from hasten.engine.stop import StopTexts
from hasten.runtime.executor import PartResult
from hasten.runtime.pages import CachedSequence
from hasten.runtime.sampling import Choice, Masks, SamplingOptions, SequenceSampler, TokenLogprob

if TYPE_CHECKING:
    from hasten.cache.kv_disk import Reading
    from hasten.engine.grammar import GrammarState
    from hasten.engine.speculate import Draft
    from hasten.models.tokenizer import Tokenizer

Floats = npt.NDArray[np.float32]


@dataclass
class Clock:
    """When things happened to an answer, seconds; None: not yet."""

    arrived: float
    started: float | None = None
    first: float | None = None

    def since_ms(self, moment: float | None) -> float | None:
        """Milliseconds from arrival to a moment."""
        return None if moment is None else 1000 * (moment - self.arrived)


class Answer:
    """One of a request's n answers.

    `tokens` are the prompt and the answer so far. The first `prompt_tokens` of them are computed as prompt,
    the rest as answer, however often they are computed: where the two take different kernels, an answer
    that was thrown out and computed again is the same to the bit.
    """

    def __init__(
        self,
        request: Request,
        index: int,
        clock: Clock,
        tokenizer: Tokenizer,
        vocab_size: int,
        grammar: GrammarState | None = None,
    ) -> None:
        self.request = request
        self.index = index
        self.clock = clock
        self.tokens: list[int] = list(request.prompt)
        self.prompt_tokens = len(request.prompt)
        self.cached = CachedSequence()
        self.chain: Chain | None = None  # set when it is first scheduled
        self.published = 0  # full pages that were offered to the prefix cache
        self.sampler = SequenceSampler(self.sampling, request.prompt, vocab_size)
        self.deadline = clock.arrived + (request.deadline_ms or float("inf")) / 1000
        self.grammar = grammar
        self.draft: Draft | None = None
        self.hit_tokens = self.drafted = self.accepted = self.preemptions = 0
        self.stop: str | int | None = None  # what ended it, if a stop text or token did
        self.reading: Reading | None = None  # pages of its prompt on their way from disk
        self.siblings: list[Answer] = []  # wait for this one's prompt
        self.prompt_logprobs: list[TokenLogprob | None] = []
        self.pooled: npt.NDArray[np.float64] | None = None  # [E], summed over the prompt so far
        self.is_first_pass = True  # its prompt was not computed to its end yet
        self.prompt_read = 0  # prompt tokens in these two: once is enough, however often they are computed
        self._text = tokenizer.stream(request.skip_special, request.keep_special)
        self._stops = StopTexts(request.stop)
        eos = () if request.sampling.ignore_eos else tokenizer.eos_ids
        self._ends = frozenset((*eos, *request.stop_token_ids))
        self._eos = frozenset(eos)

    @property
    def made(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def left(self) -> int:
        """Tokens the answer may still get."""
        return self.request.max_new_tokens - self.made

    @property
    def pending(self) -> int:
        """Tokens that are known and not computed."""
        return len(self.tokens) - self.cached.length

    @property
    def in_prompt(self) -> bool:
        """Whether the next token to compute is prompt."""
        return self.cached.length < self.prompt_tokens

    @property
    def every_row(self) -> bool:
        """Whether the hidden states of all of the prompt are wanted still, not only the last."""
        wanted = self.request.prompt_logprobs is not None or self.request.pooling == "mean"
        return wanted and self.prompt_read < len(self.request.prompt)

    @property
    def sampling(self) -> SamplingOptions:
        """The request's options with this answer's own seed."""
        options = self.request.sampling
        return replace(options, seed=(options.seed + self.index) % 2**64) if self.index else options

    def first_masks(self) -> Masks:
        """What its grammar allows as the first token: uint32 [1, ceil(V / 32)]."""
        assert self.grammar is not None, "an answer without a grammar has no masks"
        return self.grammar.masks([])

    def read_prompt(self, start: int, count: int, result: PartResult) -> None:
        """Take in what prompt tokens `start` to `start + count` gave; what was read before is left out.

        Raises:
            HastenError: a logit is NaN.
        """
        read, self.prompt_read = self.prompt_read, max(self.prompt_read, start + count)
        if self.request.pooling == "mean" and result.hidden is not None:
            fresh = result.hidden[max(0, read - start) : len(self.request.prompt) - start]
            total = fresh.sum(axis=0, dtype=np.float64)
            self.pooled = total if self.pooled is None else self.pooled + total
        if self.request.prompt_logprobs is None:
            return
        if isinstance(result.scores, BaseException):
            raise result.scores
        if start == 0 and read == 0:
            self.prompt_logprobs.append(None)  # nothing comes before the first token
        self.prompt_logprobs += result.scores

    def embedding(self, result: PartResult) -> Floats | None:
        """The prompt's embedding float32 [E], if one was asked for; `result` is its last part's."""
        if self.request.pooling == "mean" and self.pooled is not None:
            mean: Floats = (self.pooled / len(self.request.prompt)).astype(np.float32)
            return mean
        if self.request.pooling == "last" and result.hidden is not None:
            last: Floats = result.hidden[-1].copy()
            return last
        return None

    def share_prompt(self) -> None:
        """What the prompt gave is the same for all of n."""
        for one in self.siblings:
            one.prompt_logprobs, one.prompt_read = list(self.prompt_logprobs), self.prompt_read

    def take(self, choice: Choice) -> tuple[list[int], list[TokenLogprob], FinishReason | None, str]:
        """Add what was drawn, up to where the answer ends: (tokens, logprobs, how it ended, new text)."""
        taken: list[int] = []
        text: list[str] = []
        finish: FinishReason | None = None
        for token in choice.tokens:
            taken.append(token)
            self.tokens.append(token)
            finish, piece = self._push(token)
            text.append(piece)
            if finish is not None:
                break
        return taken, choice.logprobs[: len(taken)], finish, "".join(text)

    def _push(self, token: int) -> tuple[FinishReason | None, str]:
        if token in self._ends:
            self.stop = None if token in self._eos else token
            return "stop", self.rest()
        shown, stop = self._stops.push(self._text.push(token))
        if stop is not None:
            self.stop = stop
            return "stop", shown
        if self.left == 0:
            return "length", shown + self.rest()
        return None, shown

    def rest(self) -> str:
        """Text held back, when no more tokens come."""
        shown, stop = self._stops.push(self._text.flush())
        return shown if stop is not None else shown + self._stops.flush()

    def output(
        self,
        now: float,
        tokens: Sequence[int] = (),
        text: str = "",
        logprobs: Iterable[TokenLogprob] = (),
        finish: FinishReason | None = None,
        error: str = "",
        embedding: Floats | None = None,
    ) -> Output:
        """News of this answer; the first carries the prompt's logprobs, the last the usage."""
        prompt_logprobs = None
        if len(self.prompt_logprobs) == len(self.request.prompt):
            prompt_logprobs = tuple(self.prompt_logprobs)
            self.prompt_logprobs = []
        return Output(
            request_id=self.request.id,
            index=self.index,
            token_ids=tuple(tokens),
            text=text,
            logprobs=tuple(logprobs),
            prompt_logprobs=prompt_logprobs,
            finish_reason=finish,
            stop=self.stop if finish == "stop" else None,
            error=error,
            embedding=embedding,
            usage=self.usage(now) if finish is not None else None,
        )

    def usage(self, now: float) -> Usage:
        """What the answer has cost up to now."""
        return Usage(
            prompt_tokens=len(self.request.prompt),
            cached_tokens=self.hit_tokens,
            output_tokens=self.made,
            drafted_tokens=self.drafted,
            accepted_tokens=self.accepted,
            preemptions=self.preemptions,
            queue_ms=self.clock.since_ms(self.clock.started) or 0.0,
            ttft_ms=self.clock.since_ms(self.clock.first),
            e2e_ms=1000 * (now - self.clock.arrived),
        )
