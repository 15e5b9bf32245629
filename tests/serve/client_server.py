"""`hasten serve` on a tiny random model in a process of its own, for tests with real clients."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_models

CONTEXT = 4096
NAME = "tiny"
READY_S = 60.0


@dataclass(frozen=True)
class Server:
    """A server that runs."""

    url: str  # http://127.0.0.1:PORT
    folder: Path  # of the model
    process: subprocess.Popen[str]

    def get(self, path: str) -> Any:
        """A JSON document of the server."""
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            return json.load(answer)

    def engine(self) -> dict[str, Any]:
        """The engine's numbers."""
        return self.get("/stats")["models"][NAME]

    def settled(self, limit_s: float = 5.0) -> dict[str, Any]:
        """The engine's numbers once nothing runs or waits."""
        until = time.monotonic() + limit_s
        while (stats := self.engine())["running"] or stats["waiting"]:
            assert time.monotonic() < until, f"requests are left: {stats}"
            time.sleep(0.01)
        return stats


def tiny_folder(folder: Path) -> Path:
    """A tiny Llama with room for tool descriptions, whose every character is a token."""
    model = tiny_models.Tiny("llama", "llama", {"max_position_embeddings": CONTEXT}, "llama", 102)
    return tiny_models.save_folder(model, folder / NAME)


@contextlib.contextmanager
def running(folder: Path, *options: str) -> Iterator[Server]:
    """Serve the model in a folder until the block ends."""
    command = [sys.executable, "-m", "hasten", "serve", f"{NAME}={folder}", "--port", "0", "--threads", "1"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, "--context", str(CONTEXT), *options], stdout=subprocess.PIPE, stderr=log, text=True
        )
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip().split()[-1:]
            if not url:
                log.seek(0)
                raise AssertionError(f"the server did not start: {log.read()[-2000:]}")
            server = Server(url[0].rstrip("/"), folder, process)
            _wait(server)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(server: Server) -> None:
    until = time.monotonic() + READY_S
    while True:
        with contextlib.suppress(OSError):
            server.get("/ready")
            return
        assert time.monotonic() < until, "the server was never ready"
        time.sleep(0.02)
