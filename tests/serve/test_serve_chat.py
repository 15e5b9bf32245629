"""`/v1/chat/completions` over real HTTP."""

from __future__ import annotations

import pytest
from running_server import Running, chat
from stand_in_engine import FULL, LATE

PATH = "/v1/chat/completions"


def test_answers_in_one_piece(server: Running) -> None:
    reply = server.ask(PATH, chat("hello", max_tokens=100))
    assert reply.status == 200
    document = reply.json
    assert document["id"].startswith("chatcmpl-")
    assert document["object"] == "chat.completion"
    assert document["model"] == "echo"
    (choice,) = document["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": "<user>hello",
        "refusal": None,
        "annotations": [],
    }
    assert choice["finish_reason"] == "stop"
    assert document["usage"] == {
        "prompt_tokens": 11,
        "completion_tokens": 11,
        "total_tokens": 22,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


def test_streams_the_same_text_and_usage_when_asked(server: Running) -> None:
    reply = server.ask(PATH, chat('q"ö\n\u2028', stream=True, stream_options={"include_usage": True}))
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.body.endswith(b"data: [DONE]\n\n")
    *chunks, last = reply.events
    assert {chunk["id"] for chunk in [*chunks, last]} == {last["id"]}
    assert all(chunk["object"] == "chat.completion.chunk" and chunk["usage"] is None for chunk in chunks)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == '<user>q"ö\n\u2028'
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert last["choices"] == []
    assert last["usage"]["prompt_tokens"] == len('<user>q"ö\n\u2028'.encode())


def test_streams_without_usage(server: Running) -> None:
    events = server.ask(PATH, chat(stream=True)).events
    assert all("usage" not in event for event in events)
    assert all(event["choices"] for event in events)


def test_several_answers_keep_their_index(server: Running) -> None:
    server.engine.reply = "abc"
    document = server.ask(PATH, chat(n=3)).json
    assert [choice["index"] for choice in document["choices"]] == [0, 1, 2]
    assert {choice["message"]["content"] for choice in document["choices"]} == {"abc"}
    assert document["usage"]["completion_tokens"] == 9
    texts = ["", "", ""]
    for event in server.ask(PATH, chat(n=3, stream=True)).events:
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == ["abc", "abc", "abc"]


def test_logprobs_in_both_forms(server: Running) -> None:
    server.engine.reply = "ab"
    asked = chat(logprobs=True, top_logprobs=2)
    whole = server.ask(PATH, asked).json["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in whole] == ["a", "b"]
    assert whole[0]["bytes"] == [97]
    assert [entry["token"] for entry in whole[0]["top_logprobs"]] == ["a", "b"]
    pieces = [
        entry
        for event in server.ask(PATH, {**asked, "stream": True}).events
        for entry in (event["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert pieces == whole


def test_what_is_asked_reaches_the_engine(server: Running) -> None:
    server.ask(
        PATH,
        chat(
            "x",
            temperature=0.5,
            top_p=0.9,
            top_k=7,
            min_p=0.1,
            repetition_penalty=1.1,
            presence_penalty=0.2,
            frequency_penalty=-0.3,
            logit_bias={"5": -100},
            seed=-1,
            stop=["a", "b"],
            stop_token_ids=[3],
            max_completion_tokens=9,
            n=2,
            user="ann",
            priority=4,
            deadline_ms=1e6,
            cache_salt="s",
            ignore_eos=True,
            guided_regex="a+",
            prompt_logprobs=2,
        ),
    )
    request = server.engine.asked[-1]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 7, 0.1)
    penalties = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
    assert penalties == (1.1, 0.2, -0.3)
    assert sampling.logit_bias == {5: -100}
    assert sampling.seed == 2**64 - 1
    assert sampling.ignore_eos
    assert (request.stop, request.stop_token_ids) == (("a", "b"), (3,))
    assert (request.max_new_tokens, request.n, request.prompt_logprobs) == (9, 2, 2)
    assert request.client.endswith("/ann")
    assert (request.priority, request.deadline_ms, request.salt) == (4, 1e6, "s")
    assert (request.grammar.kind, request.grammar.source) == ("regex", "a+")


def test_defaults_are_openais(server: Running) -> None:
    server.ask(PATH, chat("x"))
    first = server.engine.asked[-1]
    assert first.sampling.temperature == 1.0
    assert first.max_new_tokens == 4096 - len("<user>x")
    server.ask(PATH, chat("x"))
    assert server.engine.asked[-1].sampling.seed != first.sampling.seed


def test_defaults_are_the_models_own_where_its_authors_advise_some(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    advised = {"temperature": 0.6, "top_k": 20.0, "top_p": 0.95, "repetition_penalty": 1.05}
    monkeypatch.setattr(server.models["echo"], "sampling", advised)
    server.ask(PATH, chat("x", top_p=1))
    sampling = server.engine.asked[-1].sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.6, 20, 1)
    assert sampling.repetition_penalty == 1.05
    document = server.ask("/v1/responses", {"input": "x"}).json
    assert (document["temperature"], document["top_p"]) == (0.6, 0.95)


@pytest.mark.parametrize(
    ("fields", "kind", "source"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", ""),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": {"type": "null"}},
                }
            },
            "json_schema",
            '{"type": "null"}',
        ),
        ({"guided_json": {"type": "null"}}, "json_schema", '{"type": "null"}'),
        ({"guided_choice": ["x", "y"]}, "choice", '["x", "y"]'),
        ({"guided_grammar": "start: A"}, "lark", "start: A"),
        ({"structured_outputs": {"regex": "z"}}, "regex", "z"),
        ({"structured_outputs": {"json": {"const": 2}}}, "json_schema", '{"const": 2}'),
    ],
)
def test_every_way_to_ask_for_structure(server: Running, fields: dict, kind: str, source: str) -> None:
    assert server.ask(PATH, chat(**fields)).status == 200
    grammar = server.engine.asked[-1].grammar
    assert (grammar.kind, grammar.source) == (kind, source)


def test_content_parts_are_joined_and_developer_is_system(server: Running) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "d"}, {"role": "user", "content": parts}]
    reply = server.ask(PATH, {"messages": messages})
    assert reply.json["choices"][0]["message"]["content"] == "<system>d<user>a\nb"


def test_a_full_queue_says_when_to_come_again(server: Running) -> None:
    server.engine.error = FULL
    for stream in (False, True):
        reply = server.ask(PATH, chat(stream=stream))
        assert (reply.status, reply.headers["retry-after"]) == (429, "3")
        assert reply.error["code"] == "queue_full"


def test_a_deadline_that_cannot_be_met_is_refused(server: Running) -> None:
    server.engine.error = LATE
    reply = server.ask(PATH, chat(deadline_ms=5.0))
    assert reply.status == 503
    assert "900 ms" in reply.error["message"]


def test_an_answer_that_breaks_is_an_error(server: Running) -> None:
    server.engine.breaks_after = 0
    assert server.ask(PATH, chat(stream=True)).status == 500  # nothing was sent yet: its own status
    server.engine.breaks_after = 2
    assert server.ask(PATH, chat()).status == 500
    reply = server.ask(PATH, chat(stream=True))
    assert reply.status == 200
    assert reply.events[-1]["error"]["message"] == "the model broke"
    assert reply.body.endswith(b"data: [DONE]\n\n")


def test_what_a_template_refuses_is_the_clients_fault(server: Running) -> None:
    reply = server.ask(PATH, chat("refuse me"))
    assert (reply.status, reply.error["param"]) == (400, "messages")
    assert reply.error["message"] == "the template refuses"

    reply = server.ask(PATH, chat(chat_template_kwargs={"messages": []}))
    assert (reply.status, reply.error["param"]) == (400, "chat_template_kwargs")


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>'


def test_tool_calls_in_both_forms(server: Running) -> None:
    server.engine.reply = f"Well.{CALL}{CALL}"
    (choice,) = server.ask(PATH, chat(tools=TOOLS)).json["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Well."
    calls = choice["message"]["tool_calls"]
    assert [call["function"] for call in calls] == [{"name": "add", "arguments": '{"x": 1}'}] * 2
    assert len({call["id"] for call in calls}) == 2
    events = server.ask(PATH, chat(tools=TOOLS, stream=True)).events
    deltas = [event["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("content") or "" for delta in deltas) == "Well."
    pieces = [one for delta in deltas for one in delta.get("tool_calls", [])]
    assert [one["index"] for one in pieces if "id" in one] == [0, 1]
    for index in (0, 1):  # arguments come as the model writes them
        parts = [one["function"]["arguments"] for one in pieces if one["index"] == index]
        assert "".join(parts) == '{"x": 1}' and len(parts) > 3
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_tool_choice_decides_what_the_model_may_do(server: Running) -> None:
    server.engine.reply = CALL
    (choice,) = server.ask(PATH, chat(tools=TOOLS, tool_choice="none")).json["choices"]
    assert choice["message"]["content"] == CALL  # the model was told of no tools: text is text
    assert server.engine.asked[-1].grammar is None
    server.ask(PATH, chat(tools=TOOLS, tool_choice="required"))
    assert server.engine.asked[-1].grammar.kind == "structural"
    named = {"type": "function", "function": {"name": "add"}}
    server.ask(PATH, chat(tools=TOOLS, tool_choice=named))
    assert server.engine.asked[-1].grammar.kind == "structural"
    named["function"] = {"name": "sub"}
    assert server.ask(PATH, chat(tools=TOOLS, tool_choice=named)).error["param"] == "tool_choice"


def test_calls_and_results_go_back_to_the_model(server: Running) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
    ]
    assert server.ask(PATH, {"messages": messages, "tools": TOOLS}).status == 200
    call["function"]["arguments"] = "{x"  # what a model once wrote wrong ends no conversation
    assert server.ask(PATH, {"messages": messages, "tools": TOOLS}).status == 200
