"""What editors, agents, gateways and benchmarks send, as they send it: bodies in our own words."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from running_server import Running, chat

CHAT, RESPONSE = "/v1/chat/completions", "/v1/responses"
USER = {"role": "user", "content": "hello"}
WEATHER = {
    "name": "get_weather",
    "description": "Weather of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
TOOL = {"type": "function", "function": WEATHER}
FORM = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object", "properties": {}}}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'

FIELDS: dict[str, dict[str, Any]] = {
    "a chat page": {
        "chat_id": "c1",
        "session_id": "s",
        "id": "m1",
        "background_tasks": {"title": True},
        "model_item": {},
    },
    "an agent framework": {
        "metadata": {"run": "1"},
        "store": True,
        "service_tier": "flex",
        "safety_identifier": "u",
    },
    "a gateway": {
        "user": "u1",
        "extra_body": {"top_k": 5},
        "caching": False,
        "tags": ["x"],
        "num_retries": 2,
    },
    "an editor": {
        "max_tokens": -1,
        "options": {"num_predict": 4, "repeat_penalty": 1.1},
        "keep_alive": "30m",
    },
    "an SDK": {"reasoning_effort": "low", "verbosity": "low", "stream_options": {"include_usage": True}},
    "a local client": {
        "max_tokens": 4.0,
        "temperature": "0.5",
        "mirostat": 0,
        "typical_p": 1.0,
        "n_probs": 0,
    },
    "a benchmark": {
        "ignore_eos": True,
        "min_tokens": 0,
        "return_token_ids": False,
        "best_of": 1,
        "seed": None,
    },
    "thinking switches": {
        "thinking": {"type": "disabled"},
        "enable_thinking": False,
        "include_reasoning": False,
    },
    "old functions": {"functions": [WEATHER], "function_call": "auto"},
    "both caps": {"max_tokens": 5, "max_completion_tokens": 6},
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_fields_of_real_clients_are_taken(server: Running, fields: dict[str, Any]) -> None:
    reply = server.ask(CHAT, chat(**fields))
    assert reply.status == 200, reply.body


def test_what_is_left_out_is_said(server: Running) -> None:
    reply = server.ask(CHAT, chat(metadata={"a": "b"}, no_such_field=1, temprature=2, tfs_z=1))
    assert reply.headers["x-hasten-ignored"] == "metadata, no_such_field, temprature, tfs_z"
    page = server.ask("/metrics").body.decode()
    for name in ("metadata", "tfs_z"):
        assert f'hasten_ignored_fields_total{{field="{name}"}}' in page
    assert 'hasten_ignored_fields_total{field="other"}' in page and "temprature" not in page
    assert "x-hasten-ignored" not in server.ask(CHAT, chat()).headers


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"use_beam_search": True}, "use_beam_search"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"mirostat": 2}, "mirostat"),
        ({"logprob_token_ids": [5]}, "logprob_token_ids"),
        ({"suffix": "x"}, "suffix"),
        ({"allowed_tokens": [1], "dry_multiplier": 1}, "dry_multiplier"),
    ],
)
def test_what_would_change_the_answer_is_refused(server: Running, fields: dict[str, Any], name: str) -> None:
    reply = server.ask(CHAT, chat(**fields))
    assert reply.status == 400 and reply.error["param"].startswith(name)


def test_other_words_mean_the_same(server: Running) -> None:
    server.ask(CHAT, chat(repeat_penalty=1.5, n_predict=7, stop_sequences=["x"], random_seed=3))
    request = server.engine.asked[-1]
    assert (request.sampling.repetition_penalty, request.max_new_tokens) == (1.5, 7)
    assert (request.stop, request.sampling.seed) == (("x",), 3)


def test_borders_that_others_allow(server: Running) -> None:
    assert server.ask(CHAT, chat(top_p=0, seed=2**64)).status == 200
    assert 0 < server.engine.asked[-1].sampling.top_p < 1e-3
    assert server.ask(CHAT, chat(model="")).json["model"] == "echo"
    assert server.ask("/tokenize", {"content": "abc"}).json["tokens"] == list(b"abc")


def test_a_cap_is_a_cap(server: Running) -> None:
    assert server.ask(CHAT, chat(max_tokens=10**12)).status == 200
    assert server.engine.asked[-1].max_new_tokens == 4096 - len("<user>hello")
    reply = server.ask(CHAT, chat("x" * 5000))
    assert "maximum context length is 4096 tokens" in reply.error["message"]
    assert "more with --context (the model can 131072)" in reply.error["message"]


def test_a_context_that_cannot_be_longer_names_no_flag(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.models["echo"].config, "context", 4096)
    message = server.ask(CHAT, chat("x" * 5000)).error["message"]
    assert "maximum context length is 4096 tokens" in message and "--context" not in message


HISTORIES: dict[str, tuple[list[Any], str]] = {
    "content null": (
        [USER, {"role": "assistant", "content": None}, USER],
        "<user>hello<assistant><user>hello",
    ),
    "content a list of texts": ([{"role": "user", "content": ["a", {"text": "b"}]}], "<user>a\nb"),
    "a stray type": ([{**USER, "type": "text"}], "<user>hello"),
    "outputs sent back": (
        [
            USER,
            {"role": "assistant", "content": "W", "id": "m", "finish_reason": "stop", "audio": None},
            USER,
        ],
        "<user>hello<assistant>W<user>hello",
    ),
    "cache marks": (
        [
            {
                "role": "user",
                "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}],
            }
        ],
        "<user>a",
    ),
    "a result without an id": (
        [
            USER,
            {
                "role": "assistant",
                "tool_calls": [{"index": 0, "function": {"name": "f", "arguments": {"a": 1}}}],
            },
            {"role": "tool", "content": {"t": 20}},
        ],
        '<user>hello<assistant><tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
        '<user><tool_response>\n{"t": 20}\n</tool_response>',
    ),
    "the role function": (
        [
            USER,
            {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
            {"role": "function", "name": "f", "content": "20"},
        ],
        '<user>hello<assistant><tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
        "<user><tool_response>\n20\n</tool_response>",
    ),
}


@pytest.mark.parametrize(("messages", "prompt"), HISTORIES.values(), ids=HISTORIES)
def test_histories_as_clients_keep_them(
    server: Running, messages: list[Any], prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        server.models["echo"].tokenizer, "fields", SimpleNamespace(chat_templates={"default": ""})
    )
    assert server.ask(CHAT, {"messages": messages}).status == 200
    assert bytes(server.engine.asked[-1].prompt).decode() == prompt


def test_tools_are_told_once_where_the_template_knows_none(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = SimpleNamespace(chat_templates={"default": ""})
    monkeypatch.setattr(server.models["echo"].tokenizer, "fields", fields)
    assert server.ask(CHAT, chat(tools=[TOOL])).status == 200
    assert bytes(server.engine.asked[-1].prompt).count(b"# Tools") == 1


@pytest.mark.parametrize(
    "tool",
    [
        WEATHER | {"type": "function"},
        {"name": "get_weather", "input_schema": WEATHER["parameters"]},
        {"function": WEATHER},
        {"type": "function", "function": {**WEATHER, "strict": None, "cache_control": {}}},
    ],
)
def test_tools_in_other_forms(server: Running, tool: dict[str, Any]) -> None:
    server.engine.reply = CALL
    reply = server.ask(CHAT, chat(tools=[tool, {"type": "web_search"}], tool_choice={"type": "auto"}))
    (choice,) = reply.json["choices"]
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "get_weather"
    assert reply.headers["x-hasten-ignored"] == "tools.web_search"


def test_a_strict_tool_is_held_to_its_schema_where_the_model_may_choose(server: Running) -> None:
    strict = {"type": "function", "function": {**WEATHER, "strict": True}}
    plain = {"type": "function", "function": {**WEATHER, "name": "other", "strict": False}}
    server.engine.reply = CALL
    (choice,) = server.ask(CHAT, chat(tools=[strict, plain])).json["choices"]
    assert choice["finish_reason"] == "tool_calls"
    source = server.engine.asked[-1].grammar.source
    assert "start: (calls | form | unmarked)" in source and "before[lazy]" in source and "Oslo" in source
    server.ask(CHAT, chat(tools=[plain]))
    assert server.engine.asked[-1].grammar is None
    server.ask(CHAT, chat(tools=[strict], tool_choice="none"))
    assert server.engine.asked[-1].grammar is None


def test_tools_beside_a_format_are_a_call_or_the_format(server: Running) -> None:
    server.engine.reply = CALL
    (choice,) = server.ask(CHAT, chat(tools=[TOOL], response_format=FORM)).json["choices"]
    assert choice["finish_reason"] == "tool_calls"
    source = server.engine.asked[-1].grammar.source
    assert "start: (calls | bare | form)" in source and "get_weather" in source
    server.ask(CHAT, chat(tools=[TOOL], response_format=FORM, tool_choice="required"))
    assert "start: (calls)" in server.engine.asked[-1].grammar.source


@pytest.mark.parametrize(
    "choice", ["required", "any", {"type": "function", "function": {"name": "get_weather"}}]
)
def test_a_forced_call_is_one(server: Running, choice: Any) -> None:
    server.engine.reply = CALL + "\n" + CALL
    for more, calls in (({}, 1), ({"parallel_tool_calls": False}, 1), ({"parallel_tool_calls": True}, 2)):
        named = not isinstance(choice, str)
        reply = server.ask(CHAT, chat(tools=[TOOL], tool_choice=choice, **more)).json
        assert len(reply["choices"][0]["message"]["tool_calls"]) == (1 if named else calls)
        several = "{0,7}" in server.engine.asked[-1].grammar.source
        assert several == (calls == 2 and not named)


def test_a_strict_server_loosens_no_schema_of_a_tool(server: Running, strict_server: Running) -> None:
    schema = {"type": "object", "properties": {"days": {"type": "array", "uniqueItems": True}}}
    body = chat(tools=[{"type": "function", "function": {"name": "plan", "parameters": schema}}])
    assert strict_server.ask(CHAT, body).status == 200  # no grammar is made for it
    for choice in ("required", {"type": "function", "function": {"name": "plan"}}):
        forced = {**body, "tool_choice": choice}
        refused = strict_server.ask(CHAT, forced)
        assert (refused.status, refused.error["param"]) == (400, "tools")
        assert "'plan'" in refused.error["message"] and "uniqueItems" in refused.error["message"]
        assert server.ask(CHAT, forced).status == 200
        assert "uniqueItems" not in server.engine.asked[-1].grammar.source


def test_one_call_at_most_where_it_is_asked_for(server: Running) -> None:
    server.engine.reply = CALL + CALL
    reply = server.ask(CHAT, chat(tools=[TOOL], parallel_tool_calls=False))
    assert len(reply.json["choices"][0]["message"]["tool_calls"]) == 1
    assert server.engine.asked[-1].stop == ("</tool_call>",)


@pytest.mark.parametrize("size", [3, 20, 40, 60])
def test_a_call_that_is_cut_is_no_text(server: Running, size: int) -> None:
    server.engine.reply = CALL
    body = chat(tools=[TOOL], max_tokens=size)
    (choice,) = server.ask(CHAT, body).json["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("length", "")
    assert "tool_calls" not in choice["message"]
    events = server.ask(CHAT, {**body, "stream": True}).events
    deltas = [event["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("content") or "" for delta in deltas) == ""
    assert events[-1]["choices"][0]["finish_reason"] == "length"


@pytest.fixture
def thinker(server: Running, monkeypatch: pytest.MonkeyPatch) -> Running:
    """A model whose template names a thought's marks."""
    fields = SimpleNamespace(chat_templates={"default": "<think></think><tool_call> tools"})
    monkeypatch.setattr(server.models["echo"].tokenizer, "fields", fields)
    return server


def test_thoughts_are_kept_apart(thinker: Running) -> None:
    thinker.engine.reply = "<think>\nHm, so.\n</think>\n\nHi" + CALL
    (choice,) = thinker.ask(CHAT, chat(tools=[TOOL])).json["choices"]
    message = choice["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm, so.", "Hi")
    assert message["tool_calls"] and choice["finish_reason"] == "tool_calls"
    deltas = [
        event["choices"][0]["delta"] for event in thinker.ask(CHAT, chat(stream=True, tools=[TOOL])).events
    ]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hm, so."
    assert "".join(delta.get("content") or "" for delta in deltas) == "Hi"
    assert [delta.get("reasoning") for delta in deltas] == [
        delta.get("reasoning_content") for delta in deltas
    ]
    reply = thinker.ask(CHAT, chat(include_reasoning=False)).json
    assert not {"reasoning", "reasoning_content"} & reply["choices"][0]["message"].keys()
    told = reply["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert len("Hm, so.") - 1 <= told <= len("<think>\nHm, so.\n</think>")
    body = chat(stream=True, stream_options={"include_usage": True})
    last = thinker.ask(CHAT, body).events[-1]
    assert last["usage"]["completion_tokens_details"]["reasoning_tokens"] == told
    thought, said, *_ = thinker.ask(RESPONSE, {"input": "x"}).json["output"]
    assert thought["type"] == "reasoning" and thought["content"][0]["text"] == "Hm, so."
    assert said["content"][0]["text"].startswith("Hi")


def test_a_format_begins_after_the_thought(thinker: Running) -> None:
    thinker.ask(CHAT, chat(response_format=FORM, max_tokens=400))
    grammar = thinker.engine.asked[-1].grammar
    assert "(thought GAP?)?" in grammar.source and grammar.thought.most_tokens == 96
    thinker.ask(CHAT, chat(response_format=FORM, reasoning_effort="none"))
    assert thinker.engine.asked[-1].grammar.kind == "json_schema"
    thinker.ask(CHAT, chat(thinking={"type": "enabled", "budget_tokens": 64}))
    assert thinker.engine.asked[-1].grammar.thought.most_tokens == 64


UNFOLLOWED = {
    "uniqueItems": ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, "[1, 1]", "[1, 2]"),
    "pattern": ({"type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"}, '"."', '"1.5"'),
    "not": ({"type": "integer", "not": {"const": 3}}, "3", "4"),
    "if": ({"type": "integer", "if": {"minimum": 5}, "then": {"multipleOf": 2}}, "7", "8"),
    "contains": ({"type": "array", "contains": {"const": 1}}, "[2]", "[2, 1]"),
    "dependentRequired": (
        {"type": "object", "dependentRequired": {"a": ["b"]}},
        '{"a": 1}',
        '{"a": 1, "b": 2}',
    ),
}


@pytest.mark.parametrize("name", UNFOLLOWED)
def test_what_a_grammar_cannot_follow_is_checked_at_the_end(server: Running, name: str) -> None:
    schema, bad, good = UNFOLLOWED[name]
    for text, is_good in ((bad, False), (good, True)):
        server.engine.reply = text
        form: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        reply = server.ask(CHAT, chat(response_format=form))
        assert reply.headers["x-hasten-schema"] == f"checked after generation: {name}"
        assert ("schema_violations" in reply.json["choices"][0]) != is_good
        last = server.ask(CHAT, chat(response_format=form, stream=True)).events[-1]["choices"][0]
        assert ("schema_violations" in last) != is_good
        for stream in (False, True):
            body = {"prompt": "a", "guided_json": schema, "stream": stream, "max_tokens": 50}
            reply = server.ask("/v1/completions", body)
            assert (b"schema_violations" in reply.body) != is_good, reply.body
        form["json_schema"]["strict"] = True
        reply = server.ask(CHAT, chat(response_format=form))
        assert reply.status == (200 if is_good else 500)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "STRING", "nullable": True},
        {"type": "object", "properties": {"a": {"type": "string", "strict": True, "format": "binary"}}},
        {"type": "object", "propertyOrdering": ["a"], "properties": {"a": {"type": "int"}}, "x-y": 1},
        {"propertyNames": {"enum": ["a"]}, "additionalProperties": {"type": "integer"}},
        {"oneOf": [{"type": "string"}, {"type": "null"}], "discriminator": {"propertyName": "k"}},
    ],
)
def test_annotations_and_dialects_need_no_check(server: Running, schema: dict[str, Any]) -> None:
    reply = server.ask(CHAT, chat(response_format={"type": "json_object", "schema": schema}))
    assert reply.status == 200 and "x-hasten-schema" not in reply.headers


AGENT = {
    "instructions": "You are an agent.",
    "store": False,
    "include": ["reasoning.encrypted_content"],
    "reasoning": {"effort": "medium", "summary": "auto"},
    "text": {"verbosity": "low"},
    "truncation": "auto",
    "prompt_cache_key": "k",
    "client_metadata": {"x": "y"},
    "tools": [
        {"type": "function", **WEATHER, "strict": False},
        {"type": "web_search"},
        {
            "type": "namespace",
            "name": "n",
            "tools": [{"type": "function", "name": "inner", "parameters": {}}],
        },
        {"type": "custom", "name": "patch", "format": {"type": "grammar"}},
    ],
}


def test_a_coding_agents_turns(server: Running) -> None:
    asked = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]}
    thought = {"type": "reasoning", "id": "rs_1", "summary": [], "content": None, "encrypted_content": None}
    made = {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "get_weather", "arguments": "{}"}
    other = {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {}}
    result = {
        "type": "function_call_output",
        "call_id": "c1",
        "output": [{"type": "input_text", "text": "ok"}],
    }
    reply = server.ask(RESPONSE, {**AGENT, "input": [asked, thought, other, made, result]})
    assert reply.status == 200, reply.body
    assert "tools.web_search" in reply.headers["x-hasten-ignored"]
    assert [tool["name"] for tool in reply.json["tools"]] == ["get_weather", "inner"]


def test_an_item_is_named_by_its_id(server: Running) -> None:
    server.engine.reply = "Hi."
    first = server.ask(RESPONSE, {"input": "hello"}).json
    named = [{"role": "user", "content": "a"}, {"type": "item_reference", "id": first["output"][0]["id"]}]
    assert server.ask(RESPONSE, {"input": [*named, {"role": "user", "content": "b"}]}).status == 200
    assert bytes(server.engine.asked[-1].prompt).decode() == "<user>a<assistant>Hi.<user>b"
    lost = server.ask(RESPONSE, {"input": [{"type": "item_reference", "id": "msg_0"}]})
    assert (lost.status, lost.error["code"]) == (404, "item_not_found")


def test_an_answer_goes_on_with_the_last_message(server: Running) -> None:
    begun = [USER, {"role": "assistant", "content": "Once upon"}]
    for body in (
        {"messages": begun, "continue_final_message": True},
        {"messages": [USER, {**begun[1], "prefix": True}]},
    ):
        assert server.ask(CHAT, body).status == 200
        assert bytes(server.engine.asked[-1].prompt).decode() == "<user>hello<assistant>Once upon"


def test_a_broken_body_is_still_refused(server: Running) -> None:
    assert server.ask(CHAT, json.dumps(chat(temperature="hot")).encode()).error["param"] == "temperature"
    assert (
        server.ask(CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}).status == 400
    )


COMPLETION, MESSAGES = "/v1/completions", "/v1/messages"


def test_a_benchmark_scores_choices(server: Running) -> None:
    """Prompts as ids, echoed, with the log-probability of each token behind the first."""
    server.engine.reply = "!"
    for most, text in ((1, "!"), (0, "")):
        body = {"prompt": [list(b"abc"), list(b"de")], "echo": True, "logprobs": 1, "max_tokens": most}
        for choice, prompt in zip(server.ask(COMPLETION, body).json["choices"], ("abc", "de"), strict=True):
            found = choice["logprobs"]
            assert choice["text"] == prompt + text
            assert found["tokens"] == list(prompt + text)
            assert found["token_logprobs"] == [None] + [-0.5] * (len(prompt + text) - 1)
            assert found["text_offset"] == list(range(len(prompt + text)))
            assert found["top_logprobs"][0] is None and found["top_logprobs"][1] == {prompt[1]: -0.5}
    events = server.ask(COMPLETION, {**body, "prompt": "abc", "max_tokens": 1, "stream": True}).events
    assert "".join(event["choices"][0]["text"] for event in events) == "abc!"
    tokens = [
        token for event in events for token in (event["choices"][0]["logprobs"] or {"tokens": []})["tokens"]
    ]
    assert tokens == list("abc!")


def test_echo_without_logprobs_and_the_chosen_token(server: Running) -> None:
    server.engine.reply = "!"
    reply = server.ask(COMPLETION, {"prompt": "abc", "echo": True, "logprobs": None}).json
    assert (reply["choices"][0]["text"], reply["choices"][0]["logprobs"]) == ("abc!", None)
    found = server.ask(COMPLETION, {"prompt": "abc", "logprobs": 0}).json["choices"][0]["logprobs"]
    assert found["top_logprobs"] == [{"!": -0.5}]


def test_the_best_of_several(server: Running) -> None:
    reply = server.ask(COMPLETION, {"prompt": "abc", "best_of": 3, "n": 2}).json
    assert [choice["index"] for choice in reply["choices"]] == [0, 1]
    assert server.engine.asked[-1].n == 3


def test_filling_in(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = {"<|fim_prefix|>": 260, "<|fim_suffix|>": 261, "<|fim_middle|>": 262}
    tokenizer = server.models["echo"].tokenizer
    monkeypatch.setattr(tokenizer, "id_of", ids.get)
    monkeypatch.setattr(type(tokenizer), "bos_id", None, raising=False)
    server.engine.reply = "mid"
    reply = server.ask(COMPLETION, {"prompt": "a", "suffix": "b", "max_tokens": 5}).json
    assert server.engine.asked[-1].prompt == (260, 97, 261, 98, 262)
    assert reply["choices"][0]["text"] == "mid"
    body = {"input_prefix": "a", "input_suffix": "b", "input_extra": [{"text": "x"}], "n_predict": 9}
    assert server.ask("/infill", body).json["content"] == "mid"
    assert server.engine.asked[-1].prompt == (260, *b"x\na", 261, 98, 262)
    spelled = {
        "top_p": 0,
        "stop": "",
        "seed": 2**64,
        "logit_bias": [[7, False]],
        "user": {"a": 1},
        "store": True,
    }
    reply = server.ask("/infill", {**body, **spelled})
    assert reply.status == 200 and {"store", "user"} <= set(reply.headers["x-hasten-ignored"].split(", "))
    sampling = server.engine.asked[-1].sampling
    assert 0 < sampling.top_p < 1e-3 and dict(sampling.logit_bias) == {7: -100.0}
    pieces = server.ask("/infill", {**body, "stream": True}).events
    assert "".join(piece["content"] for piece in pieces) == "mid" and pieces[-1]["stop"] is True


def test_fewer_dimensions(server: Running) -> None:
    (entry,) = server.ask("/v1/embeddings", {"input": "abc", "dimensions": 2}).json["data"]
    assert len(entry["embedding"]) == 2 and sum(one * one for one in entry["embedding"]) == pytest.approx(1)


def test_what_clients_ask_before_they_ask(server: Running) -> None:
    assert server.ask("/version").json["version"]
    for path in ("/v1/models/", "/models", "//v1//models", "/v1/v1/models"):
        assert server.ask(path).json["data"][0]["id"] == "echo"
    assert server.ask("/chat/completions/", chat()).status == 200


ANTHROPIC = {"max_tokens": 100, "messages": [USER]}
SHELL = {"name": "get_weather", "input_schema": WEATHER["parameters"], "cache_control": {"type": "ephemeral"}}


def test_messages_in_one_piece(server: Running) -> None:
    server.engine.reply = "Hi."
    reply = server.ask(MESSAGES, {**ANTHROPIC, "system": [{"type": "text", "text": "s"}], "top_k": 3}).json
    assert reply["content"] == [{"type": "text", "text": "Hi."}]
    assert (reply["type"], reply["role"], reply["stop_reason"]) == ("message", "assistant", "end_turn")
    assert reply["usage"]["input_tokens"] + reply["usage"]["cache_read_input_tokens"] == len(
        "<system>s<user>hello"
    )
    assert server.ask(MESSAGES + "/count_tokens", {"messages": [USER]}).json == {
        "input_tokens": len("<user>hello")
    }


def test_messages_stream_a_call(server: Running) -> None:
    server.engine.reply = "So." + CALL
    body = {**ANTHROPIC, "tools": [SHELL], "tool_choice": {"type": "auto"}, "stream": True}
    events = server.ask(MESSAGES, body).events
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["message_start", "ping"] and kinds[-2:] == ["message_delta", "message_stop"]
    starts = [event["content_block"]["type"] for event in events if event["type"] == "content_block_start"]
    assert starts == ["text", "tool_use"] and kinds.count("content_block_stop") == 2
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert json.loads("".join(delta.get("partial_json", "") for delta in deltas)) == {"city": "Rome"}
    assert events[-2]["delta"]["stop_reason"] == "tool_use"
    (text, call) = server.ask(MESSAGES, {**body, "stream": False}).json["content"]
    assert (text["text"], call["input"], call["name"]) == ("So.", {"city": "Rome"}, "get_weather")


def test_messages_with_results_thoughts_and_a_beginning(thinker: Running) -> None:
    thought = {"type": "thinking", "thinking": "hm", "signature": "x"}
    used = {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "ok"}]}
    turns = [
        USER,
        {"role": "assistant", "content": [thought, used]},
        {"role": "user", "content": [result, {"type": "text", "text": "go"}]},
        {"role": "assistant", "content": "Well"},
    ]
    thinker.engine.reply = "<think>aha</think>now"
    body = {**ANTHROPIC, "messages": turns, "stop_sequences": ["n"], "metadata": {"user_id": "u"}}
    reply = thinker.ask(MESSAGES, {**body, "thinking": {"type": "enabled", "budget_tokens": 50}}).json
    assert [block["type"] for block in reply["content"]] == ["thinking", "text"]
    request = thinker.engine.asked[-1]
    assert bytes(request.prompt).decode().endswith("<tool>ok<user>go<assistant>Well")
    assert (request.stop, request.client.split("/")[1]) == (("n",), "u")
    assert [block["type"] for block in thinker.ask(MESSAGES, body).json["content"]] == ["text"]


def test_messages_say_what_is_wrong(server: Running) -> None:
    reply = server.ask(
        MESSAGES, {**ANTHROPIC, "messages": [{"role": "user", "content": [{"type": "image"}]}]}
    )
    assert (reply.status, reply.json["type"]) == (400, "error")
    assert (
        reply.json["error"]["type"] == "invalid_request_error" and "image" in reply.json["error"]["message"]
    )


def test_models_are_named_as_hubs_name_them() -> None:
    from hasten.serve.options import names_of

    assert names_of(["org/name=demo"]) == {"org/name": "demo"}
    assert list(names_of(["./a=b/x.gguf"]).values()) == ["./a=b/x.gguf"]
