"""What is told of requests: one JSON object a line on stderr, and OpenTelemetry's spans.

A full pipe behind stderr must not stop the event loop, so lines wait in a bounded queue for a thread that
writes them; what does not fit is dropped and the next line says how many were.
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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
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
        """A request that has ended."""
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
        """Called by logging, from any thread."""
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
    import sys

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
