"""What a prefix cache would have done with the requests of a trace: the serving code on empty pages."""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass

import numpy as np

from hasten.cache.kv_entry import HEADER_BYTES
from hasten.cache.policy import new_policy
from hasten.cache.shelf import Shelf
from hasten.core import CachePolicy
from hasten.engine.prefix import Bytes, Chain, Match, PrefixCache, root_key
from hasten.engine.trace import Trace, TraceRequest
from hasten.errors import UsageError
from hasten.runtime.pages import PagePool, Sequence

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
        """As `KvDisk.has`."""
        return key in self._shelf

    def read(self, key: bytes, out: Bytes) -> bool:
        """As `KvDisk.read`, but that nothing is read."""
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
    request: TraceRequest
    tokens: list[int]  # the prompt
    sequence: Sequence


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
        self._running: list[tuple[float, int, _Running]] = []  # heap by end
        self._count = 0
        self._unsettled: deque[list[int]] = deque(maxlen=2 * model.max_sequences)
        self._token_s = trace.least_seconds_per_token
        self._idle_since = 0.0

    def begin(self, request: TraceRequest) -> tuple[int, int]:
        """A request begins, after those that ended before: (prompt tokens found, of them on disk)."""
        while self._running and self._running[0][0] <= request.started:
            self._idle_since, _, ended = heapq.heappop(self._running)
            self._end(ended)
        if not self._running:
            self._idle(request.started - self._idle_since)
        tokens = request.prompt.tolist()
        chain = self._chain(tokens)
        while (taken := self._take(tokens, chain, request.reads, len(self._running))) is None:
            if not self._running:
                return 0, 0  # it never fitted
            self._end(heapq.heappop(self._running)[2])  # it waited for one to end
        sequence, found = taken
        self._publish(tokens, chain, sequence, found.tokens, len(tokens))
        self._count += 1
        heapq.heappush(self._running, (request.ended, self._count, _Running(request, tokens, sequence)))
        return found.tokens, found.disk_tokens

    def _end(self, running: _Running) -> None:
        """A request ends: its answers can be found from now on. Their last token was never computed."""
        prompt, sequence, outputs = running.tokens, running.sequence, running.request.outputs
        texts = [prompt + output.tolist() for output in outputs if len(output) > 1]
        if not texts:
            self._tail(prompt, self._chain(prompt), sequence)
        elif self._model.shares_answers:
            tokens = texts.pop(0)[:-1]
            chain = self._chain(tokens)
            if self._pool.ensure(-(-len(tokens) // self._pool.page_tokens) - len(sequence.pages)):
                self._pool.grow(sequence, len(tokens))
                self._publish(tokens, chain, sequence, len(prompt), len(tokens))
                self._tail(tokens, chain, sequence)
        self._pool.truncate(sequence, 0)
        if not self._model.shares_answers:
            self._unsettled.extend(texts)
            return
        for tokens in texts:  # further answers to one prompt
            while self._settle(tokens[:-1]):
                pass

    def _idle(self, seconds: float) -> None:
        """Nothing runs for so long: answers are computed once more as prompt, the newest first."""
        while self._unsettled and seconds > 0:
            computed = self._settle(self._unsettled[-1])
            seconds -= computed * self._token_s
            if not computed:
                self._unsettled.pop()

    def _settle(self, tokens: list[int]) -> int:
        """The next pages of an answer, computed as prompt: how many tokens; 0: all is done that can be."""
        size, chain = self._pool.page_tokens, self._chain(tokens)
        found = self._prefix.match(tokens, chain)
        sequence = Sequence(found.pages, found.tokens)
        end = min(len(tokens), (found.tokens // size + SETTLE_PAGES) * size)
        more = end - found.tokens > 1 and self._pool.ensure(-(-end // size) - len(sequence.pages))
        if more:
            self._pool.grow(sequence, end)
            self._publish(tokens, chain, sequence, found.tokens, end)
            if end == len(tokens):
                self._tail(tokens, chain, sequence)
        self._pool.truncate(sequence, 0)
        return end - found.tokens if more else 0

    def _take(
        self, tokens: list[int], chain: Chain, reads: bool, spare: int
    ) -> tuple[Sequence, Match] | None:
        """Pages for all of a text, found ones first, `spare` more to remain; None: there are not enough."""
        found = self._prefix.match(tokens, chain) if reads else Match()
        sequence = Sequence(found.pages, found.tokens)
        needed = -(-len(tokens) // self._pool.page_tokens) + spare
        if not self._pool.ensure(needed - len(found.pages)):
            self._pool.truncate(sequence, 0)
            return None
        self._pool.grow(sequence, len(tokens))
        return sequence, found

    def _publish(self, tokens: list[int], chain: Chain, sequence: Sequence, start: int, end: int) -> None:
        """Share the pages that tokens `start` to `end` fill."""
        size = self._pool.page_tokens
        self._prefix.publish(tokens, chain, sequence.pages, start // size, end // size)
        sequence.length = end

    def _tail(self, tokens: list[int], chain: Chain, sequence: Sequence) -> None:
        size = self._pool.page_tokens
        if len(tokens) % size:
            self._prefix.publish_tail(tokens, chain, sequence.pages[len(tokens) // size])

    def _chain(self, tokens: list[int]) -> Chain:
        chain = Chain(root_key("", ""), self._pool.page_tokens)
        chain.cover(tokens, len(tokens))
        return chain
