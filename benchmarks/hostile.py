"""Hostile requests against `hasten serve`: how long others wait meanwhile, and what is computed for nobody.

    python benchmarks/hostile.py                      # the demo model, packed as w4
    python benchmarks/hostile.py --artifact w4.hasten

While each body is answered, one client asks /health again and again and another reads a running stream; the
longest wait between two of its answers, and the longest silence of the stream beyond its usual one, are
compared with a bar. A chat makes a stream wait for its prompt: bodies that are answered are compared with the
same chat without what is hostile in it. Then 500 clients send a chat and reset their connection at once: what
still runs a second later must be nothing, and the next client must be answered.

Writes benchmarks/results/hostile.json. Exit code 1: a bar was missed.
"""

from __future__ import annotations

import argparse
import http.client
import json
import socket
import struct
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bar import Bar, Settings, record, say
from hasten.bench.load import Address
from hasten.bench.process import ServerProcess, free_port
from hasten.errors import HastenError

CHAT = "/v1/chat/completions"
SMALL_S, LARGE_S = 0.05, 0.2  # the bars: of bodies of 100 KB, and of 15 MB
RESETS = 500
JSON = {"content-type": "application/json"}
SHORT = {"max_tokens": 1}
PLAIN_CHATS = 5  # asked to see how long a stream waits for an ordinary one
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Count from one to a thousand."}]}


@dataclass(frozen=True)
class Attack:
    """A body that has stopped a server, and the longest pause that others may see."""

    name: str
    path: str
    body: bytes
    limit_s: float
    is_answered: bool = False  # it is a chat as well


def attacks() -> list[Attack]:
    """Wrong values by the thousand in 100 KB, values by the million and texts of 15 MB."""

    def of(name: str, path: str, body: Any, limit_s: float, is_answered: bool = False) -> Attack:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return Attack(name, path, data, limit_s, is_answered)

    many, text = 20_000, "a" * 15_000_000
    found = [
        of(f"{many} wrong ids", "/detokenize", {"tokens": [-1] * many}, SMALL_S),
        of("5,000 wrong messages", CHAT, {"messages": [{"role": 5}] * 5000}, SMALL_S),
        of(
            "10,000 unknown fields",
            CHAT,
            {**HELLO, **SHORT, **{f"x{i}": 1 for i in range(10_000)}},
            SMALL_S,
            True,
        ),
        of(
            "10,000 wrong biases",
            CHAT,
            {**HELLO, "logit_bias": {str(i): "x" for i in range(10_000)}},
            SMALL_S,
        ),
        of("4,000 wrong items", "/v1/responses", {"input": [{"role": 5}] * 4000}, SMALL_S),
        of("half a million wrong ids", "/detokenize", {"tokens": [-1] * 499_990}, LARGE_S),
        of("5 million wrong ids", "/detokenize", b'{"tokens":[' + b"-1," * 5_000_000 + b"1]}", LARGE_S),
        of(
            "99,000 unknown fields",
            CHAT,
            {**HELLO, **SHORT, **{f"x{i}": 1 for i in range(99_000)}},
            LARGE_S,
            True,
        ),
        of("5 million lists", CHAT, b'{"x":[' + b"[]," * 5_000_000 + b"1]}", LARGE_S),
        of("half a million ids to decode", "/detokenize", {"tokens": [1000] * 499_990}, LARGE_S),
        of("1 MB to /tokenize", "/tokenize", {"prompt": "one more word " * 70_000}, LARGE_S),
    ]
    for kind, long in (("letters", text), ("blanks", " " * len(text))):
        found += [
            of(f"15 MB of {kind} to /tokenize", "/tokenize", {"prompt": long}, LARGE_S),
            of(f"15 MB of {kind} to completions", "/v1/completions", {"prompt": long}, LARGE_S),
            of(f"15 MB of {kind} to chat", CHAT, {"messages": [{"role": "user", "content": long}]}, LARGE_S),
            of(f"15 MB of {kind} to embeddings", "/v1/embeddings", {"input": long}, LARGE_S),
            of(f"15 MB of {kind} to responses", "/v1/responses", {"input": long}, LARGE_S),
        ]
    return found


class Watcher:
    """Two clients who notice when nobody is answered: one asks /health, one reads a stream."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._end = threading.Event()
        self.health_s = 0.0
        self.stream_s = 0.0
        self._threads = [threading.Thread(target=one, daemon=True) for one in (self._ask, self._read)]
        for thread in self._threads:
            thread.start()

    def reset(self) -> None:
        """Forget the pauses seen so far."""
        self.health_s = self.stream_s = 0.0

    def stop(self) -> None:
        """Leave."""
        self._end.set()
        for thread in self._threads:
            thread.join(30)

    def _ask(self) -> None:
        line = connection(self._address)
        while not self._end.is_set():
            began = time.perf_counter()
            line.request("GET", "/health")
            line.getresponse().read()
            self.health_s = max(self.health_s, time.perf_counter() - began)
            time.sleep(0.002)

    def _read(self) -> None:
        body = json.dumps({**HELLO, "stream": True, "ignore_eos": True, "max_tokens": 2000, "temperature": 0})
        while not self._end.is_set():
            line = connection(self._address)
            line.request("POST", CHAT, body, JSON)
            answer = line.getresponse()
            answer.readline()
            before = time.perf_counter()
            while answer.readline() and not self._end.is_set():
                now = time.perf_counter()
                self.stream_s, before = max(self.stream_s, now - before), now
            answer.close()
            line.close()


def connection(address: Address) -> http.client.HTTPConnection:
    """A new one."""
    return http.client.HTTPConnection(address.host, address.port, timeout=120)


def ask(address: Address, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    """Status and body of one request."""
    line = connection(address)
    try:
        line.request(method, path, body, JSON)
        answer = line.getresponse()
        return answer.status, answer.read()
    finally:
        line.close()


def pauses(address: Address) -> tuple[list[Bar], list[dict[str, Any]]]:
    """Each attack under the eyes of the watchers."""
    watcher = Watcher(address)
    time.sleep(2)
    watcher.reset()
    time.sleep(3)
    quiet_s = watcher.stream_s  # a step of the engine
    for _ in range(PLAIN_CHATS):
        ask(address, "POST", CHAT, json.dumps({**HELLO, **SHORT}).encode())
        time.sleep(0.2)
    chat_s = watcher.stream_s
    bars, details = [], []
    for attack in attacks():
        watcher.reset()
        began = time.perf_counter()
        status, said = ask(address, "POST", attack.path, attack.body)
        took = time.perf_counter() - began
        time.sleep(0.2)
        bars.append(Bar(f"{attack.name}: /health", watcher.health_s, attack.limit_s, "s", at_least=False))
        stream_s = max(0.0, watcher.stream_s - (chat_s if attack.is_answered else quiet_s))
        bars.append(Bar(f"{attack.name}: a stream", stream_s, attack.limit_s, "s", at_least=False))
        known = status in (200, 400)
        bars.append(Bar(f"{attack.name}: 200 or 400", float(known), 1.0, ""))
        details.append({"name": attack.name, "bytes": len(attack.body), "status": status, "seconds": took})
        details[-1]["said"] = said[:160].decode("utf-8", "replace")
    watcher.stop()
    return bars, [{"quiet_stream_pause_s": quiet_s, "chat_stream_pause_s": chat_s}, *details]


def resets(address: Address) -> tuple[list[Bar], dict[str, Any]]:
    """Clients that send a chat and reset at once."""
    body = json.dumps({**HELLO, "max_tokens": 400, "ignore_eos": True, "stream": True}).encode()
    lines = (
        f"POST {CHAT} HTTP/1.1",
        "host: x",
        "content-type: application/json",
        f"content-length: {len(body)}",
    )
    head = "\r\n".join([*lines, "", ""])
    for _ in range(RESETS):
        line = socket.create_connection((address.host, address.port))
        line.sendall(head.encode() + body)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        line.close()
    time.sleep(1)
    stats = next(iter(json.loads(ask(address, "GET", "/stats")[1])["models"].values()))
    status, _ = ask(address, "POST", CHAT, json.dumps({**HELLO, "max_tokens": 1}).encode())
    left = float(stats["running"] + stats["waiting"])
    bars = [
        Bar(f"{RESETS} resets: left after a second", left, 0.0, "", at_least=False),
        Bar(f"{RESETS} resets: the next client's status", float(status), 200.0, "", at_least=False),
    ]
    return bars, {"running": stats["running"], "waiting": stats["waiting"], "cancelled": stats["cancelled"]}


def main() -> int:
    """Start a server, attack it, judge it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--artifact", default="", help="what is served; default: the model as w4")
    parser.add_argument("--threads", type=int, default=1, help="of the engine; the clients need a core too")
    given = parser.parse_args()
    settings = Settings(given.model, Path(given.artifact).name, given.threads, 1, None, None)
    chosen = [given.artifact] if given.artifact else [given.model, "--recipe", "w4"]
    address = Address("127.0.0.1", free_port())
    command = [sys.executable, "-m", "hasten", "serve", *chosen, "--port", str(address.port), "--no-log"]
    command += ["--threads", str(given.threads)]
    try:
        with ServerProcess("hasten serve", command, address, ready="/ready") as server:
            server.wait_ready()
            bars, details = pauses(address)
            more, left = resets(address)
    except HastenError as error:
        say(f"failed: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""))
        return 1
    bars += more
    say(f"written: {record('hostile', settings, bars, {'attacks': details, 'resets': left})}")
    return 0 if all(bar.passed for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
