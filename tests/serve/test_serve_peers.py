"""What users of vLLM's and llama.cpp's servers send, and look for in answers."""

from __future__ import annotations

from typing import Any

import pytest
from running_server import Running, chat, serving
from stand_in_engine import StandInEngine

import hasten
from hasten.serve.options import ServeOptions

CHAT, COMPLETION, EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
USER = {"role": "user", "content": "hello"}
BEGUN = [USER, {"role": "assistant", "content": "Once "}]


def bodies(**fields: Any) -> list[tuple[str, dict[str, Any]]]:
    return [(CHAT, chat(**fields)), (COMPLETION, {"prompt": "hello", **fields})]


def test_rules_reach_the_engine(server: Running) -> None:
    rules = {
        "min_tokens": 3,
        "max_tokens": 9,
        "allowed_token_ids": [97, 98],
        "bad_words": ["no"],
        "include_stop_str_in_output": True,
    }
    for path, body in bodies(**rules):
        assert server.ask(path, body).status == 200
        request = server.engine.asked[-1]
        assert (request.min_new_tokens, request.allowed_tokens) == (3, (97, 98))
        assert request.forbidden == (tuple(b"no"), tuple(b" no"))
        assert request.shows_stop


def test_a_minimum_moves_what_nobody_asked_for(server: Running) -> None:
    assert server.ask(COMPLETION, {"prompt": "abc", "min_tokens": 40}).status == 200
    assert server.engine.asked[-1].max_new_tokens == 40


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"min_tokens": 10, "max_tokens": 9}, "min_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"allowed_token_ids": [300]}, "allowed_token_ids"),
    ],
)
def test_rules_that_cannot_hold_are_refused(server: Running, fields: dict[str, Any], name: str) -> None:
    for path, body in bodies(**fields):
        assert server.ask(path, body).error["param"] == name


def test_ids_beside_the_texts(server: Running) -> None:
    server.engine.reply = "Hi."
    whole = server.ask(CHAT, chat(return_token_ids=True)).json
    assert bytes(whole["prompt_token_ids"]) == b"<user>hello"
    assert bytes(whole["choices"][0]["token_ids"]) == b"Hi."
    (choice,) = server.ask(COMPLETION, {"prompt": "abc", "return_token_ids": True}).json["choices"]
    assert (bytes(choice["prompt_token_ids"]), bytes(choice["token_ids"])) == (b"abc", b"Hi.")
    plain = server.ask(COMPLETION, {"prompt": "abc"}).json["choices"][0]
    assert plain["token_ids"] is plain["prompt_token_ids"] is None


def test_ids_in_streams(server: Running) -> None:
    server.engine.reply = "Hi."
    events = server.ask(CHAT, chat(return_token_ids=True, stream=True)).events
    assert bytes(events[0]["prompt_token_ids"]) == b"<user>hello"
    assert not any("prompt_token_ids" in event for event in events[1:])
    assert b"".join(bytes(event["choices"][0].get("token_ids", ())) for event in events) == b"Hi."
    for echo in (False, True):
        body = {"prompt": "abc", "return_token_ids": True, "stream": True, "echo": echo}
        choices = [event["choices"][0] for event in server.ask(COMPLETION, body).events]
        assert [bytes(choice.get("prompt_token_ids", ())) for choice in choices] == [b"abc", b"", b""]
        assert b"".join(bytes(choice["token_ids"]) for choice in choices) == b"Hi."


def test_tokens_are_named_by_their_ids(server: Running) -> None:
    server.engine.reply = "Hi"
    fields = {"return_tokens_as_token_ids": True}
    found = server.ask(CHAT, chat(logprobs=True, top_logprobs=1, **fields)).json
    entry = found["choices"][0]["logprobs"]["content"][0]
    assert (entry["token"], entry["bytes"], entry["top_logprobs"][0]["token"]) == (
        f"token_id:{ord('H')}",
        [ord("H")],
        f"token_id:{ord('H')}",
    )
    body = {"prompt": "ab", "logprobs": 0, "echo": True, **fields}
    columns = server.ask(COMPLETION, body).json["choices"][0]["logprobs"]
    assert columns["tokens"] == [f"token_id:{one}" for one in b"abHi"]
    assert columns["text_offset"] == [0, 1, 2, 3]
    assert columns["top_logprobs"][3] == {f"token_id:{ord('i')}": -0.5}


def test_a_chat_repeats_what_it_goes_on_with(server: Running) -> None:
    server.engine.reply = "upon"
    body = {"messages": BEGUN, "continue_final_message": True, "echo": True}
    assert server.ask(CHAT, body).json["choices"][0]["message"]["content"] == "Once upon"
    events = server.ask(CHAT, {**body, "stream": True}).events
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == "Once upon"
    said = server.ask(CHAT, chat(echo=True)).json["choices"][0]["message"]["content"]
    assert said == "upon"  # the user's words are not the assistant's


def test_usage_so_far_begins_at_nothing(server: Running) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = server.ask(CHAT, chat(stream=True, stream_options=options)).events
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts[:3] == [0, 1, 2]


def test_the_fingerprint_is_this_versions(server: Running) -> None:
    for path, body in bodies():
        assert server.ask(path, body).json["system_fingerprint"].endswith(hasten.__version__)
        events = server.ask(path, {**body, "stream": True}).events
        assert all(event["system_fingerprint"].endswith(hasten.__version__) for event in events)


def test_any_name_means_the_first_model_where_the_server_says_so() -> None:
    options = ServeOptions(port=0, log=False, any_model=True)
    with serving(options, {"first": StandInEngine(), "second": StandInEngine()}) as running:
        for asked, got in (("gpt-4.1", "first"), ("second", "second"), (None, "first")):
            assert running.ask(CHAT, chat(model=asked)).json["model"] == got


GBNF = 'root ::= "a"{5,5}'


@pytest.mark.parametrize(
    "fields",
    [{"grammar": GBNF}, {"guided_grammar": GBNF}, {"structured_outputs": {"grammar": GBNF}}],
    ids=lambda fields: next(iter(fields)),
)
def test_a_grammar_under_every_name(server: Running, fields: dict[str, Any]) -> None:
    for path, body in bodies(**fields):
        assert server.ask(path, body).status == 200
        assert server.engine.asked[-1].grammar.source == GBNF


def test_tokens_are_counted_without_an_answer(server: Running) -> None:
    for path, body, words in (
        ("/v1/chat/completions/input_tokens", chat(), "<user>hello"),
        ("/v1/responses/input_tokens", {"input": "hello", "instructions": "be"}, "<system>be<user>hello"),
    ):
        assert server.ask(path, body).json["input_tokens"] == len(words)
    assert server.engine.asked == []
    first = server.ask("/v1/responses", {"input": "hello"}).json
    body = {"input": "more", "previous_response_id": first["id"]}
    words = "<user>hello<assistant><user>hello<user>more"
    assert server.ask("/v1/responses/input_tokens", body).json["input_tokens"] == len(words)


def test_inputs_of_several_forms_are_embedded_together(server: Running) -> None:
    given = ["abc", [97, 98, 99], {"prompt_string": "abc"}, {"content": [{"type": "text", "text": "abc"}]}]
    entries = server.ask(EMBED, {"input": given}).json["data"]
    assert len(entries) == 4 and all(one["embedding"] == entries[0]["embedding"] for one in entries)
    assert len(server.ask(EMBED, {"input": given[3]}).json["data"]) == 1
    for wrong in ({"content": "abc"}, {"content": [{"type": "image_url"}]}, {}):
        assert server.ask(EMBED, {"input": wrong}).error["param"].startswith("input")


def test_fields_that_vllm_always_sends_are_there(server: Running) -> None:
    assert server.ask(CHAT, chat()).json["prompt_logprobs"] is None
    assert server.ask(COMPLETION, {"prompt": "a"}).json["choices"][0]["prompt_logprobs"] is None
    (model,) = server.ask("/v1/models").json["data"]
    assert model["root"] == model["id"]
    assert "out of vocabulary" in server.ask(COMPLETION, {"prompt": [9999]}).error["message"]


def test_a_prompt_is_cut_where_that_is_asked_for(server: Running) -> None:
    for fields, kept in (
        ({"truncate_prompt_tokens": 3}, b"llo"),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, b"hel"),
        ({"truncate_prompt_tokens": 30}, b"hello"),
    ):
        echoed = server.ask(COMPLETION, {"prompt": "hello", "echo": True, "max_tokens": 0, **fields}).json
        assert bytes(server.engine.asked[-1].prompt) == kept
        assert echoed["choices"][0]["text"].encode() == kept
    assert server.ask(CHAT, chat("x" * 5000, truncate_prompt_tokens=-1)).status == 200
    assert len(server.engine.asked[-1].prompt) == 4095  # of 4096: one is left for the answer
    assert server.ask(CHAT, chat(truncate_prompt_tokens=0)).error["param"] == "truncate_prompt_tokens"


def test_chats_are_encoded_as_they_would_be_asked(server: Running) -> None:
    body = {"messages": BEGUN, "continue_final_message": True, "return_token_strs": True}
    found = server.ask("/tokenize", body).json
    assert bytes(found["tokens"]) == b"<user>hello<assistant>Once "
    assert found["token_strs"][:2] == ["<3c>", "<75>"]


def test_all_wrong_ids_are_named(server: Running) -> None:
    error = server.ask(CHAT, chat(logit_bias={"bad1": 5, "bad2": 5, "7": 1})).error
    assert error["param"] == "logit_bias.bad1"
    assert "bad1" in error["message"] and "bad2" in error["message"] and "7" not in error["message"]


def test_a_schema_beside_the_type_is_one(server: Running) -> None:
    server.ask(CHAT, chat(response_format={"type": "json_object", "schema": {"const": 42}}))
    assert server.engine.asked[-1].grammar.kind == "json_schema"
    error = server.ask(CHAT, chat(response_format={"type": "json_object", "schema": 123})).error
    assert error["param"].startswith("response_format")


@pytest.mark.parametrize(("logprobs", "prompt_logprobs"), [(1, 2), (2, 0), (None, 1)])
def test_an_echoed_prompt_is_scored_in_both_forms(
    server: Running, logprobs: int | None, prompt_logprobs: int
) -> None:
    server.engine.reply = "!"
    body = {"prompt": "abc", "echo": True, "logprobs": logprobs, "prompt_logprobs": prompt_logprobs}
    whole = server.ask(COMPLETION, body).json["choices"][0]
    streamed = server.ask(COMPLETION, {**body, "stream": True}).events[0]["choices"][0]
    for choice in (whole, streamed):
        assert choice["prompt_logprobs"][0] is None and len(choice["prompt_logprobs"]) == 3
        assert len(choice["prompt_logprobs"][1]) == max(1, prompt_logprobs)
        columns = choice["logprobs"]
        if logprobs is None:
            assert columns is None
        else:
            assert columns["tokens"] == list("abc!") and len(columns["top_logprobs"][1]) == logprobs


def test_a_prefix_of_a_proxy_is_no_other_path(server: Running) -> None:
    assert server.ask("/llm/v1/chat/completions", chat()).status == 200
    assert server.ask("/api/openai/v1/models").json["data"][0]["id"] == "echo"
    assert server.ask("/v1/models/x/v1/models").status == 404  # a model's name
    for path in ("/llm/v1/nothing", "/llm/metrics", "/a/b/c/d/e/v1/models"):
        assert server.ask(path).status == 404
    with serving(ServeOptions(port=0, log=False, api_keys=("key",))) as guarded:
        assert guarded.ask("/llm/v1/models").status == 401
