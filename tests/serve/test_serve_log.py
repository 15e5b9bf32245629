"""The log: JSON lines that never stop the server."""

from __future__ import annotations

import io
import json
import logging
import threading

from hasten.serve.metrics import Forward, Log


def test_lines_are_json_and_leave_out_what_is_not_known() -> None:
    stream = io.StringIO()
    log = Log(stream)
    log.request(request_id="r", status=200, error=None)
    log.event("ready", models=["a"])
    log.close()
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert (first["event"], first["request_id"], first["status"]) == ("request", "r", 200)
    assert "error" not in first
    assert first["time"].endswith("Z")
    assert second["models"] == ["a"]


def test_requests_can_be_left_out() -> None:
    stream = io.StringIO()
    log = Log(stream, requests=False)
    log.request(request_id="r")
    log.event("ready")
    log.close()
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["ready"]


class Blocked(io.StringIO):
    """A pipe whose reader sleeps."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    def write(self, text: str) -> int:
        self.gate.wait(10)
        return super().write(text)


def test_a_full_pipe_loses_lines_and_says_how_many(monkeypatch: object) -> None:
    stream = Blocked()
    log = Log(stream)
    for number in range(10_500):
        log.event("x", number=number)  # returns at once
    stream.gate.set()
    log.event("last")
    log.close()
    entries = [json.loads(line) for line in stream.getvalue().splitlines()]
    lost = sum(entry.get("dropped_lines", 0) for entry in entries)
    assert lost + len(entries) in (10_500, 10_501)
    assert lost >= 499


def test_what_the_library_logs_comes_along() -> None:
    stream = io.StringIO()
    log = Log(stream)
    record = logging.LogRecord("hasten.cache", logging.WARNING, "f", 1, "dropped %s", ("x",), None)
    Forward(log).handle(record)
    log.close()
    entry = json.loads(stream.getvalue())
    assert (entry["event"], entry["level"], entry["message"]) == ("log", "warning", "dropped x")


def test_a_closed_stream_is_no_error() -> None:
    stream = io.StringIO()
    stream.close()
    log = Log(stream)
    log.event("x")
    log.close()
