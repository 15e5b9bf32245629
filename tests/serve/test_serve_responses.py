"""`/v1/responses` over real HTTP."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

import pytest
from running_server import Running, serving, wait_for
from stand_in_engine import FULL, StandInEngine, refusing

from hasten.engine.request import Output, Request

PATH = "/v1/responses"
TOOLS = [{"type": "function", "name": "add", "parameters": {"type": "object"}}]
CALL = '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>'


def test_answers_in_one_piece(server: Running) -> None:
    document = server.ask(PATH, {"input": "hi", "instructions": "Be brief", "metadata": {"a": "b"}}).json
    assert (document["object"], document["status"]) == ("response", "completed")
    (item,) = document["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert item["content"][0]["text"] == "<system>Be brief<user>hi"
    assert document["metadata"] == {"a": "b"}
    usage = document["usage"]
    assert usage["input_tokens"] == usage["output_tokens"] == 24
    assert usage["total_tokens"] == 48
    assert usage["input_tokens_details"] == {"cached_tokens": 2}


def test_streams_typed_events_in_order(server: Running) -> None:
    server.engine.reply = "ab"
    reply = server.ask(PATH, {"input": "hi", "stream": True})
    names = [line[7:] for line in reply.body.decode().split("\n") if line.startswith("event: ")]
    assert names == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    events = reply.events
    assert [event["type"] for event in events] == names
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["delta"] for event in events if "delta" in event] == ["a", "b"]
    assert events[2]["item"]["content"] == []
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == "ab"


def test_an_answer_cut_by_its_limit_is_incomplete(server: Running) -> None:
    document = server.ask(PATH, {"input": "hello", "max_output_tokens": 3}).json
    assert document["status"] == "incomplete"
    assert document["incomplete_details"] == {"reason": "max_output_tokens"}


def test_calls_are_items_of_their_own(server: Running) -> None:
    server.engine.reply = f"Well.{CALL}"
    document = server.ask(PATH, {"input": "add", "tools": TOOLS}).json
    message, call = document["output"]
    assert message["content"][0]["text"] == "Well."
    assert (call["type"], call["name"], call["arguments"]) == ("function_call", "add", '{"x": 1}')
    events = server.ask(PATH, {"input": "add", "tools": TOOLS, "stream": True}).events
    kinds = [event["type"] for event in events]
    assert "response.function_call_arguments.delta" in kinds
    done = next(event for event in events if event["type"] == "response.function_call_arguments.done")
    assert (done["output_index"], done["arguments"]) == (1, '{"x": 1}')


def test_items_become_messages(server: Running) -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "add"}]},
        {"type": "function_call", "call_id": "c", "name": "add", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "3"},
    ]
    assert server.ask(PATH, {"input": items, "tools": TOOLS}).status == 200
    asked = bytes(server.engine.asked[-1].prompt).decode()
    assert "add" in asked
    assert "3" in asked


def test_a_stored_response_is_found_continued_and_forgotten(server: Running) -> None:
    server.engine.reply = "One"
    first = server.ask(PATH, {"input": "start", "instructions": "only now"}).json
    assert server.ask(f"{PATH}/{first['id']}").json == first
    server.engine.reply = None
    again = server.ask(PATH, {"input": "more", "previous_response_id": first["id"]}).json
    assert again["output"][0]["content"][0]["text"] == "<user>start<assistant>One<user>more"
    assert server.ask(f"{PATH}/{first['id']}", method="DELETE").json["deleted"]
    assert server.ask(f"{PATH}/{first['id']}").status == 404
    gone = server.ask(PATH, {"input": "more", "previous_response_id": first["id"]})
    assert (gone.status, gone.error["param"]) == (404, "previous_response_id")


def test_store_false_keeps_nothing(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hasten.serve.responses.dumped", None)  # nor is its size worked out
    document = server.ask(PATH, {"input": "x", "store": False}).json
    assert server.ask(f"{PATH}/{document['id']}").status == 404


def test_the_store_is_bounded() -> None:
    from hasten.serve.kept import ResponseStore, StoredResponse

    store = ResponseStore(most=2, most_bytes=100)
    for name, size in (("a", 10), ("b", 10), ("c", 10), ("big", 1000)):
        store.add(name, StoredResponse("me", {}, [], size))
    assert len(store) == 2
    store.add("d", StoredResponse("me", {}, [], 95))
    assert len(store) == 1
    assert store.get("d", "me")


def test_nobody_gets_anothers_response() -> None:
    from running_server import serving

    from hasten.serve.options import ServeOptions

    options = ServeOptions(port=0, log=False, api_keys=("one", "two"))
    with serving(options, {"echo": StandInEngine()}) as server:
        one, two = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))
        name = server.ask(PATH, {"input": "x"}, headers=one).json["id"]
        assert server.ask(f"{PATH}/{name}", headers=two).status == 404
        assert server.ask(f"{PATH}/{name}", headers=one).status == 200


def test_an_answer_that_breaks_ends_with_failed(server: Running) -> None:
    server.engine.breaks_after = 2
    events = server.ask(PATH, {"input": "hello", "stream": True}).events
    assert events[-1]["type"] == "response.failed"
    assert events[-1]["response"]["error"]["message"] == "the model broke"


def test_logprobs_where_included(server: Running) -> None:
    server.engine.reply = "ab"
    include = {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
    document = server.ask(PATH, {"input": "x", **include}).json
    assert [entry["token"] for entry in document["output"][0]["content"][0]["logprobs"]] == ["a", "b"]
    assert server.ask(PATH, {"input": "x", "top_logprobs": 1}).error["param"] == "top_logprobs"


@dataclass
class HeldEngine(StandInEngine):
    """Gives an answer's first piece, and the rest when it is let."""

    goes_on: threading.Event = field(default_factory=threading.Event)

    async def stream(self, request: Request) -> AsyncGenerator[Output, None]:
        async with aclosing(super().stream(request)) as outputs:
            async for output in outputs:
                yield output
                while not self.goes_on.is_set():
                    await asyncio.sleep(0.002)


def status_of(server: Running, name: str) -> str:
    return server.ask(f"{PATH}/{name}").json["status"]


def test_a_response_is_made_in_the_background() -> None:
    engine = HeldEngine("hello")
    with serving(engines={"held": engine}) as server:
        queued = server.ask(PATH, {"input": "hi", "background": True}).json
        assert (queued["status"], queued["background"], queued["output"]) == ("queued", True, [])
        wait_for(lambda: bool(engine.asked))
        assert status_of(server, queued["id"]) == "in_progress"
        body = {"input": "go on", "previous_response_id": queued["id"]}
        assert server.ask(PATH, body).error["code"] == "response_not_ready"
        engine.goes_on.set()
        wait_for(lambda: status_of(server, queued["id"]) == "completed")
        whole = server.ask(f"{PATH}/{queued['id']}").json
        assert whole["output"][0]["content"][0]["text"] == "hello" and whole["usage"]["output_tokens"] == 5
        assert server.ask(PATH, body).status == 200
        assert bytes(engine.asked[-1].prompt) == b"<user>hi<assistant>hello<user>go on"
        assert server.ask(f"{PATH}/{queued['id']}/cancel", b"", method="POST").json["status"] == "completed"


def test_a_response_in_the_background_is_stopped() -> None:
    engine = HeldEngine("hello")
    with serving(engines={"held": engine}) as server:
        name = server.ask(PATH, {"input": "hi", "background": True}).json["id"]
        wait_for(lambda: bool(engine.asked))
        assert server.ask(f"{PATH}/{name}/cancel", b"", method="POST").json["status"] == "cancelled"
        assert status_of(server, name) == "cancelled"
        assert len(engine.cancelled) == 1
        name = server.ask(PATH, {"input": "hi", "background": True}).json["id"]
        wait_for(lambda: len(engine.asked) == 2)
        assert server.ask(f"{PATH}/{name}", method="DELETE").json["deleted"]
        assert len(engine.cancelled) == 2 and server.ask(f"{PATH}/{name}").status == 404


def test_what_goes_wrong_in_the_background_is_told(server: Running) -> None:
    with refusing(server.engine, FULL):
        name = server.ask(PATH, {"input": "hi", "background": True}).json["id"]
        wait_for(lambda: status_of(server, name) == "failed")
    assert "256 requests wait" in server.ask(f"{PATH}/{name}").json["error"]["message"]
    for more in ({"store": False}, {"stream": True}):
        error = server.ask(PATH, {"input": "hi", "background": True, **more}).error
        assert error["param"] == "background"
    whole = server.ask(PATH, {"input": "hi"}).json
    assert server.ask(f"{PATH}/{whole['id']}/cancel", b"", method="POST").status == 400
