"""Faults that a second look at the server found."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import pytest
from running_server import Running, chat, serving, wait_for
from stand_in_engine import StandInEngine

from hasten.errors import UsageError
from hasten.serve import generate
from hasten.serve.options import ServeOptions
from hasten.serve.server import listen


@pytest.mark.parametrize("number", [b"NaN", b"1e999", b"-Infinity"])
def test_numbers_that_are_not_finite_are_refused_where_anything_goes(server: Running, number: bytes) -> None:
    tool = b'{"type": "function", "name": "f", "parameters": {"x": ' + number + b"}}"
    reply = server.ask("/v1/responses", b'{"input": "x", "tool_choice": "none", "tools": [' + tool + b"]}")
    assert reply.status == 400
    assert "finite" in reply.error["message"]


def test_a_tool_message_may_name_its_function(server: Running) -> None:
    function = {"name": "add", "arguments": "{}"}
    call = {"id": "a", "type": "function", "function": function}
    messages = [
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "name": "add", "content": "3"},
    ]
    assert server.ask("/v1/chat/completions", {"messages": messages}).status == 200


def test_ids_outside_the_vocabulary_are_no_text(server: Running) -> None:
    reply = server.ask("/detokenize", {"tokens": [65, 300]})
    assert (reply.status, reply.error["param"]) == (400, "tokens")
    assert server.ask("/detokenize", {"tokens": [65]}).json == {"prompt": "A"}


def test_a_browser_may_send_the_headers_it_asks_for() -> None:
    origin = "https://page.example"
    with serving(ServeOptions(port=0, log=False, cors_origins=(origin,))) as running:
        asked = {
            "origin": origin,
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type,x-stainless-lang",
        }
        reply = running.ask("/v1/chat/completions", method="OPTIONS", headers=asked)
        assert reply.status == 204
        assert "x-stainless-lang" in reply.headers["access-control-allow-headers"]
        reply = running.ask(
            "/v1/chat/completions", method="OPTIONS", headers={**asked, "origin": "https://b.example"}
        )
        assert reply.status == 403
        assert "access-control-allow-headers" not in reply.headers


@pytest.mark.parametrize("given", ["*", "https://page.example/"])
def test_origins_as_people_write_them(given: str) -> None:
    with serving(ServeOptions(port=0, log=False, cors_origins=(given,))) as running:
        reply = running.ask("/health", headers={"origin": "https://page.example"})
        assert reply.headers["access-control-allow-origin"] == "https://page.example"


def test_a_call_with_many_inputs_comes_in_turns() -> None:
    class Counting(StandInEngine):
        most = 0

        async def stream(self, request: Any) -> Any:
            async for output in super().stream(request):
                self.most = max(self.most, self.running)
                yield output

    engine = Counting(delay_s=0.001)
    with serving(engines={"echo": engine}) as running:
        reply = running.ask("/v1/embeddings", {"input": [f"text {i}" for i in range(500)]})
        assert reply.status == 200
        assert [one["index"] for one in reply.json["data"]] == list(range(500))
        assert 1 < engine.most <= 64
        late = running.ask("/v1/embeddings", {"input": ["a"] * 500, "deadline_ms": 3})
        assert (late.status, late.error["code"]) == (504, "deadline_exceeded")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_a_silent_stream_shows_that_it_lives(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr(generate, "EVERY_S", 0.05)
    body = chat("ab", stream=True) if "chat" in path else {"input": "ab", "stream": True}
    with serving(engines={"echo": StandInEngine(reply="ab", delay_s=0.3)}) as running:
        reply = running.ask(path, body)
    assert reply.status == 200
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.body.startswith(b": waiting\n\n")
    assert 4 <= reply.body.count(b": waiting\n\n") <= 12
    assert reply.events[-1].get("type", "response.completed") == "response.completed"


@pytest.mark.parametrize(
    "path,last",
    [("/v1/chat/completions", "error"), ("/v1/completions", "error"), ("/v1/responses", "response")],
)
def test_a_stream_that_outlives_the_drain_ends_with_an_error(path: str, last: str) -> None:
    text = "word " * 400
    body = {"messages": chat(text)["messages"], "prompt": text, "input": text}
    names = {"/v1/chat/completions": "messages", "/v1/completions": "prompt", "/v1/responses": "input"}
    asked: dict[str, Any] = {names[path]: body[names[path]], "stream": True}
    if path == "/v1/completions":
        asked["max_tokens"] = 2000
    replies: list[Any] = []
    with serving(
        ServeOptions(port=0, log=False, drain_s=0.5), {"echo": StandInEngine(delay_s=0.02)}
    ) as running:
        asker = threading.Thread(target=lambda: replies.append(running.ask(path, asked)))
        asker.start()
        wait_for(lambda: running.engine.steps > 3)
        running.server.should_exit = True
        began = time.monotonic()
        asker.join(10)
        assert time.monotonic() - began < 5
    event = replies[0].events[-1]
    assert last in event
    error = event["error"] if last == "error" else event["response"]["error"]
    assert "stopping" in error["message"]


def test_a_second_signal_still_ends_the_engine() -> None:
    """The process aborts if native threads run when the interpreter ends."""
    with serving(engines={"echo": StandInEngine(delay_s=0.02)}) as running:
        body = chat("word " * 400, stream=True)
        asker = threading.Thread(target=lambda: running.ask("/v1/chat/completions", body))
        asker.start()
        wait_for(lambda: running.engine.steps > 3)
        running.server.should_exit = running.server.force_exit = True
        asker.join(10)
    assert running.engine.closed
    assert running.models["echo"].closed


def test_two_servers_that_start_at_once_do_not_share_a_port() -> None:
    with socket.socket() as both:
        both.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        both.bind(("127.0.0.1", 0))
        options = ServeOptions(port=both.getsockname()[1], log=False)
        with listen(options):  # bound twice: the one that listens first has the port
            with pytest.raises(OSError):
                both.listen()
            with pytest.raises(UsageError, match="cannot listen on"):
                listen(options)
