"""Texts of megabytes: refused before they are encoded where they cannot fit; a library's panic is told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from running_server import Running, chat, serving, wait_for
from stand_in_engine import ByteTokenizer, StandInEngine, StandInModel

from hasten.serve.metrics import Log
from hasten.serve.options import ServeOptions

CHAT, COMPLETION, RESPONSE = "/v1/chat/completions", "/v1/completions", "/v1/responses"
EMBEDDING = "/v1/embeddings"
LONG = "a" * 3_000_000
PANIC = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})


@dataclass
class Watched(ByteTokenizer):
    """One token for so many characters; notes what it was given."""

    characters: int = 1
    longest_token: int = 4
    encoded: list[int] = field(default_factory=list)
    panics: bool = False

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        if self.panics:
            raise PANIC("Onig: Regex search error: retry-limit-in-match over")
        self.encoded.append(len(text))
        return [97] * (len(text) // self.characters)

    def count(self, text: str, add_special: bool = True) -> int:
        return len(self.encode(text))


@pytest.fixture
def tokenizer() -> Watched:
    return Watched()


@pytest.fixture
def watched(tokenizer: Watched) -> Iterator[Running]:
    engine = StandInEngine(reply="ab")

    def load(ref: str) -> tuple[Any, Any]:
        return StandInModel(ref, tokenizer=tokenizer), engine

    with serving(ServeOptions(port=0, log=False), {"echo": engine}, load) as running:
        yield running


LONG_BODIES = [
    (CHAT, chat(LONG)),
    (COMPLETION, {"prompt": LONG}),
    (COMPLETION, {"prompt": ["a", LONG]}),
    (EMBEDDING, {"input": LONG}),
    (RESPONSE, {"input": LONG}),
    (RESPONSE, {"input": "a", "instructions": LONG}),
]


@pytest.mark.parametrize(("path", "body"), LONG_BODIES)
def test_a_text_that_cannot_fit_is_not_encoded(
    watched: Running, tokenizer: Watched, path: str, body: Any
) -> None:
    reply = watched.ask(path, body)
    assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")
    assert "3,000,0" in reply.error["message"]
    assert max(tokenizer.encoded, default=0) <= len("ready")


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_a_text_that_may_fit_is_counted_part_by_part(watched: Running, tokenizer: Watched, path: str) -> None:
    text = "a" * 1_000_000  # 256 characters a token would fit
    tokenizer.characters = 10
    reply = watched.ask(path, chat(text) if path == CHAT else {"prompt": text})
    assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")
    assert "more than 4096 tokens" in reply.error["message"]
    assert [one for one in tokenizer.encoded if one > 5] == [65536, 65536]


def test_a_long_text_of_long_tokens_is_answered(watched: Running, tokenizer: Watched) -> None:
    tokenizer.characters = 250
    reply = watched.ask(COMPLETION, {"prompt": "a" * 1_000_000})
    assert reply.status == 200
    assert reply.json["usage"]["prompt_tokens"] == 4000
    tokenizer.characters = tokenizer.longest_token = 1000
    assert watched.ask(COMPLETION, {"prompt": LONG}).json["usage"]["prompt_tokens"] == 3000


def test_tokenize_and_detokenize_have_limits_of_their_own(server: Running) -> None:
    for body, param in (
        ({"prompt": LONG}, "prompt"),
        (chat(LONG), "messages"),
        ({"prompt": "中" * 400_000}, "prompt"),
    ):
        reply = server.ask("/tokenize", body)
        assert (reply.status, reply.error["code"], reply.error["param"]) == (400, "text_too_long", param)
    reply = server.ask("/detokenize", b'{"tokens":[' + b"1," * 500_000 + b"1]}")
    assert (reply.status, reply.error["code"]) == (400, "too_many_values")


def test_long_lists_of_tokens_are_whole(server: Running) -> None:
    text = 'é"\n' * 50_000
    reply = server.ask("/tokenize", {"prompt": text, "return_token_strs": True}).json
    assert reply["tokens"] == list(text.encode())
    assert reply["count"] == len(reply["tokens"]) == len(reply["token_strs"]) == 200_000
    assert server.ask("/detokenize", {"tokens": reply["tokens"]}).json == {"prompt": text}
    assert server.ask("/tokenize", {"prompt": ""}).json["tokens"] == []


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, chat()),
        (CHAT, chat(stream=True)),
        (COMPLETION, {"prompt": ["a", "b"]}),
        (EMBEDDING, {"input": "a"}),
        (RESPONSE, {"input": "a", "stream": True}),
        ("/tokenize", {"prompt": "a"}),
    ],
)
def test_a_panic_of_a_library_is_an_error_object(
    watched: Running, tokenizer: Watched, path: str, body: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(Log, "event", lambda self, name, *_, **fields: said.append(f"{name} {fields}"))
    tokenizer.panics = True
    reply = watched.ask(path, body)
    assert (reply.status, reply.error["code"]) == (500, "library_fault")
    assert "PanicException" in reply.error["message"]
    wait_for(lambda: any("fault" in line and "retry-limit-in-match" in line for line in said))
    tokenizer.panics = False
    assert watched.ask(CHAT, chat()).status == 200


class Panicking(StandInEngine):
    """Whose library panics after two outputs of the answer."""

    async def stream(self, request: Any) -> Any:
        number = 0
        async for output in super().stream(request):
            if number == 2:
                raise PANIC("gone")
            number += 1
            yield output


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, chat("long enough")),
        (COMPLETION, {"prompt": ["long enough", "another"]}),
        (RESPONSE, {"input": "long enough"}),
    ],
)
def test_a_panic_in_an_answer_ends_it(path: str, body: dict[str, Any]) -> None:
    with serving(engines={"echo": Panicking()}) as running:
        reply = running.ask(path, body)
        assert (reply.status, reply.error["code"]) == (500, "library_fault")
        events = running.ask(path, {**body, "stream": True}).events
        assert "PanicException" in str(events[-1])
        assert running.engine.running == 0
