"""Traces of requests: what a prefix cache needs to know of them, and nothing of what they say.

A file of JSON lines. `{"hasten_trace": 1, "recorded": ...}` comes first, again wherever another recording was
appended. `{"model": NAME, "page_tokens": ..., ...}` describes a model before its first request. Every other
line is a request that ended: when it arrived, began and ended (seconds from the start of the recording), and
the marks of its prompt and answers.

A mark stands for one token and all before it: two bytes of a BLAKE2b hash of the salt and the text up to
there, keyed with a secret that lives as long as the recording and is written nowhere. Two texts have the same
marks as far as they are the same (but for one in 65,536 by chance), and that is all that marks tell.
"""

from __future__ import annotations

import base64
import json
import logging
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hasten.cache.reading import read_stream
from hasten.errors import DiskError, FormatError, UsageError
from hasten.speed.cost import prompt_flops

if TYPE_CHECKING:
    from hasten.engine.model import LanguageModel
    from hasten.engine.request import Request, Usage

TRACE_VERSION = 1
_LARGEST = 1 << 32  # bytes of a trace: all of it is read
Marks = npt.NDArray[np.int32]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TraceModel:
    """What of a model its cache depends on."""

    model: str
    page_tokens: int
    page_bytes: int
    kv_pages: int  # it had when the trace was recorded
    max_sequences: int
    shares_answers: bool  # answers are cached as they are computed; else when they were computed as prompt
    token_cost: float  # of a prompt's first tokens; only the proportion to the next counts
    context_cost: float  # more of a token for each token before it

    @classmethod
    def of(cls, name: str, model: LanguageModel) -> TraceModel:
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


_HINT = "record one with: hasten serve MODEL --record TRACE.jsonl"


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
