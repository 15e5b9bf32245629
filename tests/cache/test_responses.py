"""The response cache: only what can have one answer, and for as long as it is good."""

from __future__ import annotations

from typing import Any

import pytest

from hasten.cache.requests import ResponseCache

ASKED = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def key(**changes: Any) -> str:
    found = ResponseCache.key("f", {**ASKED, **changes})
    assert found is not None
    return found


@pytest.mark.parametrize(
    "request_, expected",
    [
        ({"temperature": 0}, True),
        ({"temperature": 0.0, "top_p": 0.5}, True),
        ({"temperature": 0.7, "seed": 3}, True),
        ({"seed": 0}, True),
        ({}, False),
        ({"temperature": 0.7}, False),
        ({"temperature": None, "seed": None}, False),
        ({"temperature": False}, False),
        ({"seed": True}, False),
        ({"temperature": 0, "x": object()}, False),
        ({"temperature": 0, "x": float("nan")}, False),
    ],
)
def test_only_deterministic_requests_have_a_key(request_: dict[str, Any], expected: bool) -> None:
    assert (ResponseCache.key("f", request_) is not None) is expected


def test_keys() -> None:
    assert key() == key(stream=True, user="me", stream_options={"include_usage": True})
    assert key() == ResponseCache.key("f", dict(reversed(list(ASKED.items()))))
    others = {key(), key(max_tokens=5), key(model="n"), key(messages=[]), key(seed=1), key(salt="x")}
    assert len(others) == 6 and ResponseCache.key("g", ASKED) not in others


def test_get_put_and_time() -> None:
    clock = Clock()
    cache = ResponseCache(10_000, ttl_s=60, clock=clock)
    assert cache.get(key()) is None
    assert cache.put(key(), b"answer")
    assert cache.get(key()) == b"answer"
    clock.now += 59.9
    assert cache.get(key()) == b"answer"
    clock.now += 0.2  # a hit does not make it younger
    assert cache.get(key()) is None
    assert cache.bytes == 0


@pytest.mark.parametrize("reason", ["cancelled", "error", "deadline", "content_filter"])
def test_answers_that_did_not_end_are_not_kept(reason: str) -> None:
    cache = ResponseCache(10_000, 60)
    assert not cache.put(key(), b"half", finish_reasons=["stop", reason])
    assert cache.get(key()) is None
    assert cache.put(key(), b"all", finish_reasons=["stop", "length", "tool_calls"])


def test_bounded_by_bytes_and_last_use() -> None:
    cache = ResponseCache(5_000, 60)
    keys = [key(seed=i) for i in range(4)]
    for one in keys[:3]:
        cache.put(one, bytes(1000))
    assert cache.get(keys[0]) is not None
    cache.put(keys[3], bytes(1000))
    assert [cache.get(one) is not None for one in keys] == [True, False, True, True]
    assert 3_000 <= cache.bytes <= 5_000
    assert not cache.put(key(seed=9), bytes(5000))
    cache.put(keys[3], bytes(10))  # replaced, not added
    assert 2_000 < cache.bytes < 4_000
