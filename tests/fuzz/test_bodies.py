"""Request bodies with a value at random in the place of another: understood or refused, never more."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from hasten.serve.body import Strict, parse
from hasten.serve.call import Problem
from hasten.serve.chat import ChatRequest
from hasten.serve.messages import AskedFields, CountRequest, MessagesRequest, as_chat
from hasten.serve.responses import ResponseRequest
from hasten.serve.texts import (
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    InfillRequest,
    TokenizeRequest,
)

MUTANTS = 500  # of each body
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}}
MESSAGES = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": [{"type": "text", "text": "a"}], "name": "u"},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "h", "prefix": True},
    {"role": "tool", "tool_call_id": "c1", "content": "ok"},
    {"role": "assistant", "content": [{"type": "thinking", "thinking": "x"}, {"type": "text", "text": "y"}]},
    {"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": "{}"}},
    {"role": "function", "name": "f", "content": "z"},
    {"role": "user", "content": "b"},
]
CHAT: dict[str, Any] = {
    "messages": MESSAGES,
    "tools": [TOOL],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "functions": [{"name": "g", "parameters": {}}],
    "function_call": {"name": "g"},
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
    "logit_bias": [[1, False], [2, 3]],
    "stop": ["a"],
    "user": "u",
    "store": True,
    "reasoning": {"effort": "low"},
    "thinking": {"type": "enabled", "budget_tokens": 5},
    "stream_options": {"include_usage": True},
    "options": {"num_predict": 3},
    "extra_body": {"top_k": 3},
    "structured_outputs": {"json": {}},
    "max_thinking_tokens": 3,
}
ITEMS = [
    {"role": "user", "content": "a"},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "b"}], "id": "i"},
    {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "o"}]},
    {"type": "reasoning", "summary": [], "encrypted_content": None},
    {"type": "item_reference", "id": "x"},
    {"type": "custom_tool_call", "input": "a", "name": "n", "call_id": "d"},
    {"type": "local_shell_call", "action": {}},
]
RESPONSE: dict[str, Any] = {
    "input": ITEMS,
    "tools": [
        {"type": "function", "name": "f", "parameters": {}},
        {"type": "web_search"},
        {"type": "namespace", "tools": [{"type": "function", "name": "z"}]},
        {"type": "custom", "name": "q", "format": {}},
    ],
    "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
    "text": {
        "format": {"type": "json_schema", "name": "x", "schema": {}, "strict": None},
        "verbosity": "low",
    },
    "include": ["reasoning.encrypted_content", "x"],
    "metadata": {"a": 1},
    "reasoning": {"effort": "low", "summary": "auto"},
    "truncation": "auto",
}
RESULT = {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "r"}]}
FILE = {"type": "document", "source": {"type": "text", "data": "d"}}
USE = {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}}
ASKED: dict[str, Any] = {
    "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "a"}, RESULT, FILE]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "t", "signature": ""}, USE]},
    ],
    "tools": [{"name": "f", "input_schema": SCHEMA}, {"type": "bash_20250124", "name": "bash"}],
    "tool_choice": {"type": "tool", "name": "f", "disable_parallel_tool_use": True},
    "thinking": {"type": "enabled", "budget_tokens": 1024},
}
BODIES: list[tuple[type[Strict], dict[str, Any]]] = [
    (ChatRequest, CHAT),
    (ResponseRequest, RESPONSE),
    (MessagesRequest, {**ASKED, "max_tokens": 4, "stop_sequences": ["a"], "metadata": {"user_id": "u"}}),
    (CountRequest, ASKED),
    (CompletionRequest, {"prompt": ["a", "b"], "logit_bias": {"1": 2}, "logprobs": True, "suffix": "y"}),
    (TokenizeRequest, {"messages": MESSAGES, "tools": [TOOL], "add_special_tokens": True}),
    (DetokenizeRequest, {"tokens": [1, 2]}),
    (EmbeddingRequest, {"input": ["a", "b"], "encoding_format": "float", "dimensions": 3}),
    (InfillRequest, {"input_prefix": "a", "input_suffix": "b", "input_extra": [{"text": "b"}]}),
]
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1.5, 10**25, "", "a", "text", "function", "\x00", [], {}, [[]], [{}], [None]),
    *([1], ["a"], {"a": 1}, {"type": []}, {"type": {}}, {"text": None}, {"text": 5}, {"name": 5}, {"id": 5}),
    *({"function": {}}, {"function": None}, {"type": None, "name": []}, [["x", 1]], {"role": []}, {"": ""}),
)


@pytest.mark.parametrize(("model", "body"), BODIES, ids=[model.__name__ for model, _ in BODIES])
def test_a_body_is_understood_or_refused(model: type[Strict], body: dict[str, Any]) -> None:
    results = [read(model, mutant) for mutant in mutants(body, random.Random(model.__name__))]
    assert 0 < sum(results) < len(results)


def read(model: type[Strict], document: Any) -> bool:
    """Whether a body is understood; only a `Problem` that a client can read may come out."""
    try:
        asked = parse(model, json.dumps(document).encode(), set())
        if isinstance(asked, AskedFields):
            as_chat(asked, set())
    except Problem as problem:
        assert problem.status == 400 and problem.message
        return False
    return True


def mutants(body: dict[str, Any], rng: random.Random) -> Iterator[Any]:
    """The body, and some of its fields with values replaced, removed or added."""
    yield body
    for _ in range(MUTANTS):
        changed = json.loads(json.dumps(body))
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            places = [place for place in _places(changed) if place]
            *way, last = rng.choice(places)
            holder = changed
            for step in way:
                holder = holder[step]
            value = json.loads(json.dumps(rng.choice(VALUES)))
            chance = rng.random()
            if chance < 0.7:
                holder[last] = value
            elif chance < 0.85 and len(changed) > 1:
                del holder[last]
            elif isinstance(holder, list):
                holder.insert(last, value)
            else:
                holder[rng.choice(["type", "text", "name", "content", "function", "tools", "id"])] = value
        needed = ("messages", "input", "prompt", "tokens", "input_prefix")
        yield {k: v for k, v in changed.items() if k in needed or rng.random() < 0.7}


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield place
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, one in inner:
        yield from _places(one, (*place, step))
