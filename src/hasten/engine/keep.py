"""The pages of all answers: given, shared with answers that begin alike, taken back, read from disk."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

from hasten.cache.folders import remember_folder
from hasten.cache.kv_disk import KvAhead, KvDisk
from hasten.cache.policy import new_policy
from hasten.core import ServingOptions
from hasten.engine.answer import Answer
from hasten.engine.loaded import LoadedModel, fingerprint
from hasten.engine.prefix import Chain, Match, PrefixCache, root_key
from hasten.engine.request import EngineStats, Request
from hasten.errors import UsageError
from hasten.runtime.executor import Part
from hasten.runtime.pages import CachedSequence
from hasten.speed.cost import prompt_flops

log = logging.getLogger(__name__)

_LEAST_WAIT_S = 0.05  # for pages from disk, however fast they are computed
_MOST_WAIT_S = 10.0
_UNKNOWN_S = 0.01  # to compute a token, before the first was
_COST_FLOPS = 1e12  # a second's; only the proportions between pages matter


class PrefixKeeper:
    """The pages of all answers, and the prefix cache over them.

    Where the executor gives pages of prompts and answers different classes (`Executor.kv_class`), only pages
    computed as prompt are shared. An answer is then computed once more, as the prompt it will be in the
    next turn, when the engine has nothing else to do: see `settle`.
    """

    def __init__(
        self,
        model: LoadedModel,
        options: ServingOptions,
        counters: EngineStats,
        token_s: Callable[[], float | None],  # to compute a prompt token; None: not measured yet
    ) -> None:
        self._executor = model.executor
        self._pool = model.executor.pool
        self._counters = counters
        self._look_at_weights()
        self._token_s = token_s
        disk = _disk(model, options)
        self._ahead = KvAhead(disk) if disk is not None else None
        self._prefix: PrefixCache | None = None
        self._unsettled: deque[tuple[list[int], str]] = deque(maxlen=2 * model.options.max_sequences)
        if options.prefix_cache:
            if self._pool.reclaim is not None:
                raise UsageError(
                    "this model has an engine with a prefix cache already",
                    hint="close that one first, or use ServingOptions(prefix_cache=False)",
                )
            config, bytes_ = model.config, self._pool.pages * self._executor.page_bytes
            self._prefix = PrefixCache(
                self._pool,
                self._executor,
                new_policy(options.cache_policy, bytes_),
                lambda start, count: prompt_flops(config, start, count) / _COST_FLOPS,
                self._ahead,
            )

    def _look_at_weights(self) -> None:
        self._weights_version = self._executor.weights_version
        as_prompt, as_answer = (self._executor.kv_class(1, kind) for kind in (True, False))
        self.shares_answers = as_prompt == as_answer  # pages computed as answer may be shared as they are

    def outgrows(self, answer: Answer, length: int) -> bool:
        """Whether an answer of `length` tokens must be computed anew: the class of its pages changes."""
        cached = answer.cached
        return cached.length > 0 and cached.kv_class != self._executor.kv_class(length, True)

    @property
    def is_stale(self) -> bool:
        """Whether a layer was replaced since pages were computed: they no longer say what the model would."""
        return self._weights_version != self._executor.weights_version

    def start_anew(self) -> None:
        """Drop all kept pages; no answer may have pages now.

        The disk tier is closed: its fingerprint names the weights that were loaded.
        """
        self._look_at_weights()
        self._unsettled.clear()
        if self._prefix is not None:
            self._prefix.clear()
        if self._ahead is not None:
            log.warning("a layer was replaced; the KV cache on disk is no longer used by this engine")
            self._close_disk()
            if self._prefix is not None:
                self._prefix.leave_disk()

    @property
    def cached_pages(self) -> int:
        """Pages in the prefix cache."""
        return len(self._prefix) if self._prefix is not None else 0

    def read_ahead(self, answer: Answer) -> None:
        """Ask the disk for pages of a waiting answer that are not in memory, if reading them is worth it.

        The answer waits for them as long as computing them would take, where that is known. The answer is the
        same whether they come in time or not.
        """
        if self._ahead is None or not answer.request.prefix_cache or answer.results.every_row:
            return
        try:
            self._ask_disk(answer, self._ahead)
        except Exception:  # it only saves time
            log.exception("pages could not be asked for from disk")

    def _ask_disk(self, answer: Answer, ahead: KvAhead) -> None:
        assert self._prefix is not None, "pages are kept on disk only beside a prefix cache"
        self._cover(answer, self._executor.kv_class(len(answer.tokens), True))
        size = self._pool.page_tokens
        full = answer.chain.keys[: (min(len(answer.tokens), self._shareable(answer)) - 1) // size]
        keys = [key for key in full if key not in self._prefix and not ahead.has(key)]
        if answer.reading is not None:
            ahead.ask_more(answer.reading, keys)
            return
        page_s = size * (self._token_s() or _UNKNOWN_S)
        worth = min(max(_LEAST_WAIT_S, len(keys) * page_s), _MOST_WAIT_S)
        if keys and ahead.seconds(len(keys)) <= worth:
            answer.reading = ahead.ask(keys, time.monotonic() + worth)
        elif keys:
            ahead.doubt()

    def is_reading(self, answer: Answer) -> bool:
        """Whether an answer shall wait for pages on their way from disk."""
        reading = answer.reading
        if reading is None or time.monotonic() >= reading.until:
            return False
        if reading.done:  # ask for pages that were evicted from memory since then
            self.read_ahead(answer)
        return not reading.done

    def wait_for_disk(self, seconds: float) -> None:
        """Wait until a page arrives, at most so long; for when nothing can run."""
        if self._ahead is not None:
            self._ahead.wait(seconds)

    def _stop_reading(self, answer: Answer) -> None:
        reading, answer.reading = answer.reading, None
        if reading is not None and self._ahead is not None:
            self._ahead.drop(reading)

    def begin(self, answer: Answer, spare: int = 0, *, alone: bool = False) -> bool:
        """Pages for all known tokens of an answer, computed ones among them.

        Args:
            spare: pages that must stay free beside, for the others to grow.
            alone: no other answer runs.

        Returns:
            False: there are not enough.
        """
        known, size = len(answer.tokens), self._pool.page_tokens
        needed = -(-known // size) + spare
        if not alone and needed > self._pool.usable + self.cached_pages:
            return False
        found = self._match(answer)
        if not self._pool.ensure(needed - len(found.pages), alone=alone):
            for page in found.pages:
                self._pool.release(page)
            return False
        self._stop_reading(answer)
        answer.cached = CachedSequence(found.pages, found.tokens, self._executor.kv_class(known, True))
        answer.published = found.tokens // size
        self._pool.grow(answer.cached, known)
        if self._is_first(answer):
            answer.tally.hit_tokens = found.tokens
            self._counters.prefix_hit_tokens += found.tokens
            self._counters.disk_hit_tokens += found.disk_tokens
            self._counters.prefix_query_tokens += known
        return True

    def _is_first(self, answer: Answer) -> bool:
        """Whether its prompt is computed for the first time: only then are hits counted."""
        return answer.tally.preemptions == 0 and answer.is_first_pass

    def next_keys(self, answer: Answer, tokens: int) -> list[bytes]:
        """The keys of the pages that a prompt's next `tokens` tokens fill."""
        size, start = self._pool.page_tokens, answer.cached.length
        if self._prefix is None or not answer.in_prompt:
            return []
        return answer.chain.keys[start // size : max((start + tokens) // size, start // size + 1)]

    def catch_up(self, answer: Answer) -> None:
        """Take what others have computed of an answer's prompt since it was admitted."""
        if self._prefix is None or not any(key in self._prefix for key in self.next_keys(answer, 1)):
            return
        found, known = self._match(answer), len(answer.tokens)
        if found.tokens <= answer.cached.length:
            for page in found.pages:
                self._pool.release(page)
            return
        gained = found.tokens - answer.cached.length
        kv_class = answer.cached.kv_class
        self._pool.truncate(answer.cached, 0)
        answer.cached = CachedSequence(found.pages, found.tokens, kv_class)
        self._pool.grow(answer.cached, known)
        answer.published = found.tokens // self._pool.page_tokens
        if self._is_first(answer):
            answer.tally.hit_tokens += gained
            self._counters.prefix_hit_tokens += gained
            self._counters.disk_hit_tokens += found.disk_tokens

    def known(self, request: Request) -> int:
        """How many tokens of a request's prompt were computed before and are in memory now."""
        if self._prefix is None or not request.prefix_cache or request.prompt_logprobs is not None:
            return 0
        prompt = request.prompt
        kv_class = self._executor.kv_class(len(prompt), True)
        chain = Chain(root_key(request.salt, kv_class), self._pool.page_tokens)
        chain.cover(prompt, len(prompt))
        return self._prefix.known(prompt, chain)

    def known_of(self, answer: Answer) -> int:
        """The same for the tokens of an answer that waits, whose keys are computed once."""
        if self._prefix is None or not answer.request.prefix_cache or answer.results.every_row:
            return 0
        self._cover(answer, self._executor.kv_class(len(answer.tokens), True))
        return self._prefix.known(answer.tokens[: self._shareable(answer)], answer.chain)

    def _match(self, answer: Answer) -> Match:
        self._cover(answer, self._executor.kv_class(len(answer.tokens), True))
        if self._prefix is None or not answer.request.prefix_cache or answer.results.every_row:
            return Match()
        return self._prefix.match(answer.tokens[: self._shareable(answer)], answer.chain)

    def _cover(self, answer: Answer, kv_class: str) -> None:
        """Compute the keys of an answer's pages that may be shared. `kv_class`: the class of its pages."""
        root = root_key(answer.request.salt, kv_class)
        if answer.chain.root != root:
            answer.chain, answer.published = Chain(root, self._pool.page_tokens), 0
        answer.chain.cover(answer.tokens, self._shareable(answer))

    def _shareable(self, answer: Answer) -> int:
        """How many of an answer's tokens may be shared once they are computed."""
        return len(answer.tokens) if self.shares_answers else answer.prompt_tokens

    def has_room(self, answer: Answer) -> bool:
        """Whether the page of the next token is there."""
        return answer.cached.length < len(answer.cached.pages) * self._pool.page_tokens

    def reserve(self, answer: Answer, tokens: int, *, alone: bool = False) -> bool:
        """Pages for `tokens` more tokens; False: there are not enough. `alone`: no other answer runs."""
        length = answer.cached.length + tokens
        missing = -(-length // self._pool.page_tokens) - len(answer.cached.pages)
        if missing > 0 and not self._pool.ensure(missing, alone=alone):
            return False
        self._pool.grow(answer.cached, length)
        return True

    def publish(self, answer: Answer) -> None:
        """Share what an answer has computed."""
        computed = min(answer.cached.length, len(answer.tokens), self._shareable(answer))
        end = computed // self._pool.page_tokens
        if self._prefix is None or end <= answer.published:
            return
        # The class is that of the pages: the last token, not computed yet, may already belong to another one.
        self._cover(answer, answer.cached.kv_class or "")
        self._prefix.publish(answer.tokens, answer.chain, answer.cached.pages, answer.published, end)
        answer.published = end

    def fork(self, leader: Answer, sibling: Answer) -> bool:
        """Give a sibling the leader's computed prompt: full pages shared, the last one copied."""
        size, length = self._pool.page_tokens, leader.cached.length
        full, rest = divmod(length, size)
        if rest and not self._pool.ensure(1):
            return False
        for page in leader.cached.pages[:full]:
            self._pool.share(page)
        sibling.cached = CachedSequence(leader.cached.pages[:full], length, leader.cached.kv_class)
        if rest:
            sibling.cached.pages.append(self._pool.take())
            self._executor.copy_page(leader.cached.pages[full], sibling.cached.pages[full])
        sibling.chain, sibling.published = leader.chain.copy(), leader.published
        sibling.tally.hit_tokens = leader.tally.hit_tokens
        return True

    def release(self, answer: Answer) -> None:
        """Take an answer's pages; those in the prefix cache stay there."""
        self._pool.truncate(answer.cached, 0)

    def end(self, answer: Answer, keep: bool = True) -> None:
        """An answer is done: its pages come back.

        Args:
            keep: share its last page too, and remember to settle it. False for an answer that failed.
        """
        try:
            if keep and self._prefix is not None and answer.cached.length:
                self.publish(answer)
                computed = min(answer.cached.length, len(answer.tokens))
                if computed <= self._shareable(answer):
                    if computed // self._pool.page_tokens >= answer.published:
                        tokens = answer.tokens[:computed]
                        self._prefix.publish_tail(tokens, answer.chain, answer.cached.pages)
                elif answer.request.prefix_cache:
                    self._unsettled.append((answer.tokens, answer.request.salt))
        finally:
            self.release(answer)
            self._stop_reading(answer)

    @property
    def unsettled(self) -> int:
        """Ended answers that the next turn would have to compute as prompt."""
        return len(self._unsettled)

    def settle(self) -> bool:
        """Compute a little of an ended answer as prompt, for the next turn. False: nothing is left to do."""
        if not self._unsettled or self._prefix is None:
            return False
        tokens, salt = self._unsettled[-1]  # counted until it is done: other threads look at `unsettled`
        kv_class = self._executor.kv_class(len(tokens), True)

        def compute(sequence: CachedSequence, end: int) -> None:
            sequence.kv_class = kv_class
            part = Part(sequence, tokens[sequence.length : end], as_prompt=True)
            self._executor.collect(self._executor.submit([part]))

        done = True  # what fails is not tried again
        try:
            _, done = self._prefix.settle(tokens, root_key(salt, kv_class), compute)
        finally:
            if done:
                self._unsettled.pop()
        return bool(self._unsettled)

    def close(self) -> None:
        """Write what waits for the disk and give up the cached pages."""
        self._close_disk()
        if self._prefix is not None:
            self._prefix.clear()
            self._pool.reclaim = None

    def _close_disk(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
        self._ahead = None


def _disk(model: LoadedModel, options: ServingOptions) -> KvDisk | None:
    if options.kv_disk is None or not options.prefix_cache:
        return None
    remember_folder("kv", options.kv_disk)
    limit = int(options.kv_disk_gb * 1e9)
    return KvDisk(options.kv_disk, limit, fingerprint(model), model.executor.page_bytes, options.cache_policy)
