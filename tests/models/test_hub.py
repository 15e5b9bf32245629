"""`hasten pull` against a server of our own that speaks the hub's API."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gguf_bytes import STRING, array, smallest_model

REVISION = "a" * 40


class Hub:
    """One repository, o/n. `cut` is how many bytes of a large file are sent before the line breaks."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.cut: int | None = None
        self.asked: list[tuple[str, str | None]] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def info(self) -> dict[str, Any]:
        siblings = []
        for name, data in self.files.items():
            sha1 = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
            entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": sha1}
            if name.endswith(".gguf"):
                sha256 = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 130}
            siblings.append(entry)
        return {
            "id": "o/n",
            "modelId": "o/n",
            "sha": REVISION,
            "siblings": siblings,
            "tags": [],
            "private": False,
        }


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/models/o/n"):
            return self._send(200, json.dumps(self.hub.info()).encode(), {}, body)
        name = path.removeprefix("/o/n/resolve/").partition("/")[2]
        if name not in self.hub.files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
        data, asked = self.hub.files[name], self.headers.get("Range")
        self.hub.asked.append((name, asked if body else None))
        first = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
        etag = hashlib.sha256(data).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": REVISION, "Accept-Ranges": "bytes"}
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        return self._send(206 if first else 200, data[first:], headers, body, self.hub.cut)

    def _send(
        self, status: int, data: bytes, headers: dict[str, str], body: bool, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data if cut is None else data[:cut])
            if cut is not None and cut < len(data):
                self.close_connection = True


@pytest.fixture
def hub() -> Iterator[Hub]:
    small = smallest_model()
    small.metadata.append(("tokenizer.ggml.merges", array(STRING, [])))
    model = small.build()
    found = Hub({"README.md": b"hello", "m-Q4_K_M.gguf": model + bytes(24 << 20), "m-Q8_0.gguf": model})
    yield found
    found.server.shutdown()


def hasten(hub: Hub, home: Path, *arguments: str, offline: bool = False) -> tuple[int, str, str]:
    env = {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_ETAG_TIMEOUT": "5", "HF_HUB_DOWNLOAD_TIMEOUT": "5",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "hasten", *arguments],
        env=env, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_a_pull_is_checked_and_found_again_without_a_network(hub: Hub, tmp_path: Path) -> None:
    code, out, err = hasten(hub, tmp_path, "pull", "o/n", "--include", "Q8_0", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert [f["name"] for f in document["files"]] == ["m-Q8_0.gguf"] and document["revision"] == REVISION
    assert document["files"][0]["sha256"] == hashlib.sha256(hub.files["m-Q8_0.gguf"]).hexdigest()
    assert document["ref"] == "o/n/m-Q8_0.gguf"
    hub.server.shutdown()
    code, out, err = hasten(hub, tmp_path, "show", "o/n:Q8_0", "--json", offline=True)
    assert code == 0, err
    assert json.loads(out)["architecture"] == "qwen2"


def test_a_cut_download_goes_on_where_it_stopped(hub: Hub, tmp_path: Path) -> None:
    name = "m-Q4_K_M.gguf"
    hub.cut = (
        12 << 20
    )  # the client writes pieces of 10 MB, and asks for the rest by itself or at the next pull
    first, _, err = hasten(hub, tmp_path, "pull", "o/n:Q4_K_M")
    assert "Traceback" not in err
    hub.cut = None
    code, out, err = hasten(hub, tmp_path, "pull", "o/n:Q4_K_M")
    assert code == 0, err
    assert "all digests are right" in out and (first == 0 or "downloading m-Q4_K_M.gguf" in err)
    ranges = [asked for file, asked in hub.asked if file == name and asked]
    assert ranges and all(not asked.startswith("bytes=0-") for asked in ranges)


def test_a_damaged_file_is_dropped_and_named(hub: Hub, tmp_path: Path) -> None:
    right = hub.info()
    hub.files["m-Q8_0.gguf"] = b"x" * len(hub.files["m-Q8_0.gguf"])
    hub.info = lambda: right  # type: ignore[method-assign]
    code, _, err = hasten(hub, tmp_path, "pull", "o/n:Q8_0")
    assert code == 1 and "m-Q8_0.gguf of o/n has the sha256" in err and "damaged on its way" in err
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.read_bytes()[:1] == b"x"]


def test_what_is_not_there_is_said(hub: Hub, tmp_path: Path) -> None:
    code, _, err = hasten(hub, tmp_path, "pull", "o/n", "--include", "IQ9")
    assert code == 1 and "no file with IQ9 in its name" in err and "m-Q8_0.gguf" in err
    code, _, err = hasten(hub, tmp_path, "pull", "nothing")
    assert code == 1 and "is no hub id" in err
