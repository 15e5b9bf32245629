"""Bodies that are wrong: each is refused with the name of what is wrong in it, and none harms the server."""

from __future__ import annotations

import gzip
import json
import random
import string
from typing import Any

import pytest
from running_server import Running, chat

from hasten.serve.body import parse
from hasten.serve.call import Problem
from hasten.serve.chat import ChatRequest
from hasten.serve.responses import ResponseRequest

CHAT, COMPLETION, RESPONSE = "/v1/chat/completions", "/v1/completions", "/v1/responses"
EMBEDDING = "/v1/embeddings"


@pytest.fixture
def server(strict_server: Running) -> Running:
    """Every word of a refusal is a strict server's."""
    return strict_server


@pytest.mark.parametrize(
    ("path", "body", "param", "code"),
    [
        (CHAT, chat(frobnicate=1), "frobnicate", "unknown_parameter"),
        (CHAT, chat(audio={"voice": "x"}), "audio", "unsupported_parameter"),
        (CHAT, chat(functions=[]), "functions", "unsupported_parameter"),
        (CHAT, chat(verbosity="low"), "verbosity", "unsupported_parameter"),
        (CHAT, chat(store=True), "store", "invalid_value"),
        (CHAT, chat(temperature="1"), "temperature", "invalid_value"),
        (CHAT, chat(temperature=-1), "temperature", "invalid_value"),
        (CHAT, chat(top_p=0), "top_p", "invalid_value"),
        (CHAT, chat(n=0), "n", "invalid_value"),
        (CHAT, chat(n=True), "n", "invalid_value"),
        (CHAT, chat(max_tokens=1.5), "max_tokens", "invalid_value"),
        (CHAT, chat(max_tokens=5000), "max_tokens", "context_length_exceeded"),
        (CHAT, chat(max_tokens=1, max_completion_tokens=1), "max_tokens", None),
        (CHAT, chat(top_logprobs=1), "top_logprobs", None),
        (CHAT, chat(stream_options={"include_usage": True}), "stream_options", None),
        (CHAT, chat(stop=[""]), "stop.0", "invalid_value"),
        (CHAT, chat(logit_bias={"a": 1}), "logit_bias.a", "invalid_value"),
        (CHAT, chat(tool_choice="required"), "tool_choice", "invalid_value"),
        (CHAT, chat(tool_choice="sometimes"), "tool_choice", "invalid_value"),
        (CHAT, chat(tool_choice={"name": "add"}), "tool_choice.type", "missing_required_parameter"),
        (CHAT, {"messages": []}, "messages", "invalid_value"),
        (CHAT, {}, "messages", "missing_required_parameter"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages.0.content", "missing_required_parameter"),
        (CHAT, {"messages": [{"role": "boss", "content": "x"}]}, "messages.0", "invalid_value"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": "x", "weight": 1}]},
            "messages.0.weight",
            "unknown_parameter",
        ),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]},
            "messages.0.content.0.type",
            "invalid_value",
        ),
        (CHAT, chat(response_format={"type": "xml"}), "response_format", "invalid_value"),
        (CHAT, chat(guided_regex="a", guided_choice=["b"]), None, None),
        (CHAT, [], None, "invalid_value"),
        (CHAT, b"{", None, "invalid_json"),
        (CHAT, b"", None, "invalid_json"),
        (CHAT, b'{"messages": NaN}', "messages", "invalid_value"),
        (COMPLETION, {"prompt": []}, "prompt", "invalid_value"),
        (COMPLETION, {"prompt": "x", "suffix": "y"}, "suffix", "invalid_value"),
        (COMPLETION, {"prompt": "x", "best_of": 1, "n": 2}, "best_of", "invalid_value"),
        (COMPLETION, {"prompt": [[]]}, "prompt.0", "invalid_value"),
        (COMPLETION, {"prompt": "x", "messages": []}, "messages", "unknown_parameter"),
        (EMBEDDING, {"input": "x", "dimensions": 0}, "dimensions", "invalid_value"),
        (RESPONSE, {"input": "x", "conversation": "c"}, "conversation", "unsupported_parameter"),
        (RESPONSE, {"input": "x", "tools": [{"type": "web_search"}]}, "tools.0.type", "invalid_value"),
    ],
)
def test_each_wrong_field_is_named(
    server: Running, path: str, body: Any, param: str | None, code: str
) -> None:
    reply = server.ask(path, body)
    assert reply.status == 400
    assert reply.error["type"] == "invalid_request_error"
    assert (reply.error["param"], reply.error["code"]) == (param, code)
    assert not server.engine.asked


def test_null_is_as_if_not_there(server: Running) -> None:
    body = chat(temperature=None, tools=None, stop=None, audio=None, reasoning_effort=None, metadata=None)
    assert server.ask(CHAT, body).status == 200


def test_a_prompt_longer_than_the_context(server: Running) -> None:
    reply = server.ask(CHAT, chat("x" * 5000))
    assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")


def test_only_json_is_read(server: Running) -> None:
    # what a page elsewhere may send without asking first (a "simple request") must not start any work
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        reply = server.ask(CHAT, json.dumps(chat()).encode(), headers={"content-type": kind})
        assert reply.status == 415
    assert not server.engine.asked


def test_deep_nesting_is_refused(server: Running) -> None:
    for deep in (b"[" * 100_000, b'{"messages":' + b"[" * 5000 + b"]" * 5000 + b"}", b'{"a":' * 20_000):
        assert server.ask(CHAT, deep).status == 400


def mangled(rng: random.Random) -> bytes:
    """A good body with something wrong in it, or no body at all."""
    body = json.dumps(chat("hello", stream=True, temperature=0.5, stop=["x"], n=2)).encode()
    kind = rng.randrange(6)
    if kind == 0:
        return rng.randbytes(rng.randrange(400))
    if kind == 1:
        return body[: rng.randrange(len(body))]
    if kind == 2:
        at = rng.randrange(len(body))
        return body[:at] + rng.randbytes(rng.randrange(1, 5)) + body[at + 1 :]
    document = json.loads(body)
    if kind == 3:
        document["".join(rng.choices(string.printable, k=rng.randrange(9)))] = rng.random()
    else:
        place = document if kind == 4 else document["messages"][0]
        wrong = [None, [], {}, -1, 1e308, 2**70, "", "x" * 50, True, [[]], {"a": {}}, "\ud800"]
        place[rng.choice(list(place))] = rng.choice(wrong)
    return json.dumps(document).encode()


def test_a_thousand_malformed_bodies(server: Running) -> None:
    import http.client

    rng = random.Random(7)
    paths = [CHAT, COMPLETION, RESPONSE, EMBEDDING, "/tokenize", "/detokenize"]
    connection = http.client.HTTPConnection(*server.address, timeout=20)
    statuses = []
    for number in range(1000):
        connection.request(
            "POST", paths[number % len(paths)], mangled(rng), {"content-type": "application/json"}
        )
        answer = connection.getresponse()
        answer.read()
        statuses.append(answer.status)
    connection.close()
    assert set(statuses) <= {200, 400, 404}, sorted(set(statuses))
    assert statuses.count(400) > 800
    assert server.ask("/health").status == 200
    assert server.engine.running == 0


CALLED = {"id": "c", "type": "function", "function": {"name": "get weather f\u00fcr", "arguments": "{}"}}
CUSTOM = {"id": "c", "type": "custom", "custom": {"name": "patch", "input": "text"}}


@pytest.mark.parametrize("call", [CALLED, {**CALLED, "function": {"name": "", "arguments": "{}"}}, CUSTOM])
def test_what_a_model_once_called_does_not_end_a_conversation(call: dict[str, Any]) -> None:
    """A name that no tool may have came from the model; the next turns send it back."""
    history = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]
    body = {"messages": [*history, {"role": "tool", "tool_call_id": "c", "content": "b"}]}
    said = parse(ChatRequest, json.dumps(body).encode(), set()).messages[1]
    name = call.get("function", call.get("custom"))["name"]
    assert said["tool_calls"][0]["function"]["name"] == name
    item = {"type": "function_call", "call_id": "c", "name": name, "arguments": "{}"}
    parse(ResponseRequest, json.dumps({"input": [item]}).encode(), set())
    with pytest.raises(Problem, match=r"pattern|character"):
        parse(ChatRequest, json.dumps(chat(tools=[CALLED])).encode(), set())


def test_roles_in_capitals() -> None:
    messages = [{"role": "System", "content": "a"}, {"role": "USER", "content": "b"}]
    found = parse(ChatRequest, json.dumps({"messages": messages}).encode(), set()).messages
    assert [message["role"] for message in found] == ["system", "user"]


def test_a_byte_order_mark_is_passed_over_and_compression_is_named() -> None:
    body = json.dumps(chat()).encode()
    assert parse(ChatRequest, b"\xef\xbb\xbf" + body) == parse(ChatRequest, body)
    with pytest.raises(Problem, match="compressed by gzip"):
        parse(ChatRequest, gzip.compress(body))
