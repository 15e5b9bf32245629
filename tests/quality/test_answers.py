"""Who answers: a model in this process, a server of OpenAI's kind, and answers that were kept."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hasten
from hasten.core import EngineOptions
from hasten.engine.loaded import fingerprint
from hasten.engine.model import LanguageModel
from hasten.errors import PeerError
from hasten.quality.answers import InProcess, Server, kept_answers
from hasten.quality.divergence import log_softmax

PROMPTS = ["the cat sat on", "in an hour the", "one two three", "the cat sat in"]
CHOICES = [(" the mat", " a"), (" end", " beginning of the end"), (" four", " five"), (" x", " yz")]


def silent(done: int) -> None:
    pass


@pytest.fixture(scope="module")
def model(tiny_folder: Callable[..., Path]) -> LanguageModel:
    options = EngineOptions(threads=1, context=256, max_sequences=3, prefill_chunk=16)
    return hasten.load(tiny_folder("qwen3"), "w4", options=options)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_likelihoods_are_those_of_the_whole_text(model: LanguageModel) -> None:
    """One pass over prompt and choice, each token's log-probability after the ones before it."""
    told: list[int] = []
    found = InProcess(model).likelihoods(PROMPTS, CHOICES, told.append)
    assert told[-1] == len(PROMPTS)
    for prompt, some, row in zip(PROMPTS, CHOICES, found, strict=True):
        for choice, score in zip(some, row, strict=True):
            opening, whole = model.tokenizer.encode(prompt), model.tokenizer.encode(prompt + choice)
            start = len(opening) if whole[: len(opening)] == opening else len(opening) - 1
            rows = log_softmax(model.logits(np.array(whole, np.int32)))
            places = range(start, len(whole))
            assert score == pytest.approx(sum(rows[at - 1, whole[at]] for at in places), abs=1e-3)


def test_states_before_continuations_are_those_of_whole_texts(model: LanguageModel) -> None:
    """To the bit, and no page stays taken."""
    free = model.executor.pool.free
    opening = model.tokenizer.encode("the cat sat on the mat, and the dog sat on the cat. then")
    some = [[5], [7, 8, 9], list(range(10, 40)), [7, 8]]
    for one, found in zip(some, model.hidden_before(opening, some), strict=True):
        whole = model.hidden([*opening, *one])
        np.testing.assert_array_equal(found, whole[len(opening) - 1 : -1])
    assert model.executor.pool.free == free


def test_classes_of_pages_that_change_share_nothing(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening, some = [1, 2, 3], [[4, 5], [6, 7, 8]]
    shared = model.hidden_before(opening, some)
    monkeypatch.setattr(model.executor, "kv_class", lambda tokens, as_prompt: tokens > 4)
    for one, other in zip(shared, model.hidden_before(opening, some), strict=True):
        np.testing.assert_array_equal(one, other)


def test_continued_is_what_generate_gives(model: LanguageModel) -> None:
    """Also where prompts begin alike and their beginning is computed once."""
    prompts = ["the cat sat on the mat and then " * 3 + end for end in ("x", "y", "the", "x")]
    told: list[int] = []
    said = model.continued(prompts, 12, told=told.append)
    assert said == [one.text for one in model.generate(prompts, 12, chat=False)]
    assert sorted(told) == [1, 2, 3, 4]


def test_continued_ends_before_a_stop_text(model: LanguageModel) -> None:
    (whole,) = model.continued(PROMPTS[:1], 12)
    stop = whole[5:7]
    (cut,) = model.continued(PROMPTS[:1], 12, (stop,))
    assert cut == whole[: whole.index(stop)]


class Completions(BaseHTTPRequestHandler):
    """OpenAI's completions over a loaded model; `echoes` False is a server that knows no `echo`."""

    model: Any
    echoes = True
    asked: list[dict[str, Any]]

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.asked.append({**body, "path": self.path, "key": self.headers.get("authorization")})
        if body["model"] != "own":
            self._send(404, {"error": {"message": "no such model"}})
        elif body.get("echo") and self.echoes:
            self._send(200, {"choices": [self._echo(body["prompt"])]})
        else:
            with lock:
                (text,) = self.model.continued([body["prompt"]], body["max_tokens"])
            self._send(200, {"choices": [{"text": text, "logprobs": None}]})

    def _echo(self, prompt: str) -> dict[str, Any]:
        tokenizer = self.model.tokenizer
        with lock:
            ids = tokenizer.encode(prompt)
            rows = log_softmax(self.model.logits(np.array(ids, np.int32)))
        offsets = [len(tokenizer.decode(ids[:at])) for at in range(len(ids))]
        scores = [None, *(float(rows[at - 1, ids[at]]) for at in range(1, len(ids)))]
        told = {"text_offset": [*offsets, len(prompt)], "token_logprobs": [*scores, -0.5]}
        return {"text": prompt + "!", "logprobs": told}

    def _send(self, status: int, document: dict[str, Any]) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


lock = threading.Lock()


@pytest.fixture
def served(model: LanguageModel) -> Iterator[tuple[str, type[Completions]]]:
    kind = type("Own", (Completions,), {"model": model, "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", kind
        server.shutdown()


def test_a_server_answers_as_the_model_does(
    model: LanguageModel, served: tuple[str, type[Completions]]
) -> None:
    server, inside = Server(served[0], "own"), InProcess(model)
    stop = (model.continued(PROMPTS[:1], 12)[0][4:6], "zzz", "yyy", "xxx", "www")
    assert server.texts(PROMPTS, 12, stop, silent) == inside.texts(PROMPTS, 12, stop, silent)
    assert all(len(one["stop"]) == 4 and one["temperature"] == 0 for one in served[1].asked)
    found = server.likelihoods(PROMPTS, CHOICES, silent)
    np.testing.assert_allclose(
        np.array(found), np.array(inside.likelihoods(PROMPTS, CHOICES, silent)), atol=1e-3
    )


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/"])
def test_urls(served: tuple[str, type[Completions]], ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASTEN_API_KEY", "sesame")
    Server(served[0] + ending, "own").texts(PROMPTS[:1], 2, (), silent)
    assert served[1].asked[0]["path"] == "/v1/completions"
    assert served[1].asked[0]["key"] == "Bearer sesame"


def test_a_server_without_echo_gives_no_likelihoods(served: tuple[str, type[Completions]]) -> None:
    served[1].echoes = False
    assert Server(served[0], "own").likelihoods(PROMPTS, CHOICES, silent) is None
    assert len(served[1].asked) == 1


def test_servers_that_do_not_answer(served: tuple[str, type[Completions]]) -> None:
    with pytest.raises(PeerError, match=r"404.*no such model") as caught:
        Server(served[0], "other").texts(PROMPTS, 2, (), silent)
    assert "models" in (caught.value.hint or "")
    with pytest.raises(PeerError, match="gives no completion") as caught:
        Server("http://127.0.0.1:9", "own").texts(PROMPTS, 2, (), silent)
    assert "hasten serve" in (caught.value.hint or "")


class Counted:
    """A subject that notes what it is asked."""

    context = None

    def __init__(self, identity: str | None) -> None:
        self.identity = identity
        self.asked: list[Sequence[str]] = []

    def ask(self, questions: Sequence[str]) -> list[str]:
        """Of kept questions, nothing is asked again."""

        def answer(some: Sequence[str], told: Callable[[int], None]) -> list[str]:
            self.asked.append(list(some))
            return [one.upper() for one in some]

        found = kept_answers(self, ("task",), questions, answer, silent)  # type: ignore[arg-type]
        assert found is not None
        return found


def test_answers_are_computed_once(cache: Path) -> None:
    assert Counted("a").ask(["x", "y"]) == ["X", "Y"]
    again = Counted("a")
    assert again.ask(["y", "x", "z"]) == ["Y", "X", "Z"]
    assert again.asked == [["z"]]
    other, nobody = Counted("b"), Counted(None)
    other.ask(["x"])
    nobody.ask(["x"])
    nobody.ask(["x"])
    assert (other.asked, nobody.asked) == ([["x"]], [["x"], ["x"]])
    assert len(list((cache / "answers").glob("*.json"))) == 2


def test_damaged_answers_are_computed_again(cache: Path) -> None:
    Counted("a").ask(["x"])
    (kept,) = (cache / "answers").glob("*.json")
    kept.write_text(kept.read_text().replace("X", "Z"))
    again = Counted("a")
    assert again.ask(["x"]) == ["X"]
    assert again.asked == [["x"]]


def test_a_disk_that_refuses_costs_nothing_else(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.mkdir()
    (cache / "answers").write_text("a file where the folder should be")
    assert Counted("a").ask(["x"]) == ["X"]
    assert "not kept" in caplog.text


def test_the_fingerprint_names_a_model(model: LanguageModel) -> None:
    assert InProcess(model, fingerprint(model)).identity == fingerprint(model)
