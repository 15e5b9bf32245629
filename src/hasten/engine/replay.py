"""What a prefix cache would have done with the requests of a trace: the serving code on empty pages."""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass

import numpy as np

from hasten.cache.kv_folder import HEADER_BYTES
from hasten.cache.policy import Shelf, new_policy
from hasten.core import CachePolicy
from hasten.engine.prefix import Bytes, Chain, Match, PrefixCache, root_key
from hasten.engine.trace import Trace, TraceRequest
from hasten.errors import UsageError
from hasten.runtime.pages import CachedSequence, PagePool

SETTLE_PAGES = 2  # computed at a time, as hasten.engine.keep does
DISK_READ_BYTES_PER_S = 2e9  # assumed where nothing was measured: a page that is not in the system's cache


@dataclass(frozen=True)
class ReplayResult:
    """One cache on one trace. Tokens saved are counted, seconds saved predicted."""

    policy: CachePolicy
    ram_gb: float
    disk_gb: float
    requests: int
    prompt_tokens: int
    hit_tokens: int  # found in memory or on disk
    disk_hit_tokens: int  # of them, on disk
    hit_ratio: float  # of prompt tokens
    disk_hit_ratio: float
    ttft_saved_s: float  # predicted, all requests: tokens not computed, less pages read from disk
    ttft_saved_ms: float  # predicted, mean of a request


def replay(
    trace: Trace,
    policy: CachePolicy,
    ram_bytes: int,
    disk_bytes: int = 0,
    seconds_per_token: float | None = None,
    disk_bytes_per_s: float = DISK_READ_BYTES_PER_S,
) -> ReplayResult:
    """Run a trace through a cache of another size or policy.

    Pages, their owners, keys and the order in which they go are the engine's own code. Requests begin and end
    when they did in the recording, although a better cache would have ended them sooner; each one's prompt is
    shared from its beginning on, and its answer from its end on.

    Args:
        ram_bytes: memory for keys and values, those of running requests included.
        disk_bytes: limit of the disk tier; 0 is none.
        seconds_per_token: to compute a prompt token; None takes what the trace measured.

    Raises:
        UsageError: less memory than one page, or an unknown policy.
    """
    model = trace.model
    if ram_bytes < model.page_bytes:
        raise UsageError(
            f"{ram_bytes / 1e9:g} GB hold no page of {model.page_bytes:,} bytes", hint="give more --ram-gb"
        )
    books = _Books(trace, policy, ram_bytes, disk_bytes)
    prompt_tokens = hit_tokens = disk_tokens = 0
    for request in trace.requests:
        hits, from_disk = books.begin(request)
        prompt_tokens += len(request.prompt)
        hit_tokens += hits
        disk_tokens += from_disk
    per_token = trace.seconds_per_token if seconds_per_token is None else seconds_per_token
    reading = disk_tokens / model.page_tokens * model.page_bytes / disk_bytes_per_s
    saved = hit_tokens * (per_token or 0.0) - reading
    return ReplayResult(
        policy=policy,
        ram_gb=ram_bytes / 1e9,
        disk_gb=disk_bytes / 1e9,
        requests=len(trace.requests),
        prompt_tokens=prompt_tokens,
        hit_tokens=hit_tokens,
        disk_hit_tokens=disk_tokens,
        hit_ratio=hit_tokens / max(1, prompt_tokens),
        disk_hit_ratio=disk_tokens / max(1, prompt_tokens),
        ttft_saved_s=saved,
        ttft_saved_ms=1000 * saved / max(1, len(trace.requests)),
    )


class NoMemory:
    """Pages that hold nothing: what `PrefixCache` asks of an executor."""

    def __init__(self, page_bytes: int) -> None:
        self.page_bytes = page_bytes
        self._nothing: Bytes = np.zeros(0, np.uint8)

    def copy_page(self, source: int, target: int) -> None:
        """Nothing to copy."""

    def read_page(self, page: int) -> Bytes:
        """Nothing."""
        return self._nothing

    def write_page(self, page: int, data: Bytes) -> None:
        """Nothing to write."""


class NoDisk:
    """The disk tier's books without its files: the same `Shelf` as `KvDisk`, and time stands still."""

    def __init__(self, limit_bytes: int, page_bytes: int, policy: CachePolicy) -> None:
        self._shelf = Shelf(limit_bytes, policy)
        self._file_bytes = page_bytes + HEADER_BYTES

    def has(self, key: bytes) -> bool:
        """As `KvAhead.has`."""
        return key in self._shelf

    knows = has

    def read(self, key: bytes, out: Bytes) -> bool:
        """As `KvAhead.read`, but that nothing is read."""
        self._shelf.touch(key, 0.0)
        return key in self._shelf

    def write(self, key: bytes, data: Bytes, cost: float, parent: bytes = b"") -> None:
        """As `KvDisk.write`, at once."""
        if self._file_bytes > self._shelf.limit_bytes:
            return
        while self._shelf.bytes + self._file_bytes > self._shelf.limit_bytes:
            self._shelf.pop()
        self._shelf.insert(key, self._file_bytes, cost, parent, 0.0)


@dataclass
class _Running:
    """A request while it runs. Its first answer grows token by token, evenly over the time it took."""

    request: TraceRequest
    prompt_tokens: int
    tokens: list[int]  # of the prompt and the first answer, but the last: that is never computed
    chain: Chain
    sequence: CachedSequence

    def moment(self, length: int) -> float:
        """When `length` tokens were computed."""
        request, made = self.request, len(self.tokens) - self.prompt_tokens
        if length >= len(self.tokens):
            return request.ended
        first = min(request.started + (request.prefill_s or 0.0), request.ended)
        return first + (request.ended - first) * (length - self.prompt_tokens) / made


class _Books:
    """The engine's bookkeeping of pages (`hasten.engine.keep`) for requests whose answers are known."""

    def __init__(self, trace: Trace, policy: CachePolicy, ram_bytes: int, disk_bytes: int) -> None:
        model = trace.model
        self._model = model
        self._pool = PagePool(ram_bytes // model.page_bytes, model.page_tokens)
        disk = NoDisk(disk_bytes, model.page_bytes, policy) if disk_bytes else None
        self._prefix = PrefixCache(
            self._pool,
            NoMemory(model.page_bytes),
            new_policy(policy, self._pool.pages * model.page_bytes),
            lambda start, count: count * (model.token_cost + model.context_cost * start),
            disk,
        )
        self._events: list[tuple[float, int, int, _Running]] = []  # heap: when, order, tokens computed then
        self._count = 0
        self._running = 0
        self._idle_since = 0.0
        self._unsettled: deque[list[int]] = deque(maxlen=2 * model.max_sequences)
        self._token_s = trace.least_seconds_per_token

    def begin(self, request: TraceRequest) -> tuple[int, int]:
        """A request begins, after those that ended before: (prompt tokens found, of them on disk)."""
        while self._events and self._events[0][0] <= request.started:
            self._go_on()
        if not self._running:
            self._idle(request.started - self._idle_since)
        prompt = request.prompt.tolist()
        answer = request.outputs[0].tolist()[:-1] if request.outputs else []
        chain = self._chain(prompt)
        while (taken := self._take(prompt, chain, request.reads)) is None:
            if not self._events:
                return 0, 0  # it never fitted
            self._go_on()  # it waited for others to end
        sequence, found = taken
        self._publish(prompt, chain, sequence, found.tokens, len(prompt))
        running = _Running(request, len(prompt), prompt + answer, self._chain(prompt + answer), sequence)
        self._running += 1
        self._wait(running, len(prompt))
        return found.tokens, found.disk_tokens

    def _wait(self, running: _Running, computed: int) -> None:
        """Come back to a request when its last page is full, or when it ends."""
        size = self._pool.page_tokens
        stop = min(-(-computed // size) * size, len(running.tokens))
        self._count += 1
        heapq.heappush(self._events, (running.moment(stop), self._count, stop, running))

    def _go_on(self) -> None:
        """The next thing that happened to a running request."""
        moment, _, computed, running = heapq.heappop(self._events)
        sequence = running.sequence
        if self._model.shares_answers and computed > sequence.length and self._has_room(sequence, computed):
            self._publish(running.tokens, running.chain, sequence, sequence.length, computed)
        if computed < len(running.tokens):
            if self._pool.ensure(1):
                self._pool.grow(sequence, computed + 1)
            self._wait(running, computed + 1)
            return
        self._end(running)
        self._running -= 1
        self._idle_since = moment

    def _has_room(self, sequence: CachedSequence, tokens: int) -> bool:
        return len(sequence.pages) * self._pool.page_tokens >= tokens

    def _end(self, running: _Running) -> None:
        """A request ends: its answers can be found from now on."""
        prompt, sequence = running.tokens[: running.prompt_tokens], running.sequence
        texts = [prompt + output.tolist() for output in running.request.outputs if len(output) > 1]
        if (self._model.shares_answers or not texts) and self._has_room(sequence, len(running.tokens)):
            self._tail(running.tokens, running.chain, sequence)
        self._pool.truncate(sequence, 0)
        if not self._model.shares_answers:
            self._unsettled.extend(texts)
            return
        for tokens in texts[1:]:  # further answers to one prompt
            while not self._settle(tokens[:-1])[1]:
                pass

    def _idle(self, seconds: float) -> None:
        """Nothing runs for so long: answers are computed once more as prompt, the newest first."""
        while self._unsettled and seconds > 0:
            computed, done = self._settle(self._unsettled[-1])
            seconds -= computed * self._token_s
            if done:
                self._unsettled.pop()

    def _settle(self, tokens: list[int]) -> tuple[int, bool]:
        """The next pages of an answer, computed as prompt: (how many tokens, whether that was all)."""
        size, chain = self._pool.page_tokens, self._chain(tokens)
        found = self._prefix.match(tokens, chain)
        sequence = CachedSequence(found.pages, found.tokens)
        end = min(len(tokens), (found.tokens // size + SETTLE_PAGES) * size)
        more = end - found.tokens > 1 and self._pool.ensure(-(-end // size) - len(sequence.pages))
        if more:
            self._pool.grow(sequence, end)
            self._publish(tokens, chain, sequence, found.tokens, end)
            if end == len(tokens):
                self._tail(tokens, chain, sequence)
        self._pool.truncate(sequence, 0)
        return (end - found.tokens if more else 0), (not more or end == len(tokens))

    def _take(self, tokens: list[int], chain: Chain, reads: bool) -> tuple[CachedSequence, Match] | None:
        """Pages for all of a text, found ones first, and one more for each other; None: there are too few."""
        found = self._prefix.match(tokens, chain) if reads else Match()
        sequence = CachedSequence(found.pages, found.tokens)
        needed = -(-len(tokens) // self._pool.page_tokens) + self._running
        if not self._pool.ensure(needed - len(found.pages)):
            self._pool.truncate(sequence, 0)
            return None
        self._pool.grow(sequence, len(tokens))
        return sequence, found

    def _publish(
        self, tokens: list[int], chain: Chain, sequence: CachedSequence, start: int, end: int
    ) -> None:
        """Share the pages that tokens `start` to `end` fill."""
        size = self._pool.page_tokens
        self._prefix.publish(tokens, chain, sequence.pages, start // size, end // size)
        sequence.length = end

    def _tail(self, tokens: list[int], chain: Chain, sequence: CachedSequence) -> None:
        size = self._pool.page_tokens
        if len(tokens) % size:
            self._prefix.publish_tail(tokens, chain, sequence.pages[len(tokens) // size])

    def _chain(self, tokens: list[int]) -> Chain:
        chain = Chain(root_key("", ""), self._pool.page_tokens)
        chain.cover(tokens, len(tokens))
        return chain
