"""From the start of the process to its first model: what HTTP says meanwhile, and signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running_server import Running, chat, wait_for
from stand_in_engine import StandInEngine, StandInModel

from hasten.errors import ModelError
from hasten.serve.options import ServeOptions
from hasten.serve.server import ServeSetup, made, url_of

WAITS = """
import signal, sys, time
signal.signal(signal.SIGINT, {handler})  # whoever runs the tests may ignore it, or not
import hasten.cli.serve as verb
from hasten.serve.server import ServeSetup
from hasten.cli import main
verb._prepared = lambda refs, recipe: (refs, None)
def load(self, ref):
    print("loading", flush=True)
    while True:
        time.sleep(0.01)
ServeSetup.load = load
sys.argv = ["hasten", "serve", "a", "--port", "0"]
sys.exit(main())
"""


@pytest.fixture
def loading() -> Any:
    """A server whose model comes, or fails to, when it is told to."""
    go, failure = threading.Event(), []
    engine = StandInEngine()

    def load(ref: str) -> Any:
        go.wait(30)
        if failure:
            raise failure[0]
        return StandInModel(ref), engine

    said: list[str] = []
    server, listener = made(ServeSetup({"echo": "echo"}, ServeOptions(port=0, log=False)), said.append, load)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield Running(url_of(listener), server, {"echo": engine}), go, failure, said, thread
    finally:
        go.set()
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def test_http_is_answered_while_the_model_loads(loading: Any) -> None:
    running, go, _, said, _ = loading
    for path in ("/health", "/ready"):
        reply = running.ask(path)
        assert (reply.status, reply.json) == (503, {"status": "loading"})
    for path in ("/v1/models", "/v1/models/echo"):  # what many ask to see whether a server is ready
        reply = running.ask(path)
        assert (reply.status, reply.error["code"]) == (503, "loading")
    assert said == []
    replies: list[Any] = []
    asker = threading.Thread(target=lambda: replies.append(running.ask("/v1/chat/completions", chat("abc"))))
    asker.start()
    time.sleep(0.1)
    assert asker.is_alive()
    go.set()
    asker.join(20)
    assert replies[0].status == 200
    assert said == [running.url]
    assert (running.ask("/health").status, running.ask("/ready").status) == (200, 200)


def test_a_model_that_cannot_be_loaded_ends_the_server(loading: Any) -> None:
    running, go, failure, said, thread = loading
    failure.append(ModelError("no weights", hint="get some"))
    go.set()
    thread.join(20)
    assert not thread.is_alive()
    assert running.server.failure is failure[0]
    assert said == []


def test_a_server_that_is_stopped_while_it_loads_ends_at_once(loading: Any) -> None:
    running, go, _, _, thread = loading
    asker = threading.Thread(target=lambda: running.ask("/v1/chat/completions", chat("abc")), daemon=True)
    asker.start()
    time.sleep(0.1)
    running.server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()
    assert not running.server.loaded
    go.set()


def waiting(handler: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS.format(handler=handler)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "loading\n"
    return process


@pytest.mark.parametrize(
    ("signals", "code"),
    [
        ([signal.SIGINT], 130),
        ([signal.SIGINT, signal.SIGINT], 130),
        ([signal.SIGINT, signal.SIGINT, signal.SIGINT, signal.SIGTERM], 130),
        ([signal.SIGTERM], 0),
        ([signal.SIGTERM, signal.SIGTERM], 0),
    ],
)
@pytest.mark.parametrize("after_s", [0.0, 0.2, pytest.param(1.0, marks=pytest.mark.slow)])
def test_signals_while_the_model_loads(signals: list[int], code: int, after_s: float) -> None:
    with waiting("signal.default_int_handler") as process:
        time.sleep(after_s)
        for number in signals:
            process.send_signal(number)
            time.sleep(0.02)
        _, said = process.communicate(timeout=30)
    assert process.returncode == code, said
    assert "stopped" in said
    assert "Traceback" not in said


def test_sigint_that_is_ignored_at_the_start_stays_ignored() -> None:
    """A server in the background of a script must not end by the script's Ctrl-C."""
    with waiting("signal.SIG_IGN") as process:
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        process.terminate()
        assert process.wait(30) == 0


@pytest.mark.parametrize("after_s", [0.0, 0.1, 0.3, 0.6])
def test_sigterm_at_any_time_of_the_start(tiny_folder: Callable[..., Path], after_s: float) -> None:
    command = [sys.executable, "-m", "hasten", "serve", str(tiny_folder("qwen2")), "--port", "0", "--no-log"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
    ) as process:
        wait_for(lambda: catches(process.pid, signal.SIGTERM))  # 50 ms: nothing can be done before
        time.sleep(after_s)
        process.terminate()
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said


def catches(pid: int, number: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(mask, 16) >> (number - 1) & 1)
