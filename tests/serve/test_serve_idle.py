"""Connections that wait for nothing make room for who has something to ask."""

from __future__ import annotations

import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from running_server import Running, chat, serving, wait_for

from hasten.errors import UsageError
from hasten.serve.http_server import Waiting
from hasten.serve.options import ServeOptions
from hasten.serve.server import allow_files

MOST = 8
GET = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.fixture(scope="module")
def full() -> Iterator[Running]:
    """A server of few connections."""
    options = ServeOptions(port=0, log=False, max_connections=MOST, header_timeout_s=60, body_timeout_s=60)
    with serving(options) as running:
        yield running


@pytest.fixture
def server(full: Running) -> Iterator[Running]:
    full.engine.__init__()
    yield full
    wait_for(lambda: full.connections == 0)


def asked(server: Running, path: str = "/health") -> socket.socket:
    """A connection that has been answered once and is kept."""
    connection = server.connect()
    connection.sendall(GET.replace(b"/health", path.encode()))
    assert connection.recv(4096).startswith(b"HTTP/1.1 200")
    return connection


def is_open(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(4096, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True
    finally:
        connection.setblocking(True)


@pytest.mark.parametrize("kept_alive", [False, True])
def test_many_idle_connections_keep_nobody_off(server: Running, kept_alive: bool) -> None:
    idle = [asked(server) if kept_alive else server.connect() for _ in range(5 * MOST)]
    for number in range(3 * MOST):
        assert server.ask("/v1/chat/completions", chat(f"{number}")).status == 200
    wait_for(lambda: sum(map(is_open, idle)) <= MOST)
    assert server.connections <= MOST
    for one in idle:
        one.close()


def test_the_longest_idle_one_leaves_first(server: Running) -> None:
    first, *others = [asked(server) for _ in range(MOST)]
    first.sendall(GET)  # now it has waited the shortest
    assert first.recv(4096).startswith(b"HTTP/1.1 200")
    extra = [asked(server) for _ in range(MOST - 2)]
    wait_for(lambda: not any(map(is_open, others[: MOST - 2])))
    assert is_open(first) and is_open(others[-1])
    for one in (first, *others, *extra):
        one.close()


def test_who_is_being_answered_stays(server: Running) -> None:
    engine = server.engine
    engine.reply, engine.delay_s = "x" * 100, 0.01
    busy = []
    for number in range(MOST):
        busy.append(server.connect())
        body = b'{"messages":[{"role":"user","content":"%d"}]}' % number
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        busy[-1].sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
    wait_for(lambda: engine.running == MOST)
    refused = server.ask("/health")
    assert (refused.status, refused.error["code"]) == (503, "too_many_connections")
    for one in busy:
        assert one.recv(4096).startswith(b"HTTP/1.1 200")
        one.close()


@pytest.mark.parametrize(
    "begun", [GET[:9], b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{"]
)
def test_who_is_slow_to_ask_is_told(server: Running, begun: bytes) -> None:
    """A request that never ends counts as idle: its client hears why it is left."""
    slow = [server.connect() for _ in range(MOST)]
    for one in slow:
        one.sendall(begun)
    time.sleep(0.1)
    assert server.ask("/health").status == 200
    assert slow[0].recv(4096).startswith(b"HTTP/1.1 503")
    for one in slow:
        one.close()


class Connection:
    def __init__(self, network: str) -> None:
        self.network = network


def test_an_address_with_many_connections_makes_room_for_others() -> None:
    waiting = Waiting()
    alone = Connection("10.0.0.1")
    many = [Connection("10.0.0.2") for _ in range(5)]
    for one in (alone, *many):
        waiting.add(one)  # type: ignore[arg-type]
    for one in many:
        assert waiting.longest() is (one if one is not many[-1] else alone)
        waiting.discard(waiting.longest())  # type: ignore[arg-type]
    assert waiting.longest() is many[-1]
    waiting.discard(many[-1])  # type: ignore[arg-type]
    assert waiting.longest() is None


@pytest.mark.parametrize(
    ("files", "asked", "allowed"), [(300, None, 150), (1024, None, 768), (6000, None, 4096), (300, 20, 20)]
)
def test_where_few_files_may_be_open_there_are_fewer_connections(
    files: int, asked: int | None, allowed: int
) -> None:
    """Containers often allow 1,024: a server must start there without a flag."""
    program = (
        f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({files}, {files}))\n"
        f"from hasten.serve.server import allow_files; print(allow_files({asked}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(allowed), done.stderr


def test_more_connections_than_files_are_refused_by_the_flag() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard == resource.RLIM_INFINITY:
        pytest.skip("files without end")
    with pytest.raises(UsageError, match="--max-connections"):
        allow_files(hard)
