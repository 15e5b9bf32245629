"""What is asked of the engine, what comes back, and what it tells of itself in numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from hasten.errors import UsageError
from hasten.runtime.sampling import SamplingOptions, TokenLogprob

if TYPE_CHECKING:
    from hasten.engine.grammar import Grammar

FinishReason = Literal["stop", "length", "cancelled", "deadline", "error"]
Pooling = Literal["none", "mean", "last"]


@dataclass(frozen=True)
class Request:
    """One prompt and what to do with it.

    Raises:
        UsageError: a value outside its range.
    """

    prompt: tuple[int, ...]  # token ids
    max_new_tokens: int = 128  # 0 computes the prompt alone: for prompt logprobs and embeddings
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    stop: tuple[str, ...] = ()  # texts that end the answer; they are not part of it
    stop_token_ids: tuple[int, ...] = ()
    shows_stop: bool = False  # the stop text or stop token that ended the answer is part of it
    min_new_tokens: int = 0  # before so many, no end token is drawn and no stop counts
    allowed_tokens: tuple[int, ...] = ()  # nothing else is drawn; () = all tokens
    forbidden: tuple[tuple[int, ...], ...] = ()  # runs of tokens that the answer must not have
    n: int = 1  # answers, drawn independently (seed, seed + 1, ...) from one computed prompt
    logprobs: int | None = None  # alternatives reported with each new token; 0 = the chosen one alone
    prompt_logprobs: int | None = None  # the same for the prompt's tokens; the prompt is then computed whole
    grammar: Grammar | None = None  # what the answer must match
    skip_special: bool = True  # special tokens leave no text
    keep_special: tuple[int, ...] = ()  # but these do: some models mark tool calls with them
    pooling: Pooling = "none"  # an embedding of the prompt instead of an answer
    priority: int = 0  # higher runs first
    deadline_ms: float | None = None  # from arrival to the last token
    client: str = ""  # who asks: clients of one priority share the machine evenly
    salt: str = ""  # prompts of different salts share nothing in the prefix cache
    prefix_cache: bool = True  # may read computed prefixes; what it computes is kept either way
    id: str = ""  # names the request in logs; the engine makes one up where empty

    def __post_init__(self) -> None:
        self._need(len(self.prompt) > 0, "the prompt is empty", "give at least one token")
        self._need(
            self.max_new_tokens >= 0, f"{self.max_new_tokens} new tokens asked for", "ask for 0 or more"
        )
        self._need(
            0 <= self.min_new_tokens <= max(0, self.max_new_tokens),
            f"at least {self.min_new_tokens} of {self.max_new_tokens} new tokens",
            "ask for a minimum from 0 to the maximum",
        )
        self._need(all(self.forbidden), "a forbidden run of no tokens", "give at least one token")
        self._need(1 <= self.n <= 128, f"n is {self.n}", "ask for 1 to 128 answers")
        for name, value in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            self._need(value is None or 0 <= value <= 20, f"{name} is {value}", f"use {name} from 0 to 20")
        self._need(
            self.deadline_ms is None or self.deadline_ms > 0,
            f"a deadline of {self.deadline_ms} ms",
            "give a deadline above 0 ms",
        )
        self._need(
            all(self.stop), "an empty stop text", "leave it out, or give a text of one character or more"
        )

    def _need(self, good: bool, message: str, hint: str) -> None:
        if not good:
            raise UsageError(message, hint=hint)


@dataclass(frozen=True)
class Usage:
    """What one answer cost. Times in milliseconds from the request's arrival."""

    prompt_tokens: int
    cached_tokens: int  # of the prompt, taken from the prefix cache
    output_tokens: int
    drafted_tokens: int  # proposed by speculation
    accepted_tokens: int  # and confirmed
    preemptions: int
    queue_ms: float  # until it was first computed
    ttft_ms: float | None
    e2e_ms: float


@dataclass(slots=True)
class Output:
    """What a step gave for one answer of one request; the last output says how the answer ended."""

    request_id: str
    index: int  # which of n
    token_ids: tuple[int, ...] = ()
    text: str = ""  # new text: whole characters, nothing that may still become part of a stop text
    logprobs: tuple[TokenLogprob, ...] = ()  # one a token, if asked for
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None  # with the first output; None for token 0
    finish_reason: FinishReason | None = None
    stop: str | int | None = None  # the stop text or token id that ended it, if one did
    error: str = ""  # with finish_reason "error" and "deadline"
    embedding: npt.NDArray[np.float32] | None = None  # float32 [E], not normalised
    usage: Usage | None = None  # with finish_reason


@dataclass
class EngineStats:
    """What is in the engine now, and sums since it started."""

    running: int = 0
    waiting: int = 0
    kv_pages: int = 0
    kv_pages_used: int = 0  # by sequences or the prefix cache
    kv_pages_cached: int = 0  # by the prefix cache
    prefix_query_tokens: int = 0  # prompt tokens looked up in the prefix cache
    prefix_hit_tokens: int = 0  # and found, those on disk included
    disk_hit_tokens: int = 0
    prompt_tokens: int = 0  # computed
    output_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    requests: int = 0
    cancelled: int = 0
    refused: int = 0
    batch: int = 0  # sequences in the last step
    schedule_s: float = 0.0  # spent beside computing: choosing, bookkeeping, publishing
    step_s: float = 0.0  # all of it
