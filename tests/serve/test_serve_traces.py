"""OpenTelemetry spans, where its SDK is installed."""

from __future__ import annotations

import pytest
from running_server import chat, serving

from hasten.serve.metrics import new_tracer
from hasten.serve.options import ServeOptions


def test_a_span_says_what_a_request_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", lambda name: provider.get_tracer(name))
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with serving(ServeOptions(port=0, log=False)) as server:
        server.ask("/v1/chat/completions", chat("hi"), headers={"traceparent": parent})
    (span,) = exporter.get_finished_spans()
    assert span.name == "POST /v1/chat/completions"
    assert f"{span.context.trace_id:032x}" == parent.split("-")[1]
    assert span.attributes["gen_ai.request.model"] == "echo"
    assert span.attributes["gen_ai.usage.input_tokens"] == 8
    assert span.attributes["http.response.status_code"] == 200


def test_nothing_is_traced_where_nobody_collects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hasten.serve.metrics._loaded", dict)
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert new_tracer() is None
