"""One conversation's place in the cache: what was computed stays, and only what is new is computed."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np

from hasten.engine.sampling import SamplingOptions, sample
from hasten.errors import UsageError
from hasten.runtime.pages import Sequence as CachedSequence

if TYPE_CHECKING:
    from hasten.runtime.cpu import CpuExecutor


class Session:
    """Token ids that stand in the KV cache, extended turn by turn.

    `stream` takes the whole text of the conversation each time; the longest prefix that is computed already
    is kept, which changes nothing in the result: keys and values of a prefix do not depend on what follows.
    """

    def __init__(self, executor: CpuExecutor, eos_ids: Sequence[int]) -> None:
        self._executor = executor
        self._eos = frozenset(eos_ids)
        self._sequence = CachedSequence()
        self._tokens: list[int] = []  # what the cache holds
        self._prompt = 0  # how many of them were computed as prompt
        self._turn = 0  # raised whenever the cache is cut back: an open stream can then not go on
        # a session that is dropped gives its pages back too
        weakref.finalize(self, executor.truncate, self._sequence, 0).atexit = False

    @property
    def cached_tokens(self) -> int:
        """Tokens whose keys and values are in the cache."""
        return len(self._tokens)

    def stream(self, ids: Sequence[int], max_new_tokens: int, sampling: SamplingOptions) -> Iterator[int]:
        """Continue `ids`; token ids one by one, the end token included.

        Args:
            ids: the prompt, all of it.
            max_new_tokens: 0 or more; ends earlier at an end token or where the context is full.
            sampling: how tokens are chosen.

        Raises:
            UsageError: an empty prompt, a negative count, or a prompt that leaves no room in the context;
                from the iterator, that the session was given another text or closed in the meantime.
        """
        self.check(ids, max_new_tokens)
        return self._tokens_of(list(ids), max_new_tokens, sampling)

    def check(self, ids: Sequence[int], max_new_tokens: int) -> None:
        """Say now what would be wrong with a request.

        Raises:
            UsageError: as `stream`.
        """
        context = self._executor.context
        if len(ids) == 0:
            raise UsageError("the prompt is empty", hint="give at least one token")
        if max_new_tokens < 0:
            raise UsageError(f"{max_new_tokens} new tokens asked for", hint="use -n 0 or more")
        if len(ids) + min(max_new_tokens, 1) > context:
            needed, most = len(ids) + max(max_new_tokens, 1), self._executor.config.context_length
            longer = f" or load the model with --context {needed} or more" if needed <= most else ""
            raise UsageError(
                f"the prompt has {len(ids)} tokens, the context holds {context} with the answer",
                hint=f"shorten the prompt{longer} (the model was made for {most} tokens)",
            )

    def _tokens_of(self, ids: list[int], max_new_tokens: int, sampling: SamplingOptions) -> Iterator[int]:
        if max_new_tokens == 0:
            return
        # The last token is always computed: its hidden state is what the first new token comes from.
        # Where prompts take other kernels than answers, the last answer is computed again, as prompt:
        # what is kept must not change what follows.
        kept = self._tokens if self._executor.decodes_like_prefill else self._tokens[: self._prompt]
        pairs = zip(kept, ids[:-1], strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        self.truncate(same)
        room = self._executor.context - len(ids)
        turn, new = self._turn, ids[same:]
        for count in range(1, min(max_new_tokens, room) + 1):
            token = self._next(new, sampling, prefill=count == 1)
            yield token
            if (token in self._eos and not sampling.ignore_eos) or count == room:
                return
            if turn != self._turn:
                raise UsageError(
                    "the session was cut back or given another text while this stream was open",
                    hint="finish one stream before the next, or use model.session() for each",
                )
            new = [token]

    def _next(self, new: list[int], sampling: SamplingOptions, *, prefill: bool) -> int:
        if self._executor.outgrows(self._sequence, len(self._tokens) + len(new)):
            new, prefill = [*self._tokens, *new], True
            self._forget(0)
        try:
            if prefill:
                hidden = self._executor.prefill(self._sequence, new)
            else:
                hidden = self._executor.step([(self._sequence, new)], [0])
        finally:  # Ctrl-C may come between chunks: what was computed is kept, and known
            done = self._sequence.length - len(self._tokens)
            self._tokens += new[:done]
            if prefill:
                self._prompt = len(self._tokens)
        position = np.array([self._sequence.length], np.int64)
        return sample(self._executor.head(hidden), sampling, position, threads=self._executor.threads)[0]

    def truncate(self, length: int) -> None:
        """Forget what is past `length` tokens, 0 or more."""
        self._turn += 1
        self._forget(max(length, 0))

    def _forget(self, length: int) -> None:
        self._executor.truncate(self._sequence, length)
        del self._tokens[length:]
        self._prompt = min(self._prompt, length)

    def close(self) -> None:
        """Give the pages back."""
        self.truncate(0)
