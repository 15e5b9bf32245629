"""Answers from memory."""

from __future__ import annotations

from typing import Any

import pytest
from running_server import Running, chat, serving
from stand_in_engine import StandInEngine

from hasten.cache.requests import ResponseCache
from hasten.serve.options import ServeOptions

PATH = "/v1/chat/completions"


class TimedCache(ResponseCache):
    """One whose time goes on when a test says so."""

    now = 0.0

    def __init__(self, limit_bytes: int, ttl_s: float) -> None:
        super().__init__(limit_bytes, ttl_s, lambda: TimedCache.now)


@pytest.fixture
def remembering(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("hasten.engine.loaded.fingerprint", lambda model: model.name)
    monkeypatch.setattr("hasten.serve.kept.ResponseCache", TimedCache)
    monkeypatch.setattr(TimedCache, "now", 0.0)
    with serving(ServeOptions(port=0, log=False, response_cache_ttl=5), {"a": StandInEngine()}) as server:
        yield server


def without_names(document: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key not in ("id", "created")}


def test_a_deterministic_request_is_computed_once(remembering: Running) -> None:
    body = chat("hello", temperature=0, logprobs=True, top_logprobs=1, n=2)
    first, second = remembering.ask(PATH, body).json, remembering.ask(PATH, body).json
    assert len(remembering.engine.asked) == 1
    assert first["id"] != second["id"]
    assert without_names(first) == without_names(second)
    events = remembering.ask(PATH, {**body, "stream": True}).events  # the same answer in the other form
    assert len(remembering.engine.asked) == 1
    texts = ["", ""]
    for event in events:
        texts[event["choices"][0]["index"]] += event["choices"][0]["delta"].get("content", "")
    assert texts == [choice["message"]["content"] for choice in first["choices"]]
    assert b"hasten_response_cache_hits_total" in remembering.ask("/metrics").body


def test_anything_else_is_computed(remembering: Running) -> None:
    for body in (
        chat("hello", temperature=0),
        chat("hello", temperature=0, max_tokens=5),
        chat("hello", temperature=0, cache_salt="other"),
        chat("hello", seed=1),
        chat("hello", seed=2),
        chat("hello"),
        chat("hello"),  # no seed: another answer could be as right
    ):
        remembering.ask(PATH, body)
    remembering.ask("/v1/completions", {"prompt": "<user>hello", "temperature": 0})
    assert len(remembering.engine.asked) == 8


def test_answers_grow_old(remembering: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    for seconds in (0, 4.9):
        monkeypatch.setattr(TimedCache, "now", seconds)
        remembering.ask(PATH, chat(temperature=0))
    assert len(remembering.engine.asked) == 1
    monkeypatch.setattr(TimedCache, "now", 5.1)
    remembering.ask(PATH, chat(temperature=0))
    assert len(remembering.engine.asked) == 2


def test_an_answer_that_broke_is_not_remembered(remembering: Running) -> None:
    remembering.engine.breaks_after = 2
    assert remembering.ask(PATH, chat(temperature=0)).status == 500
    remembering.engine.breaks_after = None
    assert remembering.ask(PATH, chat(temperature=0)).status == 200


def test_it_is_off_by_default(server: Running) -> None:
    for _ in range(2):
        server.ask(PATH, chat(temperature=0))
    assert len(server.engine.asked) == 2
