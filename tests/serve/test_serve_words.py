"""What other servers call things: Ollama, SGLang, TGI, Together, Groq, Moonshot, Azure and others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from running_server import Running, chat

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def grammar(kind: str, text: str = "") -> Callable[[Any], bool]:
    return lambda asked: asked.grammar.kind == kind and text in asked.grammar.source


FORMS: dict[str, tuple[dict[str, Any], Callable[[Any], bool]]] = {
    "Ollama, json": ({"format": "json"}, grammar("json_object")),
    "Ollama, schema": ({"format": SCHEMA}, grammar("json_schema", '"a"')),
    "SGLang, regex": ({"regex": "[ab]+"}, grammar("regex", "[ab]+")),
    "SGLang, ebnf": ({"ebnf": 'root ::= "a"'}, grammar("lark", "root")),
    "TGI, json": ({"grammar": {"type": "json", "value": SCHEMA}}, grammar("json_schema", '"a"')),
    "TGI, regex": ({"grammar": {"type": "regex", "value": "[ab]+"}}, grammar("regex", "[ab]+")),
    "TGI, form": ({"response_format": {"type": "json", "value": SCHEMA}}, grammar("json_schema", '"a"')),
    "Together, regex": ({"response_format": {"type": "regex", "pattern": "a"}}, grammar("regex", "a")),
    "Fireworks": ({"response_format": {"type": "grammar", "grammar": "start: /a/"}}, grammar("lark", "/a/")),
    "a word": ({"response_format": "json_object"}, grammar("json_object")),
}


@pytest.mark.parametrize(("fields", "holds"), FORMS.values(), ids=FORMS)
def test_a_form_is_heard_whatever_it_is_called(
    server: Running, fields: dict[str, Any], holds: Callable[[Any], bool]
) -> None:
    assert server.ask(CHAT, chat(**fields)).status == 200
    assert holds(server.engine.asked[0])


@pytest.mark.parametrize("form", [{}, {"type": None}, "text", {"type": "text"}, None, ""])
def test_a_form_that_asks_for_nothing_is_none(server: Running, form: Any) -> None:
    reply = server.ask(CHAT, chat(response_format=form, format=""))
    assert reply.status == 200, reply.body
    assert server.engine.asked[0].grammar is None


HEARD: dict[str, tuple[dict[str, Any], Callable[[Any], bool]]] = {
    "stops of an editor": ({"stop": [f"\n{i}" for i in range(60)]}, lambda asked: len(asked.stop) == 60),
    "stops with null": ({"stop": ["\n\n", None]}, lambda asked: asked.stop == ("\n\n",)),
    "min_new_tokens": ({"min_new_tokens": 3}, lambda asked: asked.min_new_tokens == 3),
    "no_stop_trim": ({"stop": "x", "no_stop_trim": True}, lambda asked: asked.shows_stop),
    "ban_eos_token": ({"ban_eos_token": True}, lambda asked: asked.sampling.ignore_eos),
    "do_sample": ({"do_sample": False, "temperature": 1}, lambda asked: asked.sampling.temperature == 0),
    "logprobs as a number": ({"logprobs": 2}, lambda asked: asked.logprobs == 2),
    "no logprobs as a number": ({"logprobs": 0}, lambda asked: asked.logprobs is None),
    "n_probs": ({"n_probs": 3}, lambda asked: asked.logprobs == 3),
    "no n_probs": ({"n_probs": 0}, lambda asked: asked.logprobs is None),
    "a user's number": ({"user": 12}, lambda asked: asked.client.endswith("/12")),
    "null in stream_options": ({"stream_options": {"include_usage": None}}, lambda asked: True),
    "an empty choice": ({"tools": [TOOL], "tool_choice": {}}, lambda asked: True),
    "a tool sent twice": ({"tools": [TOOL, TOOL]}, lambda asked: True),
    "a thought as a word": ({"thinking": "disabled"}, lambda asked: True),
    "a thought as a truth": ({"reasoning": False}, lambda asked: True),
    "Ollama's think": ({"think": "low"}, lambda asked: True),
}


@pytest.mark.parametrize(("fields", "holds"), HEARD.values(), ids=HEARD)
def test_other_words_are_heard(server: Running, fields: dict[str, Any], holds: Callable[[Any], bool]) -> None:
    reply = server.ask(CHAT, chat("x" * 20, **fields))
    assert reply.status == 200, reply.body
    assert "x-hasten-ignored" not in reply.headers
    assert holds(server.engine.asked[0])


CHANGES = [
    {"chat_template": "{{ messages }}"},
    {"documents": [{"text": "a"}]},
    {"guidance_scale": 2},
    {"negative_prompt": "a"},
    {"no_repeat_ngram_size": 3},
    {"stop_regex": "a+"},
    {"logprob_token_ids": [1]},
]


@pytest.mark.parametrize("fields", CHANGES, ids=lambda fields: next(iter(fields)))
def test_what_would_change_the_answer_is_refused_by_name(server: Running, fields: dict[str, Any]) -> None:
    error = server.ask(CHAT, chat(**fields)).error
    assert (error["param"], error["code"]) == (next(iter(fields)), "unsupported_parameter")


def test_an_answer_goes_on_where_moonshot_says_so(server: Running) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "Wo", "partial": True}]
    assert server.ask(CHAT, {"messages": messages}).status == 200
    assert bytes(server.engine.asked[0].prompt).endswith(b"Wo")


@pytest.mark.parametrize(
    "fields",
    [
        {"output_format": {"type": "json_schema", "schema": SCHEMA}},
        {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
    ],
)
def test_messages_may_ask_for_a_schema(server: Running, fields: dict[str, Any]) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 5, **fields}
    assert server.ask(MESSAGES, body).status == 200
    assert grammar("json_schema", '"a"')(server.engine.asked[0])


def test_what_another_server_did_by_itself_is_left_out_of_messages(server: Running) -> None:
    said = [
        {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
        {"type": "web_search_tool_result", "tool_use_id": "s", "content": []},
        {"type": "text", "text": "found"},
    ]
    user = {"role": "user", "content": "a"}
    body = {
        "messages": [user, {"role": "assistant", "content": said}, user],
        "tools": [{"type": "bash_20250124", "name": "bash"}],
    }
    reply = server.ask(MESSAGES, body)
    assert reply.status == 200, reply.body
    left = "messages.server_tool_use, messages.web_search_tool_result, tools.bash_20250124"
    assert reply.headers["x-hasten-ignored"] == left
    assert b"<assistant>found" in bytes(server.engine.asked[0].prompt)


@pytest.mark.parametrize(
    "kind", ["ghost_snapshot", "other", "mcp_list_tools", "web_search_call", "compaction"]
)
def test_items_of_other_services_are_left_out_of_responses(server: Running, kind: str) -> None:
    reply = server.ask(RESPONSES, {"input": [{"type": kind}, {"role": "user", "content": "a"}]})
    assert reply.status == 200, reply.body
    assert reply.headers["x-hasten-ignored"] == f"input.{kind}"


def test_a_text_beside_the_items_is_a_message(server: Running) -> None:
    assert server.ask(RESPONSES, {"input": [{"type": "input_text", "text": "abc"}]}).status == 200
    assert bytes(server.engine.asked[0].prompt) == b"<user>abc"


def test_responses_hear_the_form_of_chats(server: Running) -> None:
    form = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
    reply = server.ask(RESPONSES, {"input": "a", "response_format": form})
    assert reply.status == 200, reply.body
    assert grammar("json_schema", '"a"')(server.engine.asked[0])
    error = server.ask(RESPONSES, {"input": "a", "guided_regex": "a"}).error
    assert (error["param"], error["code"]) == ("guided_regex", "unsupported_parameter")


@pytest.mark.parametrize(
    "path",
    [
        "/openai/deployments/echo/chat/completions?api-version=1",
        "/beta/chat/completions",
        "/a/v1beta/openai/chat/completions",
    ],
)
def test_paths_of_services_lead_to_the_routes(server: Running, path: str) -> None:
    assert server.ask(path, chat()).status == 200
