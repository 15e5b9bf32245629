"""Bodies that are large, or hold very many wrong values: refused in a time that grows with their length."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from running_server import Running, chat, wait_for

from hasten.serve import service
from hasten.serve.body import MAX_PARTS, MAX_VALUES, Ignored, Strict, parse
from hasten.serve.call import Problem
from hasten.serve.chat import ChatRequest
from hasten.serve.responses import ResponseRequest
from hasten.serve.texts import CompletionRequest, DetokenizeRequest

MANY = 60_000


@pytest.fixture
def server(strict_server: Running) -> Running:
    """Every word of a refusal is a strict server's."""
    return strict_server


WRONG: list[tuple[type[Strict], Any, str, str]] = [
    (DetokenizeRequest, {"tokens": [-1] * MANY}, "tokens.0", "greater than or equal to 0"),
    (ChatRequest, {"messages": [{"role": 5}] * (MANY // 4)}, "messages.0", "tag '5'"),
    (ChatRequest, chat(**{f"x{i}": 1 for i in range(MANY)}), "x0", "unknown field x0"),
    (ChatRequest, chat(logit_bias={str(i): "x" for i in range(MANY)}), "logit_bias.0", "a valid number"),
    (ChatRequest, chat(stop=[1] * MANY), "stop.0", "a valid string"),
    (CompletionRequest, {"prompt": ["a", 1] * MANY}, "prompt.1", "a valid string"),
    (
        ResponseRequest,
        {"input": [{"type": "message", "role": 5}] * 9000},
        "input.0.role",
        "should be 'system'",
    ),
    (
        ChatRequest,
        {"messages": [{**{f"x{i}": 1 for i in range(MANY)}, "role": "user", "content": "a"}]},
        "messages.0.x0",
        "unknown field messages.0.x0",
    ),
]


@pytest.mark.parametrize(("model", "body", "param", "said"), WRONG)
def test_many_wrong_values_cost_no_more_than_their_length(
    model: type[Strict], body: Any, param: str, said: str
) -> None:
    data = json.dumps(body).encode()
    began = time.monotonic()
    with pytest.raises(Problem) as caught:
        parse(model, data)
    assert time.monotonic() - began < 5  # 0.2 s; minutes if every error had the body parsed again
    assert caught.value.status == 400
    assert caught.value.param == param
    assert said in caught.value.message


@pytest.mark.parametrize(
    "body",
    [
        b'{"tokens":[' + b"1," * MAX_VALUES + b"1]}",
        b'{"tokens":[' + b"[]," * MAX_PARTS + b"[]]}",
        b'{"x":{' + b",".join(b'"%d":1' % i for i in range(MAX_PARTS)) + b"}}",
        b'{"x":"\\\\\\"","y":[' + b'"a\\",",' * MAX_VALUES + b'""]}',
    ],
)
def test_a_body_of_too_many_parts_is_refused_before_it_is_parsed(
    body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DetokenizeRequest, "model_validate_json", lambda *_: pytest.fail("parsed"))
    with pytest.raises(Problem) as caught:
        parse(DetokenizeRequest, body)
    assert (caught.value.status, caught.value.code) == (400, "too_many_values")


@pytest.mark.parametrize("text", [',:[{"' * 400_000, '\\",\\' * 1_100_000, '","' * 700_000])
def test_what_a_text_holds_counts_as_one_value(text: str) -> None:
    assert parse(CompletionRequest, json.dumps({"prompt": text}).encode()).prompt == text


TOOL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
HISTORIES: list[tuple[type[Strict], Callable[[int], Any]]] = [
    (ChatRequest, lambda n: {"messages": [{"role": "tool", "content": "1"}] * n}),
    (
        ChatRequest,
        lambda n: {"messages": [{"role": "assistant", "tool_calls": [TOOL] * 900}, *[{"role": "tool"}] * n]},
    ),
    (
        ChatRequest,
        lambda n: chat(
            tools=[{"name": f"f{i}"} for i in range(n)],
            tool_choice={"type": "allowed_tools", "tools": [{"name": f"f{i}"} for i in range(n)]},
        ),
    ),
    (ChatRequest, lambda n: chat(**{f"x{i}": 1 for i in range(n)})),
    (ChatRequest, lambda n: {"messages": [{"role": "user", "content": "a", f"x{i}": 1} for i in range(n)]}),
    (ResponseRequest, lambda n: {"input": [{"type": f"x{i}_call"} for i in range(n)] + [{"role": "user"}]}),
    (ResponseRequest, lambda n: {"input": "a", "include": [f"x{i}" for i in range(n)]}),
]


@pytest.mark.parametrize(("model", "body"), HISTORIES)
def test_the_tolerant_reading_costs_no_more_than_the_length(
    model: type[Strict], body: Callable[[int], Any]
) -> None:
    """9,000 results of tools took 4 s, 20,000 tools beside as many allowed ones 20 s."""
    data = json.dumps(body(9000)).encode()
    ignored = Ignored()
    began = time.monotonic()
    with contextlib.suppress(Problem):
        parse(model, data, ignored)
    assert time.monotonic() - began < 2  # 0.05 s
    assert len(ignored) <= Ignored.most


def test_half_a_character_is_read_as_a_sign_for_it() -> None:
    """JavaScript's texts are cut between the halves of an emoji; a strict server says that it is no JSON."""
    body = b'{"messages":[{"role":"user","content":"a \\ud83d b \\ude00 \\ud83d\\ude00 \\\\ud83d"}]}'
    found = parse(ChatRequest, body, Ignored())
    assert found.messages[0]["content"] == "a \ufffd b \ufffd \U0001f600 \\ud83d"
    with pytest.raises(Problem, match="no valid JSON"):
        parse(ChatRequest, body)


def test_fields_that_are_null_do_not_hide_among_many_wrong_ones() -> None:
    body = chat(**{f"x{i}": None for i in range(500)}, store=None)
    with pytest.raises(Problem, match="unknown field x0"):
        parse(ChatRequest, json.dumps(body).encode())


@pytest.mark.parametrize(
    ("path", "body", "param", "said"),
    [
        (
            "/v1/chat/completions",
            chat(stop=["a"] * 257),
            "stop",
            "list should have at most 256 items, not 257",
        ),
        ("/v1/chat/completions", chat(stop=5), "stop", "should be a valid string or a valid array"),
        ("/v1/completions", {"prompt": ["a"] * 129}, "prompt", "list should have at most 128 items"),
        ("/v1/completions", {"prompt": [-1]}, "prompt.0", "greater than or equal to 0"),
        ("/v1/embeddings", {"input": ["a"] * 3000}, "input", "list should have at most 2048 items"),
        ("/v1/chat/completions", chat(guided_choice=[]), "guided_choice", "at least 1 item"),
        ("/v1/chat/completions", chat(stop="x" * 1001), "stop", "at most 1000 characters"),
        ("/v1/responses", {"input": [{"type": "function_call", "call_id": "a"}]}, "input.0.name", "missing"),
        ("/v1/responses", {"input": [{"type": "web_page"}]}, "input.0", "function_call_output"),
    ],
)
def test_the_refusal_names_what_is_wrong(
    server: Running, path: str, body: Any, param: str, said: str
) -> None:
    reply = server.ask(path, body)
    assert (reply.status, reply.error["param"]) == (400, param)
    assert said in reply.error["message"]


def test_others_are_answered_while_a_large_body_is_refused(server: Running) -> None:
    body = b'{"input":[' + b'{"type":"message","role":5},' * 30_000 + b"{}]}"
    replies: list[Any] = []
    asker = threading.Thread(target=lambda: replies.append(server.ask("/v1/responses", body)))
    asker.start()
    while asker.is_alive():
        began = time.monotonic()
        assert server.ask("/health").status == 200
        assert time.monotonic() - began < 2  # benchmarks/hostile.py measures it
    assert replies[0].error["param"] == "input.0.role"


def test_bodies_together_take_no_more_than_memory_has(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_ALWAYS", 100_000)
    bodies = server.server.service.bodies
    monkeypatch.setattr(bodies, "_left", lambda: 0)
    text = json.dumps(chat("x" * 1000, user="u" * 10)).encode().ljust(90_000)
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with server.connect() as slow:
        slow.sendall(f"{head}content-length: {len(text)}\r\n\r\n".encode() + text[:50_000])
        wait_for(lambda: bodies.held == len(text))
        refused = server.ask("/v1/chat/completions", text[:-1])
        assert (refused.status, refused.error["code"]) == (503, "overloaded")
        assert refused.headers["retry-after"] == "1" and bodies.held == len(text)
        assert server.ask("/v1/chat/completions", chat()).status == 200  # what is small is not counted
        slow.sendall(text[50_000:])
        assert slow.recv(1000).startswith(b"HTTP/1.1 200")
    wait_for(lambda: bodies.held == 0)
    with server.connect() as gone:
        gone.sendall(f"{head}content-length: {len(text)}\r\n\r\n".encode() + text[:50_000])
        wait_for(lambda: bodies.held == len(text))
    wait_for(lambda: bodies.held == 0)
    start = f"{head}transfer-encoding: chunked\r\n\r\n186a1\r\n".encode()
    with server.connect() as chunked:  # counted as it comes
        chunked.sendall(start + b"[" * 100_001 + b"\r\n0\r\n\r\n")
        assert chunked.recv(1000).startswith(b"HTTP/1.1 503")
    wait_for(lambda: bodies.held == 0)
