"""Keys, origins, ids, clients that leave, clients that are slow, and clients that are too many."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import pytest
from running_server import Running, chat, serving, wait_for
from stand_in_engine import StandInEngine

from hasten.serve.options import ServeOptions

PATH = "/v1/chat/completions"


def post(body: bytes, path: str = PATH, extra: str = "") -> bytes:
    """A request as bytes."""
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{extra}"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def read_all(connection: socket.socket) -> bytes:
    data = b""
    while piece := connection.recv(65536):
        data += piece
    return data


@pytest.fixture(scope="module")
def strict() -> Iterator[Running]:
    """A server with keys, one web origin and tight limits."""
    options = ServeOptions(
        port=0,
        log=False,
        api_keys=("first-key", "second-key"),
        cors_origins=("https://good.example",),
        max_connections=8,
        max_body_mb=0.1,
        max_header_kb=4,
        header_timeout_s=0.4,
        body_timeout_s=0.4,
        send_timeout_s=0.4,
        keep_alive_s=1,
        max_priority=(9, 2),
    )
    with serving(options, {"echo": StandInEngine()}) as running:
        yield running


KEY = {"authorization": "Bearer second-key"}


def test_keys(strict: Running) -> None:
    for path in (PATH, "/v1/models", "/metrics", "/stats", "/tokenize", "/openapi.json"):
        reply = strict.ask(path)
        assert (reply.status, reply.error["code"]) == (401, "invalid_api_key"), path
        assert reply.headers["www-authenticate"] == "Bearer"
    for wrong in ("Bearer nope", "Bearer ", "Basic second-key", "second-key", "Bearer second-key2"):
        assert strict.ask("/v1/models", headers={"authorization": wrong}).status == 401
    assert strict.ask("/v1/models", headers=KEY).status == 200
    assert strict.ask("/v1/models", headers={"authorization": "bearer first-key"}).status == 200
    for open_to_all in ("/health", "/ready", "/"):
        assert strict.ask(open_to_all).status == 200


def test_keys_in_other_headers(strict: Running) -> None:
    for name in ("x-api-key", "api-key"):
        assert strict.ask("/v1/models", headers={name: "first-key"}).status == 200
        assert strict.ask("/v1/models", headers={name: "nope"}).status == 401
    for path in ("/v1/messages/", "//v1/chat/completions", "/models", "/infill"):
        assert strict.ask(path).status == 401, path


def test_a_key_caps_the_priority(strict: Running) -> None:
    for key, asked, given in (("first-key", 50, 9), ("second-key", 50, 2), ("second-key", -3, -3)):
        strict.ask(PATH, chat(priority=asked), headers={"x-api-key": key})
        assert strict.engine.asked[-1].priority == given


def test_clients_are_told_apart_by_key(strict: Running) -> None:
    strict.ask(PATH, chat(user="ann"), headers=KEY)
    assert strict.engine.asked[-1].client == "key-1/ann"


def test_other_origins_are_answered_only_where_allowed(strict: Running) -> None:
    ask = {"access-control-request-method": "POST", "origin": "https://good.example"}
    reply = strict.ask(PATH, method="OPTIONS", headers=ask)
    assert (reply.status, reply.headers["access-control-allow-origin"]) == (204, "https://good.example")
    assert "authorization" in reply.headers["access-control-allow-headers"]
    ask["origin"] = "https://evil.example"
    reply = strict.ask(PATH, method="OPTIONS", headers=ask)
    assert reply.status == 403
    assert "access-control-allow-origin" not in reply.headers
    reply = strict.ask(PATH, chat(), headers={**KEY, "origin": "https://good.example"})
    assert reply.headers["access-control-allow-origin"] == "https://good.example"


def test_cors_is_off_by_default(server: Running) -> None:
    reply = server.ask(PATH, chat(), headers={"origin": "https://good.example"})
    assert "access-control-allow-origin" not in reply.headers


def test_request_ids_come_and_go(server: Running) -> None:
    assert server.ask("/health", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    made = server.ask("/health", headers={"x-request-id": "bad id " * 9}).headers["x-request-id"]
    assert len(made) == 24
    server.ask(PATH, chat(), headers={"x-request-id": "same"})
    server.ask(PATH, chat(), headers={"x-request-id": "same"})
    ids = [request.id for request in server.engine.asked]
    assert len(set(ids)) == 2  # clients may repeat their ids, the engine's are unique
    assert all(name.startswith("same-") for name in ids)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_cancelled_within_a_step(server: Running, stream: bool) -> None:
    engine = server.engine
    engine.reply, engine.delay_s = "x" * 1000, 0.02
    with server.connect() as connection:
        connection.sendall(post(json.dumps(chat(stream=stream)).encode()))
        wait_for(lambda: engine.steps > 3)
        before = engine.steps
    wait_for(lambda: engine.running == 0)
    assert engine.steps - before < 5  # of 1,000
    assert engine.cancelled == [engine.asked[-1].id]


def test_a_client_that_leaves_while_it_waits_in_the_queue(server: Running) -> None:
    engine = server.engine
    engine.delay_s = 5
    with server.connect() as connection:
        connection.sendall(post(json.dumps(chat(stream=True)).encode()))
        wait_for(lambda: engine.running == 1)
    wait_for(lambda: engine.running == 0, 2)


def test_a_body_is_counted_as_it_comes(strict: Running) -> None:
    reply = strict.ask(PATH, chat("x" * 200_000), headers=KEY)
    assert (reply.status, reply.error["code"]) == (413, "body_too_large")
    with strict.connect() as connection:  # no content-length to trust
        head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\nauthorization: {KEY['authorization']}\r\n"
        connection.sendall(f"{head}transfer-encoding: chunked\r\n\r\n".encode())
        sent = 0
        with pytest.raises(OSError):
            for _ in range(200):
                connection.sendall(b"4000\r\n" + b"x" * 0x4000 + b"\r\n")
                sent += 0x4000
                time.sleep(0.005)
        assert sent < 3_000_000
    assert not [one for one in strict.engine.asked if len(one.prompt) > 100_000]


def test_a_slow_body_is_not_waited_for(strict: Running) -> None:
    with strict.connect() as connection:
        connection.sendall(post(b"{" + b" " * 100, extra=f"authorization: {KEY['authorization']}\r\n")[:-50])
        assert b" 408 " in read_all(connection)


def test_slow_headers_are_not_waited_for(strict: Running) -> None:
    with strict.connect() as silent, strict.connect() as dripping:
        dripping.sendall(b"POST / HTTP/1.1\r\nhost: x\r\n")
        assert b" 408 " in read_all(silent)
        assert b" 408 " in read_all(dripping)


@pytest.mark.parametrize(
    "flood",
    [
        b"GET / HTTP/1.1\r\n" + b"".join(b"h%d: v\r\n" % i for i in range(500)),
        b"GET / HTTP/1.1\r\nh: " + b"v" * 100_000,
        b"GET /" + b"a" * 100_000,
        b"GET / HTTP/1.1\r\n" + b"h" * 100_000,
        b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 2000 + b"\r\n",
    ],
)
def test_floods_of_headers_are_cut_off(strict: Running, flood: bytes) -> None:
    with strict.connect() as connection:
        try:
            connection.sendall(flood)
            answer = read_all(connection)
        except OSError:
            answer = b"HTTP/1.1 431 "  # closed before we had sent all of it
        assert b" 431 " in answer or b" 400 " in answer
    wait_for(lambda: strict.connections == 0)
    assert strict.ask("/health").status == 200


@pytest.mark.parametrize(
    "noise", [b"\x16\x03\x01\x02\x00", b"\r\n\r\n\r\n", b"GET\0/\0", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]
)
def test_what_is_no_http_is_closed(strict: Running, noise: bytes) -> None:
    with strict.connect() as connection:
        connection.sendall(noise)
        read_all(connection)
    assert strict.ask("/health").status == 200


def test_a_client_that_does_not_read_is_cancelled(strict: Running) -> None:
    engine = strict.engine
    engine.reply, engine.piece = "y" * 4000, 1
    body = json.dumps(chat(stream=True, n=30)).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(strict.address)
        before = len(engine.asked)
        connection.sendall(post(body, extra=f"authorization: {KEY['authorization']}\r\n"))
        wait_for(lambda: len(engine.asked) > before)
        wait_for(lambda: engine.running == 0)
        wait_for(lambda: strict.connections == 0)  # not left open behind a full buffer
    engine.reply = None


def test_a_slow_reader_that_goes_on_gets_all_of_it(strict: Running) -> None:
    """The whole answer waits in the server's buffer, longer than an idle connection is kept."""
    engine = strict.engine
    engine.reply, engine.piece = "y" * 4000, 4000
    body = json.dumps(chat(n=4, logprobs=True, top_logprobs=5)).encode()
    extra = f"authorization: {KEY['authorization']}\r\nconnection: keep-alive\r\n"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        connection.settimeout(90)
        connection.connect(strict.address)
        connection.sendall(post(body, extra=extra))
        data = connection.recv(65536)
        length = int(data.split(b"content-length: ")[1].split(b"\r\n")[0])
        left = length - len(data.split(b"\r\n\r\n", 1)[1])
        size = length // 12
        while left:
            time.sleep(0.15)
            wanted = min(left, size)
            while wanted:
                piece = connection.recv(min(wanted, 65536))
                assert piece, f"cut off with {left} of {length} bytes to come"
                wanted -= len(piece)
                left -= len(piece)
    engine.reply = None


def test_keep_alive_and_pipelining(server: Running) -> None:
    body = json.dumps(chat("a")).encode()
    with server.connect() as connection:
        connection.sendall(
            post(body) + post(body) + b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
        )
        answers = read_all(connection)
    assert answers.count(b"HTTP/1.1 200 ") == 3
