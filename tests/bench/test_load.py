"""The load generator against a server that a test writes itself, byte by byte."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from chat_workloads import Conversation, SharedChats
from hasten.bench.figures import Answer
from hasten.bench.load import (
    Address,
    Asked,
    Call,
    Event,
    HttpAnswer,
    figures,
    read_answer,
    run_calls,
    run_open,
    send_now,
)
from hasten.bench.peers import EngineSpec, ours
from hasten.bench.process import ServerProcess, free_port
from hasten.bench.workload import Lengths, Traffic
from hasten.errors import PeerError
from server_process import server_command

EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"

Script = Callable[[bytes], Sequence[bytes]]
"""A request -> the pieces of the answer, 10 ms apart."""


@contextlib.contextmanager
def serving(script: Script) -> Iterator[Address]:
    """A server that answers every connection by its script and then closes it."""
    loop = asyncio.new_event_loop()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            (int(x.split(b":")[1]) for x in head.split(b"\r\n") if x.lower().startswith(b"content-length")), 0
        )
        with contextlib.suppress(OSError):  # a client that hung up
            for piece in script(head + await reader.readexactly(length)):
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.01)
        writer.close()

    server = loop.run_until_complete(asyncio.start_server(handle, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield Address("127.0.0.1", server.sockets[0].getsockname()[1])
    finally:
        server.close()
        asyncio.run_coroutine_threadsafe(_handled(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _handled() -> None:
    """Wait until every answer of this loop is written."""
    await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()})


def chunked(*parts: bytes) -> list[bytes]:
    """Parts of a body, each in a chunk of its own, and the end."""
    return [b"%x\r\n%s\r\n" % (len(part), part) for part in parts] + [b"0\r\n\r\n"]


def event(text: str | None = None, **more: object) -> bytes:
    """A chat completion chunk."""
    choice = {"index": 0, "delta": {"content": text} if text else {"role": "assistant", "content": ""}}
    return b"data: " + json.dumps({"choices": [{**choice, **more}]}).encode() + b"\n\n"


def test_a_stream_is_read_and_timed_whatever_pieces_it_comes_in() -> None:
    asked: list[bytes] = []

    def script(request: bytes) -> list[bytes]:
        asked.append(request)
        body = event() + event("Hello") + event(" you") + event(None, finish_reason="stop")
        body += b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3}}\n\ndata: [DONE]\n\n'
        return [EVENTS, *chunked(body[:50], body[50:90], body[90:151], body[151:])]

    with serving(script) as address:
        [answer] = run_calls(address, [Call({"messages": [], "max_tokens": 9})])
    assert answer.text == "Hello you"
    assert (answer.output_tokens, answer.prompt_tokens, answer.finish_reason) == (3, 7, "stop")
    assert answer.error == ""
    assert answer.first_s is not None
    assert 0.01 < answer.first_s <= answer.last_s
    assert json.loads(asked[0].partition(b"\r\n\r\n")[2])["stream"] is True


def test_one_bad_answer_does_not_end_the_others() -> None:
    def script(request: bytes) -> list[bytes]:
        match json.loads(request.partition(b"\r\n\r\n")[2])["kind"]:
            case "good":
                return [EVENTS, *chunked(event("x"), event(None, finish_reason="length"))]
            case "refused":
                return [b"HTTP/1.1 429 Too Many\r\nContent-Length: 4\r\n\r\nfull"]
            case "cut":
                return [EVENTS, chunked(event("x"))[0]]
            case "silent":
                return [EVENTS, *chunked(event("x"))]
            case "fault":
                return [EVENTS, *chunked(event("x"), b'data: {"error": {"message": "broken"}}\n\n')]
        return [b"SMTP ready\r\n"]

    kinds = ["good", "refused", "cut", "silent", "fault", "other"]
    with serving(script) as address:
        answers = run_calls(address, [Call({"kind": kind, "max_tokens": 5}) for kind in kinds])
    errors = dict(zip(kinds, (answer.error for answer in answers), strict=True))
    assert errors["good"] == ""
    assert answers[0].output_tokens == 5  # it ended by length and there was no usage
    assert "429" in errors["refused"]
    assert "full" in errors["refused"]
    assert "closed in the middle" in errors["cut"]
    assert "finish reason" in errors["silent"]
    assert "broken" in errors["fault"]
    assert "not HTTP" in errors["other"]
    assert figures(answers).failed == 5


def test_a_client_hangs_up_after_the_events_it_wants() -> None:
    pieces = [EVENTS, *chunked(*(event(str(number)) for number in range(200)))]
    with serving(lambda _: pieces) as address:
        [answer] = run_calls(address, [Call({"max_tokens": 9}, stop_after=3)])
    assert answer.text.startswith("012")
    assert len(answer.text) < 10
    assert answer.error == ""


def test_no_more_clients_than_asked_are_let_loose() -> None:
    open_now, most = 0, 0
    lock = threading.Lock()

    def script(_: bytes) -> Iterator[bytes]:
        nonlocal open_now, most
        with lock:
            open_now += 1
            most = max(most, open_now)
        yield EVENTS
        yield from chunked(event("x", finish_reason="stop"))[:1]
        with lock:
            open_now -= 1
        yield b"0\r\n\r\n"

    with serving(script) as address:  # type: ignore[arg-type]
        answers = run_calls(address, [Call({})] * 9, concurrency=3)
    assert [answer.error for answer in answers] == [""] * 9
    assert most == 3


def test_figures_are_those_of_all_clients_together() -> None:
    answers = [
        Answer(0.1, 1.1, 11, finish_reason="length", sent_s=100.0),
        Answer(0.3, 2.0, 18, finish_reason="length", sent_s=100.5),
    ]
    one = figures(answers)
    assert one.wall_s == pytest.approx(2.5)  # 100.0 to 102.5
    assert one.tok_per_s == pytest.approx(29 / 2.5)
    assert one.ttft_p50_ms == pytest.approx(200)
    assert one.ttft_p95_ms == pytest.approx(290)
    assert one.tpot_p50_ms == pytest.approx(100)
    with pytest.raises(PeerError, match="no answer"):
        figures([])


def test_tokens_without_usage_are_counted_by_events() -> None:
    data = [event("a"), event("b"), event(None, finish_reason="stop")]
    stream = tuple(Event(1.0 + i, one[6:].strip()) for i, one in enumerate(data))
    answer = read_answer(HttpAnswer(200, {}, 0.5, 9.0, stream), {"max_tokens": 64})
    assert answer.output_tokens == 2
    assert (answer.first_s, answer.last_s) == (0.5, 1.5)


def test_a_plain_answer_is_json_or_says_so() -> None:
    with serving(lambda _: [b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n", b'{"a": 1}']) as address:
        assert send_now(address, "GET", "/").json() == {"a": 1}
    with serving(lambda _: [b"HTTP/1.1 500 Oh\r\n\r\n<html>"]) as address:
        answer = send_now(address, "GET", "/")
    assert (answer.status, answer.body) == (500, b"<html>")
    with pytest.raises(PeerError, match="not JSON"):
        answer.json()
    with pytest.raises(PeerError, match="Connect"):
        send_now(Address("127.0.0.1", free_port()), "GET", "/")


def test_a_server_that_dies_says_its_last_words() -> None:
    address = Address("127.0.0.1", free_port())
    command = ["sh", "-c", "echo no model here >&2; exit 3"]
    with (
        ServerProcess("fake", command, address) as server,
        pytest.raises(PeerError, match=r"code 3[\s\S]*no model here"),
    ):
        server.wait_ready(20.0)
    with pytest.raises(PeerError, match="cannot start"):
        ServerProcess("fake", ["/no/such/program"], address)


class WordTokenizer:
    """One token a word; a message costs three more."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        self.words += sorted(set(text.split()) - set(self.words))
        places = {word: place for place, word in enumerate(self.words)}
        return [places[word] for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(self.words[token] for token in ids)

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        return [t for m in messages for t in [0, 0, 0, *self.encode(m["content"])]]


def test_rounds_are_cold_then_warm() -> None:
    chats = SharedChats(WordTokenizer(), clients=4, system_tokens=100)
    cold, warm, next_cold = (chats.round(number) for number in range(3))
    systems = [{chat[0]["content"] for chat in one} for one in (cold, warm, next_cold)]
    assert systems[0] == systems[1]
    assert len(systems[0] | systems[2]) == 2
    questions = [chat[1]["content"] for one in (cold, warm) for chat in one]
    assert len(set(questions)) == 8
    assert 98 <= len(chats.tokenizer.encode(systems[0].pop())) <= 102


def test_a_conversation_reaches_its_length_in_its_last_turn() -> None:
    plan = Conversation(WordTokenizer(), tokens=1000, turns=4, answer_tokens=50)
    messages = [plan.opening(3)]
    for turn in range(2, 5):
        messages += [{"role": "assistant", "content": "word " * 50}, plan.question(turn)]
    assert 900 <= len(plan.tokenizer.encode_chat(messages)) <= 1000
    assert plan.opening(3) != plan.opening(4)


def test_the_peers_server_gets_its_settings() -> None:
    spec = EngineSpec("llama.cpp:q4_0", "", "q4_0", "", "", threads=4, context=512)
    command = server_command("/opt/python", spec, "/A/Model.gguf", Address("127.0.0.1", 81), 2)
    assert command[:3] == ["/opt/python", "-m", "llama_cpp.server"]
    flags = dict(zip(command[3::2], command[4::2], strict=True))
    assert flags["--model"] == "/A/Model.gguf"
    assert (flags["--n_threads"], flags["--n_threads_batch"], flags["--n_ctx"]) == ("2", "4", "512")
    assert flags["--interrupt_requests"] == "false"  # or a new request would end the one before


def test_our_engine_answers_chats_in_a_worker(tiny_folder: Callable[..., Path]) -> None:
    spec = EngineSpec(
        "engine", "", "prefix_cache=on,speculate=off", "", "", threads=1, context=256, chats=True
    )
    engine = ours.load(spec, str(tiny_folder("llama")))
    prompts = [[5, 6, 7] * 30, [9] * 40]
    first, second = engine.chats(prompts, 8), engine.chats(prompts, 8)
    engine.close()
    assert [answer.output_tokens for answer in first] == [8, 8]
    assert [answer.prompt_tokens for answer in first] == [90, 40]
    assert all(0 < (answer.first_s or 0) <= answer.last_s for answer in first)
    assert [answer.cached_tokens for answer in second] > [0, 0]


SMALL = Traffic("small", "", Lengths(3, 3, 3), Lengths(4, 4, 4), shared=2)


def opened(script: Script, asked: Asked) -> tuple[dict[str, object], list[dict[str, object]]]:
    """The record of an open load on a scripted server, and the bodies that it was sent."""
    bodies: list[dict[str, object]] = []

    def answer(request: bytes) -> Sequence[bytes]:
        if request.startswith(b"GET /v1/models"):
            body = b'{"data": [{"id": "letters"}]}'
            return [b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)]
        bodies.append(json.loads(request.partition(b"\r\n\r\n")[2]))
        return script(request)

    with serving(answer) as address:
        return run_open(address, asked, range(100)), bodies


def whole(request: bytes) -> list[bytes]:
    """An answer of four tokens, three of whose prompt were cached."""
    usage = {"prompt_tokens": 5, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 3}}
    last = b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n"
    return [EVENTS, *chunked(event("a"), event("bcd"), event(None, finish_reason="length") + last)]


def test_an_open_load_does_not_wait_for_answers() -> None:
    """Thirty requests of 40 ms come within some 60 ms: a client that waited would take more than a second."""
    load, bodies = opened(whole, Asked(SMALL, rate=500.0, count=30, seed=1))
    rows = load["requests"]
    assert isinstance(rows, list)
    assert [row["at_s"] for row in rows] == sorted(row["at_s"] for row in rows)
    assert max(row["at_s"] for row in rows) < 0.5
    assert load["wall_s"] < 1.0
    assert load["goodput"] == 1.0
    assert load["cached"] == pytest.approx(3 / 5)
    assert len(bodies) == 32  # two come first and are not counted
    asked = [tuple(body["prompt"]) for body in bodies[2:]]
    assert len(set(asked)) == 30
    assert {len(prompt) for prompt in asked} == {5}
    assert {prompt[:2] for prompt in asked} == {(0, 1)}
    assert {body["model"] for body in bodies} == {"letters"}
    assert "deadline_ms" not in bodies[0]
    again, _ = opened(whole, Asked(SMALL, rate=500.0, count=30, seed=1))
    assert [row["at_s"] for row in again["requests"]] == [row["at_s"] for row in rows]


def test_an_open_load_tells_met_late_refused_and_failed_apart() -> None:
    strict = Traffic("strict", "", Lengths(3, 3, 3), Lengths(4, 4, 4), deadline_ms=1500.0)
    number = iter(range(100))

    def script(request: bytes) -> Iterator[bytes]:
        match next(number) - 2:
            case 0:
                yield b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nlate"
            case 1:
                yield b"HTTP/1.1 500 Oh\r\nContent-Length: 2\r\n\r\nno"
            case 2:
                slowly = [b": wait\n\n"] * 170  # 10 ms apart
                yield from [EVENTS, *chunked(*slowly, event("a"), event(None, finish_reason="length"))]
            case 3:
                fault = (
                    b'data: {"error": {"message": "the deadline passed", "code": "deadline_exceeded"}}\n\n'
                )
                yield from [EVENTS, *chunked(event("a"), fault)]
            case _:
                yield from whole(request)

    load, bodies = opened(script, Asked(strict, rate=20.0, count=8, seed=2))  # type: ignore[arg-type]
    shares = {key: load[key] for key in ("goodput", "late", "refused", "failed")}
    assert shares == pytest.approx({"goodput": 0.5, "late": 0.25, "refused": 0.125, "failed": 0.125})
    assert {body["deadline_ms"] for body in bodies} == {1500.0}
    rows = load["requests"]
    assert rows[0]["refused_after_ms"] < 1500
    assert rows[2]["latency_ms"] > 1500
    assert rows[1]["error"].startswith("status 500")


def test_a_server_that_names_no_model_is_no_server_to_load() -> None:
    with (
        serving(lambda _: [b"HTTP/1.1 404 No\r\nContent-Length: 2\r\n\r\n{}"]) as address,
        pytest.raises(PeerError, match="names no model"),
    ):
        run_open(address, Asked(SMALL, 10.0, 2), range(100))
