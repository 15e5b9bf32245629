"""Tool calls of every family, in one piece and in any pieces."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.models.answers import ArgumentsDelta, CallStarted, TextDelta, ToolCallStream
from hasten.models.tool_calls import ToolStyle, new_call_id
from whole_calls import parse_tool_calls

HERMES, LIST, LLAMA = ToolStyle("hermes"), ToolStyle("hermes_list"), ToolStyle("llama")
MISTRAL, ARGS, PHI = ToolStyle("mistral"), ToolStyle("mistral_args"), ToolStyle("phi")
TRICKY = {"code": 'print("</tool_call> [TOOL_CALLS] \\\\")\n', "n": [1, {"a": None}], "ü": "你好 \U0001f980"}
TRICKY_JSON = json.dumps(TRICKY, ensure_ascii=False)
F = ("f", {"x": 1})

X = '{"name": "f", "arguments": {"x": 1}}'
Y = '{"name": "g", "arguments": ' + TRICKY_JSON + "}"
P = '{"name": "f", "parameters": {"x": 1}}'
BOTH = [F, ("g", TRICKY)]
OPEN, CLOSE = "<tool_call>", "</tool_call>"

# style, answer, content, calls
CALLS: list[tuple[ToolStyle, str, str, list[tuple[str, Any]]]] = [
    (HERMES, f"{OPEN}\n{X}\n{CLOSE}", "", [F]),
    (HERMES, f"Let me look.\n\n{OPEN}\n{X}\n{CLOSE}\n", "Let me look.", [F]),
    (HERMES, f"{OPEN}{X}{CLOSE}\n{OPEN}\n{Y}\n{CLOSE} and more ", "and more ", BOTH),
    (HERMES, OPEN + '{"name": "f", "arguments": "{\\"x\\": 1}"}' + CLOSE, "", [F]),
    (HERMES, OPEN + X, "", [F]),  # the closing mark never came
    (HERMES, OPEN + '{"name": "f"}' + CLOSE, "", [("f", {})]),
    (HERMES, OPEN + '{"type": "function", "function": ' + X + "}" + CLOSE, "", [F]),
    (HERMES, f"{OPEN}oh {OPEN}{X}{CLOSE}", OPEN + "oh", [F]),
    (LIST, f"{OPEN}[{X}, {Y}]{CLOSE}", "", BOTH),
    (LLAMA, P, "", [F]),
    (LLAMA, ' \n{"type": "function", ' + P[1:], "", [F]),
    (LLAMA, "<|python_tag|>" + P, "", [F]),
    (LLAMA, f'Sure: <|python_tag|>{P}; {{"name": "g", "parameters": {{}}}}', "Sure:", [F, ("g", {})]),
    (MISTRAL, f'[TOOL_CALLS] [{X}, {Y[:-1]}, "id": "abcdefghi"}}]', "", BOTH),
    (MISTRAL, f"Hm. [TOOL_CALLS][{X}]", "Hm.", [F]),
    (ARGS, '[TOOL_CALLS]f[ARGS]{"x": 1}[TOOL_CALLS]g.h[CALL_ID]abcdefghi[ARGS]{}', "", [F, ("g.h", {})]),
    (ARGS, '[TOOL_CALLS]f{"x": 1}', "", [F]),
    (PHI, f"<|tool_call|>[{X}, {Y}]<|/tool_call|>", "", BOTH),
]
NO_CALLS = [
    (HERMES, "a <tool and <tool_call is no mark <"),
    (HERMES, f"{OPEN}{{name: f}}{CLOSE}"),
    (HERMES, OPEN + '{"name": "f", "argum'),
    (HERMES, OPEN + '{"name": "f", "arguments": [1]}' + CLOSE),
    (HERMES, OPEN + '{"name": "f", "arguments": {"x": 1e999}}' + CLOSE),
    (HERMES, OPEN + '{"name": "\\ud800", "arguments": {}}' + CLOSE),
    (HERMES, f"  {X}  "),
    (HERMES, " \n "),
    (HERMES, ""),
    (LIST, f"{OPEN}[]{CLOSE}"),
    (LLAMA, '{"name": "Bob", "age": 3}'),
    (LLAMA, '{"a": [1, 2'),
    (LLAMA, '<|python_tag|>search.call(query="x")'),
    (LLAMA, f"It is {P}"),
    (MISTRAL, "[TOOL_CALLS] nothing"),
    (MISTRAL, "[TOOL"),
    (PHI, "<|tool_call|>no<|/tool_call|>"),
]
SAMPLES = CALLS + [(style, answer, answer, []) for style, answer in NO_CALLS]


def through(
    style: ToolStyle, pieces: list[str], names: tuple[str, ...] = ()
) -> tuple[str, list[tuple[str, Any]]]:
    """Content and calls of a stream, its events checked for order."""
    stream = ToolCallStream(style, names, new_id=lambda: "id")
    content, calls = "", []
    events = [event for piece in pieces for event in stream.push(piece)] + stream.flush()
    for event in events:
        match event:
            case TextDelta(text):
                assert text
                content += text
            case CallStarted(index, identity, name):
                assert index == len(calls) and identity == "id"
                calls.append([name, ""])
            case ArgumentsDelta(index, text):
                assert index == len(calls) - 1
                calls[index][1] += text
    return content, [(name, json.loads(arguments)) for name, arguments in calls]


@pytest.mark.parametrize(("style", "answer", "content", "calls"), SAMPLES)
def test_samples(style: ToolStyle, answer: str, content: str, calls: list[Any]) -> None:
    assert through(style, [answer]) == (content, calls)
    text, found = parse_tool_calls(answer, style)
    assert text == content and [(c.name, json.loads(c.arguments)) for c in found] == calls


@pytest.mark.parametrize(("style", "answer", "content", "calls"), SAMPLES)
def test_pieces_change_nothing(style: ToolStyle, answer: str, content: str, calls: list[Any]) -> None:
    assert through(style, list(answer)) == (content, calls)
    for cut in range(len(answer) + 1):
        assert through(style, [answer[:cut], answer[cut:]]) == (content, calls)


PARTS = [OPEN, CLOSE, X, "[TOOL_CALLS]", "[ARGS]", "<|tool_call|>", "<|/tool_call|>", "<|python_tag|>", P]
PARTS += [*'f"{}[] \n\\<;', "text", "```json\n", "```", '{"name": "f", "parameters": {"a": "</tool_call>"}}']


FENCED = [
    (f"```json\n{X}\n```", "", [F]),
    (f"```\n{X}\n```\n", "", [F]),
    (f" {X}\n{Y}", "", BOTH),
    (f"{OPEN}{X}{CLOSE}\n{Y}", "", BOTH),
    (X.replace("f", "nobody"), X.replace("f", "nobody"), []),
    ('{"name": "f"}', '{"name": "f"}', []),
    ('{"city": "f", "arguments": {}}', '{"city": "f", "arguments": {}}', []),
    (f"{X} is a call", f"{X} is a call", []),
    (f"```json\n{X}\n``` is a call", f"```json\n{X}\n``` is a call", []),
    ("```python\nprint()\n```", "```python\nprint()\n```", []),
    ("``", "``", []),
]


@pytest.mark.parametrize(("answer", "content", "calls"), FENCED)
def test_forgotten_marks(answer: str, content: str, calls: list[Any]) -> None:
    for style in (HERMES, PHI):
        if OPEN in answer and style is PHI:
            continue
        assert through(style, [answer], ("f", "g")) == (content, calls)
        assert through(style, list(answer), ("f", "g")) == (content, calls)
        for cut in range(len(answer) + 1):
            assert through(style, [answer[:cut], answer[cut:]], ("f", "g")) == (content, calls)
    assert through(LIST, [X])[1] == [], "without the names, JSON is content"


def test_json_that_is_no_call_passes_at_once() -> None:
    stream = ToolCallStream(HERMES, names=["f"])
    assert stream.push('{"na') == []
    assert stream.push('tion": 1') == [TextDelta("{"), TextDelta('"nation": 1')]


@settings(max_examples=400, deadline=None)
@given(
    parts=st.lists(st.sampled_from(PARTS), max_size=12),
    style=st.sampled_from([HERMES, LIST, LLAMA, MISTRAL, ARGS, PHI]),
    names=st.sampled_from([(), ("f", "g")]),
    seed=st.integers(0, 2**32),
)
def test_any_text_in_any_pieces(parts: list[str], style: ToolStyle, names: Any, seed: int) -> None:
    answer, rng = "".join(parts), random.Random(seed)
    cuts = sorted(rng.choices(range(len(answer) + 1), k=5))
    pieces = [answer[a:b] for a, b in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
    whole = through(style, [answer], names)
    assert through(style, pieces, names) == whole == through(style, list(answer), names)
    if not whole[1]:
        assert whole[0] == answer, "what is no call is content, all of it"


def test_content_passes_at_once() -> None:
    stream = ToolCallStream(HERMES)
    assert stream.push("Hello wor") == [TextDelta("Hello wor")]
    assert stream.push("ld <tool") == [TextDelta("ld")]
    assert stream.push("s> ") == [TextDelta(" <tools>")]


def test_long_and_hostile_answers_stay_cheap() -> None:
    import time

    started = time.process_time()
    for style in (HERMES, LLAMA, MISTRAL, PHI):
        for text in (
            "<tool_call>" * 4000,
            '<tool_call>{"' + "</tool_call>" * 4000,
            "{" * 40_000,
            "[" * 40_000,
        ):
            content, calls = parse_tool_calls(style.opening + text, style)
            assert content == style.opening + text and not calls
    assert time.process_time() - started < 3


def test_ids() -> None:
    assert len(new_call_id(MISTRAL)) == 9 and new_call_id(MISTRAL).isalnum()
    assert new_call_id(HERMES).startswith("call_") and new_call_id(HERMES) != new_call_id(HERMES)
