"""OpenTelemetry: one span a request, where its packages are installed and something collects spans.

Names of the attributes: https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hasten.serve.call import Call, Scope

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
