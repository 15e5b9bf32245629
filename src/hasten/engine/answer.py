"""One answer while it is made: its tokens, its pages, its text and what it cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hasten.engine.prefix import Chain
from hasten.engine.request import FinishReason, Output, Request, Usage
from hasten.runtime.executor import PartResult
from hasten.runtime.pages import CachedSequence
from hasten.runtime.sampling import Choice, Masks, SequenceSampler, TokenLogprob

if TYPE_CHECKING:
    from hasten.cache.kv_disk import Reading
    from hasten.engine.grammar_compiler import GrammarState
    from hasten.engine.speculate import Draft
    from hasten.models.tokenizer import Tokenizer

Floats = npt.NDArray[np.float32]


@dataclass
class Tally:
    """When things happened to an answer, in seconds, and what it has cost. None: not yet."""

    arrived: float
    started: float | None = None  # first computed
    first: float | None = None  # first token
    hit_tokens: int = 0  # of the prompt, found in the prefix cache
    drafted: int = 0
    accepted: int = 0
    preemptions: int = 0

    def since_ms(self, moment: float | None) -> float | None:
        """Milliseconds from arrival to a moment."""
        return None if moment is None else 1000 * (moment - self.arrived)


class PromptResults:
    """What a prompt's rows gave: log-probabilities, an embedding. A row is read once, though a preempted
    prompt is computed several times."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.logprobs: list[TokenLogprob | None] = []
        self.read_tokens = 0  # the prompt's tokens whose rows were read
        self._sum: npt.NDArray[np.float64] | None = None  # [E], of the hidden states read

    @property
    def every_row(self) -> bool:
        """Whether the hidden states of all of the prompt are still wanted, not only the last."""
        wanted = self.request.prompt_logprobs is not None or self.request.pooling == "mean"
        return wanted and self.read_tokens < len(self.request.prompt)

    def read(self, start: int, count: int, result: PartResult) -> None:
        """Take in the rows of prompt tokens `start` to `start + count`; rows that were read are left out.

        Raises:
            HastenError: a logit is NaN.
        """
        before, self.read_tokens = self.read_tokens, max(self.read_tokens, start + count)
        if self.request.pooling == "mean" and result.hidden is not None:
            fresh = result.hidden[max(0, before - start) : len(self.request.prompt) - start]
            total = fresh.sum(axis=0, dtype=np.float64)
            self._sum = total if self._sum is None else self._sum + total
        if self.request.prompt_logprobs is None:
            return
        if isinstance(result.scores, BaseException):
            raise result.scores
        if start == 0 and before == 0:
            self.logprobs.append(None)  # nothing comes before the first token
        self.logprobs += result.scores

    def embedding(self, result: PartResult) -> Floats | None:
        """The prompt's embedding float32 [E], if one was asked for; `result` is its last part's."""
        if self.request.pooling == "mean" and self._sum is not None:
            mean: Floats = (self._sum / len(self.request.prompt)).astype(np.float32)
            return mean
        if self.request.pooling == "last" and result.hidden is not None:
            last: Floats = result.hidden[-1].copy()
            return last
        return None

    def share(self, other: PromptResults) -> None:
        """Give another answer to the same prompt what was read."""
        other.logprobs, other.read_tokens = list(self.logprobs), self.read_tokens

    def whole_logprobs(self) -> tuple[TokenLogprob | None, ...] | None:
        """The log-probabilities, once, when all are there."""
        if len(self.logprobs) != len(self.request.prompt):
            return None
        whole, self.logprobs = tuple(self.logprobs), []
        return whole


class StopTexts:
    """Finds stop texts in a stream, across the borders of its pieces.

    Holds back what may still become a stop text, so that no part of one is shown.

    Args:
        stops: the texts.
        shown: the one that is found is shown all the same.
    """

    def __init__(self, stops: Sequence[str], shown: bool = False) -> None:
        self._stops = tuple(stops)
        self._shown = shown
        self._longest = max(map(len, stops), default=0)
        self._by_first: dict[str, list[str]] = {}  # by their first character
        for stop in stops:
            self._by_first.setdefault(stop[0], []).append(stop)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """New text -> (what may be shown, the stop text that ended it or None)."""
        if not self._stops:
            return text, None
        text = self._held + text
        found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            at, stop = min(found, key=lambda one: (one[0], -len(one[1])))
            self._held = ""
            return text[: at + len(stop) if self._shown else at], stop
        keep = self._possible(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def _possible(self, text: str) -> int:
        """Length of the longest end of `text` that some stop text begins with."""
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            stops = self._by_first.get(text[-size])
            if stops is not None and any(stop.startswith(text[-size:]) for stop in stops):
                return size
        return 0

    def flush(self) -> str:
        """What was held back when the text ended another way."""
        held, self._held = self._held, ""
        return held


class AnswerText:
    """The text of an answer's tokens, up to the stop text, stop token or end token that ends it."""

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        self.request = request
        self.stop: str | int | None = None  # the stop text or token that ended it, if one did
        self._text = tokenizer.stream(request.skip_special, request.keep_special)
        self._stops = StopTexts(request.stop, request.shows_stop)
        self._eos = frozenset(() if request.sampling.ignore_eos else tokenizer.eos_ids)
        self._early = request.min_new_tokens  # tokens that must still come before a stop counts
        self.ends = ends_of(request, tokenizer.eos_ids)

    def push(self, token: int) -> tuple[str, bool]:
        """A token -> (new text, whether the answer ends with it)."""
        if token in self.ends:
            self.stop = None if token in self._eos else token
            shown = ""
            if self.request.shows_stop and self.stop is not None:
                shown = self._stops.push(self._text.push(token))[0]
            return shown + self.rest(), True
        text = self._text.push(token)
        if self._early > 0:
            self._early -= 1
            return text, False
        shown, self.stop = self._stops.push(text)
        return shown, self.stop is not None

    def rest(self) -> str:
        """Text held back, when no more tokens come."""
        shown, stop = self._stops.push(self._text.flush())
        return shown if stop is not None else shown + self._stops.flush()


class TokenRules:
    """Which tokens a request lets come, whatever its grammar says of them. All its answers share one.

    A row costs a look at the runs whose last token but one has just come, and a copy of 20 KB.

    Args:
        request: its `min_new_tokens`, `allowed_tokens` and `forbidden` are the rules.
        ends: tokens that would end the answer.
        vocab_size: V.
    """

    def __init__(self, request: Request, ends: Iterable[int], vocab_size: int) -> None:
        self._prompt = len(request.prompt)
        self._least = request.min_new_tokens
        self._always = bool(request.allowed_tokens or request.forbidden)
        allowed = np.ones(vocab_size, np.bool_)
        if request.allowed_tokens:
            allowed[:] = False
            allowed[np.asarray(request.allowed_tokens, np.int64)] = True
        behind: dict[tuple[int, ...], list[int]] = {}  # tokens that came -> those that must not follow
        for *before, last in (run for run in request.forbidden if max(run) < vocab_size):
            if before:
                behind.setdefault(tuple(before), []).append(last)
            else:
                allowed[last] = False
        self._behind = {before: np.array(lasts, np.uint32) for before, lasts in behind.items()}
        self._lengths: dict[int, set[int]] = {}  # of those, by the last token that came
        for run in behind:
            self._lengths.setdefault(run[-1], set()).add(len(run))
        self._longest = max(map(len, request.forbidden), default=0)
        self._later = _packed(allowed)
        allowed[[token for token in ends if token < vocab_size]] = False
        self._early = _packed(allowed)

    def speak(self, tokens: Sequence[int]) -> bool:
        """Whether anything is forbidden behind these tokens of prompt and answer."""
        return self._always or len(tokens) - self._prompt < self._least

    def masks(self, tokens: Sequence[int], drafts: Sequence[int]) -> Masks:
        """Which tokens may come behind prompt and answer, and behind each draft.

        Returns:
            uint32 [1 + drafts, ceil(V / 32)]; bit t % 32 of word t / 32 allows token t.
        """
        rows = np.empty((1 + len(drafts), len(self._later)), np.uint32)
        first = max(self._prompt, len(tokens) - self._longest)
        known = [*tokens[first:], *drafts]
        for number, row in enumerate(rows):
            end = len(tokens) - first + number
            row[:] = self._early if first + end - self._prompt < self._least else self._later
            for size in self._lengths.get(known[end - 1], ()) if end else ():
                lasts = self._behind.get(tuple(known[end - size : end])) if end >= size else None
                if lasts is not None:
                    np.bitwise_and.at(row, lasts >> 5, ~(np.uint32(1) << (lasts & 31)))
        return rows


def _packed(allowed: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint32]:
    """Bits of a row: uint32 [ceil(V / 32)]."""
    row = np.zeros((len(allowed) + 31) // 32 * 4, np.uint8)
    bits = np.packbits(allowed, bitorder="little")
    row[: len(bits)] = bits
    return row.view(np.uint32)


def rules_of(request: Request, eos_ids: Iterable[int], vocab_size: int) -> TokenRules | None:
    """The rules of a request; None where it has none."""
    if not (request.min_new_tokens or request.allowed_tokens or request.forbidden):
        return None
    return TokenRules(request, ends_of(request, eos_ids), vocab_size)


def ends_of(request: Request, eos_ids: Iterable[int]) -> frozenset[int]:
    """Tokens that end an answer."""
    return frozenset(() if request.sampling.ignore_eos else eos_ids).union(request.stop_token_ids)


class Answer:
    """One of a request's n answers.

    `tokens` are the prompt and the answer so far. The first `prompt_tokens` of them are computed as prompt,
    the rest as answer, however often they are computed: where the two take different kernels, an answer
    that was preempted and computed again is the same to the bit.
    """

    def __init__(
        self,
        request: Request,
        index: int,
        arrived: float,
        tokenizer: Tokenizer,
        vocab_size: int,
        grammar: GrammarState | None = None,
        rules: TokenRules | None = None,
    ) -> None:
        self.request = request
        self.index = index
        self.deadline = arrived + (request.deadline_ms or float("inf")) / 1000
        self.tokens: list[int] = list(request.prompt)
        self.prompt_tokens = len(request.prompt)
        sampling = replace(request.sampling, seed=(request.sampling.seed + index) % 2**64)
        self.sampler = SequenceSampler(sampling, request.prompt, vocab_size)
        self.grammar = grammar
        self.draft: Draft | None = None
        self.siblings: list[Answer] = []  # wait for this one's prompt
        self.tally = Tally(arrived)
        self.text = AnswerText(request, tokenizer)
        self._rules = rules
        self.results = PromptResults(request)
        self.is_first_pass = True  # its prompt was not computed to its end yet
        # its pages, which PrefixKeeper gives
        self.cached = CachedSequence()
        self.chain = Chain(b"", 0)  # of no root: replaced when the answer is first scheduled
        self.published = 0  # full pages that were offered to the prefix cache
        self.reading: Reading | None = None  # pages of its prompt on their way from disk

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
    def is_bound(self) -> bool:
        """Whether some tokens may not come next: `masks` says which."""
        return self.grammar is not None or (self._rules is not None and self._rules.speak(self.tokens))

    def masks(self, drafts: Sequence[int] = ()) -> Masks:
        """What may come next, and after each draft, by its grammar and by the request's own rules.

        Where the grammar leaves nothing that the rules allow, it counts alone: an answer whose grammar can
        only end does so before `min_new_tokens`.

        Returns:
            uint32 [1 + k, ceil(V / 32)], k <= len(drafts): drafts behind are cut.
        """
        if self._rules is None or not self._rules.speak(self.tokens):
            assert self.grammar is not None, "an answer that is not bound has no masks"
            return self.grammar.masks(drafts)
        ruled = self._rules.masks(self.tokens, drafts)
        if self.grammar is None:
            return ruled
        rows = self.grammar.masks(drafts)
        both = rows & ruled[: len(rows)]
        return np.where(both.any(axis=1, keepdims=True), both, rows)

    def take(self, choice: Choice) -> tuple[list[int], list[TokenLogprob], FinishReason | None, str]:
        """Add what was drawn, up to where the answer ends: (tokens, logprobs, how it ended, new text)."""
        taken: list[int] = []
        text: list[str] = []
        finish: FinishReason | None = None
        for token in choice.tokens:
            taken.append(token)
            self.tokens.append(token)
            shown, ends = self.text.push(token)
            text.append(shown)
            if ends or self.left == 0:
                finish = "stop" if ends else "length"
                break
        if finish == "length":
            text.append(self.text.rest())
        return taken, choice.logprobs[: len(taken)], finish, "".join(text)

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
        return Output(
            request_id=self.request.id,
            index=self.index,
            token_ids=tuple(tokens),
            text=text,
            logprobs=tuple(logprobs),
            prompt_logprobs=self.results.whole_logprobs(),
            finish_reason=finish,
            stop=self.text.stop if finish == "stop" else None,
            error=error,
            embedding=embedding,
            usage=self._usage(now) if finish is not None else None,
        )

    def _usage(self, now: float) -> Usage:
        tally = self.tally
        return Usage(
            prompt_tokens=len(self.request.prompt),
            cached_tokens=tally.hit_tokens,
            output_tokens=self.made,
            drafted_tokens=tally.drafted,
            accepted_tokens=tally.accepted,
            preemptions=tally.preemptions,
            queue_ms=tally.since_ms(tally.started) or 0.0,
            ttft_ms=tally.since_ms(tally.first),
            e2e_ms=1000 * (now - tally.arrived),
        )
