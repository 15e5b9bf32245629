"""What is counted and told of requests: Prometheus at `/metrics`, `usage`, log lines, OpenTelemetry's spans.

The log is one JSON object a line on stderr. A full pipe behind stderr must not stop the event loop, so lines
wait in a bounded queue for a thread that writes them; what does not fit is dropped and the next line says how
many were.

The metrics have vLLM's names with the prefix `hasten_`, so that dashboards translate. Source of the names:
vLLM's docs/usage/metrics.md.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TextIO

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from hasten.serve.body import KNOWN_NAMES

if TYPE_CHECKING:
    from hasten.engine.request import EngineStats, Output, Usage
    from hasten.serve.call import Call, Scope

WAITING = 10_000


class Log:
    """Writes events.

    Args:
        stream: where to; stderr by default.
        requests: whether requests are written too, or only what happens to the server itself.
    """

    def __init__(self, stream: TextIO | None = None, *, requests: bool = True) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._requests = requests
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue(WAITING)
        self._dropped = 0
        self._thread = threading.Thread(target=self._write, name="hasten-log", daemon=True)
        self._thread.start()

    def request(self, **fields: Any) -> None:
        if self._requests:
            self.event("request", **fields)

    def event(self, event: str, level: str = "info", **fields: Any) -> None:
        """Anything else. Fields that are None are left out."""
        entry = {"time": time.time(), "level": level, "event": event, **fields}
        try:
            self._lines.put_nowait(entry)
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Write what waits; gives up after a second where nobody reads."""
        try:
            self._lines.put(None, timeout=1)
        except queue.Full:
            return
        self._thread.join(1)

    def _write(self) -> None:
        while (entry := self._lines.get()) is not None:
            if self._dropped:
                entry["dropped_lines"], self._dropped = self._dropped, 0
            entry["time"] = _stamp(entry["time"])
            line = json.dumps({k: v for k, v in entry.items() if v is not None}, default=str)
            try:
                self._stream.write(line + "\n")
                self._stream.flush()
            except (OSError, ValueError):  # nobody reads any more: the server goes on
                continue


class Forward(logging.Handler):
    """Hands on what the library logs: a cache entry that was dropped, an engine that stopped."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.INFO)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        trace = logging.Formatter().formatException(record.exc_info) if record.exc_info else None
        self._log.event(
            "log",
            record.levelname.lower(),
            logger=record.name,
            message=record.getMessage(),
            traceback=trace,
            **{name: value for name, value in vars(record).items() if name in ("path", "reason")},
        )


def _stamp(moment: float) -> str:
    """ISO 8601 in UTC, milliseconds."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment))
    return f"{whole}.{int(moment % 1 * 1000):03d}Z"


# What of the log line goes into the span, and under which name.
_ATTRIBUTES = {
    "model": "gen_ai.request.model",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "cached_tokens": "gen_ai.usage.cache_read.input_tokens",
    "output_tokens": "gen_ai.usage.output_tokens",
    "finish_reason": "gen_ai.response.finish_reasons",
    "ttft_ms": "hasten.ttft_ms",
    "queue_ms": "hasten.queue_ms",
    "accepted_tokens": "hasten.accepted_draft_tokens",
    "error": "error.message",
}


class Tracer:
    """Opens spans. Made by `new_tracer`."""

    def __init__(self, tracer: Any) -> None:
        self._tracer = tracer

    @contextmanager
    def span(self, scope: Scope, call: Call) -> Iterator[None]:
        """A span around one request, below the client's own if it sent a traceparent."""
        from opentelemetry import propagate, trace

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        parent = propagate.extract(headers)
        name = f"{scope['method']} {scope['path'][:100]}"
        with self._tracer.start_as_current_span(name, context=parent, kind=trace.SpanKind.SERVER) as span:
            try:
                yield
            finally:
                span.set_attributes(_attributes(scope, call))
                if (call.status or 500) >= 500:
                    span.set_status(trace.StatusCode.ERROR)


def _attributes(scope: Scope, call: Call) -> Mapping[str, Any]:
    known = {
        "http.request.method": scope["method"],
        "url.path": scope["path"][:200],
        "hasten.request_id": call.request_id,
    }
    if call.status is not None:
        known["http.response.status_code"] = call.status
    for field, name in _ATTRIBUTES.items():
        if field in call.fields:
            known[name] = call.fields[field]
    return known


def new_tracer() -> Tracer | None:
    """A tracer, or None where nothing would collect its spans: without the packages, or not set up.

    An endpoint in the environment (OTEL_EXPORTER_OTLP_ENDPOINT) sets up the SDK and its OTLP exporter, if
    they are installed; a provider that the process set up before is used as it is.
    """
    if importlib.util.find_spec("opentelemetry") is None:
        return None
    asked = any(name in os.environ for name in _ENDPOINTS)
    if not asked and "opentelemetry.sdk.trace" not in _loaded():
        return None
    try:
        from opentelemetry import trace

        if asked:
            _set_up()
        return Tracer(trace.get_tracer("hasten.serve"))
    except ImportError:
        return None


_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


def _loaded() -> Mapping[str, Any]:
    return sys.modules


def _set_up() -> None:
    """Give the process a provider that exports in the background, unless it has one."""
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    if isinstance(trace.get_tracer_provider(), TracerProvider):
        return
    name = os.environ.get("OTEL_SERVICE_NAME", "hasten")
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)


CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Histograms: name -> (help, upper ends of the buckets).
_SHORT = "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1 2.5 5 7.5 10 20 40 80"
_EACH = "0.001 0.0025 0.005 0.0075 0.01 0.015 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1 2.5"
_WHOLE = "0.1 0.3 0.5 0.8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960"
_TOKENS = "1 2 5 10 20 50 100 200 500 1000 2000 5000 10000 20000 50000 100000"
_HISTOGRAMS = {
    "time_to_first_token_seconds": ("Arrival to first token.", _SHORT),
    "time_per_output_token_seconds": ("Mean time of an answer's tokens after its first.", _EACH),
    "inter_token_latency_seconds": ("Between two publications of an answer.", _EACH),
    "e2e_request_latency_seconds": ("Arrival to last token.", _WHOLE),
    "request_queue_time_seconds": ("Arrival to being computed.", _WHOLE),
    "request_prompt_tokens": ("Prompt tokens of a request.", _TOKENS),
    "request_generation_tokens": ("Tokens generated for an answer.", _TOKENS),
}

# EngineStats -> (name, help); counters get `_total` from the client library.
_GAUGES = {
    "running": ("num_requests_running", "Answers being computed."),
    "waiting": ("num_requests_waiting", "Answers waiting to be computed."),
    "batch": ("batch_size", "Sequences in the last step."),
    "kv_pages": ("kv_pages", "Pages of keys and values there are."),
    "kv_pages_cached": ("kv_pages_cached", "Pages kept for prompts to come."),
}
_COUNTERS = {
    "prefix_query_tokens": ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
    "prefix_hit_tokens": ("prefix_cache_hits", "Prompt tokens found in the prefix cache."),
    "disk_hit_tokens": ("prefix_cache_disk_hits", "Prompt tokens found in the cache on disk."),
    "prompt_tokens": ("prompt_tokens", "Prompt tokens."),
    "output_tokens": ("generation_tokens", "Tokens generated."),
    "drafted_tokens": ("spec_decode_num_draft_tokens", "Tokens proposed by speculation."),
    "accepted_tokens": ("spec_decode_num_accepted_tokens", "Proposed tokens that were right."),
    "preemptions": ("num_preemptions", "Answers put back to make room."),
    "steps": ("engine_steps", "Steps of the engine."),
    "requests": ("engine_requests", "Requests the engine was asked, refused ones included."),
    "cancelled": ("engine_requests_cancelled", "Requests cancelled."),
    "refused": ("engine_requests_refused", "Requests refused: full queue or deadline."),
    "schedule_s": ("schedule_seconds", "Time spent deciding what to compute."),
    "step_s": ("step_seconds", "Time spent in steps."),
}


class Metrics:
    """Everything counted. One a server: tests run several in a process."""

    def __init__(self, paths: Iterable[str] = ()) -> None:
        self.paths = frozenset(paths)  # label values: a client must not be able to make new ones
        self.registry = CollectorRegistry(auto_describe=False)
        self.first_tokens: dict[str, tuple[float, int]] = {}  # model -> (sum of TTFT in seconds, answers)
        self._histograms = {
            name: Histogram(
                f"hasten_{name}",
                text,
                ["model_name"],
                registry=self.registry,
                buckets=[*map(float, ends.split())],
            )
            for name, (text, ends) in _HISTOGRAMS.items()
        }
        self._finished = self._counter(
            "request_success", "Answers finished, by reason.", "model_name", "finished_reason"
        )
        self._http = self._counter("http_requests", "HTTP requests, by outcome.", "method", "path", "status")
        self._ignored = self._counter("ignored_fields", "Fields of requests that were left out.", "field")
        self._cached = self._counter("response_cache_hits", "Requests answered from memory.", "model_name")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"hasten_{name}", text, labels, registry=self.registry)

    def http(self, method: str, path: str, status: int) -> None:
        known = method if method in ("GET", "POST", "DELETE", "OPTIONS", "HEAD") else "other"
        self._http.labels(known, path, str(status)).inc()

    def ignored(self, names: Iterable[str]) -> None:
        """Fields of a body that were left out; names that nobody knows count together."""
        for name in names:
            self._ignored.labels(name if name in KNOWN_NAMES else "other").inc()

    def answered_from_memory(self, model: str) -> None:
        self._cached.labels(model).inc()

    def finished(self, model: str, reason: str, usage: Usage | None, gaps_s: Iterable[float]) -> None:
        """An answer that has ended; everything about it is counted here, nothing while it runs."""
        self._finished.labels(model, reason).inc()
        if usage is None:
            return
        seen: dict[str, Iterable[float]] = {
            "e2e_request_latency_seconds": [usage.e2e_ms / 1000],
            "request_queue_time_seconds": [usage.queue_ms / 1000],
            "request_prompt_tokens": [usage.prompt_tokens],
            "request_generation_tokens": [usage.output_tokens],
            "inter_token_latency_seconds": gaps_s,
        }
        if usage.ttft_ms is not None:
            seen["time_to_first_token_seconds"] = [usage.ttft_ms / 1000]
            total, count = self.first_tokens.get(model, (0.0, 0))
            self.first_tokens[model] = total + usage.ttft_ms / 1000, count + 1
            if usage.output_tokens > 1:
                each = (usage.e2e_ms - usage.ttft_ms) / (usage.output_tokens - 1)
                seen["time_per_output_token_seconds"] = [each / 1000]
        for name, values in seen.items():
            histogram = self._histograms[name].labels(model)
            for value in values:
                histogram.observe(value)

    def watch(self, engines: Callable[[], Iterable[tuple[str, EngineStats]]]) -> None:
        """Report the engines' own numbers too, (model, numbers), as they are when asked."""
        self.registry.register(_Engines(engines))

    def render(self) -> bytes:
        return generate_latest(self.registry)


class _Engines:
    def __init__(self, engines: Callable[[], Iterable[tuple[str, EngineStats]]]) -> None:
        self._engines = engines

    def collect(self) -> Iterator[Metric]:
        now = list(self._engines())

        def family(kind: Any, name: str, text: str, value: Callable[[EngineStats], float]) -> Metric:
            made = kind(f"hasten_{name}", text, labels=["model_name"])
            for model, stats in now:
                made.add_metric([model], value(stats))
            return made  # type: ignore[no-any-return]

        text = "Pages in use, 0 to 1; those kept for prompts to come do not count."
        yield family(
            GaugeMetricFamily,
            "kv_cache_usage_perc",
            text,
            lambda stats: (stats.kv_pages_used - stats.kv_pages_cached) / max(1, stats.kv_pages),
        )
        for kind, table in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for field, (name, text) in table.items():
                yield family(kind, name, text, attrgetter(field))


class Tally:
    """Takes every output as it passes; counts when an answer ends, not with each token."""

    def __init__(self, metrics: Metrics, model: str, call: Call) -> None:
        self._metrics = metrics
        self._model = model
        self._call = call
        self._last: dict[tuple[int, int], float] = {}
        self._gaps: dict[tuple[int, int], list[float]] = {}
        self._prompts: dict[int, Usage] = {}
        self._output_tokens = 0
        self._is_new = True
        call.fields["model"] = model

    def remembered(self) -> None:
        """The outputs to come were computed for an earlier call: the times in them are not this one's."""
        self._is_new = False
        self._metrics.answered_from_memory(self._model)
        self._call.fields["response_cache"] = "hit"

    def take(self, which: int, output: Output) -> None:
        now, key = time.perf_counter(), (which, output.index)
        if key in self._last:
            self._gaps.setdefault(key, []).append(now - self._last[key])
        self._last[key] = now
        if output.finish_reason is None:
            return
        if self._is_new:
            self._metrics.finished(self._model, output.finish_reason, output.usage, self._gaps.pop(key, ()))
        if output.usage is not None:
            self._prompts.setdefault(which, output.usage)
            self._output_tokens += output.usage.output_tokens
            self._log(output.finish_reason, output.usage)

    def _log(self, reason: str, usage: Usage) -> None:
        fields = self._call.fields
        fields["finish_reason"] = reason
        fields["prompt_tokens"] = self.prompt_tokens
        fields["cached_tokens"] = self.cached_tokens
        fields["output_tokens"] = self._output_tokens
        if not self._is_new:
            return
        fields["queue_ms"] = round(usage.queue_ms, 2)
        if usage.ttft_ms is not None:
            fields["ttft_ms"] = round(usage.ttft_ms, 2)
        for name in ("drafted_tokens", "accepted_tokens", "preemptions"):
            if getattr(usage, name):
                fields[name] = fields.get(name, 0) + getattr(usage, name)

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts; a prompt with several answers counts once."""
        return sum(usage.prompt_tokens for usage in self._prompts.values())

    @property
    def cached_tokens(self) -> int:
        """Of them, found in the prefix cache."""
        return sum(usage.cached_tokens for usage in self._prompts.values())

    @property
    def output_tokens(self) -> int:
        """Of all answers that have ended."""
        return self._output_tokens

    def usage(self, prompt: str = "prompt", answer: str = "completion") -> dict[str, Any]:
        """OpenAI's usage object, in the words of chat and completions or in others."""
        return {
            f"{prompt}_tokens": self.prompt_tokens,
            f"{answer}_tokens": self.output_tokens,
            "total_tokens": self.prompt_tokens + self.output_tokens,
            f"{prompt}_tokens_details": {"cached_tokens": self.cached_tokens},
        }
