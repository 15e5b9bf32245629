"""A stand-in for `hasten serve`: the page's files, and streamed answers that a test writes itself."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from hasten.serve.app import HEADERS, assets

FIGURES = {
    "loaded": True,
    "running": 2,
    "waiting": 3,
    "batch": 4,
    "kv_pages": 200,
    "kv_pages_used": 60,
    "kv_pages_cached": 10,
    "requests": 7,
    "output_tokens": 0,
    "prefix_query_tokens": 1000,
    "prefix_hit_tokens": 250,
    "ttft_s_sum": 1.0,
    "ttft_count": 10,
}


@dataclass
class Script:
    """What the next answers are. `pause_s` lies between two pieces."""

    pieces: list[str] = field(default_factory=lambda: ["Hello", " there", "."])
    pause_s: float = 0.0
    finish: str = "stop"
    refuse: tuple[int, dict[str, Any], dict[str, str]] | None = None  # status, error, headers
    break_after: int | None = None  # pieces; the stream then ends with an error event
    cut_after: int | None = None  # pieces; the connection then closes
    key: str = ""  # the one that is let in; empty: all
    models: list[str] = field(default_factory=lambda: ["demo", "other"])
    stats: bool = True


class StandIn:
    """The server. `asked` are the bodies it got, `left` counts clients that went before the end."""

    def __init__(self) -> None:
        self.script = Script()
        self.asked: list[dict[str, Any]] = []
        self.left = threading.Semaphore(0)
        self.started = time.monotonic()
        stand_in = self

        class Bound(Handler):
            server_state = stand_in

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def figures(self) -> dict[str, Any]:
        """Counters that grow by the second: 50 tokens, first tokens after 40 ms, half the prompts cached."""
        age = time.monotonic() - self.started
        grown = {
            "output_tokens": round(50 * age),
            "ttft_count": 10 + 2 * int(age * 4),
            "ttft_s_sum": 1 + 0.08 * int(age * 4),
            "prefix_query_tokens": 1000 + 100 * int(age * 4),
            "prefix_hit_tokens": 250 + 50 * int(age * 4),
        }
        return {"uptime_s": age, "models": {"demo": {**FIGURES, **grown}, "other": {"loaded": False}}}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def stand_in() -> Iterator[StandIn]:
    server = StandIn()
    try:
        yield server
    finally:
        server.close()


class Handler(BaseHTTPRequestHandler):
    """Answers of one connection."""

    server_state: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        script = self.server_state.script
        if (asset := assets().get(self.path)) is not None:
            self.give(200, asset.body, {**HEADERS, "Content-Type": asset.media_type, "ETag": asset.etag})
        elif not self.let_in():
            pass
        elif self.path == "/v1/models":
            self.give_json(200, {"object": "list", "data": [{"id": name} for name in script.models]})
        elif self.path == "/stats" and script.stats:
            self.give_json(200, self.server_state.figures())
        else:
            self.give_json(404, {"error": {"message": f"{self.path} is not here"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server_state.asked.append(body)
        script = self.server_state.script
        if not self.let_in():
            return
        if script.refuse:
            status, error, headers = script.refuse
            self.give_json(status, {"error": error}, headers)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            self.stream(script)
        except (BrokenPipeError, ConnectionResetError):
            self.server_state.left.release()
        self.close_connection = True

    def stream(self, script: Script) -> None:
        self.event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        for number, piece in enumerate(script.pieces):
            if number == script.break_after:
                self.event({"error": {"message": "the model ran out of memory", "hint": "ask for less"}})
                return
            if number == script.cut_after:
                return
            time.sleep(script.pause_s)
            self.event({"choices": [{"index": 0, "delta": {"content": piece}}]})
        self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": script.finish}]})
        usage = {"prompt_tokens": 40, "completion_tokens": len(script.pieces)}
        self.event({"choices": [], "usage": {**usage, "prompt_tokens_details": {"cached_tokens": 32}}})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, value: dict[str, Any]) -> None:
        self.wfile.write(b": keep\n" + f"data: {json.dumps(value)}\n\n".encode())

    def let_in(self) -> bool:
        key = self.server_state.script.key
        if key and self.headers.get("Authorization") != f"Bearer {key}":
            hint = "send `Authorization: Bearer KEY`"
            self.give_json(401, {"error": {"message": "no valid API key", "hint": hint}})
            return False
        return True

    def give_json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self.give(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def give(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
