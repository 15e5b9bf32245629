"""The process one engine lives in: JSON lines in on stdin, JSON lines out on what was stdout.

    {"op": "load", "spec": {...}, ...}
    {"ok": true, "result": {...}}  or  {"ok": false, "error": "...", "hint": "...", "code": 1}

It starts as `python -m hasten.bench.worker`, or in a Python without hasten through `process.BOOTSTRAP`; so
nothing is imported here but the standard library, `hasten.core`, `hasten.errors` and this package's light
files. Whatever an engine prints to stdout goes to stderr: the channel is ours alone.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, TextIO

from hasten.bench.peers import EngineSpec
from hasten.core import Workload, as_json
from hasten.errors import HastenError, PeerError
from hasten.machine.memory import peak_rss_bytes

PR_SET_PDEATHSIG = 1


class Worker:
    def __init__(self) -> None:
        self._engine: Any = None

    def handle(self, request: dict[str, Any]) -> Any:
        handlers: dict[str, Callable[..., Any]] = {
            "check": self.check,
            "prepare": self.prepare,
            "load": self.load,
            "run": self.run,
            "chats": self.chats,
            "cost": self.cost,
            "encode": lambda text: self._engine.encode(text),
            "decode": lambda ids: self._engine.decode(ids),
            "peak_rss": peak_rss_bytes,
        }
        arguments = {key: value for key, value in request.items() if key != "op"}
        return handlers[request["op"]](**arguments)

    def check(self, requires: list[str]) -> list[str]:
        """Those of the modules that cannot be found here."""
        return [name for name in requires if not _exists(name)]

    def prepare(self, spec: dict[str, Any]) -> str:
        return str(importlib.import_module(spec["module"]).prepare(EngineSpec(**spec)))

    def load(self, spec: dict[str, Any], prepared: str) -> dict[str, Any]:
        """Load the engine; what it says of itself."""
        engine = importlib.import_module(spec["module"]).load(EngineSpec(**spec), prepared)
        self._engine = engine
        about = engine.about() if hasattr(engine, "about") else {}
        return {
            "version": engine.version,
            "format": engine.format,
            "weight_bytes": engine.weight_bytes,
            "notes": engine.notes,
            **about,
        }

    def run(self, prompts: list[list[int]], output: int) -> Any:
        return as_json(self._engine.generate(prompts, output))

    def chats(self, prompts: list[list[int]], output: int) -> Any:
        """Many requests at once, each timed for itself (engines that batch continuously)."""
        return as_json(self._engine.chats(prompts, output))

    def cost(self, workload: dict[str, Any]) -> Any:
        """The workload's cost (our engine only)."""
        return as_json(self._engine.cost(Workload(**workload)))


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # a parent package is missing or broken
        return False


def serve(requests: TextIO, replies: TextIO) -> None:
    worker = Worker()
    for line in requests:
        reply = _answer(worker, json.loads(line))
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _answer(worker: Worker, request: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"ok": True, "result": worker.handle(request)}
    except HastenError as error:
        return {"ok": False, "error": error.message, "hint": error.hint, "code": error.exit_code}
    except Exception as error:  # noqa: BLE001  a foreign engine may raise anything
        traceback.print_exc()
        text = " ".join(str(error).split())[:500]
        code = PeerError.exit_code
        return {"ok": False, "error": f"{type(error).__name__}: {text}", "hint": None, "code": code}


def die_with_parent() -> None:
    """Linux: be killed when the driver is gone, even if it was killed itself, even while stopped."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    """Entry point: keep stdout for the replies and give everybody else stderr."""
    die_with_parent()
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(sys.stdin, channel)
    channel.flush()
    os._exit(0)  # engines' own clean-up at exit is not worth a crash after the last figure


if __name__ == "__main__":
    main()
