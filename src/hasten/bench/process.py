"""The driver's side of a worker process: start, ask, pause, kill."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from hasten.errors import HastenError, PeerError, UsageError

PACKAGE = Path(__file__).resolve().parent.parent
"""Folder of the `hasten` package."""

BOOTSTRAP = """\
import sys, types
sys.path[:] = [p for p in sys.path if p]
package = types.ModuleType("hasten")
package.__path__ = [sys.argv[1]]
sys.modules["hasten"] = package
from hasten.bench.worker import main
main()
"""
"""Runs the worker in a Python without hasten: its files alone, not the site-packages beside them."""

TAIL_LINES = 12


class WorkerProcess:
    """One engine's process. Use as a context manager: whatever happens, it is killed at the end.

    It has a session of its own, so Ctrl-C reaches the driver alone, which then kills it. While another
    engine is asked, it is stopped (SIGSTOP), so that no spinning thread of it takes the other's cores.
    """

    def __init__(self, name: str, python: str | None = None, crash_hint: str | None = None) -> None:
        """Start it.

        Args:
            name: how messages call the engine.
            python: another Python to run it in; None is this one, with hasten as installed here.
            crash_hint: what to do if the process dies by itself.
        Raises:
            PeerError: that Python does not start.
        """
        self.name = name
        self._crash_hint = crash_hint
        command = [sys.executable, "-m", "hasten.bench.worker"]
        if python is not None:
            command = [python, "-c", BOOTSTRAP, str(PACKAGE)]
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed in kill()
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                start_new_session=True,
            )
        except OSError as error:
            self._stderr.close()
            raise PeerError(
                f"{name}: cannot start {command[0]}: {error.strerror}",
                hint="set HASTEN_PEER_PYTHON or --peer-python to a Python that has the engine",
            ) from None
        self._replies: queue.Queue[bytes] = queue.Queue()
        self._tail = ""
        threading.Thread(target=self._listen, daemon=True).start()

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def ask(self, op: str, limit_s: float, **arguments: Any) -> Any:
        """Send one request and wait for its result.

        Raises:
            UsageError, PeerError: what the worker said.
            PeerError: it died, or did not answer within the limit (it is killed then); with its last words.
        """
        if self._stderr.closed:
            raise PeerError(f"{self.name} has ended already{self._tail}")
        self._signal("SIGCONT")
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps({"op": op, **arguments}).encode() + b"\n")
            stdin.flush()
            line = self._replies.get(timeout=limit_s)
        except queue.Empty:
            self.kill()
            raise PeerError(
                f"{self.name} gave no answer to {op!r} within {limit_s:.0f} s{self._tail}"
            ) from None
        except BrokenPipeError:
            line = b""
        if not line:
            raise self._death(op)
        return self._result(json.loads(line))

    def pause(self) -> None:
        """Stop the process until it is asked again."""
        self._signal("SIGSTOP")

    def kill(self) -> None:
        """End the process and all it started. Safe to call twice."""
        if self._stderr.closed:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._tail = self._read_tail()
        for pipe in (self._process.stdin, self._stderr):
            with contextlib.suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()

    def _listen(self) -> None:
        """Put every reply line in the queue, and an empty one at the end of the stream."""
        stdout = self._process.stdout
        assert stdout is not None
        with stdout:
            for line in stdout:
                self._replies.put(line)
        self._replies.put(b"")

    def _signal(self, name: str) -> None:
        number = getattr(signal, name, None)
        if number is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def _result(self, reply: dict[str, Any]) -> Any:
        if reply["ok"]:
            return reply["result"]
        kind: type[HastenError] = UsageError if reply["code"] == UsageError.exit_code else PeerError
        raise kind(f"{self.name}: {reply['error']}", hint=reply["hint"])

    def _death(self, op: str) -> PeerError:
        code = self._process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        self.kill()
        return PeerError(f"{self.name} {how} during {op!r}{self._tail}", hint=self._crash_hint)

    def _read_tail(self) -> str:
        self._stderr.seek(0)
        lines = self._stderr.read().decode("utf-8", "replace").strip().splitlines()[-TAIL_LINES:]
        return "; its last words:\n  " + "\n  ".join(lines) if lines else ""
