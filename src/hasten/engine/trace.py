"""Traces of requests, and what a prefix cache of another size or policy would have done with them.

A file of JSON lines. `{"hasten_trace": 1, "recorded": ...}` comes first, again wherever another recording was
appended. `{"model": NAME, "page_tokens": ..., ...}` describes a model before its first request. Every other
line is a request that ended: when it arrived, began and ended (seconds from the start of the recording), and
the marks of its prompt and answers.

A mark stands for one token and all before it: two bytes of a BLAKE2b hash of the salt and the text up to
there, keyed with a secret that lives as long as the recording and is written nowhere. Two texts have the same
marks as far as they are the same (but for one in 65,536 by chance), and that is all that marks tell.

`replay` runs the engine's own code for pages, keys and their order on pages that hold nothing.
"""

from __future__ import annotations

import base64
import heapq
import json
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hasten.cache.kv_folder import HEADER_BYTES
from hasten.cache.policy import Shelf, new_policy
from hasten.cache.reading import read_stream
from hasten.core import CachePolicy
from hasten.engine.prefix import Bytes, Chain, Match, PrefixCache, root_key
from hasten.errors import DiskError, FormatError, UsageError
from hasten.runtime.pages import CachedSequence, PagePool
from hasten.speed.cost import prompt_flops

if TYPE_CHECKING:
    from hasten.engine.loaded import LoadedModel
    from hasten.engine.request import Request, Usage


TRACE_VERSION = 1
DISK_READ_BYTES_PER_S = 2e9  # assumed where nothing was measured: a page that is not in the system's cache
_ROOT = root_key("", "")  # marks tell salts apart already
_LARGEST = 1 << 32  # bytes of a trace: all of it is read
_HINT = "record one with: hasten serve MODEL --record TRACE.jsonl"
Marks = npt.NDArray[np.int32]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TraceModel:
    """The properties of a model that its cache depends on."""

    model: str
    page_tokens: int
    page_bytes: int
    kv_pages: int  # it had when the trace was recorded
    max_sequences: int
    shares_answers: bool  # answers are cached as they are computed; else when they were computed as prompt
    token_cost: float  # of a prompt's first tokens; only the proportion to the next counts
    context_cost: float  # more of a token for each token before it

    @classmethod
    def of(cls, name: str, model: LoadedModel) -> TraceModel:
        """A loaded model under the name it is served by."""
        executor, size = model.executor, model.executor.page_tokens
        middle = max(size, executor.context // 2)
        first, later = (prompt_flops(model.config, start, size) / size for start in (0, middle))
        return cls(
            name,
            page_tokens=size,
            page_bytes=executor.page_bytes,
            kv_pages=executor.pool.pages,
            max_sequences=model.options.max_sequences,
            shares_answers=executor.kv_class(1, True) == executor.kv_class(1, False),
            token_cost=first,
            context_cost=(later - first) / middle,
        )


@dataclass(frozen=True)
class TraceRequest:
    """One request as it was recorded. Times in seconds from the start of the recording."""

    arrived: float
    started: float  # first computed
    ended: float
    prompt: Marks  # int32 [prompt tokens]
    outputs: tuple[Marks, ...]  # one an answer, int32 [its tokens]
    cached_tokens: int  # of the prompt, found in the cache that was there
    prefill_s: float | None  # from its start to its first token
    reads: bool  # whether it was allowed to use cached pages


@dataclass(frozen=True)
class Trace:
    """The requests of one model, in the order in which they began."""

    model: TraceModel
    requests: tuple[TraceRequest, ...]

    @property
    def least_seconds_per_token(self) -> float:
        """What a prompt token took in the request that was alone, or nearly; 0: nothing was computed."""
        rates = [
            r.prefill_s / (len(r.prompt) - r.cached_tokens)
            for r in self.requests
            if r.prefill_s is not None and len(r.prompt) - r.cached_tokens >= self.model.page_tokens
        ]
        return min(rates, default=0.0)

    @property
    def seconds_per_token(self) -> float | None:
        """What a prompt token took to compute, on average; None: nothing was computed."""
        timed = [r for r in self.requests if r.prefill_s is not None]
        tokens = sum(len(r.prompt) - r.cached_tokens for r in timed)
        return sum(r.prefill_s or 0.0 for r in timed) / tokens if tokens else None


class TraceWriter:
    """Appends requests to a trace as they end. For several threads.

    Costs about a microsecond a token. A disk that refuses ends the recording with a line in the log, nothing
    else.

    Raises:
        DiskError: the file cannot be opened.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = str(path)
        self._secret = secrets.token_bytes(32)
        self._began = time.perf_counter()
        self._lock = threading.Lock()
        self._models: set[str] = set()
        try:
            self._file = Path(path).open("ab", buffering=0)  # noqa: SIM115  as long as the server runs
        except OSError as error:
            raise DiskError(
                f"cannot write the trace {path}: {error.strerror}",
                hint="choose another file with --record FILE",
            ) from error
        self._write(
            {
                "hasten_trace": TRACE_VERSION,
                "recorded": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            }
        )

    def add(
        self,
        model: TraceModel,
        request: Request,
        outputs: Sequence[Sequence[int]],
        usage: Usage,
        arrived: float | None = None,
    ) -> None:
        """Record a request that ended.

        Args:
            outputs: token ids of each answer.
            usage: of the answer that ended last; its times say when the request began and ended.
            arrived: when it came, by `time.perf_counter`; None: it ended just now.
        """
        arrived = (time.perf_counter() - usage.e2e_ms / 1000 if arrived is None else arrived) - self._began
        started, ended = arrived + usage.queue_ms / 1000, arrived + usage.e2e_ms / 1000
        prompt = self._marks(request.salt, request.prompt)
        record = {
            "request": model.model,
            "arrived": round(arrived, 6),
            "started": round(started, 6),
            "ended": round(ended, 6),
            "prompt": _encode(prompt),
            "outputs": [
                _encode(self._marks(request.salt, [*request.prompt, *output])[2 * len(request.prompt) :])
                for output in outputs
            ],
            "cached_tokens": usage.cached_tokens,
            "prefill_s": None if usage.ttft_ms is None else round((usage.ttft_ms - usage.queue_ms) / 1000, 5),
            "reads": request.prefix_cache and request.prompt_logprobs is None and request.pooling != "mean",
        }
        with self._lock:
            if model.model not in self._models:
                self._models.add(model.model)
                self._write(asdict(model))
            self._write(record)

    def close(self) -> None:
        """End the recording."""
        with self._lock:
            self._file.close()

    def _marks(self, salt: str, tokens: Sequence[int]) -> bytes:
        """Two bytes a token."""
        state = blake2b(salt.encode() + b"\0", key=self._secret, digest_size=2)
        raw = np.asarray(tokens, np.int32).tobytes()
        marks = []
        for at in range(0, len(raw), 4):
            state.update(raw[at : at + 4])
            marks.append(state.digest())  # of all so far: a digest does not end the hash
        return b"".join(marks)

    def _write(self, record: dict[str, Any]) -> None:
        if self._file.closed:
            return
        try:
            self._file.write(json.dumps(record).encode() + b"\n")
        except OSError as error:
            log.warning("the trace ends here", extra={"path": self._path, "reason": error.strerror})
            self._file.close()


def read_trace(path: str | Path, model: str | None = None) -> Trace:
    """The requests of one model, by default the one with most of them.

    A last line that was cut short (a server that was killed) is left out.

    Raises:
        FormatError: no trace, another version, or a line that cannot be read.
        UsageError: no request of this model.
    """
    models: dict[str, TraceModel] = {}
    requests: dict[str, list[TraceRequest]] = {}
    offset = last = 0.0
    for number, record in _records(Path(path)):
        try:
            if "hasten_trace" in record:
                _check_version(path, record["hasten_trace"])
                offset = last
            elif "request" in record:
                request = _request(record, offset)
                requests.setdefault(record["request"], []).append(request)
                last = max(last, request.ended)
            else:
                models[record["model"]] = TraceModel(**record)
        except (KeyError, TypeError, ValueError) as error:
            raise _unreadable(path, number) from error
    if not requests.keys() <= models.keys():
        raise FormatError(f"{path}: a request of a model that no line describes", hint=_HINT)
    return _chosen(path, models, requests, model)


def _chosen(
    path: str | Path, models: dict[str, TraceModel], requests: dict[str, list[TraceRequest]], name: str | None
) -> Trace:
    if not requests:
        raise FormatError(f"{path}: a trace without a request", hint="send the server some requests first")
    if name is None:
        name = max(requests, key=lambda one: len(requests[one]))
    if name not in requests:
        raise UsageError(f"{path}: no request of {name!r}", hint=f"it has: {', '.join(sorted(requests))}")
    return Trace(models[name], tuple(sorted(requests[name], key=lambda r: r.started)))


def _records(path: Path) -> list[tuple[int, dict[str, Any]]]:
    try:
        lines = read_stream(path, _LARGEST).split(b"\n")
    except OSError as error:
        raise FormatError(f"cannot read the trace {path}: {error.strerror}", hint=_HINT) from error
    records = []
    for number, line in enumerate(lines[:-1], start=1):  # behind the last newline is nothing, or half a line
        try:
            record = json.loads(line)
        except ValueError as error:
            raise _unreadable(path, number) from error
        if not isinstance(record, dict) or (number == 1 and "hasten_trace" not in record):
            raise _unreadable(path, number)
        records.append((number, record))
    if not records:
        raise FormatError(f"{path} is no trace", hint=_HINT)
    return records


def _check_version(path: str | Path, version: object) -> None:
    if version != TRACE_VERSION:
        raise FormatError(
            f"{path}: trace version {version!r}, this program reads {TRACE_VERSION}",
            hint="record it again with this version",
        )


def _unreadable(path: str | Path, number: int) -> FormatError:
    return FormatError(f"{path}, line {number}: not a line of a trace", hint=_HINT)


def _request(record: dict[str, Any], offset: float) -> TraceRequest:
    prefill = record["prefill_s"]
    return TraceRequest(
        arrived=offset + float(record["arrived"]),
        started=offset + float(record["started"]),
        ended=offset + float(record["ended"]),
        prompt=_decode(record["prompt"]),
        outputs=tuple(_decode(output) for output in record["outputs"]),
        cached_tokens=int(record["cached_tokens"]),
        prefill_s=None if prefill is None else float(prefill),
        reads=bool(record["reads"]),
    )


def _encode(marks: bytes) -> str:
    return base64.b64encode(marks).decode()


def _decode(text: str) -> Marks:
    return np.frombuffer(base64.b64decode(text, validate=True), "<u2").astype(np.int32)


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
            self._prefix.publish_tail(running.tokens, running.chain, sequence.pages)
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
        return self._prefix.settle(tokens, _ROOT, self._pool.grow)

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

    def _chain(self, tokens: list[int]) -> Chain:
        chain = Chain(_ROOT, self._pool.page_tokens)
        chain.cover(tokens, len(tokens))
        return chain
