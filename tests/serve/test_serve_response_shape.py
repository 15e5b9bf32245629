"""The form of `/v1/responses` where outputs and events do not come one for one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
from running_server import Running
from stand_in_engine import ByteTokenizer, logprob

from hasten.engine.request import Output
from hasten.models.answers import ArgumentsDelta, CallStarted, Reader, TextDelta
from hasten.serve.prepare import Form
from hasten.serve.responses import ResponseShape
from hasten.serve.shape import TokenTexts, dumped, joined


class Held(Reader):
    """Gives the events it was told to, one list an output."""

    def __init__(self, *turns: Sequence[Any]) -> None:
        self._turns = list(turns)

    def push(self, text: str) -> list[Any]:
        return list(self._turns.pop(0))

    def flush(self, cut: bool = False) -> list[Any]:
        return list(self._turns.pop(0))


def shaped(reader: Any, *outputs: Output) -> tuple[dict[str, Any], list[Any]]:
    """The document, and what the events of the text said of logprobs."""
    texts = TokenTexts(cast(Any, ByteTokenizer()))
    tally: Any = SimpleNamespace(take=lambda *_: None, usage=lambda *_: {})
    reading: Any = SimpleNamespace(is_plain=False, reader=lambda _: reader, form=Form(), thoughts=True)
    shape = ResponseShape({}, texts, tally, reading)
    data = b"".join(shape.chunks([(0, output)]) for output in outputs).decode()
    events = [json.loads(line[6:]) for line in data.split("\n") if line.startswith("data: ")]
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    return json.loads(dumped(shape.document())), [
        entry["token"] for event in deltas for entry in event["logprobs"]
    ]


def output(text: str, finish: Any = None) -> Output:
    return Output(
        "a", 0, tuple(text.encode()), text, tuple(logprob(i, 0) for i in text.encode()), finish_reason=finish
    )


def test_what_one_writer_refuses_the_other_writes() -> None:
    """A whole number of more than 64 bits, in a document with parts that are JSON already."""
    value = {"seed": 1 << 70, "parts": joined(['{"a":1}', "2"])}
    assert dumped(value) == b'{"seed":1180591620717411303424,"parts":[{"a":1},2]}'
    with pytest.raises(TypeError, match="object has no JSON form"):
        dumped({"seed": 1 << 70, "thing": object()})


def tokens(document: dict[str, Any]) -> list[str]:
    part = document["output"][0]["content"][0]
    return [entry["token"] for entry in part["logprobs"]]


def test_each_token_has_its_logprobs_once_whatever_the_reader_makes_of_it() -> None:
    reader = Held([TextDelta("a"), TextDelta("b")], [], [TextDelta("cd")], [])
    document, streamed = shaped(reader, output("ab"), output("c"), output("d", "stop"))
    assert document["output"][0]["content"][0]["text"] == "abcd"
    assert tokens(document) == streamed == ["a", "b", "c", "d"]


def test_tokens_of_a_call_have_no_logprobs() -> None:
    call = [CallStarted(0, "id", "f"), ArgumentsDelta(0, "{}")]
    reader = Held([TextDelta("a")], [], call, [])
    document, streamed = shaped(reader, output("a"), output("<"), output(">", "stop"))
    assert [item["type"] for item in document["output"]] == ["message", "function_call"]
    assert tokens(document) == streamed == ["a"]


def test_an_answer_without_text_is_a_message_and_is_kept(server: Running) -> None:
    server.engine.reply = ""
    for stream in (False, True):
        reply = server.ask("/v1/responses", {"input": "say nothing", "stream": stream})
        document = reply.events[-1]["response"] if stream else reply.json
        assert document["status"] == "completed"
        assert [part["text"] for item in document["output"] for part in item["content"]] == [""]
        assert server.ask(f"/v1/responses/{document['id']}").json["id"] == document["id"]
        more = {"input": "go on", "previous_response_id": document["id"]}
        assert server.ask("/v1/responses", more).status == 200
