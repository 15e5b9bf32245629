"""Requests as bytes: clients that leave at once, offers to upgrade, refused bodies, strangers' pages."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

import pytest
from running_server import Running, chat, serving, wait_for
from stand_in_engine import StandInEngine

from hasten.serve.options import ServeOptions

PATH = "/v1/chat/completions"
LEAVE_AT_ONCE = 40


def request(
    body: bytes, *lines: str, path: str = PATH, kind: str = "content-type: application/json"
) -> bytes:
    head = [f"POST {path} HTTP/1.1", "host: x", *([kind] if kind else []), *lines]
    return "\r\n".join([*head, f"content-length: {len(body)}", "", ""]).encode() + body


def answers(connection: socket.socket) -> bytes:
    data = b""
    while piece := connection.recv(65536):
        data += piece
    return data


def whole(text: str = "hello", **fields: Any) -> bytes:
    return json.dumps(chat(text, **fields)).encode()


BODIES = [
    (PATH, chat("word " * 100)),
    (PATH, chat("word " * 100, stream=True)),
    ("/v1/completions", {"prompt": "word " * 100, "max_tokens": 500}),
    ("/v1/completions", {"prompt": ["word " * 100] * 3, "max_tokens": 500, "stream": True}),
    ("/v1/responses", {"input": "word " * 100}),
    ("/v1/responses", {"input": "word " * 100, "stream": True}),
    ("/v1/embeddings", {"input": ["word"] * 100}),
]


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize(("path", "body"), BODIES)
def test_a_client_that_sends_and_leaves_at_once_is_cancelled(path: str, body: Any, how: str) -> None:
    """`asyncio.wait_for` dropped the cancellation on Python 3.10 and 3.11: all were computed to the end."""
    data = request(json.dumps(body).encode(), path=path)
    with serving(engines={"echo": StandInEngine(delay_s=0.05)}) as running:
        for _ in range(LEAVE_AT_ONCE):
            connection = running.connect()
            connection.sendall(data)
            if how == "rst":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
        wait_for(lambda: running.connections == 0)
        time.sleep(0.1)
        wait_for(lambda: running.engine.running == 0, 2)
        ended = running.engine.steps
        time.sleep(0.2)
        assert running.engine.steps == ended
        assert ended < 4 * LEAVE_AT_ONCE
        assert running.ask("/health").status == 200


@pytest.mark.parametrize("later", [False, True])
def test_a_client_that_leaves_with_requests_in_line_is_cancelled(server: Running, later: bool) -> None:
    engine = server.engine
    engine.reply, engine.delay_s = "x" * 1000, 0.02
    with server.connect() as connection:
        if later:
            connection.sendall(request(whole()))
            wait_for(lambda: engine.steps > 3)
            connection.sendall(request(whole()))
            time.sleep(0.1)
        else:
            connection.sendall(request(whole()) * 3)
            wait_for(lambda: engine.steps > 3)
    wait_for(lambda: engine.running == 0, 5)
    assert engine.steps < 500
    assert len(engine.asked) == 1


GET = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.mark.parametrize(
    ("sent", "said", "answered"),
    [
        (request(whole("abc")), b'"content":"<user>abc"', 1),
        (request(whole("abc", stream=True)), b"data: [DONE]", 1),
        (request(json.dumps({"input": "abc"}).encode(), path="/v1/responses"), b"<user>abc", 1),
        (GET, b'"ok"', 1),
        (GET + request(whole("abc")) + GET, b'"content":"<user>abc"', 3),
        (request(whole("abc")).replace(b"POST", b"GET"), b"method_not_allowed", 1),
    ],
)
@pytest.mark.parametrize("delay_s", [0.0, 0.03])
def test_who_sends_no_more_is_answered(
    server: Running, sent: bytes, said: bytes, answered: int, delay_s: float
) -> None:
    """`nc -N`, `socat` and some load balancers close their sending side behind a request (half-close)."""
    server.engine.delay_s = delay_s
    with server.connect() as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        found = answers(connection)  # to the end: the server closes
    assert found.count(b"HTTP/1.1 ") - found.count(b"HTTP/1.1 100 ") == answered
    assert said in found
    assert server.engine.cancelled == []


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("after_s", [0.0, 0.3])
@pytest.mark.parametrize("how", ["fin", "rst"])
def test_who_sends_no_more_and_then_leaves_is_cancelled(
    server: Running, stream: bool, after_s: float, how: str
) -> None:
    engine = server.engine
    engine.reply, engine.delay_s = "x" * 4000, 0.02
    with server.connect() as connection:
        connection.sendall(request(whole(stream=stream)))
        connection.shutdown(socket.SHUT_WR)
        wait_for(lambda: engine.running == 1)
        time.sleep(after_s)
        assert engine.running == 1
        if how == "rst":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_for(lambda: engine.running == 0, 5)
    assert engine.steps < 400


@pytest.mark.parametrize(
    "sent",
    [request(whole())[:-5], b"GET /health HTTP/1.1\r\nhost: x\r\n", b"", GET + b"GET /he"],
    ids=["a part of a body", "a part of a head", "nothing", "a request and a part of one"],
)
def test_who_sends_no_more_of_a_request_is_left(server: Running, sent: bytes) -> None:
    with server.connect() as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        answers(connection)
    wait_for(lambda: server.connections == 0)
    assert server.engine.running == 0


def test_who_speaks_http_1_0_and_sends_no_more_is_gone(server: Running) -> None:
    """Proxies speak it, and close when their own client has left: there is no way to ask whether it has."""
    engine = server.engine
    engine.reply, engine.delay_s = "x" * 4000, 0.02
    with server.connect() as connection:
        connection.sendall(request(whole()).replace(b"HTTP/1.1", b"HTTP/1.0"))
        wait_for(lambda: engine.running == 1)
    wait_for(lambda: engine.running == 0, 2)


def test_requests_in_line_have_an_end(server: Running) -> None:
    """What is read ahead is bounded: a client cannot fill the memory with requests."""
    get = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
    with server.connect() as connection:
        connection.sendall(
            request(whole("a")) + get * 2000 + get.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")
        )
        assert answers(connection).count(b"HTTP/1.1 200") == 2002


OFFERS = [
    ("connection: Upgrade, HTTP2-Settings", "upgrade: h2c", "http2-settings: AAMAAABkAAQAAP__"),
    ("connection: keep-alive, Upgrade", "upgrade: websocket", "sec-websocket-version: 13"),
    ("Upgrade: TLS/1.0", "Connection: upgrade"),
]


@pytest.mark.parametrize("offer", OFFERS)
@pytest.mark.parametrize("split", [1, 7, 1 << 20])
def test_an_offer_to_upgrade_is_passed_over(server: Running, offer: tuple[str, ...], split: int) -> None:
    body = whole("abc")
    chunked = "\r\n".join(
        [
            f"POST {PATH} HTTP/1.1",
            "host: x",
            "content-type: application/json",
            *offer,
            "transfer-encoding: chunked",
        ]
    ).encode()
    chunked += b"\r\n\r\n" + b"".join(
        b"%x\r\n%s\r\n" % (len(body[i : i + 20]), body[i : i + 20]) for i in range(0, len(body), 20)
    )
    chunked += b"0\r\n\r\n"
    get = "\r\n".join(["GET /health HTTP/1.1", "host: x", *offer, "", ""]).encode()
    last = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    data = request(body, *offer) + chunked + get + request(body, *offer) + last
    with server.connect() as connection:
        for start in range(0, len(data), split):
            connection.sendall(data[start : start + split])
        said = answers(connection)
    assert said.count(b"HTTP/1.1 200") == 5
    assert said.count(b'"content":"<user>abc"') == 3


def test_an_offer_keeps_its_version_and_limits() -> None:
    with serving(ServeOptions(port=0, log=False, max_header_kb=2, max_body_mb=0.01)) as running:
        offer = "connection: Upgrade\r\nupgrade: h2c\r\n"
        for head, status in (
            (f"GET /health HTTP/1.0\r\n{offer}\r\n", b" 200 "),
            (
                "GET /health HTTP/1.1\r\nhost: x\r\nconnection: close, Upgrade\r\nupgrade: h2c\r\n\r\n",
                b" 200 ",
            ),
            (f"GET /health HTTP/1.1\r\nhost: x\r\n{offer}x: {'y' * 3000}\r\n\r\n", b" 431 "),
            (f"CONNECT a:80 HTTP/1.1\r\nhost: x\r\n{offer}\r\n", b" 400 "),
            ("CONNECT / HTTP/1.1\r\nhost: x\r\n\r\n", b" 400 "),
        ):
            with running.connect() as connection:
                connection.sendall(head.encode())
                assert status in answers(connection)


@pytest.fixture(scope="module")
def small() -> Iterator[Running]:
    options = ServeOptions(port=0, log=False, api_keys=("key",), max_body_mb=0.1, body_timeout_s=5)
    with serving(options) as running:
        yield running


@pytest.mark.parametrize(
    ("path", "lines", "status"),
    [
        (PATH, ("authorization: Bearer key",), 413),
        (PATH, (), 401),
        (PATH, ("authorization: Bearer key", "content-type: text/plain"), 415),
        ("/nowhere", (), 404),
        ("/health", (), 405),
    ],
)
@pytest.mark.parametrize("announced", [True, False])
def test_who_sends_a_whole_body_that_is_refused_gets_the_answer(
    small: Running, path: str, lines: tuple[str, ...], status: int, announced: bool
) -> None:
    size = 400_000
    body = b"x" * size
    head = [f"POST {path} HTTP/1.1", "host: x", "connection: close", *lines]
    with small.connect() as connection:
        if announced:
            connection.sendall("\r\n".join([*head, f"content-length: {size}", "", ""]).encode())
            for at in range(0, size, 50_000):
                connection.sendall(body[at : at + 50_000])
                time.sleep(0.005)
        else:
            connection.sendall("\r\n".join([*head, "transfer-encoding: chunked", "", ""]).encode())
            connection.sendall(b"%x\r\n%s\r\n0\r\n\r\n" % (size, body))
        said = answers(connection)
    assert f" {status} ".encode() in said.split(b"\r\n")[0]
    assert json.loads(said.split(b"\r\n\r\n", 1)[1])["error"]["message"]


def test_who_waits_to_be_asked_for_the_body_is_refused_at_once(small: Running) -> None:
    lines = ("host: x", "authorization: Bearer key", "expect: 100-continue", "content-length: 400000")
    with small.connect() as connection:
        connection.sendall("\r\n".join([f"POST {PATH} HTTP/1.1", *lines, "", ""]).encode())
        said = answers(connection)
    assert said.startswith(b"HTTP/1.1 413 ")
    assert b"100 Continue" not in said


def test_who_announces_what_is_never_taken_is_refused_at_once(small: Running) -> None:
    began = time.monotonic()
    with small.connect() as connection:
        connection.sendall(
            request(b"", "authorization: Bearer key").replace(b"length: 0", b"length: 99999999")
        )
        assert b" 413 " in connection.recv(1000)
    assert time.monotonic() - began < 2


def test_who_stops_sending_a_refused_body_is_answered(small: Running) -> None:
    with small.connect() as connection:
        connection.sendall(request(b"", "authorization: Bearer key").replace(b"length: 0", b"length: 200000"))
        assert b" 413 " in connection.recv(1000)  # after 2 s of silence, not after --body-timeout-s


def test_a_refused_body_without_end_is_not_taken_without_end(small: Running) -> None:
    sent = 0
    with small.connect() as connection:
        connection.sendall(
            request(b"", "authorization: Bearer key").replace(b"length: 0", b"length: 99999999")
        )
        with pytest.raises(OSError):
            while sent < 90_000_000:
                sent += connection.send(b"x" * 65536)
    assert sent < 20_000_000


FOREIGN = ("origin: https://evil.example", "sec-fetch-site: cross-site", "sec-fetch-mode: no-cors")


@pytest.mark.parametrize(
    ("kind", "lines", "status"),
    [
        ("", FOREIGN, 415),
        ("", ("sec-fetch-site: cross-site",), 415),
        ("content-type:", FOREIGN, 415),
        ("content-type: text/plain", ("content-type: application/json",), 415),
        ("content-type: application/json", ("content-type: text/plain",), 415),
        ("content-type: application/x-www-form-urlencoded", (), 415),
        ("", (), 200),
        ("Content-Type: Application/JSON; charset=utf-8", (), 200),
    ],
)
def test_what_a_page_may_send_unasked_is_not_computed(
    server: Running, kind: str, lines: tuple[str, ...], status: int
) -> None:
    with server.connect() as connection:
        connection.sendall(request(whole("a"), "connection: close", *lines, kind=kind))
        said = answers(connection)
    assert f" {status} ".encode() in said.split(b"\r\n")[0]
    if status == 415:
        assert b"curl: -H" in said
        assert not server.engine.asked


def status_for(running: Running, host: str, path: str = "/v1/models") -> int:
    with running.connect() as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nconnection: close\r\nhost: {host}\r\n\r\n".encode())
        return int(answers(connection).split(b" ")[1])


OWN = [
    "localhost",
    "LOCALHOST:8000",
    "127.0.0.1:8000",
    "[::1]:8000",
    "192.168.1.7",
    "a.localhost",
    "hasten:80",
    "",
]


def test_a_foreign_name_is_refused_on_an_address_of_this_machine(server: Running) -> None:
    assert {host: status_for(server, host) for host in OWN} == dict.fromkeys(OWN, 200)
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example."):
        assert status_for(server, host) == 403
        assert status_for(server, host, "/health") == 200
    reply = server.ask(PATH, chat(), headers={"host": "evil.example", "origin": "http://evil.example"})
    assert (reply.status, reply.error["code"]) == (403, "host_not_allowed")
    assert "--allowed-host evil.example" in reply.error["message"]
    assert not server.engine.asked


def test_two_hosts_are_refused(server: Running) -> None:
    assert status_for(server, "localhost\r\nhost: evil.example") == 400


@pytest.mark.parametrize(
    ("options", "good", "bad"),
    [
        ({"api_keys": ("k",)}, ["proxy.example"], []),
        ({"host": "0.0.0.0"}, ["proxy.example", "hasten.default.svc"], []),
        ({"allowed_hosts": ("*",)}, ["any.example"], []),
        ({"allowed_hosts": ("api.example",)}, ["api.example:443", "localhost", "10.0.0.1"], ["evil.example"]),
        (
            {"allowed_hosts": ("*.example",)},
            ["api.example", "a.b.example"],
            ["example.com", "evilexample.com"],
        ),
        ({"host": "0.0.0.0", "allowed_hosts": ("api.example",)}, ["api.example"], ["evil.example"]),
        ({"api_keys": ("k",), "allowed_hosts": ("api.example",)}, ["api.example"], ["evil.example"]),
    ],
)
def test_which_names_pass(options: dict[str, Any], good: list[str], bad: list[str]) -> None:
    with serving(ServeOptions(port=0, log=False, **options)) as running:
        for host in good:
            assert status_for(running, host) in (200, 401), host
        for host in bad:
            assert status_for(running, host) == 403, host
