"""`hasten serve` as a process, on a real engine: start, answers, drain, end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from running_server import Running, chat, wait_for

PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def start(tiny_folder: Callable[..., Path]) -> Iterator[Callable[..., tuple[Running, Any]]]:
    """(flags) -> a server on a tiny model, and its process."""
    processes = []

    def run(*flags: str) -> tuple[Running, Any]:
        command = [
            sys.executable,
            "-m",
            "hasten",
            "serve",
            f"tiny={tiny_folder('qwen2')}",
            "--port",
            "0",
        ]
        command += ["--threads", "1", *flags]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        processes.append(process)
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:"), process.communicate()
        return Running(url, None), process

    yield run
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def tiny(start: Callable[..., tuple[Running, Any]]) -> Running:
    return start("--max-sequences", "4", "--context", "300")[0]


def test_it_answers_as_the_library_does(tiny: Running, tiny_folder: Callable[..., Path]) -> None:
    import hasten

    reply = tiny.ask(PATH, chat("abc", temperature=0.0, max_tokens=12)).json
    model = hasten.load(tiny_folder("qwen2"))
    expected = model.generate(["abc"], max_new_tokens=12)[0]
    assert reply["choices"][0]["message"]["content"] == expected.text
    assert reply["usage"]["prompt_tokens"] == expected.prompt_tokens
    events = tiny.ask(PATH, chat("abc", temperature=0.0, max_tokens=12, stream=True)).events
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events) == expected.text


def test_the_log_says_what_was_decided_about_the_machine(start: Callable[..., tuple[Running, Any]]) -> None:
    _, process = start("--context", "256", "--max-sequences", "2")
    process.terminate()
    _, said = process.communicate(timeout=60)
    loaded = next(e for e in map(json.loads, said.splitlines()) if e["event"] == "model_loaded")
    assert (loaded["model"], loaded["threads"], loaded["context"]) == ("tiny", 1, 256)
    assert loaded["kv_cache"] == "512 tokens in at most 0.00 GB (2 sequences of 256 tokens)"


def test_embeddings_are_the_models_hidden_states(tiny: Running, tiny_folder: Callable[..., Path]) -> None:
    import numpy as np

    import hasten

    model = hasten.load(tiny_folder("qwen2"))
    hidden = model.hidden(model.tokenizer.encode("hello there"))
    for pooling, expected in (("mean", hidden.mean(axis=0)), ("last", hidden[-1])):
        entry = tiny.ask("/v1/embeddings", {"input": "hello there", "pooling": pooling}).json["data"][0]
        np.testing.assert_allclose(entry["embedding"], expected / np.linalg.norm(expected), atol=2e-3)


def test_clients_that_come_and_go_leave_no_pages(tiny: Running) -> None:
    def stats() -> dict[str, Any]:
        return tiny.ask("/stats").json["models"]["tiny"]

    def leave() -> None:
        body = json.dumps(chat("abc", max_tokens=250, ignore_eos=True, stream=True)).encode()
        with tiny.connect() as connection:
            head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            connection.recv(100)

    threads = [threading.Thread(target=leave) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_for(lambda: stats()["running"] == stats()["waiting"] == 0)
    now = stats()
    assert now["cancelled"] >= 8
    assert now["kv_pages_used"] == now["kv_pages_cached"]


def test_an_answer_longer_than_the_context_ends_with_length(tiny: Running) -> None:
    reply = tiny.ask(PATH, chat("abc", ignore_eos=True, n=2)).json
    assert {choice["finish_reason"] for choice in reply["choices"]} == {"length"}
    assert reply["usage"]["completion_tokens"] == 2 * (300 - reply["usage"]["prompt_tokens"])


def test_sigterm_lets_answers_finish(start: Callable[..., tuple[Running, Any]]) -> None:
    server, process = start()
    replies: list[Any] = []
    body = chat("abc", max_tokens=300, ignore_eos=True, stream=True)
    client = threading.Thread(target=lambda: replies.append(server.ask(PATH, body)))
    client.start()
    wait_for(lambda: server.ask("/stats").json["models"]["tiny"]["running"] == 1)
    process.send_signal(signal.SIGTERM)
    client.join(90)
    assert replies[0].body.endswith(b"data: [DONE]\n\n")
    assert process.wait(60) == 0
    lines = [json.loads(line) for line in process.stderr.read().splitlines()]
    assert [line["event"] for line in lines if line["event"] != "request"] == [
        "model_loaded",
        "ready",
        "draining",
        "stopped",
    ]
    logged = next(line for line in lines if line.get("output_tokens"))
    assert logged["output_tokens"] == 300
    assert logged["model"] == "tiny"
    with pytest.raises(OSError):
        socket.create_connection(server.address, 1)


def test_requests_are_recorded(start: Callable[..., tuple[Running, Any]], tmp_path: Path) -> None:
    from hasten.engine.trace import read_trace

    trace = tmp_path / "trace.jsonl"
    server, process = start("--record", str(trace))
    server.ask(PATH, chat("secret", n=2, max_tokens=5, ignore_eos=True))
    server.ask(PATH, chat("secret words", stream=True, max_tokens=7, ignore_eos=True))
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    first, second = read_trace(trace).requests
    assert [len(output) for output in first.outputs] == [5, 5]
    assert [len(output) for output in second.outputs] == [7]
    assert "secret" not in trace.read_text()


def test_drain_has_an_end(start: Callable[..., tuple[Running, Any]]) -> None:
    server, process = start("--drain-s", "1", "--context", "1024", "--no-log")
    statuses: list[int] = []

    def ask_on() -> None:  # 8 long answers one after another on one connection each
        for _ in range(8):
            try:
                statuses.append(server.ask(PATH, chat("abc", n=100, ignore_eos=True)).status)
            except OSError:
                return

    clients = [threading.Thread(target=ask_on) for _ in range(3)]
    for client in clients:
        client.start()
    wait_for(lambda: server.ask("/stats").json["models"]["tiny"]["running"] > 0)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    for client in clients:
        client.join(60)


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        ([], 2, "no model is named"),
        (["nosuch.hasten"], 1, "no artifact"),
        (["demo", "--port", "70000"], 2, "--port must be"),
        (["demo", "--host", "256.1.1.1"], 2, "cannot listen"),
        (["demo", "--pooling", "max"], 2, "pooling"),
        (["x=demo", "x=demo2"], 2, "two models"),
    ],
)
def test_mistakes_are_told_with_a_hint(flags: list[str], code: int, said: str, capsys: Any) -> None:
    from hasten.cli import main

    assert main(["serve", *flags]) == code
    error = capsys.readouterr().err
    assert said in error
    assert "hint:" in error
    assert "Traceback" not in error


def test_a_taken_port_is_told(capsys: Any) -> None:
    from hasten.cli import main

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["serve", "demo", "--port", str(taken.getsockname()[1])]) == 2
    assert "Address already in use" in capsys.readouterr().err


def test_a_missing_package_is_told(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.cli import main

    monkeypatch.setitem(sys.modules, "hasten.serve.app", None)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "nosuch.gguf", "--port", "0"]) == 1
    error = capsys.readouterr().err
    assert "uvicorn" in error
    assert "pip install 'hasten[serve]'" in error
